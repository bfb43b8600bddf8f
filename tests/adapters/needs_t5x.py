"""Skips a file of tests, and says why, where T5X can't be imported."""

import contextlib
import warnings

import jax
import pytest


def import_t5x():
    """T5X, which warns as it is imported; its own TensorFlow and Orbax do too."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            import t5x
            import t5x.models
        except ImportError as error:
            pytest.skip(
                f"T5X can't be imported ({error}): install the extra [t5x], see docs/t5x.md",
                allow_module_level=True,
            )
    return t5x


@contextlib.contextmanager
def as_t5x_runs():
    """T5X adds arrays of different ranks; recexplore's tests don't."""
    with jax.numpy_rank_promotion("allow"):
        yield
