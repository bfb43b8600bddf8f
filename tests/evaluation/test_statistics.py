"""Intervals against the delta method, scipy's bootstrap, regression, and simulated experiments."""

import numpy as np
import pytest
import scipy.sparse
import scipy.stats

from recexplore.errors import InputError
from recexplore.evaluation import statistics
from recexplore.evaluation.statistics import Sums


def some_users(count=1000, seed=0, lift=1.0):
    """Heavy-tailed: users differ in size by orders of magnitude, and in how much they like.

    Returns:
      Likes and impressions now, likes and impressions earlier.
    """
    random = np.random.default_rng(seed)
    size, taste = random.lognormal(2.0, 1.0, count), random.beta(2, 5, count)

    def period(factor):
        shown = 1.0 + random.poisson(size)
        return random.binomial(shown.astype(int), taste * factor).astype(float), shown

    liked, shown = period(lift)
    return Sums(liked, shown, *period(1.0))


def plain(sums):
    return Sums(sums.numerator, sums.denominator)


def delta_variance(sums):
    """Of a ratio of sums, by the delta method."""
    ratio = sums.numerator.sum() / sums.denominator.sum()
    residual = sums.numerator - ratio * sums.denominator
    return len(residual) * residual.var(ddof=1) / sums.denominator.sum() ** 2


def relative_delta_error(treated, control):
    """Standard error of the relative change."""
    ratios = [arm.numerator.sum() / arm.denominator.sum() for arm in (treated, control)]
    relative = [
        delta_variance(arm) / ratio**2
        for arm, ratio in zip((treated, control), ratios, strict=True)
    ]
    return ratios[0] / ratios[1] * np.sqrt(sum(relative))


def half_width(estimate):
    return (estimate.high - estimate.low) / 2


def test_a_ratio_has_the_delta_methods_interval_and_scipys():
    sums = some_users()
    found = statistics.bootstrap_ratio(sums.numerator, sums.denominator, samples=2000)
    assert found.value == sums.numerator.sum() / sums.denominator.sum()
    assert half_width(found) == pytest.approx(1.96 * np.sqrt(delta_variance(sums)), rel=0.1)
    scipys = scipy.stats.bootstrap(
        (sums.numerator, sums.denominator),
        lambda n, d, axis: n.sum(axis=axis) / d.sum(axis=axis),
        paired=True,
        n_resamples=2000,
        method="percentile",
        rng=np.random.default_rng(1),
    ).confidence_interval
    tolerance = 0.1 * half_width(found)
    assert (found.low, found.high) == pytest.approx(tuple(scipys), abs=tolerance)


def test_metrics_side_by_side_share_their_resamples():
    sums = some_users(200)
    above = np.stack([sums.numerator, sums.denominator, 2 * sums.numerator], axis=1)
    below = np.stack([sums.denominator, np.ones(200), sums.denominator], axis=1)
    found = statistics.bootstrap_ratio(above, below, 100, seed=3)
    for metric in range(3):
        alone = statistics.bootstrap_ratio(above[:, metric], below[:, metric], 100, seed=3)
        np.testing.assert_allclose([part[metric] for part in found], alone)
    np.testing.assert_allclose(found.low[2], 2 * found.low[0])
    many = Sums(above, below, above, below)
    changes = statistics.compare(many, many.of(np.arange(100)), 100)
    one = Sums(*(part[:, 0] for part in many))
    np.testing.assert_allclose(
        [part[0] for part in changes], statistics.compare(one, one.of(np.arange(100)), 100)
    )


def test_the_seed_decides_and_chunks_follow_on(monkeypatch):
    sums = plain(some_users(100))
    first = statistics.bootstrap_ratio(*sums[:2], samples=64, seed=1)
    assert first == statistics.bootstrap_ratio(*sums[:2], samples=64, seed=1)
    assert first != statistics.bootstrap_ratio(*sums[:2], samples=64, seed=2)
    monkeypatch.setattr(statistics, "_ENTRIES", 500)
    assert first == pytest.approx(statistics.bootstrap_ratio(*sums[:2], samples=64, seed=1))


def test_a_relative_change_has_the_delta_methods_interval():
    treated, control = plain(some_users(1500, 1, 0.8)), plain(some_users(1200, 2))
    found = statistics.compare(treated, control, samples=2000)
    ratios = [arm.numerator.sum() / arm.denominator.sum() for arm in (treated, control)]
    assert found.value == pytest.approx(ratios[0] / ratios[1] - 1)
    assert half_width(found) == pytest.approx(
        1.96 * relative_delta_error(treated, control), rel=0.1
    )
    assert found.low < found.value < found.high


