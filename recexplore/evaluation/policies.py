"""Policies as matrices: for each of H histories, the probability of each of M clusters.

Inputs are `log_p`, the novelty model's exact log-probabilities (-inf where a cluster isn't
allowed), and `scores`, the alignment model's logits, of which those of clusters that aren't allowed
don't matter. Rows of a policy sum to 1. Only draws without replacement and k of n are sampled; all
else has a closed form or is one integral.

Temperatures here are of the distribution over clusters. The sampler's acts token by token, which is
the same where a description is one token; elsewhere take log-probabilities at the sampler's
temperature and leave this one at 1.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import scipy.integrate
import scipy.special
from jaxtyping import Bool, Float

from recexplore.errors import InputError
from recexplore.evaluation import off_policy

Matrix = Float[np.ndarray, "H M"]
Column = Float[np.ndarray, "H"]

_STEP = 0.4  # of the trapezoid rule in log t; its error falls as exp(-π² / step), about 1e-10
_NEGLIGIBLE = 1e-13
_WIDEST = 10_000  # the range of log t grows with that of the logits
_ENTRIES = 1 << 22  # of a Monte Carlo array at a time


def tempered(log_p: Matrix, temperature: float) -> Matrix:
    """∝ p^(1 / temperature).

    Raises:
      InputError: the temperature isn't positive, or nothing is allowed.
    """
    _check_positive("temperature", temperature)
    return _normalised(np.asarray(log_p, np.float64) / temperature)


def best_of_n(
    log_p: Matrix,
    scores: Matrix,
    n: int,
    temperature: float = 1.0,
) -> Matrix:
    """The highest-scored of n independent draws, exactly.

    With F(c) the probability that one draw is c or worse: P(best = c) = F(c)^n - (F(c) - p(c))^n.
    Ties go to the likelier cluster, then to the smaller id, as in `selection.select`. So with
    p = (0.5, 0.5), n = 2 and the first scored higher: (1 - 0.25, 0.25).

    Args:
      log_p: of the novelty model.
      scores: of the alignment model.
      n: draws.
      temperature: of them.
    """
    _check_count("n", n)
    order = _best_first(log_p, scores)
    p = np.take_along_axis(tempered(log_p, temperature), order, axis=1)
    worse = np.cumsum(p[:, ::-1], axis=1)[:, ::-1]
    share = np.divide(p, worse, out=np.zeros_like(p), where=p > 0)
    with np.errstate(divide="ignore"):  # the worst cluster has the share 1 of what is left
        best = worse**n * -np.expm1(n * np.log1p(-np.minimum(share, 1.0)))
    policy = np.zeros_like(p)
    np.put_along_axis(policy, order, best, axis=1)
    return policy / policy.sum(axis=1, keepdims=True)


def best_of_distinct(
    log_p: Matrix, scores: Matrix, n: int, samples: int = 1000, seed: int = 0
) -> Matrix:
    """The highest-scored of n draws without replacement, by Monte Carlo; see `top_k`."""
    return top_k(log_p, scores, n, 1, samples, seed, distinct=True)


def top_k(
    log_p: Matrix,
    scores: Matrix,
    n: int,
    k: int,
    samples: int = 1000,
    seed: int = 0,
    *,
    distinct: bool = False,
) -> Matrix:
    """Each cluster's share among the k highest-scored different clusters of n draws.

    Where fewer than k clusters were drawn, those share. By Monte Carlo.

    Args:
      log_p: of the novelty model.
      scores: of the alignment model.
      n: draws.
      k: clusters kept.
      samples: sets of n draws for each history.
      seed: of them.
      distinct: draw without replacement.
    """
    _check_count("n", n)
    _check_count("k", k)
    _check_count("samples", samples)
    order = _best_first(log_p, scores)
    p = np.take_along_axis(tempered(log_p, 1.0), order, axis=1)
    draw = _drawn_distinct if distinct else _drawn
    total = np.zeros_like(p)
    random = np.random.default_rng(seed)
    at_once = max(1, _ENTRIES // (max(p.shape[1], n) * samples))
    for start in range(0, len(p), at_once):
        rows = slice(start, start + at_once)
        found = draw(p[rows], n, samples, random)
        kept = found & (np.cumsum(found, axis=-1, dtype=np.int32) <= k)
        total[rows] += (kept / kept.sum(axis=-1, keepdims=True)).sum(axis=0)
    policy = np.zeros_like(p)
    np.put_along_axis(policy, order, total / samples, axis=1)
    return policy


def top_k_expectation(
    log_p: Matrix,
    scores: Matrix,
    values: Matrix,
    n: int,
    k: int,
    samples: int = 1000,
    seed: int = 0,
    *,
    distinct: bool = False,
) -> Column:
    """Mean value of `top_k`. With k = n all draws are kept: scoring gains nothing."""
    return expected(top_k(log_p, scores, n, k, samples, seed, distinct=distinct), values)


def soft_best_of_n(log_p: Matrix, scores: Matrix, temperature: float) -> Matrix:
    """∝ p · exp(score / temperature): what soft selection among ever more draws tends to.

    Of all policies it has the highest mean score for its divergence from p.
    """
    _check_positive("temperature", temperature)
    return _normalised(np.asarray(log_p, np.float64) + _allowed_scores(log_p, scores) / temperature)


def soft_selection(log_p: Matrix, scores: Matrix, n: int, strength: float) -> Matrix:
    """n independent draws, of which one is kept with probability ∝ w = exp(strength · score).

    With φ(t) = Σ p(c) exp(-w(c) t) over clusters, and since 1 / W = ∫ exp(-W t) dt for the sum W of
    the weights drawn,

        P(c)  =  n p(c) ∫ w(c) exp(-w(c) t) φ(t)^(n - 1) dt,

    which the trapezoid rule in log t gives to about nine digits. n = 1 is p, strength 0 as well.

    Args:
      log_p: of the novelty model.
      scores: of the alignment model.
      n: draws.
      strength: 0 ignores the scores; the greater, the closer to `best_of_n`.
    """
    _check_count("n", n)
    if not (np.isfinite(strength) and strength >= 0):
        raise InputError(f"strength is {strength!r}; it must be a finite number of at least 0.")
    p = tempered(log_p, 1.0)
    logits = np.where(p > 0, strength * _allowed_scores(log_p, scores), -np.inf)
    logits = np.where(p > 0, logits - logits.max(axis=1, keepdims=True), 0.0)
    if -logits.min() > _WIDEST:
        raise InputError(
            f"strength is {strength!r}: times the scores' range it must be at most {_WIDEST:,}. "
            "Take best_of_n, which is the limit."
        )
    policy = np.zeros_like(p)
    log_t, left = np.log(_NEGLIGIBLE / n), 1.0
    while left > _NEGLIGIBLE:
        rate = np.exp(np.minimum(logits + log_t, 100.0))
        alive = p * np.exp(-rate)
        phi = alive.sum(axis=1, keepdims=True)
        policy += rate * alive * phi ** (n - 1)
        left = float(phi.max()) ** n
        log_t += _STEP
    return policy / policy.sum(axis=1, keepdims=True)


def greedy(scores: Matrix, allowed: Bool[np.ndarray, "H M"]) -> Matrix:
    """The allowed cluster of the highest score; ties go to the smaller id."""
    return mixed(np.where(allowed, 0.0, -np.inf), scores, 1.0)


def mixed(log_p: Matrix, scores: Matrix, relevance_weight: float) -> Matrix:
    """The cluster of the highest log p + relevance_weight · score, of all that are allowed."""
    _normalised(log_p)
    value = np.asarray(log_p, np.float64) + relevance_weight * _allowed_scores(log_p, scores)
    best = _best_first(log_p, value)[:, :1]
    policy = np.zeros(value.shape)
    np.put_along_axis(policy, best, 1.0, axis=1)
    return policy


def uniform(allowed: Bool[np.ndarray, "H M"]) -> Matrix:
    """Every allowed cluster alike."""
    return _normalised(np.where(allowed, 0.0, -np.inf))


def expected(policy: Matrix, values: Matrix | Float[np.ndarray, "M"]) -> Column:
    """Mean value of what is shown to each history; values of what never is don't count."""
    return (policy * np.where(policy > 0, values, 0.0)).sum(axis=1)


