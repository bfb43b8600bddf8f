"""Attention over key/value segments, each with its own leading shape.

A prompt's keys and values are computed once and attended to by all of its continuations: the
prompt segment has shape [B, S, …] and the continuations' own [B, N, T, …]; nothing is copied N
times; a prefix that all prompts share has shape [P, …]. Each segment gives its own block of
attention logits; one softmax runs over all blocks, which are never joined either.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

_MASKED = -1e30


class KeyValues(NamedTuple):
    """Keys and values of one stretch of tokens in one layer.

    Attributes:
      keys: [*leading, T, G, head_dim], rotated to their positions.
      values: [*leading, T, G, head_dim].

    The leading shape is a prefix of the queries' one: [B], when the queries have [B, N], is shared
    by the N; [] by the whole batch.
    """

    keys: Float[Array, "*leading T G head_dim"]
    values: Float[Array, "*leading T G head_dim"]


class Segment(NamedTuple):
    """One stretch of tokens, as all layers of a transformer keep it to be looked at later.

    Attributes:
      keys: of every layer, rotated to their positions.
      values: of every layer.
      positions: of the tokens.
    """

    keys: Float[Array, "L *leading T G head_dim"]
    values: Float[Array, "L *leading T G head_dim"]
    positions: Int[Array, "*leading T"]


class Context(NamedTuple):
    """Prompts as a network has read them: what stands before a continuation.

    Attributes:
      segments: what continuations look at, as the network's `extend` takes it.
      masks: which tokens of them are real, to be broadcast to [B, queries, tokens].
      lengths: the position of a continuation's first token.
      last: the hidden state before it.
    """

    segments: tuple[Segment, ...]
    masks: tuple[Bool[Array, "..."], ...]
    lengths: Int[Array, "B"]
    last: Float[Array, "B D"]

    def masks_for(self, ndim: int) -> tuple[Bool[Array, "..."], ...]:
        """The masks for queries with `ndim` leading axes, B the first of them."""
        return tuple(
            mask.reshape(mask.shape[0], *(1,) * ndim, mask.shape[-1]) for mask in self.masks
        )


def attend(
    queries: Float[Array, "*batch T H head_dim"],
    segments: tuple[KeyValues, ...],
    masks: tuple[Bool[Array, "..."], ...],
    softcap: float = 0.0,
    scale: float = 0.0,
    biases: tuple[Float[Array, "H ..."], ...] | None = None,
) -> Float[Array, "*batch T H head_dim"]:
    """Grouped-query attention of `queries` to all segments at once.

    Args:
      queries: rotated queries; H is a multiple of the segments' G.
      segments: where to look.
      masks: for every segment a mask that broadcasts to [*batch, T, T of the segment]; True where a
        query may look. A query that may look nowhere gets the mean of all values.
      softcap: logits x become softcap · tanh(x / softcap) (Gemma 2); 0 leaves them as they are.
      scale: factor of the logits, before the softcap; 0 is head_dim ** -0.5.
      biases: for every segment what is added to the logits, after the softcap; broadcasts to
        [H, *batch, T, T of the segment]. None: nothing.

    Returns:
      The attended values, in the queries' dtype; the softmax is computed in float32.
    """
    *batch, num_queries, num_heads, head_dim = queries.shape
    num_groups = segments[0].keys.shape[-2]
    grouped = queries.reshape(*batch, num_queries, num_groups, num_heads // num_groups, head_dim)
    beside = tuple(_insert_head(mask, len(batch)) for mask in masks)
    scale = scale or head_dim**-0.5

    if biases is not None:  # [G, R, *batch, T, S], with as many axes as the queries have
        biases = tuple(
            jnp.reshape(x, (num_groups, -1, *(1,) * (len(batch) + 3 - x.ndim), *x.shape[1:]))
            for x in biases
        )

    def of_group(queries, segments, biases):
        return _attend_group(queries, segments, beside, softcap, scale, biases)

    # One group at a time as a reader sees it; the batched axis comes first, as products want it.
    mixed = jax.vmap(of_group, in_axes=(-3, -2, 0), out_axes=-3)(grouped, segments, biases)
    return mixed.reshape(*batch, num_queries, num_heads, head_dim)


def _attend_group(
    queries: Float[Array, "*batch T R head_dim"],
    segments: tuple[KeyValues, ...],
    masks: tuple[Bool[Array, "..."], ...],
    softcap: float,
    scale: float,
    biases: tuple[Float[Array, "R ..."], ...] | None,
) -> Float[Array, "*batch T R head_dim"]:
    """R heads that share keys and values, whose axis G is gone; masks broadcast to [*batch, T, R,
    T of the segment], biases to [R, *batch, T, T of the segment]."""
    blocks = []
    for place, (segment, mask) in enumerate(zip(segments, masks, strict=True)):
        scores = _scores(queries, segment.keys) * scale
        if softcap:
            scores = softcap * jnp.tanh(scores / softcap)
        if biases is not None:
            scores = scores + jnp.moveaxis(biases[place], 0, -2).astype(scores.dtype)
        blocks.append(jnp.where(mask, scores, _MASKED))
    highest = functools.reduce(jnp.maximum, [x.max(axis=-1, keepdims=True) for x in blocks])
    highest = jax.lax.stop_gradient(highest)  # whatever it is, the quotient is the same
    weights = [jnp.exp(block - highest) for block in blocks]
    total = sum(block.sum(axis=-1, keepdims=True) for block in weights)
    mixed = sum(
        _mix(block.astype(queries.dtype), segment.values)
        for block, segment in zip(weights, segments, strict=True)
    )
    return (mixed / total).astype(queries.dtype)


def _scores(queries: Array, keys: Array) -> Array:
    """Logits [*batch, T, R, T of the segment] in float32."""
    batch, shared = _names(queries.ndim - 3), _names(keys.ndim - 2)
    return jnp.einsum(
        f"{batch}trd,{shared}sd->{batch}trs", queries, keys, preferred_element_type=jnp.float32
    )


def _mix(weights: Array, values: Array) -> Array:
    """Sums of values [*batch, T, R, head_dim] in float32."""
    batch, shared = _names(weights.ndim - 3), _names(values.ndim - 2)
    return jnp.einsum(
        f"{batch}trs,{shared}sd->{batch}trd", weights, values, preferred_element_type=jnp.float32
    )


def beside(positions: Int[Array, "*leading S"], ndim: int) -> Int[Array, "..."]:
    """[*leading, S] → [*leading, 1 …, 1, S], to be subtracted from [*batch, T, 1].

    Args:
      positions: of a segment.
      ndim: axes of the queries' positions [*batch, T].
    """
    *leading, length = positions.shape
    return positions.reshape(*leading, *(1,) * (ndim - len(leading)), length)


def _names(count: int) -> str:
    """Names of leading axes for einsum: shared ones are a prefix of the queries' ones."""
    return "abcefg"[:count]


def _insert_head(mask: Array, batch_ndim: int) -> Array:
    """[*batch, T, S] → [*batch, T, 1, S], with size-1 axes where the mask has fewer."""
    missing = batch_ndim + 2 - mask.ndim
    mask = mask.reshape((1,) * missing + mask.shape)
    return mask[..., None, :]