@pytest.mark.parametrize("earlier", [False, True])
def test_intervals_of_simulated_experiments_hold_the_true_change(earlier):
    held, values, experiments = 0, [], 200
    for seed in range(experiments):
        arms = some_users(400, 2 * seed, 0.8), some_users(400, 2 * seed + 1)
        found = statistics.compare(*(arms if earlier else map(plain, arms)), samples=300, seed=seed)
        held += found.low <= -0.2 <= found.high
        values.append(found.value)
    assert scipy.stats.binomtest(held, experiments, 0.95).pvalue > 1e-3
    error = np.std(values) / np.sqrt(experiments)
    assert np.mean(values) == pytest.approx(-0.2, abs=4 * error + 0.005)  # a ratio's bias is small


def test_cuped_takes_out_what_earlier_time_explains():
    random = np.random.default_rng(0)
    users, correlation = 4000, 0.8
    noise = random.normal(size=(2, 2, users))
    arms = []
    for arm, lift in enumerate((0.5, 0.0)):
        earlier = 10.0 + noise[arm, 0]
        now = 10.0 + lift + correlation * noise[arm, 0] + 0.6 * noise[arm, 1]
        arms.append(Sums(now, np.ones(users), earlier, np.ones(users)))
    with_earlier = statistics.compare(*arms, samples=2000)
    without = statistics.compare(*map(plain, arms), samples=2000)
    shrunk = half_width(with_earlier) / half_width(without)
    assert shrunk == pytest.approx(np.sqrt(1 - correlation**2), rel=0.07)
    assert with_earlier.low < 0.05 < with_earlier.high


def test_cuped_is_the_analysis_of_covariance():
    random = np.random.default_rng(0)
    earlier, now = random.normal(size=(2, 300)) + 5
    group = random.random(300) < 0.4
    now += 0.7 * earlier + 0.3 * group
    design = np.stack([np.ones(300), group, earlier - earlier.mean()], axis=1)
    base, effect, _ = np.linalg.lstsq(design, now)[0]
    every = Sums(now, np.ones(300), earlier, np.ones(300))
    found = statistics.compare(every.of(group), every.of(~group), 10)
    assert found.value == pytest.approx(effect / base)


def test_cuped_without_anything_to_explain_changes_nothing():
    arms = [plain(some_users(100, seed)) for seed in (0, 1)]
    constant = [Sums(*arm[:2], np.ones(100), np.ones(100)) for arm in arms]
    assert statistics.compare(*constant) == statistics.compare(*arms)
    with pytest.raises(InputError, match="Earlier sums must be given for both arms"):
        statistics.compare(constant[0], arms[1])


def test_nothing_below_is_nan_and_no_users_an_error():
    ones, none = Sums(np.ones(5), np.ones(5)), Sums(np.zeros(5), np.ones(5))
    assert np.isnan(statistics.compare(ones, none)).all()
    assert np.isnan(statistics.bootstrap_ratio(np.ones(5), np.zeros(5))).all()
    assert statistics.compare(none, ones) == (-1.0, -1.0, -1.0)
    with pytest.raises(InputError, match="0 user"):
        statistics.bootstrap_ratio(np.ones(0), np.ones(0))


def rare_clusters(users, seed):
    """Each user is shown ten of 400 clusters, most of which are rare."""
    random = np.random.default_rng(seed)
    shares = 1.0 / np.arange(1, 401) ** 1.5
    return random.multinomial(10, shares / shares.sum(), users), shares / shares.sum()


def test_the_interval_of_a_distinct_count_holds_its_expectation():
    users, held, experiments = 150, 0, 200
    for seed in range(experiments):
        counts, shares = rare_clusters(users, seed)
        expected = (1 - (1 - shares) ** (10 * users)).sum()
        found = statistics.bootstrap_statistic(counts, statistics.distinct, 200, seed)
        assert found.value == (counts.sum(axis=0) > 0).sum()
        assert found.low <= found.value <= found.high
        held += found.low <= expected <= found.high
    assert scipy.stats.binomtest(held, experiments, 0.95, "less").pvalue > 1e-3
    assert held < experiments


