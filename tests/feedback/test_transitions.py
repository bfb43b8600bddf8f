"""Novel transitions: the Ibis expressions against a walk through every user's events."""

import ibis
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from recexplore import artifacts
from recexplore.errors import InputError
from recexplore.feedback import transitions
from recexplore.feedback.transitions import SplitTimes

DAY = 86_400
SPLITS = SplitTimes(validation=6 * DAY, test=8 * DAY)
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


def as_tables(events):
    interactions = pa.table(
        {
            "user_id": [u for u, *_ in events],
            "timestamp": [day * DAY for _, day, *_ in events],
            "item_id": [f"v{item}" for *_, item, _ in events],
            "watch_fraction": pa.array([item / 10 for *_, item, _ in events], pa.float32()),
            "liked": [item % 3 == 0 for *_, item, _ in events],
            "shared": [False for _ in events],
            "skipped": [skipped for *_, skipped in events],
            "propensity": pa.array([None for _ in events], pa.float32()),
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
                            "liked": any(item % 3 == 0 for _, item, _ in here),
                            "skipped": all(skipped for *_, skipped in here),
                        }
                    )
    return sorted(found, key=lambda row: (row["timestamp"], row["user_id"], row["next_cluster"]))


@pytest.mark.parametrize("look_back", [None, 3])
@settings(max_examples=40, deadline=None)
@given(events=EVENTS, max_history=st.integers(2, 4))
def test_transitions_are_those_of_a_plain_walk(look_back, events, max_history):
    table = transitions.novel_transitions(
        *as_tables(events), SPLITS, max_history=max_history, look_back_days=look_back
    )
    rows = table.order_by("timestamp", "user_id", "next_cluster").to_pyarrow()
    expected = walk(events, max_history, look_back)
    names = list(expected[0]) if expected else ["user_id"]
    assert rows.select(names).to_pylist() == [{n: row[n] for n in names} for row in expected]


@settings(max_examples=40, deadline=None)
@given(events=EVENTS, length=st.integers(1, 3))
def test_histories_are_where_users_stood_after_an_engaged_event(events, length):
    table = transitions.histories_in_log(*as_tables(events), history_length=length)
    found = {tuple(r["history"]): r["count"] for r in table.to_pyarrow().to_pylist()}
    expected = {}
    for user in {event[0] for event in events}:
        engaged = sorted((day, item // 2) for u, day, item, s in events if u == user and not s)
        for day in {day for day, _ in engaged}:
            last = {
                c: max(d for d, x in engaged if x == c and d <= day) for d, c in engaged if d <= day
            }
            state = tuple(c for _, c in sorted((d, c) for c, d in last.items()))[-length:]
            if len(state) == length:
                expected[state] = expected.get(state, 0) + 1
    assert found == expected


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


def test_time_is_cut_by_shares_of_the_interactions():
    times = ibis.memtable({"timestamp": list(range(1000))})
    splits = transitions.split_times(times, test_share=0.2, validation_share=0.1)
    assert abs(splits.validation - 700) <= 1 and abs(splits.test - 800) <= 1


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda t: transitions.split_times(t, test_share=0.0), "test_share is 0.0"),
        (lambda t: transitions.split_times(t, test_share=0.9), "they sum to 1.0"),
        (lambda t: transitions.split_times(t.filter(t.timestamp == 0)), "can't be split by time"),
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