def novelty(policy: Matrix, log_p: Matrix) -> Column:
    """Mean -log p of what a policy shows: how surprising it is to the novelty model."""
    return -expected(policy, log_p)


def divergence(policy: Matrix, p: Matrix) -> Column:
    """KL(policy ‖ p) for each history, in nats; infinite where the policy leaves p's support."""
    return scipy.special.rel_entr(policy, p).sum(axis=1)


def best_of_n_bound(n: int) -> float:
    """log n - (n - 1) / n, which the divergence of best of n from p can't exceed."""
    _check_count("n", n)
    return float(np.log(n) - (n - 1) / n)


def effective_number(policy: Matrix, weights: Column) -> float:
    """exp of the entropy of what is shown over all: M when all clusters are shown alike.

    Args:
      policy: the clusters for each history.
      weights: how often each history is met.
    """
    shown = np.average(policy, axis=0, weights=weights)
    return float(np.exp(scipy.special.entr(shown).sum()))


def agreement(
    log_p: Matrix,
    scores: Matrix,
    truth: Matrix,
) -> tuple[Column, Column]:
    """How well scores know the truth among the draws of each history.

    Returns:
      The correlation of score and truth under p (0 where either is constant), and the truth's
      standard deviation under p.
    """
    p = tempered(log_p, 1.0)

    def centred(values):
        values = np.where(p > 0, values, 0.0)
        size = np.abs(values).max(axis=1, keepdims=True)
        values = values - (p * values).sum(axis=1, keepdims=True)
        return np.where(np.abs(values) > 1e-12 * size, values, 0.0)  # a constant's rounding

    score, true = centred(scores), centred(truth)
    joint, score_spread, spread = (
        (p * product).sum(axis=1) for product in (score * true, score**2, true**2)
    )
    scale = np.sqrt(score_spread * spread)
    return np.divide(joint, scale, out=np.zeros_like(joint), where=scale > 0), np.sqrt(spread)


