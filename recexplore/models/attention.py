"""Attention over key/value segments, each with its own leading shape.

A prompt's keys and values are computed once and attended to by all of its continuations: the
prompt segment has shape [B, S, …] and the continuations' own [B, N, T, …]; nothing is copied N
times. Each segment gives its own block of attention logits; one softmax runs over all of them.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

_MASKED = -1e30


class Segment(NamedTuple):
    """Keys and values of one stretch of tokens.

    Attributes:
      keys: [*leading, T, G, head_dim], rotated to their positions.
      values: [*leading, T, G, head_dim].

    The leading shape of a segment is a prefix of the queries' one: ([B], when the queries have
    [B, N], is shared by the N).
    """

    keys: Float[Array, "*leading T G head_dim"]
    values: Float[Array, "*leading T G head_dim"]


def rotate(
    x: Float[Array, "*leading T heads head_dim"],
    positions: Int[Array, "*leading T"],
    theta: float,
) -> Float[Array, "*leading T heads head_dim"]:
    """Rotary position embedding (Su et al. 2021): the two halves of a head are the pairs' parts.

    Args:
      x: queries or keys.
      positions: position of every token.
      theta: base of the wavelengths.
    """
    half = x.shape[-1] // 2
    frequencies = theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angles = positions[..., None, None].astype(jnp.float32) * _like(frequencies, x.ndim)
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return rotated.astype(x.dtype)


def attend(
    queries: Float[Array, "*batch T H head_dim"],
    segments: tuple[Segment, ...],
    masks: tuple[Bool[Array, "..."], ...],
) -> Float[Array, "*batch T H head_dim"]:
    """Grouped-query attention of `queries` to all segments at once.

    Args:
      queries: rotated queries; H is a multiple of the segments' G.
      segments: where to look.
      masks: for every segment a mask that broadcasts to [*batch, T, T of the segment]; True where a
        query may look. A query that may look nowhere gets the mean of all values.

    Returns:
      The attended values, in the queries' dtype; the softmax is computed in float32.
    """
    *batch, num_queries, num_heads, head_dim = queries.shape
    num_groups = segments[0].keys.shape[-2]
    grouped = queries.reshape(*batch, num_queries, num_groups, num_heads // num_groups, head_dim)
    scores = [
        jnp.where(
            _insert_heads(mask, len(batch)),
            _scores(grouped, segment.keys) * head_dim**-0.5,
            _MASKED,
        )
        for segment, mask in zip(segments, masks, strict=True)
    ]
    weights = jax.nn.softmax(jnp.concatenate(scores, axis=-1), axis=-1).astype(queries.dtype)
    total, start = 0.0, 0
    for segment in segments:
        stop = start + segment.keys.shape[-3]
        total = total + _mix(weights[..., start:stop], segment.values)
        start = stop
    return total.reshape(*batch, num_queries, num_heads, head_dim)


def _scores(grouped: Array, keys: Array) -> Array:
    """Logits [*batch, G, R, T, T of the segment] in float32."""
    shared = _names(keys.ndim - 3)
    batch = _names(grouped.ndim - 4)
    return jnp.einsum(
        f"{batch}tgrd,{shared}sgd->{batch}grts", grouped, keys, preferred_element_type=jnp.float32
    )


def _mix(weights: Array, values: Array) -> Array:
    shared = _names(values.ndim - 3)
    batch = _names(weights.ndim - 4)
    return jnp.einsum(f"{batch}grts,{shared}sgd->{batch}tgrd", weights, values)


def _names(count: int) -> str:
    """Names of leading axes for einsum: shared ones are a prefix of the queries' ones."""
    return "abcdef"[:count]


def _insert_heads(mask: Array, batch_ndim: int) -> Array:
    """[*batch, T, S] → [*batch, 1, 1, T, S], with size-1 axes where the mask has fewer."""
    missing = batch_ndim + 2 - mask.ndim
    mask = mask.reshape((1,) * missing + mask.shape)
    return mask[..., None, None, :, :]


def _like(vector: Array, ndim: int) -> Array:
    return vector.reshape((1,) * (ndim - 1) + vector.shape)
