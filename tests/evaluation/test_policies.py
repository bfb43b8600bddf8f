"""Policies against enumeration of all draws, limits, bounds and the step's own selection."""

import itertools

import jax
import numpy as np
import pytest
import scipy.integrate
import scipy.stats

from recexplore.errors import InputError
from recexplore.evaluation import off_policy, policies
from recexplore.inference import selection

H, M = 3, 4
P = np.array([[0.4, 0.3, 0.2, 0.1], [0.25, 0.25, 0.5, 0.0], [0.6, 0.0, 0.0, 0.4]])
with np.errstate(divide="ignore"):
    LOG_P = np.log(P)
# Ties: clusters 0 and 1 of the first history, 0 and 1 (equally likely) of the second.
SCORES = np.array([[0.5, 0.5, -1.0, 2.0], [1.0, 1.0, 0.3, np.nan], [0.2, -np.inf, np.inf, -0.4]])
RANDOM = np.random.default_rng(0)


def some_tables(histories=50, clusters=30, spread=2.0, seed=0):
    """log_p with a few clusters left out, and scores."""
    random = np.random.default_rng(seed)
    log_p = spread * random.normal(size=(histories, clusters))
    log_p[random.random(log_p.shape) < 0.1] = -np.inf
    return np.log(policies.tempered(log_p, 1.0), where=np.isfinite(log_p), out=log_p), (
        random.normal(size=log_p.shape)
    )


def better(row):
    """A sort key: the best first, ties to the likelier, then to the smaller id."""
    return lambda cluster: (-SCORES[row, cluster], -P[row, cluster], cluster)


def enumerated(n, choose, distinct=False):
    """A policy by going through all draws of n; choose(row, draws) says the shares of clusters."""
    found = np.zeros((H, M))
    for row in range(H):
        support = np.flatnonzero(P[row])
        ordered = itertools.permutations if distinct else itertools.product
        draws_of = (
            ordered(support, min(n, len(support))) if distinct else ordered(support, repeat=n)
        )
        for draws in draws_of:
            chance, left = 1.0, 1.0
            for cluster in draws:
                chance *= P[row, cluster] / left
                left -= P[row, cluster] if distinct else 0.0
            for cluster, share in choose(row, draws).items():
                found[row, cluster] += chance * share
    return found


def k_best(k):
    def choose(row, draws):
        kept = sorted(set(draws), key=better(row))[:k]
        return {cluster: 1 / len(kept) for cluster in kept}

    return choose


@pytest.mark.parametrize("n", [1, 2, 3, 5])
def test_best_of_n_is_what_going_through_all_draws_gives(n):
    expected = enumerated(n, k_best(1))
    np.testing.assert_allclose(policies.best_of_n(LOG_P, SCORES, n), expected, atol=1e-14)


@pytest.mark.parametrize("n", [1, 2, 3, 5])
@pytest.mark.parametrize("strength", [0.0, 0.7, 5.0])
def test_soft_selection_is_what_going_through_all_draws_gives(n, strength):
    def softmax(row, draws):
        weights = np.exp(strength * SCORES[row, list(draws)])
        shares = dict.fromkeys(draws, 0.0)
        for cluster, weight in zip(draws, weights / weights.sum(), strict=True):
            shares[cluster] += weight
        return shares

    found = policies.soft_selection(LOG_P, SCORES, n, strength)
    np.testing.assert_allclose(found, enumerated(n, softmax), atol=1e-8)


@pytest.mark.parametrize("distinct", [False, True])
@pytest.mark.parametrize(("n", "k"), [(1, 1), (2, 1), (3, 2), (3, 3), (6, 2)])
def test_top_k_is_what_going_through_all_draws_gives(n, k, distinct):
    samples = 20_000
    found = policies.top_k(LOG_P, SCORES, n, k, samples, distinct=distinct)
    expected = enumerated(n, k_best(k), distinct)
    np.testing.assert_allclose(found, expected, atol=4.5 * 0.5 / np.sqrt(samples))
    assert (found[expected == 0] == 0).all()
    if distinct and k == 1:
        again = policies.best_of_distinct(LOG_P, SCORES, n, samples)
        np.testing.assert_array_equal(again, found)


def test_keeping_all_draws_gains_nothing_from_scores():
    log_p, truth = some_tables(clusters=12, spread=0.5)
    for n in (3, 5):
        every = policies.top_k_expectation(log_p, truth, truth, n, n, distinct=True)
        blind = policies.top_k_expectation(log_p, -truth, truth, n, n, seed=1, distinct=True)
        chosen = policies.top_k_expectation(log_p, truth, truth, 3 * n, n, distinct=True)
        assert abs(every - blind).mean() < 0.03  # a hundredth of the truth's spread, over samples
        assert (chosen - every).mean() > 0.3
    one = policies.top_k_expectation(log_p, truth, truth, 1, 1, samples=4000)
    assert one == pytest.approx(policies.expected(np.exp(log_p), truth), abs=0.1)


