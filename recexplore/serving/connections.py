"""uvicorn, with what it leaves out: limits on connections and on how long headers may take."""

import asyncio
import logging
import resource
import socket
from collections.abc import Callable
from typing import Any

import uvicorn
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from recexplore.errors import InputError
from recexplore.serving.messages import Refusal

_HEADER_SECONDS = 10.0
_HEADER_BYTES = 64 << 10
_IDLE_SECONDS = 30  # of a connection between two requests
_UNREAD_SECONDS = 30  # that an answer may lie there unread
_LEAVING_SECONDS = 1.0  # that a refused client has to read why
_FILES_KEPT = 100  # descriptors that connections leave to all else
_REASONS = {400: "Bad Request", 408: "Request Timeout", 431: "Request Header Fields Too Large"}

_TOO_LARGE = Refusal(
    431,
    "headers_too_large",
    f"The headers are larger than {_HEADER_BYTES:,} bytes. Send the question as a JSON body.",
)

_log = logging.getLogger(__name__)


def listen(host: str, port: int) -> socket.socket:
    """A socket that is bound; port 0 takes a free one.

    Raises:
      InputError: the port is taken or not allowed, or the host isn't this computer's.
    """
    try:
        (family, *_, address), *_ = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )
        listening = socket.create_server(address[:2], family=family)
    except (OSError, OverflowError) as error:
        raise InputError(
            f"Can't listen on {host}, port {port} ({error}). Stop what uses the port, or name "
            "another --port (0 takes a free one), and with --host an address of this computer."
        ) from error
    if hasattr(socket, "TCP_USER_TIMEOUT"):  # Linux; connections have it from the socket
        listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, _UNREAD_SECONDS * 1000)
    return listening


def most_connections() -> int:
    """As many as this process may hold open, once it has asked for all that it may have."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard == resource.RLIM_INFINITY:  # no number that could be asked for
        hard = soft
    if soft != hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return max(hard - _FILES_KEPT, 16)


def run(
    app: Any,
    listening: socket.socket,
    *,
    connections: int,
    shutdown_seconds: float = 30.0,
    header_seconds: float = _HEADER_SECONDS,
    started: Callable[[], None] = lambda: None,
) -> None:
    """Serves until SIGTERM or SIGINT; requests that are being answered then are answered.

    Args:
      app: ASGI.
      listening: see `listen`.
      connections: open at once; further ones are told so and closed.
      shutdown_seconds: that requests have to finish when it ends.
      header_seconds: that a request's headers may take.
      started: called once it answers.
    """

    class Connection(_Connection):
        most = connections
        header_timeout = header_seconds

    class Server(uvicorn.Server):
        async def startup(self, sockets: list[socket.socket] | None = None) -> None:
            await super().startup(sockets)
            started()

    config = uvicorn.Config(
        app,
        http=Connection,
        ws="none",
        log_level="warning",
        access_log=False,
        server_header=False,
        timeout_keep_alive=_IDLE_SECONDS,
        timeout_graceful_shutdown=shutdown_seconds,
    )
    Server(config).run(sockets=[listening])


class _Connection(HttpToolsProtocol):
    """One connection.

    Attributes:
      most: open at once.
      header_timeout: seconds from a request's first byte, or from connecting, to its last header.
    """

    most = 0
    header_timeout = _HEADER_SECONDS
    _in_headers = True
    _in_message = False
    _header_bytes = 0
    _latest_bytes = 0
    _timer: asyncio.TimerHandle | None = None
    _refused = False

    def connection_made(self, transport: asyncio.Transport) -> None:
        super().connection_made(transport)
        if len(self.connections) > self.most:
            refusal = Refusal(
                503,
                "overloaded",
                f"The server has {self.most} connections open. Try again in a second, and send "
                "several requests over one connection.",
            )
            self._leave(refusal, "Service Unavailable")
        else:
            self._arm()

    def connection_lost(self, exc: Exception | None) -> None:
        self._disarm()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self._refused:
            return
        if not self._in_message and self._timer is None:  # of whatever begins here
            self._arm()
        self._latest_bytes = len(data)
        super().data_received(data)
        if self._in_headers:
            self._header_bytes += len(data)
            if self._header_bytes > _HEADER_BYTES:
                self._leave(_TOO_LARGE)

    def on_message_begin(self) -> None:
        self._in_headers = self._in_message = True
        super().on_message_begin()

    def on_message_complete(self) -> None:
        self._in_message = False
        super().on_message_complete()

    def on_headers_complete(self) -> None:
        super().on_headers_complete()  # raises where the path is too long
        self._in_headers = False
        self._header_bytes = 0
        self._disarm()

    def send_400_response(self, msg: str) -> None:
        """In place of uvicorn's, which is plain text."""
        if self._in_headers and self._header_bytes + self._latest_bytes > _HEADER_BYTES:
            self._leave(_TOO_LARGE)  # the parser gives up at long paths
        else:
            self._leave(Refusal(400, "bad_request", "This isn't HTTP/1.1. Send an HTTP request."))

    def _arm(self) -> None:
        self._timer = self.loop.call_later(self.header_timeout, self._too_slow)

    def _disarm(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _too_slow(self) -> None:
        self._timer = None
        self._leave(
            Refusal(
                408,
                "headers_too_slow",
                f"The headers hadn't arrived after {self.header_timeout:g} seconds. Send a request "
                "at once.",
            )
        )

    def _leave(self, refusal: Refusal, reason: str = "") -> None:
        """Says why, ends our side, and gives the client a moment to read it.

        A whole request that is being answered is answered first, and then nothing more is said.
        """
        if self._refused or self.transport.is_closing():
            return
        self._refused = True
        self._disarm()
        asked = self.cycle
        if asked is not None and not asked.response_complete:
            if not asked.more_body:
                asked.keep_alive = False
                return
            asked.disconnected = True
            asked.message_event.set()
        body = refusal.body
        reason = reason or _REASONS[refusal.status]
        head = (
            f"HTTP/1.1 {refusal.status} {reason}\r\ncontent-type: application/json\r\n"
            f"content-length: {len(body)}\r\nretry-after: 1\r\nconnection: close\r\n\r\n"
        )
        self.transport.write(head.encode() + body)
        self.transport.write_eof()
        self.loop.call_later(_LEAVING_SECONDS, self.transport.close)

    def shutdown(self) -> None:
        """Called when the server ends."""
        if self._refused and (self.cycle is None or self.cycle.response_complete):
            self.transport.close()
        else:
            super().shutdown()
