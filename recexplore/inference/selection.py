"""Which of the proposals are kept: settings of best-of-n, and the choice itself.

    value(c)  =  s(c)                       score alone (the default)
                 log p(c) + β s(c)          novelty and relevance mixed (`relevance_weight` β)

    plain     the k candidates of highest value
    soft      k candidates drawn one after the other, without replacement, with probabilities
              softmax(value / τ) among those left (`selection_temperature` τ)

The score s is the alignment model's logit, untransformed: its sigmoid is the predicted label. Ties
go to the likelier candidate, then to the smaller cluster id.
"""

import dataclasses
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from recexplore.errors import check_field

_MOST = 1 << 16  # proposals or choices for one history
SAMPLERS = ("independent", "distinct", "exhaustive")


@dataclasses.dataclass(frozen=True)
class BestOfN:
    """How to explore.

    Attributes:
      num_samples: n, proposals drawn from the novelty model.
      num_chosen: k, clusters kept.
      sampler: 'independent' draws may repeat themselves; 'distinct' ones are drawn without
        replacement; 'exhaustive' takes every allowed cluster, whatever n.
      temperature: of the novelty model's draws.
      relevance_weight: β; None chooses by score alone.
      selection_temperature: τ; 0 keeps the best, more chooses at random with known propensities.
    """

    num_samples: int = 16
    num_chosen: int = 5
    sampler: str = "independent"
    temperature: float = 1.0
    relevance_weight: float | None = None
    selection_temperature: float = 0.0

    def __post_init__(self):
        every = self.sampler == "exhaustive"
        for field in ("num_samples", "num_chosen"):
            check_field(self, type(getattr(self, field)) is int, field, "must be a whole number")
        for field in ("temperature", "selection_temperature", "relevance_weight"):
            value = getattr(self, field)
            known = isinstance(value, (int, float)) and math.isfinite(value)
            known = known or (field == "relevance_weight" and value is None)
            check_field(self, known, field, "must be a finite number")
        check_field(self, self.num_samples >= 1, "num_samples", "must be at least 1")
        for field in ("num_samples", "num_chosen"):
            check_field(self, getattr(self, field) <= _MOST, field, f"must be at most {_MOST:,}")
        check_field(
            self,
            1 <= self.num_chosen and (every or self.num_chosen <= self.num_samples),
            "num_chosen",
            f"must lie between 1 and num_samples, {self.num_samples}",
        )
        check_field(
            self, self.sampler in SAMPLERS, "sampler", f"must be one of {', '.join(SAMPLERS)}"
        )
        check_field(self, 1e-6 <= self.temperature <= 1e6, "temperature", "must lie in 1e-6..1e6")
        weight = self.relevance_weight or 0.0
        check_field(self, abs(weight) <= 1e6, "relevance_weight", "must lie in -1e6..1e6")
        check_field(
            self,
            self.selection_temperature == 0 or 1e-6 <= self.selection_temperature <= 1e6,
            "selection_temperature",
            "must be 0 or lie in 1e-6..1e6",
        )


class Candidates(NamedTuple):
    """The different clusters that were proposed for each prompt, with both models' opinions.

    Attributes:
      clusters: cluster ids; -1 after the last.
      scores: the alignment model's.
      log_probabilities: the novelty model's.
    """

    clusters: Int[Array, "B C"]
    scores: Float[Array, "B C"]
    log_probabilities: Float[Array, "B C"]


class Selection(NamedTuple):
    """The k candidates chosen, best first; see `best_of_n.Exploration`."""

    clusters: Int[Array, "B k"]
    scores: Float[Array, "B k"]
    log_probabilities: Float[Array, "B k"]
    propensities: Float[Array, "B k"]


def select(settings: BestOfN, candidates: Candidates, keys: Key[Array, "B"]) -> Selection:
    """Chooses k candidates for every prompt.

    Args:
      settings: k, β and τ.
      candidates: what there is to choose from.
      keys: for soft selection, a random key for each prompt.
    """
    candidates = _wide_enough(candidates, settings.num_chosen)
    clusters, scores, log_probabilities = candidates
    value = scores
    if settings.relevance_weight is not None:
        value = log_probabilities + settings.relevance_weight * scores
    value = jnp.where(clusters < 0, -jnp.inf, value)
    if not settings.selection_temperature:
        order = _descending(value, candidates)
        propensities = jnp.ones_like(value)
    else:  # the order of perturbed logits is that of draws without replacement
        logits = value / settings.selection_temperature
        shape = value.shape[1:]
        noise = jax.vmap(lambda key: jax.random.gumbel(key, shape, mode="high"))(keys)
        order = _descending(logits + noise, candidates)
        ordered = jnp.take_along_axis(logits, order, axis=1)
        left = jax.lax.cumlogsumexp(ordered, axis=1, reverse=True)
        propensities = jnp.where(jnp.isfinite(ordered), jnp.exp(ordered - left), 0.0)
    order = order[:, : settings.num_chosen]

    def chosen(values):
        return jnp.take_along_axis(values, order, axis=1)

    real = chosen(clusters) >= 0
    return Selection(
        chosen(clusters),
        jnp.where(real, chosen(scores), -jnp.inf),
        jnp.where(real, chosen(log_probabilities), -jnp.inf),
        jnp.where(real, propensities[:, : settings.num_chosen], 0.0),
    )


def _descending(value: Float[Array, "B C"], candidates: Candidates) -> Int[Array, "B C"]:
    ties = (candidates.clusters, -candidates.log_probabilities, -value)
    return jnp.lexsort(ties, axis=-1)


def _wide_enough(candidates: Candidates, num_chosen: int) -> Candidates:
    """With room for k, should there be fewer clusters than that."""
    missing = ((0, 0), (0, max(num_chosen - candidates.clusters.shape[1], 0)))
    return Candidates(
        jnp.pad(candidates.clusters, missing, constant_values=-1),
        jnp.pad(candidates.scores, missing),
        jnp.pad(candidates.log_probabilities, missing),
    )
