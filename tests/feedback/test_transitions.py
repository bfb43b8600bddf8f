"""Novel transitions: the Ibis expressions against a walk through every user's events."""

import ibis
import pyarrow as pa
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from recexplore import artifacts
from recexplore.errors import InputError
from recexplore.feedback import transitions
from recexplore.feedback.transitions import SplitTimes

DAY = 86_400
SPLITS = SplitTimes(validation=6 * DAY, test=8 * DAY)
PROPENSITY = [None, 0.5, 0.25, 0.5, 0.75, None, None]  # of items
EVENTS = st.lists(
    st.tuples(
        st.sampled_from("ab"),  # user
        st.integers(0, 9),  # day
        st.integers(0, 6),  # item; two items share a cluster
        st.booleans(),  # skipped
    ),
    min_size=1,
    max_size=40,
    unique_by=lambda event: event[:3],
)

TWO_ITEMS_AT_ONCE = [("a", 0, 0, False), ("a", 1, 4, False), ("a", 2, 2, True), ("a", 2, 3, False)]


def as_tables(events):
    interactions = pa.table(
        {
            "user_id": [u for u, *_ in events],
            "timestamp": [day * DAY for _, day, *_ in events],
            "item_id": [f"v{item}" for *_, item, _ in events],
            "watch_fraction": pa.array([item / 8 for *_, item, _ in events], pa.float32()),
            "liked": [item % 3 == 0 for *_, item, _ in events],
            "shared": [item == 5 for *_, item, _ in events],
            "skipped": [skipped for *_, skipped in events],
            "propensity": pa.array([PROPENSITY[item] for *_, item, _ in events], pa.float32()),
        }
    )
    clusters = pa.array([i // 2 for i in range(7)], pa.int32())
    items = pa.table({"item_id": [f"v{i}" for i in range(7)], "cluster_id": clusters})
    return ibis.memtable(interactions), ibis.memtable(items)


def walk(events, max_history, look_back):
    """Every user's events in order of time, the plain way."""
    found = []
    for user in sorted({event[0] for event in events}):
        mine = sorted(event[1:] for event in events if event[0] == user)
        for day in sorted({day for day, *_ in mine}):
            past = [
                e for e in mine if e[0] < day and (look_back is None or e[0] >= day - look_back)
            ]
            seen = sorted({item // 2 for _, item, _ in past})
            last = {}
            for when, item, skipped in past:
                if not skipped:
                    last[item // 2] = max(when, last.get(item // 2, -1))
            history = [c for _, c in sorted((when, c) for c, when in last.items())][-max_history:]
            for cluster in sorted({item // 2 for when, item, _ in mine if when == day}):
                here = [e for e in mine if e[0] == day and e[1] // 2 == cluster]
                if cluster not in seen and len(history) >= 2:
                    found.append(
                        {
                            "user_id": user,
                            "timestamp": day * DAY,
                            "split": "train" if day < 6 else "validation" if day < 8 else "test",
                            "history": history,
                            "next_cluster": cluster,
                            "seen": seen,
                            "watch_fraction": sum(item / 8 for _, item, _ in here) / len(here),
                            "liked": any(item % 3 == 0 for _, item, _ in here),
                            "shared": any(item == 5 for _, item, _ in here),
                            "propensity": min(
                                (PROPENSITY[i] for _, i, _ in here if PROPENSITY[i] is not None),
                                default=None,
                            ),
                            "skipped": all(skipped for *_, skipped in here),
                        }
                    )
    return sorted(found, key=lambda row: (row["timestamp"], row["user_id"], row["next_cluster"]))


@pytest.mark.parametrize("look_back", [None, 3])
@settings(max_examples=40, deadline=None)
@given(events=EVENTS, max_history=st.integers(2, 4))
@example(events=TWO_ITEMS_AT_ONCE, max_history=2)
def test_transitions_are_those_of_a_plain_walk(look_back, events, max_history):
    table = transitions.novel_transitions(
        *as_tables(events), SPLITS, max_history=max_history, look_back_days=look_back
    )
    rows = table.order_by("timestamp", "user_id", "next_cluster").to_pyarrow()
    expected = walk(events, max_history, look_back)
    names = list(expected[0]) if expected else ["user_id"]
    assert rows.select(names).to_pylist() == [{n: row[n] for n in names} for row in expected]


@pytest.mark.parametrize("look_back", [None, 3])
@settings(max_examples=40, deadline=None)
@given(events=EVENTS, length=st.integers(1, 3))
def test_histories_are_where_users_stood_after_an_engaged_event(look_back, events, length):
    table = transitions.histories_in_log(
        *as_tables(events), history_length=length, look_back_days=look_back
    )
    found = {tuple(r["history"]): r["count"] for r in table.to_pyarrow().to_pylist()}
    expected = {}
    for user in {event[0] for event in events}:
        engaged = sorted((day, item // 2) for u, day, item, s in events if u == user and not s)
        for day in {day for day, _ in engaged}:
            known = [
                (when, cluster)
                for when, cluster in engaged
                if when <= day and (look_back is None or when > day - look_back)
            ]
            last = {c: max(d for d, x in known if x == c) for _, c in known}
            state = tuple(c for _, c in sorted((d, c) for c, d in last.items()))[-length:]
            if len(state) == length:
                expected[state] = expected.get(state, 0) + 1
    assert found == expected


@pytest.mark.parametrize("look_back", [None, 3])
@settings(max_examples=40, deadline=None)
@given(events=EVENTS, length=st.integers(1, 3), users=st.sampled_from(["a", "ab"]))
@example(events=TWO_ITEMS_AT_ONCE, length=1, users="a")
def test_impressions_stand_beside_what_their_user_knew(look_back, events, length, users):
    interactions, clusters = as_tables(events)
    clusters = clusters.filter(clusters.cluster_id != 3)
    table = transitions.impressions(
        interactions,
        clusters,
        start=5 * DAY,
        users=list(users),
        history_length=length,
        look_back_days=look_back,
    )
    expected = []
    for user, day, item, _ in events:
        past = [
            (when, i // 2, skipped)
            for u, when, i, skipped in events
            if u == user
            and when < day
            and i != 6
            and (look_back is None or when >= day - look_back)
        ]
        last = {c: max(w for w, x, s in past if x == c and not s) for _, c, s in past if not s}
        history = [c for _, c in sorted((when, c) for c, when in last.items())][-length:]
        if user in users and day >= 5 and len(history) == length:
            expected.append(
                {
                    "user_id": user,
                    "timestamp": day * DAY,
                    "item_id": f"v{item}",
                    "cluster_id": None if item == 6 else item // 2,
                    "watch_fraction": item / 8,
                    "propensity": PROPENSITY[item],
                    "history": history,
                    "seen": sorted({c for _, c, _ in past}),
                }
            )
    key = ("user_id", "timestamp", "item_id")
    found = table.to_pyarrow().select(list(expected[0]) if expected else key).to_pylist()
    assert sorted(found, key=lambda row: [row[name] for name in key]) == sorted(
        expected, key=lambda row: [row[name] for name in key]
    )


def test_items_shown_before_a_time_have_been_shown_to_anyone():
    events = [("a", 1, 0, True), ("b", 2, 1, False), ("a", 3, 2, False), ("a", 1, 6, False)]
    interactions, clusters = as_tables(events)
    table = transitions.items_shown_before(interactions, clusters, 3 * DAY).order_by("item_id")
    rows = table.to_pyarrow().to_pylist()
    assert rows == [
        {"item_id": "v0", "cluster_id": 0},
        {"item_id": "v1", "cluster_id": 0},
        {"item_id": "v6", "cluster_id": 3},
    ]


def test_the_table_fits_its_schema(tmp_path):
    events = [("a", day, day % 7, False) for day in range(7)]
    table = transitions.novel_transitions(*as_tables(events), SPLITS, max_history=3).to_pyarrow()
    artifacts.write_table(tmp_path / "t.parquet", table, artifacts.TRANSITIONS)
    assert artifacts.read_table(tmp_path / "t.parquet", artifacts.TRANSITIONS).num_rows == 2


def test_a_later_event_never_changes_an_earlier_transition():
    events = [("a", day, item, False) for day, item in enumerate([0, 2, 4, 6])]
    rows = []
    for log in (events, [*events, ("a", 9, 5, False), ("a", 8, 1, True)]):
        table = transitions.novel_transitions(*as_tables(log), SPLITS, max_history=3)
        rows.append(table.filter(table.timestamp < 4 * DAY).order_by("timestamp").to_pyarrow())
    assert rows[0].equals(rows[1])


@settings(max_examples=20, deadline=None)
@given(events=EVENTS)
def test_training_rows_are_the_same_whatever_comes_after_the_cut(events):
    rows = []
    for log in (events, [event for event in events if event[1] < 6]):
        if log:
            table = transitions.novel_transitions(*as_tables(log), SPLITS, max_history=3)
            train = table.filter(table.split == "train")
            rows.append(train.order_by("timestamp", "user_id", "next_cluster").to_pyarrow())
    assert all(table.equals(rows[0]) for table in rows)


@pytest.mark.parametrize("look_back", [None, 3])
@settings(max_examples=20, deadline=None)
@given(events=EVENTS)
def test_what_is_in_no_transition_is_counted(look_back, events):
    """The novel moves of a plain walk, whatever their history, and items of no cluster."""
    interactions, clusters = as_tables(events)
    clusters = clusters.filter(clusters.cluster_id != 3)
    table = transitions.novel_transitions(
        interactions, clusters, SPLITS, max_history=2, look_back_days=look_back
    )
    known = [(user, day, item // 2) for user, day, item, _ in events if item != 6]
    novel = {
        (user, day, c)
        for user, day, c in known
        if not any(
            (u, x) == (user, c) and d < day and (look_back is None or d >= day - look_back)
            for u, d, x in known
        )
    }
    found = table.count().to_pyarrow().as_py()
    assert transitions.count_left_out(
        interactions, clusters, num_transitions=found, look_back_days=look_back
    ) == {
        "interactions without a cluster": len(events) - len(known),
        "novel moves in the first days": 0,
        "novel moves with fewer than 2 clusters of history": len(novel) - found,
    }


@settings(max_examples=20, deadline=None)
@given(events=EVENTS, days=st.integers(1, 5))
def test_the_first_days_tell_what_users_know_and_give_no_transitions(events, days):
    interactions, clusters = as_tables(events)

    def rows(burn_in):
        table = transitions.novel_transitions(
            interactions, clusters, SPLITS, max_history=3, burn_in_days=burn_in
        )
        return table.order_by("timestamp", "user_id", "next_cluster").to_pyarrow().to_pylist()

    first = interactions.timestamp.min().to_pyarrow().as_py()
    kept = [row for row in rows(0) if row["timestamp"] >= first + days * 86_400]
    assert rows(days) == kept
    counted = transitions.count_left_out(
        interactions, clusters, num_transitions=len(kept), burn_in_days=days
    )
    whole = transitions.count_left_out(interactions, clusters, num_transitions=len(kept))
    short = "novel moves with fewer than 2 clusters of history"
    early = counted["novel moves in the first days"]
    assert early + counted[short] == whole[short]


def test_time_is_cut_by_shares_of_the_interactions():
    times = ibis.memtable({"timestamp": list(range(1000))})
    splits = transitions.split_times(times, train_share=0.7, validation_share=0.1)
    assert abs(splits.validation - 700) <= 1 and abs(splits.test - 800) <= 1


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda t: transitions.split_times(t, train_share=0.0), "train_share is 0.0"),
        (lambda t: transitions.split_times(t, train_share=0.9), "they sum to 1.0"),
        (lambda t: transitions.split_times(t.filter(t.timestamp == 0)), "can't be split by time"),
        (lambda t: transitions.split_times(t.filter(t.timestamp < 0)), "has no interactions"),
        (
            lambda t: transitions.histories_in_log(t, t, history_length=0),
            "pipeline.aggregate.history_length is 0",
        ),
        (
            lambda t: transitions.histories_in_log(
                t, t, history_length=1, look_back_days=float("inf")
            ),
            "look_back_days is inf",
        ),
        (
            lambda t: transitions.novel_transitions(t, t, SPLITS, max_history=1),
            "longest history is 1",
        ),
        (
            lambda t: transitions.novel_transitions(t, t, SPLITS, max_history=2, look_back_days=0),
            "look_back_days is 0",
        ),
    ],
)
def test_arguments_out_of_range_are_named(call, message):
    interactions, _ = as_tables([("a", day, 0, False) for day in range(9)])
    with pytest.raises(InputError, match=message):
        call(interactions)