def expected_maximum(n: int) -> float:
    """Mean of the greatest of n standard normals: ∫ 1 - Φ(x)^n - Φ(-x)^n dx over x > 0."""
    _check_count("n", n)

    def beyond(x):
        return -np.expm1(n * scipy.special.log_ndtr(x)) - scipy.special.ndtr(-x) ** n

    return float(scipy.integrate.quad(beyond, 0.0, 12.0, epsabs=1e-11, limit=200)[0])


def gain_by_theory(correlation: Column | float, spread: Column | float, n: int) -> Column | float:
    """What best of n gains in truth if score and truth are jointly normal among the draws.

    Args:
      correlation: of score and truth; see `agreement`.
      spread: standard deviation of the truth.
      n: draws.
    """
    return correlation * spread * expected_maximum(n)


def worst_case(scores: Float[np.ndarray, "E H M"]) -> Matrix:
    """An ensemble's lowest score of each cluster."""
    return np.min(scores, axis=0)


def penalised(scores: Float[np.ndarray, "E H M"], weight: float) -> Matrix:
    """An ensemble's mean score, less `weight` times its standard deviation."""
    return np.mean(scores, axis=0) - weight * np.std(scores, axis=0)


class Strength(NamedTuple):
    """A dial's setting, chosen on held-out feedback.

    Attributes:
      chosen: the setting with the highest value among those that can be told.
      values: self-normalised importance-weighted feedback at every setting.
      effective: how many rows' worth of feedback each value rests on.
    """

    chosen: float
    values: Float[np.ndarray, "S"]
    effective: Float[np.ndarray, "S"]


