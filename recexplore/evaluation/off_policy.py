"""What a policy would be worth, from what another one showed.

A row of the log is a context x, a cluster a shown with the logged propensity b(a | x), and its
reward r. With the target policy's weights w = q(a | x) / b(a | x):

    inverse propensity    mean of w r: unbiased, of high variance
    self-normalised       Σ w r / Σ w: within the rewards' range, consistent
    doubly robust         mean of Σ_c q(c | x) m(x, c) + w (r - m(x, a)), with a reward model m:
                          unbiased if either the propensities or the model are right

All need b > 0 wherever q > 0; nothing in a log can tell that. See Dudík, Langford & Li 2011 (arXiv
1103.4601), Swaminathan & Joachims 2015.
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int, Real

from recexplore.errors import InputError
from recexplore.evaluation.statistics import Estimate, bootstrap_ratio


class Log(NamedTuple):
    """What was shown and how it was received, R rows.

    Attributes:
      contexts: row of the policy's matrix, 0 .. H - 1.
      actions: cluster shown, 0 .. M - 1.
      rewards: its feedback.
      propensities: probability with which it was shown.
      users: whose row it is.
    """

    contexts: Int[np.ndarray, "R"]
    actions: Int[np.ndarray, "R"]
    rewards: Real[np.ndarray, "R"]
    propensities: Float[np.ndarray, "R"]
    users: np.ndarray


class Value(NamedTuple):
    """Estimates of one policy's mean reward, with 95 % intervals over users.

    Where the effective sample size is a small part of the rows, intervals are too narrow: the rare
    rows of great weight that would widen them may not be in the log.

    Attributes:
      inverse_propensity: unbiased.
      self_normalised: less noisy.
      doubly_robust: None without a reward model.
      effective_sample_size: how many rows of the policy's own log tell as much.
    """

    inverse_propensity: Estimate
    self_normalised: Estimate
    doubly_robust: Estimate | None
    effective_sample_size: float


class Predicted(NamedTuple):
    """What a reward model says of each row of a log.

    Attributes:
      of_policy: mean reward of what the policy would show in the row's context.
      of_shown: mean reward of what was shown.
    """

    of_policy: Float[np.ndarray, "R"]
    of_shown: Float[np.ndarray, "R"]


def importance_weights(
    log: Log, policy: Float[np.ndarray, "H M"], clip: float | None = None
) -> Float[np.ndarray, "R"]:
    """q(a | x) / b(a | x), at most `clip`.

    Args:
      log: what was shown.
      policy: q.
      clip: bounds the variance for some bias towards too little; None doesn't.

    Raises:
      InputError: rows' propensities don't lie in (0, 1], contexts or clusters aren't in the
        policy's matrix, or rewards aren't finite.
    """
    check_log(log, policy.shape)
    if clip is not None and not clip > 0:
        raise InputError(f"clip is {clip!r}; it must be above 0, or None.")
    weights = policy[log.contexts, log.actions] / log.propensities
    return weights if clip is None else np.minimum(weights, clip)


def effective_sample_size(weights: Float[np.ndarray, "R"]) -> float:
    """Kish's (Σ w)² / Σ w²: R when all weigh alike, 1 when one row has it all, 0 without any."""
    square = float(np.square(weights).sum())
    return float(weights.sum()) ** 2 / square if square else 0.0


def self_normalised(
    log: Log, policy: Float[np.ndarray, "H M"], clip: float | None = None
) -> tuple[float, float]:
    """The self-normalised estimate alone (nan if nothing weighs), and its effective sample size."""
    weights = importance_weights(log, policy, clip)
    total = weights.sum()
    value = float(weights @ log.rewards / total) if total else float("nan")
    return value, effective_sample_size(weights)


def estimate_value(
    log: Log,
    policy: Float[np.ndarray, "H M"],
    predicted: Float[np.ndarray, "H M"] | None = None,
    clip: float | None = None,
    samples: int = 500,
    seed: int = 0,
) -> Value:
    """What the policy's mean reward would have been in the log's contexts.

    Args:
      log: what was shown, with propensities.
      policy: probabilities of the clusters in every context.
      predicted: a reward model's mean reward of them, for the doubly robust estimate.
      clip: see `importance_weights`.
      samples: resamples of users.
      seed: of them.

    Raises:
      InputError: see `importance_weights`.
    """
    weights = importance_weights(log, policy, clip)
    model = None
    if predicted is not None:
        direct = (policy * predicted).sum(axis=1)[log.contexts]
        model = Predicted(direct, predicted[log.contexts, log.actions])
    return value_of_weights(weights, log.rewards, log.users, model, samples, seed)


def value_of_weights(
    weights: Float[np.ndarray, "R"],
    rewards: Real[np.ndarray, "R"],
    users: np.ndarray,
    predicted: Predicted | None = None,
    samples: int = 500,
    seed: int = 0,
) -> Value:
    """A policy's value, given the importance weight of each row, however it came about.

    Args:
      weights: how much likelier the policy shows what was shown.
      rewards: of what was shown.
      users: whose row it is.
      predicted: a reward model's opinion, for the doubly robust estimate.
      samples: resamples of users.
      seed: of them.
    """
    above = [weights * rewards, weights * rewards]
    below = [np.ones_like(weights), weights]
    if predicted is not None:
        above.append(predicted.of_policy + weights * (rewards - predicted.of_shown))
        below.append(np.ones_like(weights))
    users = np.unique(users, return_inverse=True)[1]
    found = bootstrap_ratio(_by_user(above, users), _by_user(below, users), samples, seed)
    estimates = [Estimate(*map(float, column)) for column in zip(*found, strict=True)]
    return Value(
        inverse_propensity=estimates[0],
        self_normalised=estimates[1],
        doubly_robust=None if predicted is None else estimates[2],
        effective_sample_size=effective_sample_size(weights),
    )


def _by_user(columns: list[np.ndarray], users: Int[np.ndarray, "R"]) -> Float[np.ndarray, "U Q"]:
    return np.stack([np.bincount(users, column) for column in columns], axis=1)


def check_log(log: Log, shape: tuple[int, int]) -> None:
    """Counts the rows that can't be used, and says why.

    Args:
      log: any.
      shape: numbers of contexts and clusters.

    Raises:
      InputError: there are such rows, or none at all.
    """
    size = len(log.rewards)
    if not size:
        raise InputError("The log is empty: there is nothing to value a policy on.")
    contexts, clusters = shape
    rules = {
        "propensities that don't lie in (0, 1]": ~(
            (log.propensities > 0) & (log.propensities <= 1)
        ),
        "rewards that are no finite numbers": ~np.isfinite(log.rewards),
        f"contexts that don't lie in 0..{contexts - 1}": (log.contexts < 0)
        | (log.contexts >= contexts),
        f"clusters that don't lie in 0..{clusters - 1}": (log.actions < 0)
        | (log.actions >= clusters),
    }
    for rule, wrong in rules.items():
        if wrong.any():
            first = int(wrong.argmax())
            raise InputError(
                f"{int(wrong.sum())} of {size} logged row(s) have {rule}; the first is row {first}."
            )
