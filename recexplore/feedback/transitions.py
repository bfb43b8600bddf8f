"""Novel transitions: what a user's last clusters were when a cluster new to them came up.

Everything here is an Ibis expression: it runs on DuckDB, or where the log is. The only joins are of
novel events with the clusters their user knew at the time, one row a cluster.
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import ibis
import ibis.expr.types as ir
import numpy as np
import pyarrow as pa
from jaxtyping import Float

from recexplore.errors import InputError

_DAY = 86_400
_MIN_HISTORY = 2


class SplitTimes(NamedTuple):
    """Where time is cut: training before `validation`, testing from `test` on, in seconds."""

    validation: int
    test: int


def split_times(
    interactions: ir.Table, *, train_share: float = 0.7, validation_share: float = 0.1
) -> SplitTimes:
    """Cuts the log in time: first training, then validation, and the rest for testing.

    Args:
      interactions: INTERACTIONS.
      train_share: part of the interactions in the training period.
      validation_share: part in the validation period after it.

    Raises:
      InputError: shares out of range, no interactions, or all of them at one time.
    """
    for name, share in (("train_share", train_share), ("validation_share", validation_share)):
        if not isinstance(share, int | float) or not 0 < share < 1:
            raise InputError(
                f"transitions.split_times.{name} is {share!r}; it must be a number between 0 and 1."
            )
    if train_share + validation_share > 1 - 1e-9:
        raise InputError(
            "transitions.split_times: train_share and validation_share leave nothing to test on; "
            f"they sum to {train_share + validation_share}."
        )
    time = interactions.timestamp
    cuts = interactions.aggregate(
        validation=time.quantile(train_share).cast("int64"),
        test=time.quantile(train_share + validation_share).cast("int64"),
        first=time.min(),
    ).to_pyarrow()
    validation, test, first = (cuts[name][0].as_py() for name in ("validation", "test", "first"))
    if first is None:
        raise InputError("The log can't be split by time: it has no interactions.")
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


def _novel(moves: ir.Table, look_back: int | None) -> ir.Table:
    """The moves into clusters that their user didn't know."""
    window = ibis.window(group_by=[moves.user_id, moves.cluster_id], order_by=moves.timestamp)
    marked = moves.mutate(before=moves.timestamp.lag().over(window))
    is_novel = marked.before.isnull()
    if look_back is not None:
        is_novel = is_novel | (marked.before < marked.timestamp - look_back)
    return marked.filter(is_novel).drop("before")


def _after(moves: ir.Table, interactions: ir.Table, burn_in_days: int | float) -> ir.Table:
    """The moves after the first days of the log."""
    if not (math.isfinite(burn_in_days) and burn_in_days >= 0):
        raise InputError(
            f"pipeline.aggregate.burn_in_days is {burn_in_days}; it must be a number from 0 on."
        )
    if not burn_in_days:
        return moves
    start = interactions.timestamp.min().as_scalar() + int(burn_in_days * _DAY)
    return moves.filter(moves.timestamp >= start)


