"""What every request passes before it is answered: limits, the token, counting.

Plain ASGI and not Starlette's middleware class, which costs as much as an answer.
"""

import asyncio
import hmac
import ipaddress
import logging
import time
from collections.abc import Awaitable, Callable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from typing import Any

from recexplore.serving.messages import Refusal
from recexplore.serving.server_metrics import ServerMetrics

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]

OPEN = ("/", "/healthz")  # without the token; the page holds no data
_ALWAYS = ("/healthz", "/metrics")  # also when too much is asked
_LINGER_SECONDS = 2.0  # so long a sender may go on after it was refused, to read why
_LINGER_BYTES = 32 << 20
_NOT_SNIFFED = (b"x-content-type-options", b"nosniff")
_IS_JSON = (b"content-type", b"application/json")
INTERNAL = Refusal(
    500, "internal", "Something went wrong in the server. Its log says what; please report it."
)

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Limits:
    """What one client may take.

    Attributes:
      body_bytes: of a request.
      body_seconds: until it has arrived.
      requests: being answered at once, by all clients.
    """

    body_bytes: int = 64 << 10
    body_seconds: float = 10.0
    requests: int = 1_000


class Guard:
    """Lets through what may pass, with its body read; answers the rest itself.

    Args:
      app: that answers what isn't in `direct`.
      direct: (method, path) → a function from the body to the answer's, JSON both; it may refuse.
        So the questions that come by the thousand don't pay for what FastAPI does for every one.
      limits: see there.
      token: that requests must carry; None: anyone may ask.
      local_names: only requests that call the server by a name of this computer's are answered, so
        that no page of another site can have its own name lead here and read the answers.
      metrics: where requests are counted.
    """

    def __init__(
        self,
        app: Callable[..., Awaitable[None]],
        direct: Mapping[tuple[str, str], Callable[[bytes], bytes]],
        limits: Limits,
        token: str | None,
        metrics: ServerMetrics,
        local_names: bool = False,
    ):
        self._app = app
        self._direct = direct
        self._limits = limits
        self._token = None if token is None else token.encode()
        self._metrics = metrics
        self._local_names = local_names
        self._in_flight = 0
        metrics.in_flight.set_function(lambda: self._in_flight)

    async def __call__(self, scope: Any, receive: Receive, send: Send) -> None:
        """ASGI."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        start, status = time.perf_counter(), 0

        async def watched(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message.get("headers", ()), _NOT_SNIFFED]
            await send(message)

        self._in_flight += 1
        try:
            self._check(scope)
            body = await self._body(scope, receive)
            answer = self._direct.get((scope["method"], scope["path"]))
            if answer is None:
                await self._app(scope, _replayed(body, receive), watched)
            else:
                await _send(200, (), answer(body), watched)
        except Refusal as refusal:
            await _refuse(refusal, receive, watched)
        except _Gone:
            status = 499  # as others count a client that went away
        except Exception:
            if status:  # it has been answered, and FastAPI wants it logged
                raise
            _log.exception("A request failed.")
            await _refuse(INTERNAL, receive, watched)
        finally:
            self._in_flight -= 1
            self._metrics.answered(scope["path"], status or 500, time.perf_counter() - start)

    def _check(self, scope: Any) -> None:
        path = scope["path"]
        if self._in_flight > self._limits.requests and path not in _ALWAYS:
            raise Refusal(
                503,
                "overloaded",
                f"The server is answering {self._limits.requests} requests already. Try again in a "
                "second, ask for several histories at once, or raise --max_requests.",
                {"retry-after": "1"},
            )
        if self._local_names and not _is_local(scope["headers"]):
            raise Refusal(
                421,
                "misdirected",
                "Without a token the server answers to localhost, 127.0.0.1 and [::1] alone. Ask "
                "for one of these, or start it with a token or --allow_anyone.",
            )
        if self._token is not None and path not in OPEN:
            told = next((v for k, v in scope["headers"] if k == b"authorization"), b"")
            scheme, _, given = told.partition(b" ")
            if scheme.lower() != b"bearer" or not hmac.compare_digest(given, self._token):
                problem = "The token is wrong" if told else "A token is needed"
                raise Refusal(
                    401,
                    "unauthorized",
                    f"{problem}. Send the header `Authorization: Bearer TOKEN` with the server's.",
                    {"www-authenticate": "Bearer"},
                )

    async def _body(self, scope: Any, receive: Receive) -> bytes:
        """The whole body; no more of it is ever in memory than the limit and one chunk."""
        limit = self._limits.body_bytes
        length = next((v for k, v in scope["headers"] if k == b"content-length"), b"0")
        if int(length) > limit:  # the parser has let nothing but digits through
            raise self._too_large()
        body = b""
        try:
            async with asyncio.timeout(self._limits.body_seconds):
                more = True
                while more:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise _Gone
                    body += message.get("body", b"")
                    more = message.get("more_body", False)
                    if len(body) > limit:
                        raise self._too_large()
        except TimeoutError:
            raise Refusal(
                408,
                "body_too_slow",
                f"The body hadn't arrived after {self._limits.body_seconds:g} seconds. Send it at "
                "once.",
                {"connection": "close"},
            ) from None
        return body

    def _too_large(self) -> Refusal:
        return Refusal(
            413,
            "body_too_large",
            f"The body is larger than {self._limits.body_bytes:,} bytes. Send fewer histories or "
            "events in one request.",
            {"connection": "close"},
        )


class _Gone(Exception):
    """The client has left in the middle of its request."""


def _replayed(body: bytes, receive: Receive) -> Receive:
    told = False

    async def again() -> Message:
        nonlocal told
        if told:
            return await receive()
        told = True
        return {"type": "http.request", "body": body, "more_body": False}

    return again


async def _refuse(refusal: Refusal, receive: Receive, send: Send) -> None:
    headers = [(name.encode(), value.encode()) for name, value in refusal.headers.items()]
    closes = refusal.headers.get("connection") == "close"
    await _send(refusal.status, headers, refusal.body, send, more=closes)
    if closes:
        # A connection that is closed while the client still sends is reset, and the answer lost.
        await _linger(receive)
        await send({"type": "http.response.body", "body": b"", "more_body": False})


async def _send(
    status: int, headers: Sequence[tuple[bytes, bytes]], body: bytes, send: Send, more: bool = False
) -> None:
    raw = [_IS_JSON, (b"content-length", b"%d" % len(body)), *headers]
    await send({"type": "http.response.start", "status": status, "headers": raw})
    await send({"type": "http.response.body", "body": body, "more_body": more})


async def _linger(receive: Receive) -> None:
    """Throws away what still comes, for a while."""
    left = _LINGER_BYTES
    try:
        async with asyncio.timeout(_LINGER_SECONDS):
            while left > 0:
                message = await receive()
                if message["type"] == "http.disconnect" or not message.get("more_body", False):
                    return
                left -= len(message["body"]) + 1
    except TimeoutError:
        return


def _is_local(headers: Sequence[tuple[bytes, bytes]]) -> bool:
    """Whether the request's Host is this computer; requests without one are of HTTP/1.0."""
    host = next((value for key, value in headers if key == b"host"), b"localhost").decode("latin-1")
    name = host[1:].partition("]")[0] if host.startswith("[") else host.partition(":")[0]
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return name.lower() == "localhost"
