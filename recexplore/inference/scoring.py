"""The alignment model's scores of clusters or texts; each prompt is read once, each text too."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from recexplore.inference.context import Context
from recexplore.models.reward_model import RewardModel
from recexplore.models.trie import Trie

_AT_ONCE = 16  # clusters of a prompt that are scored together


def score_each(
    model: RewardModel,
    params: dict,
    trie: Trie,
    context: Context,
    clusters: Int[Array, "B C"],
) -> Float[Array, "B C"]:
    """Scores the clusters' descriptions after their prompts.

    Args:
      model: the alignment model.
      params: its variables.
      trie: the descriptions.
      context: B prompts as the model has read them.
      clusters: cluster ids, different ones for each prompt; -1 after the last. The model's work
        ends, in steps of sixteen, with the prompt that has the most.

    Returns:
      Scores; those beside -1 mean nothing.
    """
    num_prompts, width = clusters.shape

    def score(some: Int[Array, "B C"]) -> Float[Array, "B C"]:
        return _score_together(model, params, trie, context, jnp.maximum(some, 0))

    if width <= _AT_ONCE:
        return score(clusters)
    padded = jnp.pad(clusters, ((0, 0), (0, -width % _AT_ONCE)), constant_values=-1)
    most = jnp.max(jnp.sum(clusters >= 0, axis=1))

    def more(loop):
        return loop[0] < most

    def step(loop):
        start, scores = loop
        some = jax.lax.dynamic_slice_in_dim(padded, start, _AT_ONCE, axis=1)
        scores = jax.lax.dynamic_update_slice_in_dim(scores, score(some), start, axis=1)
        return start + _AT_ONCE, scores

    _, scores = jax.lax.while_loop(more, step, (jnp.int32(0), jnp.zeros(padded.shape)))
    return scores[:, :width]


def _score_together(
    model: RewardModel, params: dict, trie: Trie, context: Context, clusters: Int[Array, "B C"]
) -> Float[Array, "B C"]:
    tokens = jnp.take(trie.sequences, clusters, axis=0)
    return score_texts(model, params, context, tokens, jnp.take(trie.lengths, clusters))


def score_texts(
    model: RewardModel,
    params: dict,
    context: Context,
    tokens: Int[Array, "B C T"],
    lengths: Int[Array, "B C"],
) -> Float[Array, "B C"]:
    """Scores any texts after their prompts, whether they are descriptions or not.

    Args:
      model: the alignment model.
      params: its variables.
      context: B prompts as the model has read them.
      tokens: C texts for each prompt, right-padded.
      lengths: of the texts, at least 1.
    """
    steps = jnp.arange(tokens.shape[-1])
    positions = context.lengths[:, None, None] + steps[None, None, :]
    hidden, _ = model.apply(
        params,
        tokens,
        jnp.broadcast_to(positions, tokens.shape),
        (steps[:, None] >= steps[None, :])[None, None],
        context.segments,
        context.masks_for(2),
        read_at=(lengths - 1)[..., None],
        method="extend",
    )
    return model.apply(params, hidden[..., 0, :], method="score")