def test_blocks_of_histories_are_drawn_alike(monkeypatch):
    log_p, scores = some_tables(20, 6)
    whole = policies.top_k(log_p, scores, 3, 2, 3000)
    monkeypatch.setattr(policies, "_ENTRIES", 3 * 6 * 3000)
    np.testing.assert_allclose(policies.top_k(log_p, scores, 3, 2, 3000), whole, atol=0.06)


def test_one_draw_is_the_novelty_model_itself():
    log_p, scores = some_tables()
    for policy in (
        policies.best_of_n(log_p, scores, 1),
        policies.soft_selection(log_p, scores, 1, 3.0),
        policies.soft_selection(log_p, scores, 9, 0.0),
        policies.tempered(log_p, 1.0),
    ):
        np.testing.assert_allclose(policy, np.exp(log_p), atol=1e-8)
    cooler = policies.tempered(log_p, 0.5)
    squared = np.exp(2 * log_p)
    np.testing.assert_allclose(cooler, squared / squared.sum(axis=1, keepdims=True))
    np.testing.assert_allclose(policies.best_of_n(log_p, scores, 1, temperature=0.5), cooler)


def test_limits_of_many_draws_and_strong_selection():
    log_p, scores = some_tables()
    allowed = np.isfinite(log_p)
    greedy = policies.greedy(scores, allowed)
    np.testing.assert_allclose(policies.best_of_n(log_p, scores, 10**7), greedy, atol=1e-6)
    tilted = policies.soft_best_of_n(log_p, scores, 1 / 1.5)
    np.testing.assert_allclose(
        policies.soft_selection(log_p, scores, 20_000, 1.5), tilted, atol=1e-3
    )
    best = policies.best_of_n(log_p, scores, 8)
    np.testing.assert_allclose(
        policies.soft_selection(log_p, scores, 8, 1000.0), best, atol=1e-2
    )  # all but near ties
    np.testing.assert_allclose(
        policies.soft_best_of_n(log_p, scores, 1e9), np.exp(log_p), rtol=1e-6
    )
    np.testing.assert_allclose(policies.soft_best_of_n(log_p, scores, 1e-4), greedy, atol=1e-6)


def test_rare_clusters_keep_their_precision():
    p = np.array([[1e-12, 1 - 1e-12]])
    found = policies.best_of_n(np.log(p), np.array([[1.0, 0.0]]), 1000)
    assert found[0, 0] == pytest.approx(1e-9, rel=1e-8)


def test_policies_are_distributions_over_what_is_allowed():
    log_p, scores = some_tables()
    allowed = np.isfinite(log_p)
    for policy in (
        policies.tempered(log_p, 3.0),
        policies.best_of_n(log_p, scores, 20, 2.0),
        policies.best_of_distinct(log_p, scores, 20, 50),
        policies.top_k(log_p, scores, 20, 5, 50),
        policies.soft_best_of_n(log_p, scores, 0.3),
        policies.soft_selection(log_p, scores, 20, 3.0),
        policies.greedy(scores, allowed),
        policies.mixed(log_p, scores, 0.5),
        policies.uniform(allowed),
    ):
        np.testing.assert_allclose(policy.sum(axis=1), 1.0, rtol=1e-12)
        assert (policy >= 0).all() and (policy[~allowed] == 0).all()
    assert np.ptp(policies.uniform(allowed)[0, allowed[0]]) == 0


def test_the_soft_policy_has_the_most_score_for_its_divergence():
    log_p, scores = some_tables()
    p, temperature = np.exp(log_p), 0.4

    def objective(policy):
        return policies.expected(policy, scores) - temperature * policies.divergence(policy, p)

    best = objective(policies.soft_best_of_n(log_p, scores, temperature))
    expected = temperature * np.log((p * np.exp(scores / temperature)).sum(axis=1))
    np.testing.assert_allclose(best, expected)
    for other in (policies.best_of_n(log_p, scores, 5), policies.tempered(log_p, 1.3), p):
        assert (objective(other) < best).all()


@pytest.mark.parametrize("n", [1, 2, 5, 20, 100])
def test_divergence_of_best_of_n_stays_below_its_bound_and_reaches_it(n):
    log_p, scores = some_tables()
    bound = policies.best_of_n_bound(n)
    found = policies.divergence(policies.best_of_n(log_p, scores, n), np.exp(log_p))
    assert (found <= bound + 1e-12).all()
    fine = np.full((1, 20_000), -np.log(20_000))  # as good as continuous
    policy = policies.best_of_n(fine, np.arange(20_000.0)[None], n)
    assert policies.divergence(policy, np.exp(fine))[0] == pytest.approx(bound, abs=n * 1e-4)


