"""What stands before a continuation, read once: an instruction that all prompts share, a history.

How it is read is the network's own affair (recexplore.models.networks). A Transformer keeps

segment     leading shape   read
prefix      []              once per parameters, by `prefix_cache`; once per batch of histories that
                            begin alike, where there are many
history     [B]             once per prompt, by `read_prompts`
own         [B, …]          by whoever goes on from here

and an EncoderDecoder, which reads a prompt in both directions and so only as a whole,

encoded     [B]             once per prompt, the prefix among it
start       [B]             the token that its answers begin with
own         [B, …]          by whoever goes on from here
"""

import functools
from typing import Any, NamedTuple

import flax.linen as nn
import jax
from jaxtyping import Array, Int

from recexplore.models.attention import Context


class Prompts(NamedTuple):
    """Prompts without the prefix they share, right-padded, and their numbers of real tokens."""

    tokens: Int[Array, "B S"]
    lengths: Int[Array, "B"]


@functools.partial(jax.jit, static_argnums=0)
def prefix_cache(
    model: nn.Module, params: dict, tokens: Int[Array, "P"], length: Int[Array, ""] | None = None
) -> Any:
    """The beginning that all prompts share, as a network has read it.

    Args:
      model: a language model or a RewardModel.
      params: its variables.
      tokens: the beginning; at least one token.
      length: how many of them are real, where they are right-padded.

    Returns:
      Of a Transformer the segment of its keys and values, of an EncoderDecoder the tokens; their
      `positions` are -1 where they are padding.
    """
    return model.apply(params, tokens, length, method="read_prefix")


def read_prompts(model: nn.Module, params: dict, prefix: Any, prompts: Prompts) -> Context:
    """Runs prompts through a model, after a prefix that it has read before.

    Args:
      model: a language model or a RewardModel.
      params: its variables.
      prefix: of `prefix_cache`.
      prompts: B prompts; each has at least one token besides the prefix.
    """
    return model.apply(params, prefix, prompts.tokens, prompts.lengths, method="read_prompts")
