"""What the item recommender is trained for: the next item.

Objectives as in `objectives`, (model, params, catalogue, batch, dropout key) → `Sums`. A batch has
`tokens` [B, T], item numbers, and `targets` [B, T + 1], of which the t-th comes after the first t
tokens; −1 where there is none. What a sequence has named can't be its next item,
as it won't be recommended again: it is left out of what the next one is told from.
"""

from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key, Real, UInt32

from recexplore.errors import InputError
from recexplore.training.objectives import Sums
from recexplore.training.reading import Batch

_BLOCK = 1024  # items at once, where all of them are scored
_LEVELS = 2**32  # that random bits have


class Catalogue(NamedTuple):
    """What is known of the I items.

    Attributes:
      clusters: of each.
      prior: log of its popularity in the training period; the model learns what differs from it.
      recent_prior: log of its popularity lately, which takes its place when the model is used.
      log_q: log of the probability that one draw of a negative is this item.
      upto: 32 random bits draw the first item whose `upto` is above them, or the last.
    """

    clusters: Int[Array, "I"]
    prior: Float[Array, "I"]
    recent_prior: Float[Array, "I"]
    log_q: Float[Array, "I"]
    upto: UInt32[Array, "I"]


def make_catalogue(
    clusters: Int[np.ndarray, "I"],
    popularity: Real[np.ndarray, "I"],
    recent_popularity: Real[np.ndarray, "I"],
    *,
    power: float = 0.75,
) -> Catalogue:
    """A catalogue in numpy, with negatives drawn by q ∝ popularity ** `power`.

    q is rounded to 32 bits before its logarithm is taken, so that what is drawn and what is
    corrected for are exactly the same.

    Args:
      clusters: of each item.
      popularity: of each item in the training period, above 0.
      recent_popularity: likewise, of late.
      power: 1 draws by popularity, 0 evenly.

    Raises:
      InputError: there are no items, or `power` isn't within 0 to 1.
    """
    if not 0 <= power <= 1:
        raise InputError(
            f"item_objectives.make_catalogue.power is {power!r}; it must be a number in 0..1."
        )
    if not len(popularity):
        raise InputError("There is no item to recommend: the clusters have none.")
    weights = np.asarray(popularity, np.float64) ** power
    ends = np.round(np.cumsum(weights) / weights.sum() * _LEVELS)
    ends[-1] = _LEVELS
    with np.errstate(divide="ignore"):  # an item too rare to be drawn is no negative
        log_q = np.log(np.diff(ends, prepend=0) / _LEVELS)
    return Catalogue(
        clusters.astype(np.int32),
        np.log(popularity).astype(np.float32),
        np.log(recent_popularity).astype(np.float32),
        log_q.astype(np.float32),
        np.minimum(ends, _LEVELS - 1).astype(np.uint32),
    )


def draw_items(key: Key[Array, ""], catalogue: Catalogue, count: int) -> Int[Array, "S"]:
    """`count` independent draws from q."""
    bits = jax.random.bits(key, (count,), jnp.uint32)
    return jnp.searchsorted(catalogue.upto[:-1], bits, side="right").astype(jnp.int32)


def next_item_loss(
    model: nn.Module,
    params: dict,
    catalogue: Catalogue,
    batch: Batch,
    dropout_key: Key[Array, ""] | None = None,
    *,
    num_negatives: int = 256,
) -> Sums:
    """Cross-entropy of the next item among all items, sampled in training.

    For the scores s, the model's and the logarithm of popularity together, the next item y and the
    items A that the sequence hasn't named,

        loss = − log ( exp s_y / Z ),   Z = Σ_{j ∈ A} exp s_j

    In training (with a dropout key) Z is estimated from S = `num_negatives` items drawn from the
    catalogue's q, the same for the whole batch:

        Ẑ = exp s_y + Σ_{draws j ∈ A, j ≠ y} exp(s_j − log(S q_j))

    The correction by log q makes that unbiased, E[Ẑ] = Z (Bengio & Senécal 2008), however popular
    items are preferred; draws that hit y, which is there already, are left out. Without a key, or
    with 0 negatives, Z is summed over all items; without a key popularity is the recent one.

    Correct is an item that scores above all those it is told from.
    """
    if num_negatives < 0:
        raise InputError(
            f"item_objectives.next_item_loss.num_negatives is {num_negatives!r}; it must be a "
            "whole number, or 0 for all items."
        )
    prior = catalogue.recent_prior if dropout_key is None else catalogue.prior
    queries, own = _read(model, params, prior, batch, dropout_key)
    if dropout_key is None or not num_negatives:
        everywhere = jnp.zeros_like(catalogue.clusters)
        others, best = _over_all(model, params, prior, queries, batch, everywhere)
    else:
        draws = draw_items(jax.random.fold_in(dropout_key, 1), catalogue, num_negatives)
        expected = jnp.log(float(num_negatives)) + jnp.take(catalogue.log_q, draws)
        scores = _scores(model, params, prior, queries, draws)
        allowed = _not_named(batch, draws) & (
            draws.reshape(1, 1, -1) != batch["targets"][..., None]
        )
        corrected = jnp.where(allowed, scores - expected.reshape(1, 1, -1), -jnp.inf)
        others = jax.nn.logsumexp(corrected, axis=-1)
        best = jnp.max(jnp.where(allowed, scores, -jnp.inf), axis=-1)
    return _sums(own, others, best, batch)


