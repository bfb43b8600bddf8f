"""Who is shown what, how often, and with which probability."""

import collections
import itertools

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest
import scipy.stats

from recexplore import artifacts
from recexplore.errors import InputError
from recexplore.serving.exploration import Exploration
from recexplore.serving.item_recommender import Ranked
from recexplore.serving.planner import (
    Budget,
    Event,
    Planner,
    Request,
    impressions,
)

DAY, NOW = 86_400, 1_700_000_000
M, PER_CLUSTER = 6, 3
ITEMS = [f"i{cluster}{place}" for cluster in range(M) for place in range(PER_CLUSTER)]
CLUSTERS = {item: int(item[1]) for item in ITEMS}
SCORES = {5: 2.0, 4: 1.5, 3: 0.0, 2: -1.0}


class Recommender:
    """A cluster's items in order, each a bit worse than the one before."""

    item_ids = ITEMS

    def number(self, item_id):
        return ITEMS.index(item_id) if item_id in ITEMS else None

    def recommend(self, sequences, clusters, count, excluded=()):
        items = np.full((*clusters.shape, count), -1, np.int32)
        scores = np.full(items.shape, -np.inf, np.float32)
        for row, place in itertools.product(*map(range, clusters.shape)):
            cluster = int(clusters[row, place])
            own = range(cluster * PER_CLUSTER, (cluster + 1) * PER_CLUSTER) if cluster >= 0 else ()
            seen = {*sequences[row], *excluded[row]}
            for at, item in enumerate([item for item in own if item not in seen][:count]):
                items[row, place, at], scores[row, place, at] = item, -0.5 * at
        return Ranked(items, scores)


def look_up(history, banned):
    """The best of four, whatever the history."""
    kept = [c for c in SCORES if c not in history and c not in banned]
    return Exploration(kept, [SCORES[c] for c in kept], [-1.0] * len(kept), [1.0] * len(kept), "x")


def planner(**budget):
    return Planner(look_up, Recommender(), CLUSTERS, Budget(**budget))


def event(item, days_ago, **what):
    return Event(item, NOW - int(days_ago * DAY), **what)


HISTORY = [event("i00", 3), event("i10", 2)]


def test_the_best_item_of_the_best_cluster():
    (planned,) = planner().plan("u", HISTORY, NOW)
    assert planned == ("i50", 5, 1.0, 2.0, -1.0, "x")
    plan = planner(num_clusters=9, cap=9).plan("u", HISTORY, NOW)
    assert [p.item_id for p in plan] == ["i50", "i40", "i30", "i20"]
    assert planner().plan("new", [], NOW)[0].item_id == "i50"


def test_nothing_that_was_met_is_shown_again():
    events = [event("i50", 30, skipped=True), event("i51", 20, skipped=True), *HISTORY]
    assert planner().plan("u", events, NOW)[0].item_id == "i52"
    events = [event("i52", 40, skipped=True), *events]
    assert planner().plan("u", events, NOW)[0].item_id == "i40"  # the cluster has nothing left


def test_clusters_rest_after_a_skip_and_after_an_exploration():
    for what in ({"skipped": True}, {"explored": True, "skipped": True}):
        for days, expected in ((6.9, 4), (7.1, 5)):
            events = [*HISTORY, event("i50", days, **what)]
            events.sort(key=lambda e: e.timestamp)
            assert planner().plan("u", events, NOW)[0].cluster == expected
    engaged = [event("i50", 300), *HISTORY]
    assert planner().plan("u", engaged, NOW)[0].cluster == 4  # what is known is never novel …
    assert planner(novel_days=200.0).plan("u", engaged, NOW)[0].cluster == 5  # … unless long ago


def test_a_user_is_shown_no_more_than_the_cap():
    offered = [event(f"i{c}0", 0.2 - 0.1 * c, explored=True) for c in (0, 1)]
    explorations = [len(planner(cap=cap).plan("u", offered, NOW)) for cap in (1, 2, 3, 9)]
    assert explorations == [0, 0, 1, 1]
    many = planner(cap=3, num_clusters=4)
    assert len(many.plan("u", offered, NOW)) == 1
    assert len(many.plan("u", offered, NOW + DAY)) == 3


def test_the_budget_is_a_share_of_the_plans():
    users = [Request(f"u{i}", HISTORY, NOW) for i in range(2000)]
    plans = planner(share=0.3).plan_all(users)
    explored = sum(map(len, plans))
    assert scipy.stats.binomtest(explored, len(users), 0.3).pvalue > 1e-3
    assert {p.propensity for plan in plans for p in plan} == {0.3}