def choose_strength(
    policy_at: Callable[[float], Matrix],
    settings: Sequence[float] | Sequence[int],
    log: off_policy.Log,
    min_effective: float = 30.0,
) -> Strength:
    """How hard to select, so that real feedback, not the score, is highest.

    The more is selected by a score, the more by its errors: what users say of the choice first
    rises, then falls (arXiv 2506.19248). Here every setting's policy is valued on logged feedback
    that the scores were not trained on. The first of equal settings is chosen.

    Args:
      policy_at: a setting's policy, such as `lambda t: soft_best_of_n(log_p, scores, t)`.
      settings: of the dial, the most cautious first.
      log: held-out feedback with propensities.
      min_effective: a setting whose value rests on fewer rows' worth of feedback isn't chosen.

    Raises:
      InputError: no setting's value rests on enough feedback.
    """
    found = [off_policy.self_normalised(log, policy_at(setting)) for setting in settings]
    values, effective = (np.array(column) for column in zip(*found, strict=True))
    known = np.where(effective >= min_effective, values, -np.inf)
    if not np.isfinite(known).any():
        raise InputError(
            f"min_effective is {min_effective}, but the held-out feedback tells at most "
            f"{effective.max():.3g} rows' worth of any of {len(settings)} setting(s)."
        )
    return Strength(settings[int(known.argmax())], values, effective)


def _normalised(logits: Matrix) -> Matrix:
    top = np.max(logits, axis=1)
    if not np.isfinite(top).all():
        raise InputError(
            f"{int((~np.isfinite(top)).sum())} of {len(top)} histories have no allowed cluster, "
            "or one whose log-probability or score is no finite number."
        )
    return scipy.special.softmax(np.asarray(logits, np.float64), axis=1)


def _allowed_scores(log_p: Matrix, scores: Matrix):
    """0 where a cluster isn't allowed, so that whatever stands there can't spread."""
    scores = np.where(np.isneginf(log_p), 0.0, scores)
    if not np.isfinite(scores).all():
        wrong = int((~np.isfinite(scores)).sum())
        raise InputError(f"{wrong} score(s) of allowed clusters are not finite numbers.")
    return scores


def _best_first(log_p: Matrix, value: Matrix):
    """Clusters of each history, [H, M]: by value, then by likelihood, then by id."""
    value = np.where(np.isneginf(log_p), -np.inf, _allowed_scores(log_p, value))
    ids = np.broadcast_to(np.arange(value.shape[1]), value.shape)
    return np.lexsort((ids, -np.asarray(log_p), -value), axis=-1)


def _drawn(p: Float[np.ndarray, "h M"], n: int, samples: int, random) -> Bool[np.ndarray, "S h M"]:
    """Which clusters are among n independent draws, by inverting the distribution function."""
    height, width = p.shape
    bounds = np.cumsum(p, axis=1)
    bounds = (bounds / bounds[:, -1:] + np.arange(height)[:, None]).ravel()
    rows = np.arange(height)[:, None]
    # Numbers stay clear of 1, which would round into the next row.
    uniform_numbers = random.random((samples, height, n)) * (1 - 1e-9) + rows
    at = np.searchsorted(bounds, uniform_numbers, side="right")
    found = np.zeros((samples, height * width), bool)
    np.put_along_axis(found, at.reshape(samples, -1), True, axis=1)
    return found.reshape(samples, height, width)


def _drawn_distinct(p: Float[np.ndarray, "h M"], n: int, samples: int, random):
    """Which clusters are among n draws without replacement: the n first of exponential clocks."""
    with np.errstate(divide="ignore"):
        times = random.standard_exponential((samples, *p.shape)) / p
    if n >= p.shape[1]:
        return np.isfinite(times)
    return np.isfinite(times) & (times <= np.partition(times, n - 1, axis=-1)[..., n - 1 : n])


def _check_count(name: str, value: int) -> None:
    if value < 1 or value != int(value):
        raise InputError(f"{name} is {value!r}; it must be a whole number of at least 1.")


def _check_positive(name: str, value: float) -> None:
    if not (np.isfinite(value) and value > 0):
        raise InputError(f"{name} is {value!r}; it must be a finite number above 0.")
