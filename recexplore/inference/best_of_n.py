"""Best of n: the novelty model proposes, the alignment model chooses, in one compiled program.

    proposals  c_1 … c_n  ~  novelty model given the history, excluded clusters impossible
    score      s(c)       =  alignment model given the history and c
    chosen                =  the k distinct proposals with the highest score

Novelty comes from the first model, relevance from the second, and n is the dial between them
(arXiv 2504.05522, section 3.3).
"""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from recexplore.errors import InputError
from recexplore.inference.sampler import Draws, Prompts, sample
from recexplore.models.reward_model import RewardModel
from recexplore.models.transformer import Transformer
from recexplore.models.trie import Trie


@dataclasses.dataclass(frozen=True)
class BestOfN:
    """How to explore.

    Attributes:
      num_samples: n, proposals drawn from the novelty model.
      num_chosen: k, clusters kept.
      temperature: of the novelty model's draws.
    """

    num_samples: int = 16
    num_chosen: int = 5
    temperature: float = 1.0

    def __post_init__(self):
        if self.num_samples < 1:
            raise InputError(
                f"best_of_n.BestOfN.num_samples is {self.num_samples}; it must be at least 1."
            )
        if not 1 <= self.num_chosen <= self.num_samples:
            raise InputError(
                f"best_of_n.BestOfN.num_chosen is {self.num_chosen}; it must lie between 1 and "
                f"num_samples, {self.num_samples}."
            )
        if not self.temperature > 0:
            raise InputError(
                f"best_of_n.BestOfN.temperature is {self.temperature}; it must be positive."
            )


class Batch(NamedTuple):
    """B histories, as both models read them.

    Attributes:
      novelty: prompts of the novelty model.
      alignment: prompts of the alignment model.
      excluded: clusters that may not be proposed: the history's, and any that the caller bans.
      ids: a number for each history; its draws depend on this and the key, not on the batch.
    """

    novelty: Prompts
    alignment: Prompts
    excluded: Bool[Array, "B M"]
    ids: Int[Array, "B"]


class Exploration(NamedTuple):
    """The k clusters chosen for each history, best first.

    Attributes:
      clusters: cluster ids; -1 where fewer than k distinct clusters were proposed.
      scores: the alignment model's, -inf beside -1.
      log_probabilities: the novelty model's, likewise.
      draws: all n proposals, for reporting.
      draw_scores: the alignment model's score of each.
    """

    clusters: Int[Array, "B k"]
    scores: Float[Array, "B k"]
    log_probabilities: Float[Array, "B k"]
    draws: Draws
    draw_scores: Float[Array, "B N"]


@functools.partial(jax.jit, static_argnames=("settings", "novelty_model", "alignment_model"))
def explore_step(
    novelty_params: dict,
    alignment_params: dict,
    trie: Trie,
    batch: Batch,
    key: Key[Array, ""],
    *,
    settings: BestOfN,
    novelty_model: Transformer,
    alignment_model: RewardModel,
) -> Exploration:
    """Proposes n clusters for every history and keeps the k best.

    Args:
      novelty_params: variables of the novelty model.
      alignment_params: variables of the alignment model.
      trie: the clusters' descriptions in tokens.
      batch: B histories.
      key: same key, same answer.
      settings: n, k and temperature.
      novelty_model: proposes.
      alignment_model: scores.

    Returns:
      The k clusters with the highest score. Ties go to the likelier proposal, then to the smaller
      cluster id; a cluster that was drawn several times counts once.
    """
    keys = jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, batch.ids)
    with jax.named_scope("propose"):
        draws = sample(
            novelty_model,
            novelty_params,
            trie,
            batch.novelty,
            batch.excluded,
            keys,
            settings.num_samples,
            settings.temperature,
        )
    with jax.named_scope("score"):
        scores = _score(alignment_model, alignment_params, trie, batch.alignment, draws.clusters)
    with jax.named_scope("choose"):
        return _choose(draws, scores, settings.num_chosen)


def _score(
    model: RewardModel, params: dict, trie: Trie, prompts: Prompts, clusters: Int[Array, "B N"]
) -> Float[Array, "B N"]:
    """Scores the clusters' descriptions after their prompts; each prompt is run once."""
    _, prompt = model.apply(params, prompts.tokens, method="prefill")
    paths = jnp.take(trie.paths, clusters, axis=0)
    steps = jnp.arange(trie.max_length)
    positions = prompts.lengths[:, None, None] + steps[None, None, :]
    in_prompt = jnp.arange(prompts.tokens.shape[1])[None, :] < prompts.lengths[:, None]
    hidden, _ = model.apply(
        params,
        jnp.take(trie.tokens, paths),
        jnp.broadcast_to(positions, paths.shape),
        (steps[:, None] >= steps[None, :])[None, None],
        (prompt,),
        (in_prompt[:, None, None, :],),
        method="extend",
    )
    ends = (jnp.take(trie.lengths, clusters) - 1)[..., None, None]
    return model.apply(params, jnp.take_along_axis(hidden, ends, axis=2)[..., 0, :], method="score")


def _choose(draws: Draws, scores: Float[Array, "B N"], num_chosen: int) -> Exploration:
    clusters, log_probabilities = draws
    same = clusters[:, :, None] == clusters[:, None, :]
    earlier = jnp.tril(jnp.ones(same.shape[1:], bool), k=-1)[None]
    repeated = jnp.any(same & earlier, axis=-1)
    counted = jnp.where(repeated, -jnp.inf, scores)
    order = jnp.lexsort((clusters, -log_probabilities, -counted), axis=-1)[:, :num_chosen]
    at = functools.partial(jnp.take_along_axis, indices=order, axis=-1)
    missing = at(repeated)
    return Exploration(
        clusters=jnp.where(missing, -1, at(clusters)),
        scores=at(counted),
        log_probabilities=jnp.where(missing, -jnp.inf, at(log_probabilities)),
        draws=draws,
        draw_scores=scores,
    )
