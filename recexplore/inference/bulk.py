"""Streams many prompts through a compiled step, in batches of one shape or of a few."""

import dataclasses
import queue
import threading
import time
from collections.abc import Callable, Iterable
from typing import Any

import jax
import numpy as np

from recexplore.errors import InputError

Progress = Callable[..., None]


def silent(done: int, total: int) -> None:
    """Says nothing of the progress."""


def run_in_batches(
    step: Callable[[Any], Any],
    rows: Any,
    *,
    batch_size: int,
    progress: Progress = silent,
) -> Any:
    """Applies a compiled step to all rows.

    Args:
      step: batch → result, both pytrees of arrays with the batch as leading axis.
      rows: pytree of numpy arrays, all with the same number of rows.
      batch_size: rows a call; the last batch is filled up with copies of the last row, so that one
        program serves them all.
      progress: called as progress(rows done, all rows).

    Returns:
      The results of all rows, in order, as numpy arrays. While one batch is computed the next is
      prepared and the one before it is fetched.

    Raises:
      InputError: no rows, or a batch size below 1.
    """
    total = jax.tree.leaves(rows)[0].shape[0]
    if batch_size < 1:
        raise InputError(f"batch_size is {batch_size}; it must be at least 1.")
    if total == 0:
        raise InputError("There is no history to run through the models: the log holds none.")
    results, running = [], None
    for start in range(0, total, batch_size):
        index = np.minimum(np.arange(start, start + batch_size), total - 1)
        batch = jax.device_put(jax.tree.map(lambda array, index=index: array[index], rows))
        ahead = step(batch)
        if running is not None:
            results.append(jax.device_get(running))
            progress(start, total)
        running = ahead
    results.append(jax.device_get(running))
    progress(total, total)
    return jax.tree.map(lambda *parts: np.concatenate(parts)[:total], *results)


@dataclasses.dataclass
class Times:
    """Where the seconds of a stream went.

    Attributes:
      total: from its beginning to its end.
      compiling: programs were made, for batches of a new shape.
      preparing: batches were made ready and handed to the device, which mostly was busy meanwhile.
      waiting: nothing was left to do but to wait for the device.
      writing: results were taken, beside all this.
      busy: the device had a batch to work on.
    """

    total: float = 0.0
    compiling: float = 0.0
    preparing: float = 0.0
    waiting: float = 0.0
    writing: float = 0.0
    busy: float = 0.0

    @property
    def utilisation(self) -> float:
        """Share of the time, but for compiling, in which the device had something to do."""
        return min(self.busy / max(self.total - self.compiling, 1e-9), 1.0)


def stream(
    batches: Iterable[Any],
    launch: Callable[[Any], Any],
    take: Callable[[Any, Any], None],
    ahead: int = 2,
) -> Times:
    """Runs batches through a compiled step without ever waiting for a result before the next one.

    This thread prepares and launches; another waits for results, in order, and takes them.

    Args:
      batches: what `launch` is called with, made ready one by one.
      launch: batch → arrays on their way.
      take: called as take(batch, arrays in numpy), in the order of the batches.
      ahead: batches that are launched before the results of an earlier one have arrived.

    Returns:
      Where the time went.

    Raises:
      Exception: what any of the three raised. Of the results before it none is lost.
    """
    times, start = Times(), time.monotonic()
    running: queue.Queue[Any] = queue.Queue(maxsize=ahead)
    failed: list[BaseException] = []

    def work() -> None:
        free = start
        while (launched := running.get()) is not None:
            if failed:
                continue
            batch, result, began = launched
            try:
                arrays = jax.device_get(result)
                done = time.monotonic()
                times.busy += done - max(began, free)
                free = done
                take(batch, arrays)
                times.writing += time.monotonic() - done
            except BaseException as error:  # told to the other thread, which raises it
                failed.append(error)

    worker = threading.Thread(target=work, name="results")
    worker.start()
    shapes: set[Any] = set()
    try:
        before = start
        for batch in batches:
            began = time.monotonic()
            times.preparing += began - before
            result = launch(batch)
            before = time.monotonic()
            shape = _shapes(batch)
            if shape in shapes:
                times.preparing += before - began
            else:
                times.compiling += before - began
            shapes.add(shape)
            running.put((batch, result, before))
            now = time.monotonic()
            times.waiting, before = times.waiting + now - before, now
            if failed:
                break
    finally:
        running.put(None)
        worker.join()
    times.total = time.monotonic() - start
    if failed:
        raise failed[0]
    return times


def _shapes(batch: Any) -> tuple[Any, ...]:
    return tuple(np.shape(leaf) for leaf in jax.tree.leaves(batch))
