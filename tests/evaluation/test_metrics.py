"""Metrics and baselines against brute force, scipy and arithmetic."""

import itertools

import numpy as np
import pytest
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st

from recexplore.evaluation import baselines, metrics, offline
from recexplore.evaluation.baselines import Rows
from recexplore.feedback import collective


def test_ranks_leave_out_the_excluded_and_share_ties():
    scores = np.array([[3.0, 2.0, 2.0, 1.0]] * 3)
    excluded = np.zeros((3, 4), bool)
    excluded[1, 0] = excluded[2, 2] = True
    found = metrics.ranks(scores, np.array([1, 1, 1]), excluded)
    assert found.tolist() == [1 + 0.5, 0 + 0.5, 1.0]


def test_recall_and_ndcg_by_hand():
    rank = np.array([0.0, 1.0, 9.5, 10.0, np.inf])
    assert metrics.recall(rank, 10).tolist() == [1, 1, 1, 0, 0]
    expected = [1.0, 1 / np.log2(3), 1 / np.log2(11.5), 0, 0]
    assert metrics.ndcg(rank, 10).tolist() == pytest.approx(expected)


def test_ranks_in_lists():
    lists = np.array([[4, 2, -1], [1, 0, 3]])
    assert metrics.ranks_in_lists(lists, np.array([2, 2])).tolist() == [1.0, np.inf]


@settings(deadline=None, max_examples=50)
@given(
    rows=st.lists(
        st.tuples(st.integers(0, 3), st.integers(0, 3), st.integers(0, 2)), min_size=2, max_size=30
    ),
    grouped=st.booleans(),
)
def test_pairwise_accuracy_is_a_count_over_all_pairs(rows, grouped):
    predicted, truth, groups = (np.array(c) for c in zip(*rows, strict=True))
    right = total = 0.0
    for i, j in itertools.combinations(range(len(rows)), 2):
        if truth[i] == truth[j] or (grouped and groups[i] != groups[j]):
            continue
        total += 1
        if predicted[i] == predicted[j]:
            right += 0.5
        else:
            right += (predicted[i] < predicted[j]) == (truth[i] < truth[j])
    found = metrics.pairwise_accuracy(
        predicted.astype(float), truth.astype(float), groups if grouped else None
    )
    assert found == pytest.approx(right / total) if total else np.isnan(found)


def test_spearman_is_scipys_and_zero_for_a_constant():
    x, y = np.random.default_rng(0).normal(size=(2, 50))
    assert metrics.spearman(x, y) == pytest.approx(scipy.stats.spearmanr(x, y).statistic)
    assert metrics.spearman(np.ones(5), np.arange(5.0)) == 0.0


def test_entropy_of_equal_shares_is_their_logarithm():
    assert metrics.entropy(np.array([3, 3, 0, 3, 3])) == pytest.approx(2.0)


def test_calibration_of_a_constant_offset():
    predicted = np.linspace(0.2, 0.8, 100)
    bins = metrics.calibration(predicted, predicted + 0.1, np.ones(100), bins=5)
    assert bins.shape == (3, 5) and bins[2].tolist() == [20.0] * 5
    assert metrics.calibration_error(bins) == pytest.approx(0.1)


@settings(deadline=None, max_examples=50)
@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 1)), min_size=1, max_size=8))
def test_choosing_keeps_distinct_clusters_best_first(proposals):
    values = np.array([4.0, 1.0, 3.0, 3.0, 0.0, 2.0])  # of each cluster; 2 and 3 tie
    clusters = np.array([[c for c, _ in proposals]])
    found = offline.choose(clusters, values[clusters], 3)[0]
    expected = sorted(set(clusters[0].tolist()), key=lambda c: (-values[c], c))[:3]
    assert found.tolist() == expected + [-1] * (3 - len(expected))


def some_rows(count=300, size=8, seed=0):
    random = np.random.default_rng(seed)
    last_two = np.array([random.choice(size, 2, replace=False) for _ in range(count)])
    seen = np.zeros((count, size), bool)
    np.put_along_axis(seen, last_two, True, axis=1)
    step = 1 + random.integers(0, 2, count)
    known = (last_two[:, 1] + step) % size == last_two[:, 0]
    targets = (last_two[:, 1] + step + 2 * known) % size  # never one of the last two
    users = np.array([f"u{i % 40}" for i in range(count)])
    return Rows(users, last_two.tolist(), last_two, targets, seen)


