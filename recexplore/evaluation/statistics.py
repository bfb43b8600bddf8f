"""What an experiment's figures are worth: users are resampled, with all that they did.

A metric is a ratio of sums over users, such as likes over impressions, or with ones below, a mean.
Several metrics of the same users may stand side by side in one array; they share the resamples, and
values and bounds are then arrays as well.
"""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import scipy.sparse
import scipy.stats
from jaxtyping import Float, Int, Real

from recexplore.errors import InputError

_ENTRIES = 1 << 21  # of the array samples × users, at a time
_TAILS = (0.025, 0.975)


class Estimate(NamedTuple):
    """A value with its 95 % interval; all nan where there is nothing to divide by."""

    value: Float[np.ndarray, "*Q"] | float
    low: Float[np.ndarray, "*Q"] | float
    high: Float[np.ndarray, "*Q"] | float


class Sums(NamedTuple):
    """What each user of an arm adds to a metric, or to Q of them.

    Attributes:
      numerator: of the ratio.
      denominator: of the ratio; ones for a mean over users.
      earlier_numerator: the same of the time before the experiment, for CUPED.
      earlier_denominator: likewise.
    """

    numerator: Real[np.ndarray, "U *Q"]
    denominator: Real[np.ndarray, "U *Q"]
    earlier_numerator: Real[np.ndarray, "U *Q"] | None = None
    earlier_denominator: Real[np.ndarray, "U *Q"] | None = None

    def of(self, users: np.ndarray) -> "Sums":
        """Those of some users only, by index or mask."""
        return Sums(*(None if part is None else part[users] for part in self))


def bootstrap_ratio(
    numerator: Real[np.ndarray, "U *Q"],
    denominator: Real[np.ndarray, "U *Q"],
    samples: int = 500,
    seed: int = 0,
) -> Estimate:
    """Ratio of sums over users.

    Args:
      numerator: of each user.
      denominator: of each user.
      samples: resamples of users.
      seed: of them.
    """
    draws = _ratio_draws(numerator, denominator, samples, np.random.default_rng(seed))
    return _estimate(_ratio(numerator.sum(axis=0), denominator.sum(axis=0)), draws)


def compare(treated: Sums, control: Sums, samples: int = 500, seed: int = 0) -> Estimate:
    """Relative change of a metric, treated / control - 1: 0.1 is ten per cent more.

    With sums of earlier time in both arms it is CUPED (Deng et al. 2013): each user's numerator is
    made smaller by θ times what the user's earlier numerator was above the earlier ratio. Treatment
    can't have changed that, so the expectation stays, and what users always were like goes out of
    the interval. θ is the regression within arms.

    Args:
      treated: of the users who got it.
      control: of other users.
      samples: resamples of each arm's users.
      seed: of them.

    Raises:
      InputError: an arm has no users, or only some of the earlier sums are given.
    """
    treated, control = _without_earlier_differences(treated, control)
    draws, ratios = [], []
    for arm, random in zip((treated, control), np.random.default_rng(seed).spawn(2), strict=True):
        draws.append(_ratio_draws(arm.numerator, arm.denominator, samples, random))
        ratios.append(_ratio(arm.numerator.sum(axis=0), arm.denominator.sum(axis=0)))
    return _estimate(_ratio(*ratios) - 1, _ratio(*draws) - 1)


def bootstrap_statistic(
    counts: Int[np.ndarray, "U M"] | scipy.sparse.sparray,
    statistic: Callable[[Float[np.ndarray, "S M"]], Float[np.ndarray, "S"]],
    samples: int = 500,
    seed: int = 0,
) -> Estimate:
    """A statistic of all users' counts that isn't a sum over users, such as `distinct`.

    Counting in a resample would go wrong: users who stand in it twice bring nothing new, and many
    who alone were shown a cluster are missing. So what each user adds is taken first, the statistic
    less that of all others (the jackknife), and the sum of that is resampled. For a distinct count
    the interval is rather too wide than too narrow (Efron & Stein 1981).

    Args:
      counts: how often each user was shown each cluster; a sparse array is fine.
      statistic: rows of totals [S, M] → values [S].
      samples: resamples of users.
      seed: of them.
    """
    return _estimate(*_statistic_draws(counts, statistic, samples, np.random.default_rng(seed)))


def compare_statistic(
    treated: Int[np.ndarray, "U M"] | scipy.sparse.sparray,
    control: Int[np.ndarray, "V M"] | scipy.sparse.sparray,
    statistic: Callable[[Float[np.ndarray, "S M"]], Float[np.ndarray, "S"]],
    samples: int = 500,
    seed: int = 0,
) -> Estimate:
    """Relative change of such a statistic, treated / control - 1; see `bootstrap_statistic`."""
    streams = zip((treated, control), np.random.default_rng(seed).spawn(2), strict=True)
    values, draws = zip(
        *(_statistic_draws(counts, statistic, samples, random) for counts, random in streams),
        strict=True,
    )
    return _estimate(_ratio(*values) - 1, _ratio(*draws) - 1)


def distinct(totals: Float[np.ndarray, "S M"]) -> Float[np.ndarray, "S"]:
    """How many clusters were shown at all."""
    return (totals > 0).sum(axis=1).astype(np.float64)