def test_changes_of_a_distinct_count_hold_no_change_between_likes():
    held, experiments = 0, 200
    for seed in range(experiments):
        arms = [rare_clusters(150, 2 * seed + arm)[0] for arm in (0, 1)]
        found = statistics.compare_statistic(*arms, statistics.distinct, 200, seed)
        held += found.low <= 0.0 <= found.high
    assert scipy.stats.binomtest(held, experiments, 0.95, "less").pvalue > 1e-3
    assert held < experiments
    few = arms[0] * (np.arange(400) < 20)
    change = statistics.compare_statistic(few, arms[1], statistics.distinct)
    assert change.value == 20 / (arms[1].sum(axis=0) > 0).sum() - 1 and change.high < -0.5


def test_a_distinct_count_varies_by_the_clusters_that_one_user_alone_was_shown():
    counts, _ = rare_clusters(300, 0)
    alone = ((counts > 0) & ((counts > 0).sum(axis=0) == 1)).sum(axis=1)
    found = statistics.bootstrap_statistic(counts, statistics.distinct, 20_000)
    assert half_width(found) == pytest.approx(1.96 * alone.std() * np.sqrt(300), rel=0.05)


def test_sparse_counts_are_the_same_and_sums_have_the_same_spread_as_ratios():
    counts, _ = rare_clusters(300, 0)
    dense = statistics.bootstrap_statistic(counts, statistics.distinct, 100)
    sparse = statistics.bootstrap_statistic(
        scipy.sparse.csr_array(counts), statistics.distinct, 100
    )
    assert sparse == dense

    def mean_of_first(totals):
        return totals[:, 0] / 300

    summed = statistics.bootstrap_statistic(counts, mean_of_first, 2000)
    ratio = statistics.bootstrap_ratio(counts[:, 0], np.ones(300), 2000)
    assert summed.value == pytest.approx(ratio.value)
    assert half_width(summed) == pytest.approx(half_width(ratio), rel=1e-6)


def test_users_are_dealt_evenly_and_independently_of_other_salts():
    users = np.arange(50_000)
    for ids in (users, [f"user-{user}" for user in users[:20_000]]):
        first, second = (statistics.assign(ids, 7, salt) for salt in ("one", "two"))
        counts = np.zeros((7, 7))
        np.add.at(counts, (first, second), 1)
        assert scipy.stats.chisquare(counts.sum(axis=1)).pvalue > 1e-3
        assert scipy.stats.chi2_contingency(counts).pvalue > 1e-3
    steps = np.bincount(first[1:] * 7 + first[:-1], minlength=49)  # neighbours as well
    assert scipy.stats.chi2_contingency(steps.reshape(7, 7)).pvalue > 1e-3


def test_a_users_arm_depends_on_nobody_else():
    ids = np.array([3, 10**15, 0, -4])
    whole = statistics.assign(ids, 12, "salt")
    assert whole.tolist() == [statistics.assign(ids[[i]], 12, "salt")[0] for i in range(4)]
    assert statistics.assign(np.arange(100), 1, "salt").max() == 0
    first, _, again = statistics.assign(["a", "b", "a"], 1000, "salt")
    assert first == again
    with pytest.raises(InputError, match="arms is 0; it must be at least 1"):
        statistics.assign(ids, 0, "salt")


def test_one_in_twenty_comparisons_of_likes_excludes_zero():
    sums = some_users(1000)
    salts = [f"salt {turn}" for turn in range(200)]
    for every in (sums, plain(sums)):
        found = statistics.false_positive_rate(every, np.arange(1000), salts, samples=150)
        assert found.low <= 0.05 <= found.high
    rows = Sums(*(np.repeat(part, 5) for part in plain(sums)[:2]))  # users taken for five each
    users = np.repeat(np.arange(1000), 5)
    wrong = statistics.false_positive_rate(rows, users, salts[:100], samples=100)
    assert wrong.low > 0.2


def test_a_metric_without_a_past_is_compared_as_if_nothing_were_known():
    random = np.random.default_rng(0)
    arms = [statistics.Sums(random.random(200) + more, np.ones(200)) for more in (0.2, 0.0)]
    nothing = np.zeros(200)
    with_past = [
        arm._replace(earlier_numerator=nothing, earlier_denominator=nothing) for arm in arms
    ]
    np.testing.assert_allclose(statistics.compare(*with_past), statistics.compare(*arms))
