"""What policies would be worth on a log that tells how likely each impression was.

A policy q looks at every impression's context: the user, their history, what they had met before.
It chooses a cluster that is new to the user, and then one of the cluster's items, each alike, among
those that had been shown before the period. So an impression of item i of cluster c in context x,
logged with the propensity p, weighs

    w = q(c | x) / (items of c · p)

and 0 where the cluster isn't new or the item not one of those; its context counts all the same.
What items there are is settled before the period: counted in the period itself, they would be those
that chance showed there, and the weights too great.
"""

from collections.abc import Mapping
from typing import NamedTuple

import ibis
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from jaxtyping import Float

from recexplore.evaluation import off_policy
from recexplore.evaluation.arms import Asked, Policy
from recexplore.feedback import transitions

_ENTRIES = 1 << 22  # of a policy's matrix at a time


class Impressions(NamedTuple):
    """R impressions and their contexts, as arrays.

    Attributes:
      histories: the H different ones, oldest first.
      asked: history and allowed clusters of each impression's context.
      log: what was shown; contexts are 0 .. R - 1, propensities those of the items.
      shares: probability with which a policy that has chosen the cluster shows this very item.
    """

    histories: list[list[int]]
    asked: Asked
    log: off_policy.Log
    shares: Float[np.ndarray, "R"]


def has_propensities(interactions: pa.Table, start: int) -> bool:
    """Whether every impression from `start` on was logged with one above 0.

    Args:
      interactions: INTERACTIONS.
      start: seconds since 1970.
    """
    late = interactions.filter(pc.greater_equal(interactions["timestamp"], start))
    known = pc.greater(late["propensity"], 0)  # what could not be shown was not: 0 is no propensity
    return late.num_rows > 0 and bool(pc.all(pc.fill_null(known, False)).as_py())


def read_impressions(
    interactions: pa.Table,
    item_clusters: pa.Table,
    num_clusters: int,
    *,
    start: int,
    history_length: int,
    look_back_days: int | float | None = None,
    num_users: int | None = None,
    seed: int = 0,
) -> Impressions:
    """Impressions from `start` on, of users who have a history and something new to be shown.

    Args:
      interactions: INTERACTIONS.
      item_clusters: ITEM_CLUSTERS.
      num_clusters: M.
      start: of the period, in seconds since 1970.
      history_length: K.
      look_back_days: how long a user knows a cluster; None: for ever.
      num_users: of a random sample; None: all users.
      seed: of it.

    Raises:
      InputError: no impression is left, or one can't be used (see `off_policy.check_log`).
    """
    late = interactions.filter(pc.greater_equal(interactions["timestamp"], start))
    users = np.sort(late["user_id"].unique().to_numpy(zero_copy_only=False))
    if num_users is not None and num_users < len(users):
        users = np.random.default_rng(seed).choice(users, num_users, replace=False)
    tables = ibis.memtable(interactions), ibis.memtable(item_clusters)
    rows = transitions.impressions(
        *tables,
        start=start,
        users=users.tolist(),
        history_length=history_length,
        look_back_days=look_back_days,
    )
    rows = rows.order_by("user_id", "timestamp", "item_id").to_pyarrow()
    choice = transitions.items_shown_before(*tables, start).to_pyarrow()
    return _as_arrays(rows, choice, num_clusters)


def _as_arrays(rows: pa.Table, choice: pa.Table, num_clusters: int) -> Impressions:
    sizes = np.bincount(choice["cluster_id"].to_numpy(), minlength=num_clusters)
    allowed = np.tile(sizes > 0, (rows.num_rows, 1))
    for row, seen in zip(allowed, rows["seen"].to_pylist(), strict=True):
        row[seen] = False
    offered = pc.is_in(rows["item_id"], choice["item_id"]).to_numpy(zero_copy_only=False)
    clusters = np.where(offered, rows["cluster_id"].fill_null(0).to_numpy(), 0)
    kept = np.flatnonzero(allowed.any(axis=1))
    place: dict[tuple[int, ...], int] = {}
    histories = [tuple(history) for history in rows["history"].take(kept).to_pylist()]
    codes = np.array([place.setdefault(history, len(place)) for history in histories], np.int64)
    log = off_policy.Log(
        contexts=np.arange(len(kept)),
        actions=clusters[kept],
        rewards=rows["watch_fraction"].to_numpy()[kept].astype(np.float64),
        propensities=rows["propensity"].to_numpy()[kept].astype(np.float64),
        users=rows["user_id"].to_numpy()[kept],
    )
    off_policy.check_log(log, (len(kept), num_clusters))
    return Impressions(
        histories=[list(history) for history in place],
        asked=Asked(codes, allowed[kept]),
        log=log,
        shares=np.where(offered, 1 / np.maximum(sizes[clusters], 1), 0.0)[kept],
    )


def value(
    impressions: Impressions,
    policy: Policy,
    feedback: Float[np.ndarray, "M"],
    samples: int = 500,
    seed: int = 0,
) -> off_policy.Value:
    """The mean reward that the policy would have had in the contexts of the impressions.

    Args:
      impressions: of `read_impressions`.
      policy: called with some of the contexts at a time.
      feedback: mean reward of each cluster, the model of the doubly robust estimate.
      samples: resamples of users.
      seed: of them.
    """
    log, asked = impressions.log, impressions.asked
    chance, direct = np.empty(len(log.rewards)), np.empty(len(log.rewards))
    at_once = max(1, _ENTRIES // asked.allowed.shape[1])
    for start in range(0, len(chance), at_once):
        rows = slice(start, start + at_once)
        chosen = policy(Asked(*(part[rows] for part in asked)))
        chance[rows] = chosen[np.arange(len(chosen)), log.actions[rows]]
        direct[rows] = chosen @ feedback
    weights = chance * impressions.shares / log.propensities
    predicted = off_policy.Predicted(direct, feedback[log.actions])
    return off_policy.value_of_weights(weights, log.rewards, log.users, predicted, samples, seed)


def value_metrics(name: str, found: off_policy.Value) -> dict[str, float]:
    """NAME/off_policy_ips, _snips and _dr with their intervals, and _ess; without what is unknown.

    Args:
      name: of the policy.
      found: its value.
    """
    estimates: Mapping[str, off_policy.Estimate | None] = {
        "ips": found.inverse_propensity,
        "snips": found.self_normalised,
        "dr": found.doubly_robust,
    }
    metrics = {f"{name}/off_policy_ess": found.effective_sample_size}
    for kind, estimate in estimates.items():
        if estimate is not None and np.isfinite(estimate).all():
            for end, part in zip(("", "_low", "_high"), estimate, strict=True):
                metrics[f"{name}/off_policy_{kind}{end}"] = float(part)
    return metrics