def test_divergence_is_scipys_entropy_and_infinite_outside_the_support():
    log_p, scores = some_tables()
    p, policy = np.exp(log_p), policies.best_of_n(log_p, scores, 4)
    np.testing.assert_allclose(
        policies.divergence(policy, p), scipy.stats.entropy(policy, p, axis=1)
    )
    assert np.isinf(policies.divergence(np.eye(M)[[3]], P[[1]]))


def test_expectations_leave_out_what_is_never_shown():
    policy = np.array([[0.25, 0.75, 0.0]])
    assert policies.expected(policy, np.array([2.0, 4.0, np.nan])) == pytest.approx([3.5])
    log_p = np.log(np.array([[0.5, 0.5, 1e-9]]))
    log_p[0, 2] = -np.inf
    assert policies.novelty(policy, log_p) == pytest.approx([np.log(2)])


def test_the_effective_number_counts_what_all_histories_show():
    assert policies.effective_number(np.eye(5), np.ones(5)) == pytest.approx(5.0)
    assert policies.effective_number(np.eye(5), np.array([1.0, 1, 0, 0, 0])) == pytest.approx(2.0)
    assert policies.effective_number(np.eye(5)[[2, 2]], np.ones(2)) == pytest.approx(1.0)


@pytest.mark.parametrize("weight", [None, 0.0, 1.3, -0.4])
def test_the_best_of_all_is_the_one_that_the_step_selects(weight):
    random = np.random.default_rng(1)
    with np.errstate(divide="ignore"):
        log_p = np.log(random.dirichlet(np.ones(6), 40).round(1))  # zeros and ties
    scores = random.integers(-2, 3, log_p.shape).astype(float)
    settings = selection.BestOfN(1, 1, "exhaustive", relevance_weight=weight)
    clusters = np.where(np.isfinite(log_p), np.arange(6), -1)
    chosen = selection.select(
        settings,
        selection.Candidates(clusters, scores, log_p),
        jax.random.split(jax.random.key(0), 40),
    )
    found = (
        policies.best_of_n(log_p, scores, 10**9)
        if weight is None
        else policies.mixed(log_p, scores, weight)
    )
    np.testing.assert_array_equal(found.argmax(axis=1), chosen.clusters[:, 0])


def test_greedy_gives_ties_to_the_smaller_id():
    allowed = np.array([[False, True, True, True]])
    found = policies.greedy(np.array([[9.0, 1.0, 2.0, 2.0]]), allowed)
    assert found.tolist() == [[0, 0, 1, 0]]


def test_the_expected_maximum_of_normals():
    assert policies.expected_maximum(1) == pytest.approx(0.0, abs=1e-12)
    assert policies.expected_maximum(2) == pytest.approx(1 / np.sqrt(np.pi))
    assert policies.expected_maximum(3) == pytest.approx(1.5 / np.sqrt(np.pi))
    assert policies.expected_maximum(10) == pytest.approx(1.5387527308, abs=1e-9)  # Harter 1961
    normal = scipy.stats.norm
    mean, _ = scipy.integrate.quad(
        lambda x: x * 100 * normal.pdf(x) * normal.cdf(x) ** 99, -10, 10, epsabs=1e-12
    )
    assert policies.expected_maximum(100) == pytest.approx(mean, abs=1e-9)
    limit = normal.ppf(1 - 1 / 1e6) + np.euler_gamma / normal.ppf(1 - 1 / 1e6)
    assert policies.expected_maximum(10**6) == pytest.approx(limit, rel=0.01)


@pytest.mark.parametrize("n", [2, 10, 50])
def test_the_theory_is_right_where_score_and_truth_are_normal(n):
    random = np.random.default_rng(n)
    truth, noise = random.normal(size=(2, 20, 4000))
    scores, log_p = 0.6 * truth + 0.8 * noise, np.full((20, 4000), -np.log(4000))
    truth = 3.0 * truth + 1.0
    correlation, spread = policies.agreement(log_p, scores, truth)
    assert correlation.mean() == pytest.approx(0.6, abs=0.02)
    assert spread.mean() == pytest.approx(3.0, abs=0.05)
    gain = policies.expected(policies.best_of_n(log_p, scores, n), truth) - truth.mean(axis=1)
    theory = policies.gain_by_theory(correlation, spread, n)
    assert gain.mean() == pytest.approx(theory.mean(), rel=0.03)


