"""Novel transitions: what a user's last clusters were when a cluster new to them came up.

Everything here is an Ibis expression: it runs on DuckDB, or where the log is. The only joins are of
novel events with the clusters their user knew at the time, one row a cluster.
"""

from typing import NamedTuple

import ibis
import ibis.expr.types as ir

from recexplore.errors import InputError

_DAY = 86_400
_MIN_HISTORY = 2


class SplitTimes(NamedTuple):
    """Where time is cut: training before `validation`, testing from `test` on, in seconds."""

    validation: int
    test: int


def split_times(
    interactions: ir.Table, *, test_share: float = 0.2, validation_share: float = 0.1
) -> SplitTimes:
    """Cuts the log in time so that the last shares of the interactions are held out.

    Args:
      interactions: INTERACTIONS.
      test_share: part of the interactions in the test period.
      validation_share: part in the validation period before it.

    Raises:
      InputError: shares out of range, or all interactions at one time.
    """
    for name, share in (("test_share", test_share), ("validation_share", validation_share)):
        if not 0 < share < 1:
            raise InputError(
                f"transitions.split_times.{name} is {share}; it must lie between 0 and 1."
            )
    if test_share + validation_share >= 1:
        raise InputError(
            "transitions.split_times: test_share and validation_share leave nothing to train on; "
            f"they sum to {test_share + validation_share}."
        )
    time = interactions.timestamp
    cuts = interactions.aggregate(
        validation=time.quantile(1 - test_share - validation_share).cast("int64"),
        test=time.quantile(1 - test_share).cast("int64"),
        first=time.min(),
    ).to_pyarrow()
    validation, test, first = (cuts[name][0].as_py() for name in ("validation", "test", "first"))
    if not first < validation < test:
        raise InputError(
            "The log can't be split by time: its interactions are at too few different times "
            f"(first {first}, validation from {validation}, test from {test})."
        )
    return SplitTimes(validation, test)


def _moves(interactions: ir.Table, item_clusters: ir.Table) -> ir.Table:
    """One row for each user, time and cluster; the signals of several items are averaged or'ed."""
    events = interactions.join(item_clusters, "item_id")
    return events.group_by("user_id", "timestamp", "cluster_id").aggregate(
        watch_fraction=events.watch_fraction.mean(),
        liked=events.liked.any(),
        shared=events.shared.any(),
        skipped=events.skipped.all(),
        propensity=events.propensity.min(),
    )


def _known(moves: ir.Table) -> ir.Table:
    """Each move with the time until which it is the user's latest in its cluster."""
    window = ibis.window(group_by=[moves.user_id, moves.cluster_id], order_by=moves.timestamp)
    return moves.select(
        known_user=moves.user_id,
        known_cluster=moves.cluster_id,
        since=moves.timestamp,
        until=moves.timestamp.lead().over(window),
    )


def _known_before(points: ir.Table, known: ir.Table, look_back: int | None) -> ir.Table:
    """Joins points in a user's time with the clusters known strictly before, one row each."""
    conditions = [
        points.user_id == known.known_user,
        known.since < points.timestamp,
        known.until.isnull() | (known.until >= points.timestamp),
    ]
    if look_back is not None:
        conditions.append(known.since >= points.timestamp - look_back)
    return points.join(known, conditions)