def next_in_cluster_loss(
    model: nn.Module,
    params: dict,
    catalogue: Catalogue,
    batch: Batch,
    dropout_key: Key[Array, ""] | None = None,
) -> Sums:
    """`next_item_loss` with A the items of the next item's cluster: what it will be asked for.

    Exact, so it is for choosing among checkpoints rather than for training.
    """
    prior = catalogue.recent_prior if dropout_key is None else catalogue.prior
    queries, own = _read(model, params, prior, batch, dropout_key)
    others, best = _over_all(model, params, prior, queries, batch, catalogue.clusters)
    return _sums(own, others, best, batch)


def _read(
    model, params, prior: Float[Array, "I"], batch: Batch, dropout_key
) -> tuple[Float[Array, "B W D"], Float[Array, "B W"]]:
    """Queries, and the scores that they give their own targets."""
    if not hasattr(model, "paired_scores"):
        raise InputError(
            f"A {type(model).__name__} scores no items, which items.train.objective is about. Bind "
            "items.train.make_network = @sequential_recommender.SequentialRecommender."
        )
    rngs = None if dropout_key is None else {"dropout": dropout_key}
    queries, _ = model.apply(
        params, batch["tokens"], dropout_key is None, method="prefill", rngs=rngs
    )
    flat = queries.reshape(-1, queries.shape[-1])
    wanted = jnp.maximum(batch["targets"], 0).reshape(-1)
    own = model.apply(params, flat, wanted, method="paired_scores")
    own = own + jnp.take(prior, wanted)
    return queries, own.reshape(queries.shape[:2])


def _scores(
    model, params, prior: Float[Array, "I"], queries: Float[Array, "B W D"], items: Int[Array, "N"]
) -> Float[Array, "B W N"]:
    scores = model.apply(params, queries, items, method="scores")
    return scores + jnp.take(prior, items).reshape(1, 1, -1)


def _over_all(
    model,
    params,
    prior: Float[Array, "I"],
    queries: Float[Array, "B W D"],
    batch: Batch,
    groups: Int[Array, "I"],
) -> tuple[Float[Array, "B W"], Float[Array, "B W"]]:
    """log Σ exp and the maximum of the scores of all allowed items but the target, among those of
    the target's group; a block of items after the other, so that memory doesn't grow with I."""
    count = groups.shape[0]
    targets = batch["targets"][..., None]
    group = jnp.take(groups, jnp.maximum(targets, 0))

    def add(found, start):
        total, best = found
        items = start + jnp.arange(_BLOCK)
        there = jnp.minimum(items, count - 1)
        scores = _scores(model, params, prior, queries, there)
        there, real = there.reshape(1, 1, -1), (items < count).reshape(1, 1, -1)
        others = real & (there != targets) & (jnp.take(groups, there) == group)
        scores = jnp.where(others & _not_named(batch, there.reshape(-1)), scores, -jnp.inf)
        total = jnp.logaddexp(total, jax.nn.logsumexp(scores, axis=-1))
        return (total, jnp.maximum(best, jnp.max(scores, axis=-1))), None

    nothing = jnp.full(queries.shape[:2], -jnp.inf, jnp.float32)
    found, _ = jax.lax.scan(add, (nothing, nothing), jnp.arange(0, count, _BLOCK))
    return found


def _not_named(batch: Batch, items: Int[Array, "N"]) -> Bool[Array, "B W N"]:
    """Which of N items the sequence hasn't named at each of its W = T + 1 places."""
    tokens = batch["tokens"]
    width = tokens.shape[1]
    named = tokens[:, :, None] == items.reshape(1, 1, -1)
    place = jnp.arange(width).reshape(1, -1, 1)
    first = jnp.min(jnp.where(named, place, width), axis=1, keepdims=True)  # width: not at all
    return jnp.arange(width + 1).reshape(1, -1, 1) <= first


def _sums(own: Array, others: Array, best: Array, batch: Batch) -> Sums:
    weights = (batch["targets"] >= 0).astype(jnp.float32)
    losses = jnp.where(weights > 0, jnp.logaddexp(own, others) - own, 0.0)
    right = jnp.where(weights > 0, own > best, False)
    return Sums(jnp.sum(losses * weights), jnp.sum(weights), jnp.sum(right * weights))