def test_baselines_are_the_conditional_frequencies_they_claim_to_be():
    rows = some_rows()
    row = 5
    a, b = rows.last_two[row]
    after_b = rows.targets[rows.last_two[:, 1] == b]
    popular = (np.bincount(rows.targets, minlength=8) + 1) / (len(rows.targets) + 8)
    expected = (np.bincount(after_b, minlength=8) + 5 * popular) / (len(after_b) + 5)
    assert baselines.markov(rows, 5.0)(rows)[row] == pytest.approx(expected)
    after_both = rows.targets[(rows.last_two == (a, b)).all(axis=1)]
    mixed = (np.bincount(after_both, minlength=8) + 3 * expected) / (len(after_both) + 3)
    assert baselines.pair_markov(rows, 5.0, 3.0)(rows)[row] == pytest.approx(mixed)
    counts = np.bincount(rows.targets, minlength=8)
    assert baselines.popularity(rows)(rows)[row].tolist() == counts.tolist()


def test_an_unknown_pair_backs_off_to_the_last_cluster():
    train = some_rows()
    unknown = train._replace(last_two=np.array([[7, 7]]), targets=train.targets[:1])
    pair, single = baselines.pair_markov(train, 5.0, 3.0), baselines.markov(train, 5.0)
    assert pair(unknown)[0] == pytest.approx(single(unknown)[0])


def test_ease_is_ridge_regression_without_the_cluster_itself():
    rows = some_rows()
    users = np.unique(rows.users)
    sets = np.zeros((len(users), 8))
    for user, seen, target in zip(rows.users, rows.seen, rows.targets, strict=True):
        sets[np.searchsorted(users, user)] += np.eye(8)[target] + seen
    sets = (sets > 0).astype(float)
    weights = np.zeros((8, 8))
    for cluster in range(8):  # each column by its own ridge regression
        others = [c for c in range(8) if c != cluster]
        gram = sets[:, others].T @ sets[:, others] + 2.0 * np.eye(7)
        weights[others, cluster] = np.linalg.solve(gram, sets[:, others].T @ sets[:, cluster])
    found = baselines.ease(rows, 2.0)(rows)
    np.testing.assert_allclose(found, rows.known_mask.astype(float) @ weights, atol=1e-8)


def test_moves_fade_by_halves():
    rows = some_rows(count=8)
    weights = 0.5 ** (np.arange(8)[::-1] / 8 / 0.25)  # a quarter of eight rows back weighs half
    assert weights[5] == 0.5 and weights[7] == 1.0
    counts = np.bincount(rows.targets, weights, minlength=8)
    assert baselines.popularity(rows, 0.25)(rows)[0] == pytest.approx(counts)
    newest = baselines.markov(rows, 1e-9, 1e-3)(rows)[7]  # all but the last row forgotten
    assert newest.argmax() == rows.targets[7]


def test_constants_are_chosen_on_validation():
    train, validation = some_rows(400, 30, seed=0), some_rows(300, 30, seed=1)
    fitted = baselines.fit_all(train, validation)
    assert set(fitted) == {"history", "seen"}
    assert set(fitted["seen"]) == {"popularity", "markov", "pair_markov", "ease"}

    def recall(baseline):
        ranks = metrics.ranks(baseline(validation), validation.targets, validation.history_mask)
        return metrics.recall(ranks, 10).mean()

    values = [recall(baselines.popularity(train, h)) for h in (None, 1 / 2, 1 / 4, 1 / 32)]
    assert len(set(values)) > 1
    assert recall(fitted["history"]["popularity"]) >= max(values)
    ridges = [recall(baselines.ease(train, ridge)) for ridge in (3.0, 100.0, 2000.0)]
    assert recall(fitted["history"]["ease"]) >= max(ridges)


