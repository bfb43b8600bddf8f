"""What passes before a request is answered, with clients that no HTTP library would be."""

import asyncio
import json

import pytest

from recexplore.serving.guard import Guard, Limits
from recexplore.serving.server_metrics import ServerMetrics

PART = {"type": "http.request", "body": b"{", "more_body": True}
WHOLE = {"type": "http.request", "body": b"{}", "more_body": False}
GONE = {"type": "http.disconnect"}


def fails(body):
    raise ZeroDivisionError


def asked(answer, *messages):
    """Sends the messages, then nothing; returns what was sent back, and the counters."""
    left, sent, metrics = list(messages), [], ServerMetrics(("/x",))

    async def receive():
        if not left:
            await asyncio.sleep(600)
        return left.pop(0)

    async def send(message):
        sent.append(message)

    async def elsewhere(*_):
        raise AssertionError("this path is answered directly")

    guard = Guard(elsewhere, {("POST", "/x"): answer}, Limits(body_seconds=0.05), None, metrics)
    scope = {"type": "http", "method": "POST", "path": "/x", "headers": []}
    asyncio.run(guard(scope, receive, send))
    return sent, metrics.text().decode()


@pytest.mark.parametrize(
    ("answer", "messages", "status", "code"),
    [
        (fails, (PART, PART), 408, "body_too_slow"),
        (fails, (WHOLE,), 500, "internal"),
    ],
)
def test_slow_bodies_and_failures_are_told_in_the_same_shape(
    answer, messages, status, code, monkeypatch
):
    monkeypatch.setattr("recexplore.serving.guard._LINGER_SECONDS", 0.05)
    (start, *bodies), counters = asked(answer, *messages)
    assert start["status"] == status
    assert ((b"connection", b"close") in start["headers"]) == (status == 408)
    told = json.loads(b"".join(body["body"] for body in bodies))
    assert told["error"]["code"] == code and not bodies[-1]["more_body"]
    assert f'recexplore_requests_total{{route="/x",status="{status}"}} 1.0' in counters


def test_a_body_in_pieces_is_one_body_and_a_client_that_leaves_gets_nothing():
    pieces = (PART, {"type": "http.request", "body": b"}", "more_body": False})
    (_, body), _ = asked(lambda whole: b"[%s]" % whole, *pieces)
    assert body["body"] == b"[{}]"
    sent, counters = asked(fails, PART, GONE)
    assert sent == [] and 'status="499"} 1.0' in counters
    assert "recexplore_requests_in_flight 0.0" in counters