def test_propensities_are_how_often_it_happens():
    random = planner(temperature=0.8, item_temperature=0.6, num_items=2, share=0.5)
    times = range(NOW, NOW + 3000)
    seen, told = collections.Counter(), {}
    for now in times:
        for planned in random.plan("u", HISTORY, now):
            seen[planned.item_id] += 1
            before = told.setdefault(planned.item_id, planned.propensity)
            assert planned.propensity == pytest.approx(before)
    assert len(told) == 8
    np.testing.assert_allclose(sum(told.values()), 0.5)
    weights = {c: np.exp(s / 0.8) for c, s in SCORES.items()}
    of_cluster = {c: w / sum(weights.values()) for c, w in weights.items()}
    first = 1 / (1 + np.exp(-0.5 / 0.6))
    for item, propensity in told.items():
        of_item = first if item.endswith("0") else 1 - first
        np.testing.assert_allclose(propensity, 0.5 * of_cluster[CLUSTERS[item]] * of_item)
    counts = np.array([seen[item] for item in told])
    expected = np.array([*told.values()])
    assert scipy.stats.chisquare(counts, counts.sum() * expected / expected.sum()).pvalue > 1e-3
    assert scipy.stats.binomtest(int(counts.sum()), len(times), 0.5).pvalue > 1e-3


def test_a_choice_that_is_all_but_certain_has_a_propensity_all_the_same():
    plan = planner(num_clusters=4, cap=9, temperature=0.001, share=0.9).plan("u", HISTORY, NOW + 1)
    assert [p.cluster for p in plan] == [5, 4, 3, 2]
    assert [p.propensity for p in plan] == pytest.approx([0.9, 1.0, 1.0, 1.0])


@hypothesis.settings(deadline=None)
@hypothesis.given(
    st.lists(
        st.tuples(st.sampled_from([*ITEMS, "unknown"]), st.floats(0, 20), st.booleans()),
        max_size=12,
    ),
    st.integers(1, 4),
)
def test_plans_keep_their_promises_and_are_the_same_alone_and_together(met, num_clusters):
    events = sorted(
        (event(item, days, skipped=skipped) for item, days, skipped in met),
        key=lambda e: e.timestamp,
    )
    ours = planner(num_clusters=num_clusters, temperature=0.5, item_temperature=0.5, cap=3)
    requests = [Request("u", events, NOW), Request("v", HISTORY, NOW), Request("w", [], NOW)]
    plans = ours.plan_all(requests)
    assert plans == [ours.plan(*request) for request in requests]
    plan = plans[0]
    assert len(plan) <= min(num_clusters, 3)
    assert len({p.cluster for p in plan}) == len(plan)
    engaged = {CLUSTERS[e.item_id] for e in events if e.item_id in CLUSTERS and not e.skipped}
    for planned in plan:
        assert planned.item_id not in {e.item_id for e in events}
        assert CLUSTERS[planned.item_id] == planned.cluster not in engaged
        assert 0 < planned.propensity <= 1


def test_what_was_planned_is_logged():
    requests = [Request("u", HISTORY, NOW), Request("v", [], NOW)]
    table = impressions(requests, planner(share=0.999).plan_all(requests))
    assert table.schema.equals(artifacts.PLANS)
    assert table.to_pylist()[0] == {
        "user_id": "u",
        "item_id": "i50",
        "timestamp": NOW,
        "propensity": pytest.approx(0.999),
        "policy": "exploration",
        "cluster_id": 5,
    }
    assert impressions(requests, [[], []]).num_rows == 0


@pytest.mark.parametrize(
    "events",
    [[event("i00", 1), event("i10", 2)], [event("i00", -1)]],
)
def test_events_out_of_order_or_in_the_future_are_refused(events):
    with pytest.raises(InputError, match="'u' aren't in order of time.*oldest first"):
        planner().plan("u", events, NOW)


@pytest.mark.parametrize(
    ("field", "value", "rule"),
    [
        ("num_clusters", 0, "at least 1"),
        ("cap", 0, "at least 1"),
        ("share", 0.0, "0..1, above 0"),
        ("share", 1.5, "0..1, above 0"),
        ("temperature", -1.0, "from 0 on"),
        ("novel_days", 0.0, "above 0, or None"),
        ("seed", -1, "at least 0"),
    ],
)
def test_a_budget_out_of_range_is_refused(field, value, rule):
    with pytest.raises(InputError, match=rf"planner.Budget.{field} is {value!r}; it must.*{rule}"):
        Budget(**{field: value})
