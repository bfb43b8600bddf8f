"""What stands before a continuation, read once: an instruction that all prompts share, a history.

segment     leading shape   read
prefix      []              once per parameters, by `prefix_cache`; once per batch of histories that
                            begin alike, where there are many
history     [B]             once per prompt, by `read_prompts`
own         [B, …]          by whoever goes on from here
"""

import functools
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from recexplore.models.attention import Segment


class Prompts(NamedTuple):
    """Prompts without the prefix they share, right-padded, and their numbers of real tokens."""

    tokens: Int[Array, "B S"]
    lengths: Int[Array, "B"]


class Context(NamedTuple):
    """Prompts as a model has read them.

    Attributes:
      segments: prefix and history.
      masks: which tokens of them are real, to be broadcast to [B, queries, tokens].
      lengths: number of real tokens, prefix and history together.
      last: hidden state of the last one.
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


@functools.partial(jax.jit, static_argnums=0)
def prefix_cache(
    model: nn.Module, params: dict, tokens: Int[Array, "P"], length: Int[Array, ""] | None = None
) -> Segment:
    """Keys and values of the beginning that all prompts share.

    Args:
      model: a Transformer or a RewardModel.
      params: its variables.
      tokens: the beginning; at least one token.
      length: how many of them are real, where they are right-padded.

    Returns:
      The segment; its positions are -1 where the tokens are padding.
    """
    _, segment = model.apply(params, tokens, method="prefill")
    if length is None:
        return segment
    real = jnp.arange(tokens.shape[0]) < length
    return segment._replace(positions=jnp.where(real, segment.positions, -1))


def read_prompts(model: nn.Module, params: dict, prefix: Segment, prompts: Prompts) -> Context:
    """Runs prompts through a model, after a prefix that it has read before.

    Args:
      model: a Transformer or a RewardModel.
      params: its variables.
      prefix: of `prefix_cache`.
      prompts: B prompts; each has at least one token besides the prefix.
    """
    num_prompts, width = prompts.tokens.shape
    in_prefix = (prefix.positions >= 0)[None, None]
    prefix_length = jnp.sum(in_prefix)
    steps = jnp.arange(width)
    hidden, history = model.apply(
        params,
        prompts.tokens,
        jnp.broadcast_to(prefix_length + steps[None, :], (num_prompts, width)),
        (steps[:, None] >= steps[None, :])[None],
        (prefix,),
        (in_prefix,),
        read_at=(prompts.lengths - 1)[:, None],
        method="extend",
    )
    in_history = steps[None, None, :] < prompts.lengths[:, None, None]
    lengths = prefix_length + prompts.lengths
    return Context((prefix, history), (in_prefix, in_history), lengths, hidden[:, 0])
