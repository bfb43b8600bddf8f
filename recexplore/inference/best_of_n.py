"""Best of n: the novelty model proposes, the alignment model chooses, in one compiled program.

    proposals  c_1 … c_n  ~  novelty model given the history, excluded clusters impossible
    score      s(c)       =  alignment model given the history and c
    chosen                =  the k distinct proposals with the highest score

Novelty comes from the first model, relevance from the second, and n is the dial between them
(arXiv 2504.05522, section 3.3).
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from recexplore.inference.context import Context, Prompts, read_prompts
from recexplore.inference.exhaustive import Tree, all_clusters, all_scores
from recexplore.inference.sampler import Draws, sample
from recexplore.inference.scoring import score_each
from recexplore.inference.selection import BestOfN, Candidates, select
from recexplore.models.networks import LanguageModel
from recexplore.models.reward_model import RewardModel
from recexplore.models.trie import ROOT, Trie, each_once, exclude, num_allowed_below

_DRAWING, _CHOOSING = 0, 1  # what a history's randomness is for


class Prefixes(NamedTuple):
    """What all prompts begin with, as each model has read it (`context.prefix_cache`)."""

    novelty: Any
    alignment: Any


class Batch(NamedTuple):
    """B histories, as both models read them; whole numbers all.

    Attributes:
      novelty: prompts of the novelty model, without their prefix.
      alignment: prompts of the alignment model, likewise.
      history: the history's clusters, right-padded with -1. They are never proposed, and the draws
        depend on them and the key alone, not on the batch.
      banned: other clusters that may not be proposed, right-padded with -1.
    """

    novelty: Prompts
    alignment: Prompts
    history: Int[Array, "B K"]
    banned: Int[Array, "B X"]


class Exploration(NamedTuple):
    """The k clusters chosen for each history, best first.

    Attributes:
      clusters: cluster ids; -1 where fewer than k distinct clusters were proposed.
      scores: the alignment model's, -inf beside -1.
      log_probabilities: the novelty model's, likewise.
      propensities: with which probability each was chosen, given the candidates and those chosen
        before it; 1 where the choice is not randomised, 0 beside -1.
      draws: all proposals, for reporting.
      draw_scores: the alignment model's score of each; -inf beside -1.
      num_distinct: how many different clusters were proposed.
      num_allowed: how many could have been.
    """

    clusters: Int[Array, "B k"]
    scores: Float[Array, "B k"]
    log_probabilities: Float[Array, "B k"]
    propensities: Float[Array, "B k"]
    draws: Draws
    draw_scores: Float[Array, "B N"]
    num_distinct: Int[Array, "B"]
    num_allowed: Int[Array, "B"]


@functools.partial(jax.jit, static_argnames=("settings", "novelty_model", "alignment_model"))
def explore_step(
    novelty_params: dict,
    alignment_params: dict,
    prefixes: Prefixes,
    trie: Trie,
    batch: Batch,
    key: Key[Array, ""],
    *,
    settings: BestOfN,
    novelty_model: LanguageModel,
    alignment_model: RewardModel,
    tree: Tree | None = None,
) -> Exploration:
    """Proposes clusters for every history and keeps the k best.

    Nothing is checked in a compiled program: `launch.Ready` does that before.

    Args:
      novelty_params: variables of the novelty model.
      alignment_params: variables of the alignment model.
      prefixes: what the prompts begin with, read by each model with these variables.
      trie: the clusters' descriptions in tokens.
      batch: B histories; each must leave a cluster to propose.
      key: same key and history, same answer, whatever else is in the batch.
      settings: n, k and how to draw and choose.
      novelty_model: proposes.
      alignment_model: scores.
      tree: of `exhaustive.build_tree`, which the exhaustive sampler needs and no other.
    """
    excluded = exclude(trie, jnp.concatenate([batch.history, batch.banned], axis=1))
    with jax.named_scope("read"):
        novelty = read_prompts(novelty_model, novelty_params, prefixes.novelty, batch.novelty)
    exhaustive = settings.sampler == "exhaustive"
    with jax.named_scope("propose"):
        if exhaustive:
            draws = all_clusters(
                novelty_model, novelty_params, trie, tree, novelty, excluded, settings.temperature
            )
        else:
            draws = sample(
                novelty_model,
                novelty_params,
                trie,
                novelty,
                excluded,
                _keys_of_histories(jax.random.fold_in(key, _DRAWING), batch.history),
                settings.num_samples,
                settings.temperature,
                distinct=settings.sampler == "distinct",
            )
    alignment = _read_once_drawn(
        draws, alignment_model, alignment_params, prefixes.alignment, batch.alignment
    )
    with jax.named_scope("score"):
        if exhaustive:
            scores = all_scores(alignment_model, alignment_params, trie, tree, alignment)
            candidates = Candidates(draws.clusters, scores, draws.log_probabilities)
        else:
            score = functools.partial(
                score_each, alignment_model, alignment_params, trie, alignment
            )
            candidates, scores = _score_once(draws, trie.num_sequences, score)
    with jax.named_scope("choose"):
        keys = _keys_of_histories(jax.random.fold_in(key, _CHOOSING), batch.history)
        selection = select(settings, candidates, keys)
    return Exploration(
        *selection,
        draws=draws,
        draw_scores=jnp.where(draws.clusters < 0, -jnp.inf, scores),
        num_distinct=jnp.sum(candidates.clusters >= 0, axis=1),
        num_allowed=num_allowed_below(trie, excluded, jnp.full(len(excluded), ROOT)),
    )


def _read_once_drawn(
    draws: Draws, model: RewardModel, params: dict, prefix: Any, prompts: Prompts
) -> Context:
    """The prompts as the alignment model reads them.

    XLA's CPU compiler would read them for both models before it draws, and so have room for both
    models' keys and values. A branch on what was drawn, as something always is, makes it wait: a
    fifth less memory for long prompts. The TPU compiler sees to it; a branch would cost it more.
    """

    def read() -> Context:
        with jax.named_scope("read"):
            return read_prompts(model, params, prefix, prompts)

    def read_if_drawn() -> Context:
        idle = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(read))
        return jax.lax.cond(jnp.any(draws.clusters >= 0), read, lambda: idle)

    return jax.lax.platform_dependent(cpu=read_if_drawn, default=read)


def _keys_of_histories(key: Key[Array, ""], history: Int[Array, "B K"]) -> Key[Array, "B"]:
    """A key for each history, from its clusters alone; padding changes nothing."""

    def fold(key, cluster):
        return jnp.where(cluster < 0, key, jax.random.fold_in(key, cluster)), None

    return jax.vmap(lambda clusters: jax.lax.scan(fold, key, clusters)[0])(history)


def _score_once(
    draws: Draws,
    num_clusters: int,
    score: Callable[[Int[Array, "B C"]], Float[Array, "B C"]],
) -> tuple[Candidates, Float[Array, "B N"]]:
    """The different clusters among the draws, each scored once, and the score of every draw."""
    width = min(draws.clusters.shape[1], num_clusters)
    missing = jnp.where(draws.clusters < 0, num_clusters, draws.clusters)
    order = jnp.argsort(missing, axis=1)
    ordered = jnp.take_along_axis(missing, order, axis=1)
    clusters = each_once(missing, num_clusters)[:, :width]
    first = jnp.minimum(jax.vmap(jnp.searchsorted)(ordered, clusters), order.shape[1] - 1)
    which = jnp.take_along_axis(order, first, axis=1)
    real = clusters < num_clusters
    scores = score(jnp.where(real, clusters, -1))
    place = jax.vmap(jnp.searchsorted)(clusters, missing)
    of_draws = jnp.take_along_axis(scores, jnp.minimum(place, width - 1), axis=1)
    log_probabilities = jnp.take_along_axis(draws.log_probabilities, which, axis=1)
    return Candidates(jnp.where(real, clusters, -1), scores, log_probabilities), of_draws