def assign(
    user_ids: Int[np.ndarray, "U"] | np.ndarray | Sequence[str], arms: int, salt: str
) -> Int[np.ndarray, "U"]:
    """The arm of each user, 0 .. arms - 1: a function of salt and id, whoever else takes part.

    Arms are equally likely, and those of different salts have nothing to do with each other.

    Args:
      user_ids: whole numbers or texts.
      arms: how many.
      salt: of the experiment.
    """
    if arms < 1:
        raise InputError(f"arms is {arms!r}; it must be at least 1.")
    ids = np.asarray(user_ids)
    if ids.dtype.kind in "iu":
        words = ids.astype(np.uint64)
    else:
        words = np.array([_word(str(user)) for user in ids], np.uint64)
    mixed = _mix(_mix(words) ^ np.uint64(_word(salt)))
    # The upper 53 bits as a fraction; 53 because a float holds no more.
    return ((mixed >> np.uint64(11)) * (arms / 2.0**53)).astype(np.int64)


def false_positive_rate(
    sums: Sums,
    user_ids: np.ndarray | Sequence[str],
    salts: Sequence[str],
    samples: int = 500,
    seed: int = 0,
) -> Estimate:
    """Share of A/A comparisons whose interval leaves out zero; 5 % if intervals are what they say.

    For each salt the users are split in two by `assign` and compared, although nothing differs.

    Args:
      sums: of all users, all treated alike; one metric.
      user_ids: theirs.
      salts: of the splits.
      samples: resamples of each half.
      seed: of them.

    Returns:
      The share with its exact binomial interval.
    """
    wrong = 0
    for turn, salt in enumerate(salts):
        half = assign(user_ids, 2, salt) == 0
        found = compare(sums.of(half), sums.of(~half), samples, seed + turn)
        wrong += not found.low <= 0.0 <= found.high  # nan holds nothing
    test = scipy.stats.binomtest(wrong, len(salts))
    return Estimate(wrong / len(salts), *map(float, test.proportion_ci()))


def _ratio(above, below):
    """nan where there is nothing to divide by."""
    above, below = np.asarray(above, np.float64), np.asarray(below, np.float64)
    found = np.full(np.broadcast_shapes(above.shape, below.shape), np.nan)
    return np.divide(above, below, out=found, where=below != 0)[()]


def _estimate(value, draws: Float[np.ndarray, "S *Q"]) -> Estimate:
    # Beyond the low and the high lie 2.5 % on average, however few the draws.
    low, high = np.quantile(draws, _TAILS, axis=0, method="weibull")
    return Estimate(value, low, high)


def _resamples(users: int, samples: int, random: np.random.Generator) -> Iterator[np.ndarray]:
    """How often each user is in each resample, [some samples, U] at a time."""
    if users < 1 or samples < 1:
        raise InputError(f"There are {users} user(s) and {samples} sample(s); neither may be 0.")
    at_once = max(1, _ENTRIES // users)
    for start in range(0, samples, at_once):
        rows = min(at_once, samples - start)
        picks = random.integers(0, users, (rows, users)) + users * np.arange(rows)[:, None]
        times = np.bincount(picks.ravel(), minlength=rows * users)
        yield times.reshape(rows, users).astype(np.float64)


def _ratio_draws(numerator, denominator, samples, random) -> Float[np.ndarray, "S *Q"]:
    parts = [
        _ratio(np.tensordot(times, numerator, 1), np.tensordot(times, denominator, 1))
        for times in _resamples(len(numerator), samples, random)
    ]
    return np.concatenate(parts)


def _statistic_draws(counts, statistic, samples, random):
    """The statistic, and resamples of it in which every user adds what leaving them out takes."""
    totals = np.asarray(counts.sum(axis=0), np.float64).reshape(1, -1)
    value = statistic(totals)[0]
    at_once = max(1, _ENTRIES // counts.shape[1])
    parts = (counts[start : start + at_once] for start in range(0, counts.shape[0], at_once))
    dense = (part.toarray() if scipy.sparse.issparse(part) else part for part in parts)
    added = np.concatenate([value - statistic(totals - part) for part in dense])
    draws = [(times - 1.0) @ added for times in _resamples(len(added), samples, random)]
    return value, value + np.concatenate(draws)


def _without_earlier_differences(treated: Sums, control: Sums) -> tuple[Sums, Sums]:
    """CUPED: the arms with smaller numerators, or as they are where nothing earlier is known."""
    arms = (treated, control)
    earlier = [part for arm in arms for part in arm[2:]]
    if all(part is None for part in earlier):
        return arms
    if any(part is None for part in earlier):
        raise InputError("Earlier sums must be given for both arms, numerator and denominator.")
    before = np.nan_to_num(  # a metric without a past has nothing to take out
        _ratio(
            sum(arm.earlier_numerator.sum(axis=0) for arm in arms),
            sum(arm.earlier_denominator.sum(axis=0) for arm in arms),
        )
    )
    # Linearised, a ratio is a mean over users; the earlier one's is 0 over both arms together.
    above = [arm.earlier_numerator - before * arm.earlier_denominator for arm in arms]
    joint, spread = 0.0, 0.0
    for arm, covariate in zip(arms, above, strict=True):
        centred = covariate - covariate.mean(axis=0)
        now = _ratio(arm.numerator.sum(axis=0), arm.denominator.sum(axis=0))
        joint = joint + ((arm.numerator - now * arm.denominator) * centred).sum(axis=0)
        spread = spread + (centred**2).sum(axis=0)
    slope = np.nan_to_num(_ratio(joint, spread))  # nothing to explain with: nothing is subtracted
    return tuple(
        Sums(arm.numerator - slope * covariate, arm.denominator)
        for arm, covariate in zip(arms, above, strict=True)
    )


def _word(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def _mix(words: np.ndarray) -> np.ndarray:
    """splitmix64's step (Steele, Lea & Flood 2014): every bit depends on every bit."""
    words = words + np.uint64(0x9E3779B97F4A7C15)
    words = (words ^ (words >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    words = (words ^ (words >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return words ^ (words >> np.uint64(31))