def novel_transitions(
    interactions: ir.Table,
    item_clusters: ir.Table,
    splits: SplitTimes,
    *,
    max_history: int,
    look_back_days: int | float | None = None,
) -> ir.Table:
    """TRANSITIONS of a log: every move into a cluster that was new to its user.

    A user's moves are ordered by time; what has the same timestamp is not known to each other. A
    move is novel when its cluster is not among those of the user's earlier events within the
    look-back window (`seen`). Its history are the last distinct clusters, at most `max_history`, of
    the earlier events in that window that were not skipped. A cluster met in several items at once
    is one move: mean watch_fraction, liked or shared if any was, skipped if all were.

    Args:
      interactions: INTERACTIONS.
      item_clusters: ITEM_CLUSTERS.
      splits: where validation and test begin; a transition belongs where its timestamp is.
      max_history: longest history kept.
      look_back_days: how long a cluster stays known; None: for ever.

    Returns:
      Rows with at least two clusters of history.
    """
    look_back = _seconds(look_back_days)
    if max_history < _MIN_HISTORY:
        raise InputError(
            f"The longest history is {max_history}; pipeline.aggregate.history_length and the "
            f"values of pipeline.tokenize.novelty_histories must be at least {_MIN_HISTORY}."
        )
    moves = _moves(interactions, item_clusters)
    window = ibis.window(group_by=[moves.user_id, moves.cluster_id], order_by=moves.timestamp)
    before = moves.timestamp.lag().over(window)
    marked = moves.mutate(before=before)
    is_novel = marked.before.isnull()
    if look_back is not None:
        is_novel = is_novel | (marked.before < marked.timestamp - look_back)
    novel = marked.filter(is_novel).drop("before")
    key = ["user_id", "timestamp", "cluster_id"]

    engaged = _known(moves.filter(~moves.skipped))
    latest = _known_before(novel.select(*key), engaged, look_back)
    recency = ibis.window(group_by=key, order_by=[ibis.desc("since"), ibis.desc("known_cluster")])
    latest = latest.mutate(place=ibis.row_number().over(recency))
    latest = latest.filter(latest.place < max_history)
    histories = latest.group_by(key).aggregate(
        history=latest.known_cluster.collect(order_by=latest.place.desc())
    )
    met = _known_before(novel.select(*key), _known(moves), look_back)
    seen = met.group_by(key).aggregate(seen=met.known_cluster.collect(order_by=met.known_cluster))

    rows = novel.join(histories, key).join(seen, key)
    rows = rows.filter(rows.history.length() >= _MIN_HISTORY)
    split = ibis.cases(
        (rows.timestamp < splits.validation, "train"),
        (rows.timestamp < splits.test, "validation"),
        else_="test",
    )
    return rows.mutate(split=split).rename(next_cluster="cluster_id")


def histories_in_log(
    interactions: ir.Table,
    item_clusters: ir.Table,
    *,
    history_length: int,
    look_back_days: int | float | None = None,
) -> ir.Table:
    """HISTORIES: the last `history_length` clusters at which some user stood after some event.

    Args:
      interactions: INTERACTIONS.
      item_clusters: ITEM_CLUSTERS.
      history_length: K.
      look_back_days: as in `novel_transitions`.
    """
    moves = _moves(interactions, item_clusters)
    engaged = moves.filter(~moves.skipped)
    points = engaged.select("user_id", timestamp=engaged.timestamp + 1).distinct()
    latest = _known_before(points, _known(engaged), _seconds(look_back_days))
    key = ["user_id", "timestamp"]
    recency = ibis.window(group_by=key, order_by=[ibis.desc("since"), ibis.desc("known_cluster")])
    latest = latest.mutate(place=ibis.row_number().over(recency))
    latest = latest.filter(latest.place < history_length)
    places = {
        f"h{place}": latest.known_cluster.max(where=latest.place == history_length - 1 - place)
        for place in range(history_length)
    }
    stands = latest.group_by(key).aggregate(**places)
    stands = stands.filter(stands.h0.notnull())
    counted = stands.group_by(list(places)).aggregate(count=stands.count())
    return counted.select(
        history=ibis.array([counted[name] for name in places]), count=counted["count"]
    )


def _seconds(look_back_days: int | float | None) -> int | None:
    if look_back_days is None:
        return None
    if not look_back_days > 0:
        raise InputError(
            f"pipeline.aggregate.look_back_days is {look_back_days}; it must be positive, or None "
            "for the whole log."
        )
    return int(look_back_days * _DAY)
