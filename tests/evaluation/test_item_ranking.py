"""Next items, baselines and ranks beside loops over the log."""

import numpy as np
import pyarrow as pa
import pytest

from recexplore import artifacts
from recexplore.evaluation import item_ranking, metrics
from recexplore.feedback.engagements import popularity, read_engagements

NUM_ITEMS, NUM_USERS = 24, 9
CLUSTERS = np.arange(NUM_ITEMS) * 7 % 4
VALIDATION, TEST = 60, 80


def some_log(seed=0, rows=400):
    """A log with users who come back to items, some of them skipped, and ties in time."""
    random = np.random.default_rng(seed)
    return pa.table(
        {
            "user_id": [f"u{u}" for u in random.integers(0, NUM_USERS, rows)],
            "item_id": [f"v{i}" for i in random.integers(0, NUM_ITEMS + 2, rows)],  # two unknown
            "timestamp": random.integers(0, 100, rows),
            "watch_fraction": np.ones(rows, np.float32),
            "liked": np.zeros(rows, bool),
            "shared": np.zeros(rows, bool),
            "skipped": random.random(rows) < 0.3,
            "propensity": pa.nulls(rows, pa.float32()),
            "policy": pa.nulls(rows, pa.string()),
        }
    ).cast(artifacts.INTERACTIONS)


LOG = some_log()
MET = read_engagements(LOG, pa.array([f"v{i}" for i in range(NUM_ITEMS)]))
ROWS = item_ranking.next_items(MET, CLUSTERS, start=TEST)


def first_meetings():
    """user → [(time, item, engaged)], from the log, the first of each item; ties in time left out
    where they would decide which was first."""
    found = {}
    for row in LOG.to_pylist():
        item = int(row["item_id"][1:])
        if item < NUM_ITEMS:
            meetings = found.setdefault(row["user_id"], {})
            known = meetings.get(item)
            here = (row["timestamp"], {not row["skipped"]})
            if known is None or here[0] < known[0]:
                meetings[item] = here
            elif here[0] == known[0]:
                known[1].update(here[1])
    return found


def test_engagements_are_every_user_s_first_meetings_oldest_first():
    expected = first_meetings()
    assert set(MET.user_ids) == set(expected)
    for user, own in zip(MET.user_ids.tolist(), MET.each(), strict=True):
        assert np.all(np.diff(MET.times[own]) >= 0)
        meetings = expected[user]
        assert sorted(MET.items[own].tolist()) == sorted(meetings)
        for item, time, engaged in zip(
            MET.items[own].tolist(), MET.times[own].tolist(), MET.engaged[own].tolist(), strict=True
        ):
            assert time == meetings[item][0] and engaged in meetings[item][1]


def test_parts_of_engagements_are_those_of_the_users_and_the_time():
    early = MET.before(50)
    assert early.times.max() < 50 and len(early.times) == np.sum(MET.times < 50)
    some = MET.of(np.array([4, 1]))
    assert some.user_ids.tolist() == MET.user_ids[[4, 1]].tolist()
    own = slice(MET.starts[1], MET.starts[2])
    np.testing.assert_array_equal(some.items[some.starts[1] :], MET.items[own])


def test_next_items_know_nothing_of_their_own_time_or_later():
    wanted = MET.engaged & (MET.times >= TEST)
    assert len(ROWS.targets) == wanted.sum()
    rows = zip(ROWS.users, ROWS.targets, ROWS.contexts, ROWS.met, strict=True)
    for user, target, context, met in rows:
        own = slice(MET.starts[user], MET.starts[user + 1])
        items, times, engaged = MET.items[own], MET.times[own], MET.engaged[own]
        now = times[items == target][0]
        assert sorted(met.tolist()) == sorted(items[times < now].tolist())
        assert context.tolist() == items[(times < now) & engaged].tolist()
        assert target not in met


def test_a_sample_of_users_has_all_their_rows():
    some = item_ranking.next_items(MET, CLUSTERS, start=TEST, users=3, seed=1)
    assert len(np.unique(some.users)) == 3
    assert len(some.targets) == np.isin(ROWS.users, some.users).sum()


