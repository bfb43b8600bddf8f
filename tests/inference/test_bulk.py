"""Streams of batches."""

import functools

import chex
import jax
import numpy as np
import pytest

from recexplore.errors import InputError
from recexplore.inference.bulk import run_in_batches


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
