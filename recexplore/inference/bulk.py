"""Streams many prompts through a compiled step in batches of one fixed shape."""

from collections.abc import Callable
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