def by_hand(scores):
    """Ranks of the targets, by sorting what is left of their clusters."""
    found = []
    for row, (target, met) in enumerate(zip(ROWS.targets, ROWS.met, strict=True)):
        left = [i for i in range(NUM_ITEMS) if CLUSTERS[i] == CLUSTERS[target] and i not in met]
        own = scores[row][target]
        above = sum(scores[row][i] > own for i in left)
        found.append(above + (sum(scores[row][i] == own for i in left) - 1) / 2)
    return np.array(found)


@pytest.mark.parametrize("half_life", [None, 0.25])
def test_popularity_counts_engagements_and_lets_them_fade(half_life):
    train = MET.before(VALIDATION)
    kept = np.flatnonzero(train.engaged)
    order = kept[np.argsort(train.times[kept], kind="stable")]
    counts = np.zeros(NUM_ITEMS)
    for age, place in enumerate(order[::-1].tolist()):
        weight = 1.0 if half_life is None else 0.5 ** (age / len(order) / half_life)
        counts[train.items[place]] += weight
    np.testing.assert_allclose(popularity(train, NUM_ITEMS, half_life), counts)
    ranks = item_ranking.ranks(
        ROWS, CLUSTERS, item_ranking.by_popularity(train, NUM_ITEMS, half_life)
    )
    expected = by_hand([popularity(train, NUM_ITEMS, half_life)] * len(ROWS.targets))
    np.testing.assert_allclose(ranks, expected)


@pytest.mark.parametrize(("last", "power"), [(2, 0.5), (50, 0.0)])
def test_cooccurrence_counts_users_who_engaged_with_both(last, power):
    train = MET.before(VALIDATION)
    baskets = [set(train.items[own][train.engaged[own]].tolist()) for own in train.each()]
    alone = np.array([sum(i in basket for basket in baskets) for i in range(NUM_ITEMS)])
    scores = np.zeros((len(ROWS.targets), NUM_ITEMS))
    for row, context in enumerate(ROWS.contexts):
        for i in context[-last:].tolist():
            for j in range(NUM_ITEMS):
                both = sum(i in basket and j in basket for basket in baskets)
                scores[row, j] += both / max(alone[i] * alone[j], 1) ** power
    scores += 1e-6 * alone / alone.max()
    asked = item_ranking.by_cooccurrence(train, NUM_ITEMS, last, power)
    np.testing.assert_allclose(asked(ROWS, np.arange(NUM_ITEMS)), scores, atol=1e-9)


def test_baselines_have_the_constants_that_are_best_on_validation(monkeypatch):
    monkeypatch.setattr(item_ranking, "_HALF_LIVES", (None, 0.1))
    validation = item_ranking.next_items(MET, CLUSTERS, start=VALIDATION, until=TEST)
    train = MET.before(VALIDATION)
    chosen = item_ranking.fit_baselines(train, validation, CLUSTERS)["items_popularity"]

    def quality(scores):
        return metrics.ndcg(item_ranking.ranks(validation, CLUSTERS, scores), 10).mean()

    candidates = [item_ranking.by_popularity(train, NUM_ITEMS, each) for each in (None, 0.1)]
    assert quality(chosen) == max(map(quality, candidates))


def test_lists_are_ranked_whatever_the_chunks_and_metrics_have_intervals():
    def recommend(rows):  # odd targets come second
        second = np.where(rows.targets % 2, rows.targets, -1)
        return np.stack([np.full(len(second), -1), second], axis=1)

    found = item_ranking.ranks_in_clusters(ROWS, recommend, lambda *_: None, at_once=7)
    np.testing.assert_array_equal(found, np.where(ROWS.targets % 2, 1, np.inf))
    told = item_ranking.ranking_metrics(ROWS.users, {"items": found})
    share = np.mean(ROWS.targets % 2)
    assert told["items/recall@5"] == pytest.approx(share)
    assert told["items/ndcg@10"] == pytest.approx(share / np.log2(3))
    assert told["items/recall@10_low"] <= share <= told["items/recall@10_high"]
