"""Streams of batches."""

import functools
import threading

import chex
import jax
import numpy as np
import pytest

from recexplore.errors import InputError
from recexplore.inference.bulk import run_in_batches, stream


def test_rows_come_back_in_order_from_one_program():
    rows = {"x": np.arange(10, dtype=np.float32), "y": np.ones((10, 2), np.float32)}
    step = jax.jit(chex.assert_max_traces(lambda r: (r["x"] * 2, r["y"].sum(axis=1)), n=1))
    done = []
    doubled, sums = run_in_batches(
        step, rows, batch_size=4, progress=lambda at, total: done.append((at, total))
    )
    np.testing.assert_array_equal(doubled, np.arange(10) * 2)
    np.testing.assert_array_equal(sums, np.full(10, 2.0))
    assert done[-1] == (10, 10)
    empty = functools.partial(run_in_batches, step, {"x": np.zeros((0,)), "y": np.zeros((0, 2))})
    with pytest.raises(InputError, match="no history"):
        empty(batch_size=4)
    with pytest.raises(InputError, match="batch_size is 0"):
        run_in_batches(step, rows, batch_size=0)


def test_a_stream_takes_results_in_order_beside_the_next_launch():
    step = jax.jit(lambda x: x * 2)
    taken = []
    batches = (np.full(3, n, np.float32) for n in range(7))
    times = stream(batches, step, lambda batch, result: taken.append((batch[0], result.tolist())))
    assert taken == [(n, [2.0 * n] * 3) for n in range(7)]
    assert times.total >= times.busy >= 0 and 0 <= times.utilisation <= 1
    assert times.compiling > 0


@pytest.mark.parametrize("where", ["batches", "launch", "take"])
def test_a_stream_that_fails_has_taken_what_came_before(where):
    taken = []

    def fail(here, number):
        if here == where and number == 3:
            raise OSError(28, "No space left on device")

    def batches():
        for number in range(50):
            fail("batches", number)
            yield np.full(2, number)

    def launch(batch):
        fail("launch", batch[0])
        return batch

    def take(batch, _):
        fail("take", batch[0])
        taken.append(int(batch[0]))

    with pytest.raises(OSError, match="No space left"):
        stream(batches(), launch, take)
    assert taken == [0, 1, 2]
    assert not any(thread.name == "results" for thread in threading.enumerate())
