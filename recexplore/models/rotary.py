"""Rotary position embedding (Su et al. 2021): which frequencies, and how heads turn by them."""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int


class Rotation(NamedTuple):
    """How far every token turns: cosine and sine of position · frequency, in float32."""

    cos: Float[Array, "*batch T half"]
    sin: Float[Array, "*batch T half"]


def frequencies(head_dim: int, theta: float) -> np.ndarray:
    """[head_dim / 2] radians a token turns each pair of a head: theta^(-2i / head_dim)."""
    half = head_dim // 2
    return theta ** (-np.arange(half) / half)


def stretched(
    plain: np.ndarray,
    factor: float,
    low_frequency_factor: float,
    high_frequency_factor: float,
    original_length: int,
) -> np.ndarray:
    """Frequencies of a context longer than the one a network first learnt (Llama 3.1).

    A pair that turns less than `low_frequency_factor` times within the original length turns
    `factor` times slower; one that turns more than `high_frequency_factor` times stays as it is;
    those between are mixed linearly.

    Args:
      plain: of `frequencies`.
      factor: how much slower.
      low_frequency_factor: in turns.
      high_frequency_factor: in turns, more than the low one.
      original_length: in tokens.
    """
    turns = original_length * plain / (2 * np.pi)
    kept = (turns - low_frequency_factor) / (high_frequency_factor - low_frequency_factor)
    kept = np.clip(kept, 0.0, 1.0)
    return kept * plain + (1 - kept) * plain / factor


def rotation(positions: Int[Array, "*batch T"], by: np.ndarray) -> Rotation:
    """The rotation of tokens at `positions` by the frequencies `by`."""
    speeds = jnp.asarray(by, jnp.float32).reshape((1,) * positions.ndim + (-1,))
    angles = positions[..., None].astype(jnp.float32) * speeds
    return Rotation(jnp.cos(angles), jnp.sin(angles))


def rotate(
    x: Float[Array, "*batch T heads head_dim"], by: Rotation
) -> Float[Array, "*batch T heads head_dim"]:
    """Turns queries or keys, in float32; the two halves of a head are the pairs' parts."""
    cos, sin = by.cos[..., None, :], by.sin[..., None, :]
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return turned.astype(x.dtype)
