"""Runs a planner in threads, so that the server goes on answering meanwhile."""

import asyncio
import logging
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from recexplore.errors import InputError
from recexplore.serving.messages import Refusal

ABSENT, LOADING, READY, FAILED = "absent", "loading", "ready", "failed"

# user id, events (item id, seconds, skipped, explored), now → what to show; see `Planner.plan`.
Met = tuple[str, int, bool, bool]
Plan = Callable[[str, Sequence[Met], int], Sequence[Any]]

_log = logging.getLogger(__name__)


class PlannerQueue:
    """A planner that is loaded in the background and asked by a few threads.

    Args:
      load: gives it; None: the work directory has no item model.
      threads: that ask it at once.
      waiting: requests that may wait for one of them.
      seconds: until an answer must be there, waiting included.
    """

    def __init__(
        self,
        load: Callable[[], Plan] | None,
        threads: int = 2,
        waiting: int = 64,
        seconds: float = 5.0,
    ):
        self._load = load
        self._plan: Plan | None = None
        self._seconds = seconds
        self._places = threading.Semaphore(threads + waiting)
        self._threads = ThreadPoolExecutor(threads, "planner")
        self.state = ABSENT if load is None else LOADING
        self.problem = ""

    def start(self) -> None:
        """Begins to load the planner."""
        if self._load is not None:
            self._threads.submit(self._loaded)

    def stop(self) -> None:
        """Takes no more requests."""
        self._threads.shutdown(wait=False, cancel_futures=True)

    async def plan(self, user_id: str, events: Sequence[Met], now: int) -> Sequence[Any]:
        """Asks the planner.

        Raises:
          Refusal: there is none, too many are waiting, it took too long, or it refused the input.
        """
        plan = self._ready()
        if not self._places.acquire(blocking=False):
            raise Refusal(
                503,
                "overloaded",
                "Too many requests wait for the planner. Try again in a second.",
                {"retry-after": "1"},
            )
        asked = self._threads.submit(plan, user_id, events, now)
        asked.add_done_callback(self._give_back)  # also of one that nobody waits for any more
        try:
            return await asyncio.wait_for(asyncio.wrap_future(asked), self._seconds)
        except TimeoutError:
            raise Refusal(
                504,
                "timeout",
                f"The planner had no answer after {self._seconds:g} seconds. Try again, or send "
                "fewer events.",
            ) from None
        except InputError as error:
            raise Refusal(422, "invalid_request", str(error)) from error

    def _ready(self) -> Plan:
        if self._plan is not None:
            return self._plan
        if self.state == LOADING:
            raise Refusal(
                503,
                "loading",
                "The item model is being loaded. Try again in a few seconds; /healthz says when "
                "it is ready.",
                {"retry-after": "2"},
            )
        if self.state == FAILED:
            raise Refusal(503, "no_item_model", f"The item model can't be used: {self.problem}")
        raise Refusal(
            503,
            "no_item_model",
            "The work directory has no item model, so that only /v1/explore answers. Train one "
            "with `recexplore run`, and start the server again.",
        )

    def _loaded(self) -> None:
        try:
            self._plan = self._load()
            self.state = READY
        except Exception as error:  # clusters are served all the same
            known = isinstance(error, InputError)
            self.problem = str(error) if known else f"{type(error).__name__}; see the server's log."
            self.state = FAILED
            _log.error("The item model can't be used: %s", error, exc_info=not known)

    def _give_back(self, _: Future) -> None:
        self._places.release()
