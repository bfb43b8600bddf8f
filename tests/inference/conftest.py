"""Programs here are compiled once and run for milliseconds: the compiler needn't try hard."""

import jax
import pytest


@pytest.fixture(scope="module", autouse=True)
def quick_to_compile():
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)