def test_agreement_is_the_weighted_correlation_among_allowed_clusters():
    log_p, scores = some_tables(4)
    truth = np.where(np.isfinite(log_p), RANDOM.normal(size=log_p.shape), np.nan)
    correlation, spread = policies.agreement(log_p, scores, truth)
    for row in range(4):
        some = np.isfinite(log_p[row])
        weights = np.exp(log_p[row, some])
        covariance = np.cov(scores[row, some], truth[row, some], aweights=weights, ddof=0)
        assert spread[row] == pytest.approx(np.sqrt(covariance[1, 1]))
        expected = covariance[0, 1] / np.sqrt(covariance[0, 0] * covariance[1, 1])
        assert correlation[row] == pytest.approx(expected)
    constant, _ = policies.agreement(log_p, np.full_like(scores, 0.1), truth)
    assert constant.tolist() == [0.0] * 4


def test_ensembles_by_hand():
    scores = np.array([[[1.0, 4.0]], [[3.0, 4.0]]])
    assert policies.worst_case(scores).tolist() == [[1.0, 4.0]]
    assert policies.penalised(scores, 0.5).tolist() == [[2.0 - 0.5 * 1.0, 4.0]]


def a_deceptive_log(rows):
    """Scores follow the truth but for the highest, which is the worst cluster; logged from p."""
    random = np.random.default_rng(0)
    clusters = 10
    p = np.full((2, clusters), 1 / clusters)
    truth = np.tile(np.linspace(0.1, 0.9, clusters), (2, 1))
    truth[:, -1] = 0.0
    scores = np.tile(np.linspace(-2, 2, clusters), (2, 1))
    contexts, actions = random.integers(0, 2, rows), random.integers(0, clusters, rows)
    rewards = (random.random(rows) < truth[contexts, actions]).astype(float)
    log = off_policy.Log(contexts, actions, rewards, np.full(rows, 1 / clusters), np.arange(rows))
    return np.log(p), scores, truth, log


def test_the_strength_is_the_one_that_feedback_likes_best():
    log_p, scores, truth, log = a_deceptive_log(40_000)
    dials = {
        "tilt": (lambda t: policies.soft_best_of_n(log_p, scores, t), [9.0, 3.0, 1.0, 0.5, 0.1]),
        "draws": (lambda n: policies.best_of_n(log_p, scores, int(n)), [1, 2, 4, 16, 64]),
        "soft": (lambda s: policies.soft_selection(log_p, scores, 5, s), [0.0, 0.5, 1.0, 4.0]),
    }
    for name, (policy_at, settings) in dials.items():
        true = [policies.expected(policy_at(s), truth).mean() for s in settings]
        found = policies.choose_strength(policy_at, settings, log)
        assert found.chosen == settings[int(np.argmax(true))], name
        assert found.chosen not in (settings[0], settings[-1]), name  # it rises, then falls
        np.testing.assert_allclose(found.values, true, atol=0.02)
        assert (np.diff(found.effective) < 0).all()


def test_a_strength_that_feedback_cannot_tell_is_not_chosen():
    log_p, scores, _, log = a_deceptive_log(200)
    rewards = (log.actions == 9).astype(float)  # nothing would be better than the highest score
    log = log._replace(rewards=rewards)

    def policy_at(temperature):
        return policies.soft_best_of_n(log_p, scores, temperature)

    assert policies.choose_strength(policy_at, [9.0, 1.0, 0.01], log, 1.0).chosen == 0.01
    assert policies.choose_strength(policy_at, [9.0, 1.0, 0.01], log, 50.0).chosen == 1.0
    with pytest.raises(InputError, match=r"min_effective is 1000.0, but .* any of 2 setting"):
        policies.choose_strength(policy_at, [9.0, 1.0], log, 1000.0)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: policies.best_of_n(LOG_P, SCORES, 0), "n is 0; it must be a whole number"),
        (lambda: policies.top_k(LOG_P, SCORES, 2, 0), "k is 0; it must be a whole number"),
        (lambda: policies.top_k(LOG_P, SCORES, 2, 1, 0), "samples is 0; it must be"),
        (lambda: policies.tempered(LOG_P, 0.0), "temperature is 0.0; it must be a finite number"),
        (lambda: policies.soft_selection(LOG_P, SCORES, 2, -1.0), "strength is -1.0; it must be"),
        (lambda: policies.soft_selection(LOG_P, SCORES, 2, 1e5), "best_of_n, which is the limit"),
        (lambda: policies.uniform(np.zeros((2, 3), bool)), "2 of 2 histories have no allowed"),
        (lambda: policies.mixed(LOG_P - np.inf, SCORES, 1.0), "3 of 3 histories have no allowed"),
        (lambda: policies.best_of_n(LOG_P, SCORES * np.nan, 2), "9 score.s. of allowed clusters"),
    ],
)
def test_errors_name_the_setting(call, message):
    with pytest.raises(InputError, match=message):
        call()