def novel_transitions(
    interactions: ir.Table,
    item_clusters: ir.Table,
    splits: SplitTimes,
    *,
    max_history: int,
    look_back_days: int | float | None = None,
    burn_in_days: int | float = 0,
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
      burn_in_days: first days of the log that tell what users know and give no transitions: where
        people were active before the log begins, most of what is new in it at first is new to the
        log only.

    Returns:
      Rows with at least two clusters of history. `count_left_out` says how many others there are.

    Raises:
      InputError: `max_history` below 2, or `look_back_days` shorter than a second or not finite.
    """
    look_back = _seconds(look_back_days)
    if max_history < _MIN_HISTORY:
        raise InputError(
            f"The longest history is {max_history}; pipeline.aggregate.history_length and the "
            f"values of pipeline.tokenize.novelty_histories must be at least {_MIN_HISTORY}."
        )
    moves = _moves(interactions, item_clusters)
    novel = _after(_novel(moves, look_back), interactions, burn_in_days)
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


def count_left_out(
    interactions: ir.Table,
    item_clusters: ir.Table,
    *,
    num_transitions: int,
    look_back_days: int | float | None = None,
    burn_in_days: int | float = 0,
) -> dict[str, int]:
    """What of a log is in no transition, by reason, for counts.json.

    Args:
      interactions: INTERACTIONS.
      item_clusters: ITEM_CLUSTERS.
      num_transitions: how many `novel_transitions` found.
      look_back_days: as there.
      burn_in_days: as there.

    Returns:
      "interactions without a cluster", which are ignored altogether; "novel moves in the first
      days"; and "novel moves with fewer than 2 clusters of history", every user's first among them.

    Raises:
      InputError: as in `novel_transitions`.
    """
    novel = _novel(_moves(interactions, item_clusters), _seconds(look_back_days))
    late = _after(novel, interactions, burn_in_days).count().to_pyarrow().as_py()
    alone = interactions.anti_join(item_clusters, "item_id")
    return {
        "interactions without a cluster": alone.count().to_pyarrow().as_py(),
        "novel moves in the first days": novel.count().to_pyarrow().as_py() - late,
        f"novel moves with fewer than {_MIN_HISTORY} clusters of history": late - num_transitions,
    }


def histories_in_log(
    interactions: ir.Table,
    item_clusters: ir.Table,
    *,
    history_length: int,
    look_back_days: int | float | None = None,
) -> ir.Table:
    """HISTORIES: the last `history_length` clusters at which some user stood after some event.

    Every user's last history is among them: those are what an exploration table is asked for.

    Args:
      interactions: INTERACTIONS.
      item_clusters: ITEM_CLUSTERS.
      history_length: K.
      look_back_days: as in `novel_transitions`; the window ends a second after the event.

    Raises:
      InputError: `history_length` below 1, or `look_back_days` as in `novel_transitions`.
    """
    if history_length < 1:
        raise InputError(
            f"pipeline.aggregate.history_length is {history_length}; it must be at least 1."
        )
    look_back = _seconds(look_back_days)
    moves = _moves(interactions, item_clusters)
    engaged = moves.filter(~moves.skipped)
    points = engaged.select("user_id", timestamp=engaged.timestamp + 1).distinct()
    latest = _known_before(points, _known(engaged), look_back)
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


def impressions(
    interactions: ir.Table,
    item_clusters: ir.Table,
    *,
    start: int,
    users: Sequence[str],
    history_length: int,
    look_back_days: int | float | None = None,
) -> ir.Table:
    """What some users were shown from a time on, and where they stood just before.

    Args:
      interactions: INTERACTIONS.
      item_clusters: ITEM_CLUSTERS.
      start: seconds since 1970.
      users: whose impressions.
      history_length: K.
      look_back_days: as in `novel_transitions`.

    Returns:
      A row for each impression of a user who has a history of K clusters: user_id, timestamp,
      item_id, cluster_id (null if the item has none), watch_fraction, propensity, and `history` and
      `seen` as in TRANSITIONS. What has the same timestamp is not known to each other.

    Raises:
      InputError: `look_back_days` as in `novel_transitions`.
    """
    look_back = _seconds(look_back_days)
    own = interactions.semi_join(ibis.memtable({"user_id": list(users)}), "user_id")
    shown = own.filter(own.timestamp >= start)
    key = ["user_id", "timestamp"]
    points = shown.select(*key).distinct()
    moves = _moves(own, item_clusters)
    latest = _known_before(points, _known(moves.filter(~moves.skipped)), look_back)
    recency = ibis.window(group_by=key, order_by=[ibis.desc("since"), ibis.desc("known_cluster")])
    latest = latest.mutate(place=ibis.row_number().over(recency))
    latest = latest.filter(latest.place < history_length)
    histories = latest.group_by(key).aggregate(
        history=latest.known_cluster.collect(order_by=latest.place.desc())
    )
    histories = histories.filter(histories.history.length() == history_length)
    met = _known_before(points, _known(moves), look_back)
    seen = met.group_by(key).aggregate(seen=met.known_cluster.collect(order_by=met.known_cluster))
    rows = shown.join(histories, key).join(seen, key).left_join(item_clusters, "item_id")
    columns = ("item_id", "cluster_id", "watch_fraction", "propensity", "history", "seen")
    return rows.select(*key, *columns)


def items_shown_before(interactions: ir.Table, item_clusters: ir.Table, time: int) -> ir.Table:
    """ITEM_CLUSTERS of the items that anyone was shown before a time, in seconds since 1970."""
    earlier = interactions.filter(interactions.timestamp < time)
    return item_clusters.semi_join(earlier, "item_id")


def busiest(
    histories: pa.Table, count: int, wanted: Callable[[list[int]], bool] = lambda history: True
) -> list[list[int]]:
    """The histories at which most users stood, no two with the same end.

    Args:
      histories: HISTORIES.
      count: how many at most.
      wanted: which are considered.
    """
    order = np.argsort(-histories["count"].to_numpy(), kind="stable")
    by_end: dict[int, list[int]] = {}
    for history in histories["history"].take(order).to_pylist():
        if len(by_end) < count and history[-1] not in by_end and wanted(history):
            by_end[history[-1]] = history
    return list(by_end.values())


def recency_weights(count: int, half_life: float | None) -> Float[np.ndarray, "R"]:
    """Weights of `count` rows, oldest first: 1 for the newest, fading by halves.

    Args:
      count: R.
      half_life: as a share of all rows; with 1/4, the row a quarter of the way back weighs 1/2.
        None: every row weighs 1.

    Raises:
      InputError: a half-life that isn't positive.
    """
    if half_life is None:
        return np.ones(count)
    if not half_life > 0:
        raise InputError(
            f"A half-life of {half_life} is not positive. Bind a share of the training rows, such "
            "as 0.25, or None for rows that count alike whenever they were made."
        )
    age = np.arange(count)[::-1] / max(count, 1)
    return 0.5 ** (age / half_life)


def _seconds(look_back_days: int | float | None) -> int | None:
    if look_back_days is None:
        return None
    if not (math.isfinite(look_back_days) and look_back_days * _DAY >= 1):
        raise InputError(
            f"pipeline.aggregate.look_back_days is {look_back_days}; it must be positive (a second "
            "at least), or None for the whole log."
        )
    return int(look_back_days * _DAY)