def test_counts_are_fitted_with_all_seen_left_out():
    train, validation = some_rows(400, 30, seed=0), some_rows(300, 30, seed=1)
    fitted = baselines.fit_counts(train, validation)

    def recall(baseline):
        ranks = metrics.ranks(baseline(validation), validation.targets, validation.known_mask)
        return metrics.recall(ranks, 10).mean()

    all_of_them = baselines.fit_all(train, validation)["seen"]
    assert recall(fitted["popularity"]) == recall(all_of_them["popularity"])
    singles_and_pairs = [recall(all_of_them[name]) for name in ("markov", "pair_markov")]
    assert recall(fitted["markov"]) == max(singles_and_pairs)


def test_the_target_mean_weights_by_users_and_falls_back_to_the_overall_mean():
    found = collective.target_mean(
        np.array([0, 0, 2]), np.array([1.0, 0.4, 0.5]), np.array([1, 3, 4]), 3
    )
    assert found.tolist() == pytest.approx([(1.0 + 1.2) / 4, (1.0 + 1.2 + 2.0) / 8, 0.5])


def test_serendipity_is_a_hit_that_no_primitive_had():
    rank = np.array([0.0, 9.5, 3.0, 10.0, 2.0])
    primitives = np.array([[10.0, 50, 3, 70, 11], [12, 10, 40, 80, 9.5]])
    assert metrics.serendipity(rank, primitives, 10).tolist() == [1, 1, 0, 0, 0]


def test_the_nearest_clusters_are_those_of_the_highest_cosine_to_either_of_the_last_two():
    rows = some_rows(20)
    centroids = np.random.default_rng(0).normal(size=(8, 5)).astype(np.float32)
    found = baselines.nearest(centroids)(rows)
    for row, pair in enumerate(rows.last_two):
        for cluster in range(8):
            cosines = [
                centroids[cluster]
                @ centroids[last]
                / np.linalg.norm(centroids[cluster])
                / np.linalg.norm(centroids[last])
                for last in pair
            ]
            assert found[row, cluster] == pytest.approx(max(cosines), abs=1e-5)


@settings(deadline=None, max_examples=50)
@given(
    rows=st.lists(
        st.lists(st.tuples(st.integers(-2, 2), st.booleans()), min_size=4, max_size=4),
        min_size=1,
        max_size=5,
    ),
    k=st.integers(1, 6),
)
def test_top_lists_and_their_coverage_by_sorting(rows, k):
    scores = np.array([[value for value, _ in row] for row in rows], float)
    scores[scores == -2] = -np.inf
    excluded = np.array([[out for _, out in row] for row in rows])
    expected = []
    for row, out in zip(scores, excluded, strict=True):
        left = [c for c in range(4) if not out[c] and row[c] > -np.inf]
        best = sorted(left, key=lambda c, row=row: (-row[c], c))[:k]
        expected.append(best + [-1] * (k - len(best)))
    lists = metrics.top_lists(scores, excluded, k)
    assert lists.tolist() == expected
    assert metrics.coverage(lists, 4) == len({c for row in expected for c in row if c >= 0}) / 4


@settings(deadline=None, max_examples=50)
@given(
    recommended=st.lists(
        st.tuples(st.integers(0, 3), st.integers(-1, 4), st.integers(-1, 4)), min_size=1, max_size=8
    ),
    engaged=st.lists(st.tuples(st.integers(0, 4), st.integers(0, 6)), max_size=8),
    named=st.booleans(),
)
def test_engaged_pairs_are_an_intersection_of_sets(recommended, engaged, named):
    pairs = {(user, c) for user, *row in recommended for c in row if c >= 0} & set(engaged)
    users = sorted({user for user, *_ in recommended})
    expected = [sum(user == owner for owner, _ in pairs) for user in users]

    def name(numbers):
        return np.array([f"u{n}" for n in numbers], str) if named else np.array(numbers, int)

    found = metrics.engaged_pairs(
        np.array([row for _, *row in recommended]),
        name([user for user, *_ in recommended]),
        name([user for user, _ in engaged]),
        np.array([cluster for _, cluster in engaged], int),
    )
    assert found.tolist() == expected
