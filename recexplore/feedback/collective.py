"""Collective feedback: how everyone who made the same move liked it.

Single reactions are noise; the reactions of all users who went from one history to one next
cluster, taken together, say how good that move is (arXiv 2504.05522). Few users make the same move,
so the mean is shrunk towards what is known of the next cluster alone.
"""

import math
from collections.abc import Mapping
from typing import NamedTuple

import ibis.expr.types as ir
import numpy as np
import pyarrow as pa

from recexplore.errors import InputError

SIGNAL_WEIGHTS: Mapping[str, float] = {
    "watch_fraction": 1.0,
    "liked": 1.0,
    "shared": 1.0,
    "skipped": -1.0,
}
_ALL_SHRUNK = 1e6  # shrinkage when moves into a cluster don't differ beyond noise
_GRAIN = 1e4  # rewards are counted in ten-thousandths: sums of whole numbers have no order


class Collective(NamedTuple):
    """Collective feedback and how its labels were made.

    Attributes:
      table: COLLECTIVE.
      shrinkage: κ, in users.
      low: reward that label 0 stands for.
      high: reward that label 1 stands for.
      dropped: rows left out, by reason, for counts.json.
    """

    table: pa.Table
    shrinkage: float
    low: float
    high: float
    dropped: dict[str, int]


def reward(signals: ir.Table, weights: Mapping[str, float] = SIGNAL_WEIGHTS) -> ir.Value:
    """One number for a reaction: the weighted sum of its signals.

    With the default weights a video watched to 80 % and liked gives 0.8 + 1 = 1.8; one skipped
    after 10 % gives 0.1 − 1 = −0.9.

    Args:
      signals: has the signals' columns.
      weights: signal → weight.

    Raises:
      InputError: a signal that doesn't exist, or a weight that isn't a number.
    """
    unknown = [name for name in weights if name not in SIGNAL_WEIGHTS]
    if unknown or not weights:
        raise InputError(
            f"collective.collective_feedback.signal_weights names {unknown or 'no signal'}; there "
            f"are: {', '.join(SIGNAL_WEIGHTS)}."
        )
    for name, weight in weights.items():
        if not isinstance(weight, int | float) or not math.isfinite(weight):
            raise InputError(
                f"collective.collective_feedback.signal_weights[{name!r}] is {weight!r}; it must "
                "be a finite number."
            )
    return sum(signals[name].cast("float64") * weight for name, weight in weights.items())


def collective_feedback(
    transitions: ir.Table,
    *,
    history_length: int,
    signal_weights: Mapping[str, float] = SIGNAL_WEIGHTS,
    shrinkage: float | None = None,
    min_count: int = 1,
    rounding: float = 0.05,
    outliers: float = 0.02,
) -> Collective:
    """COLLECTIVE from TRANSITIONS: one row for each split, history and next cluster.

    For a move made by n users with mean reward m, into a cluster whose moves have mean reward t,

        shrunk = (n · m + κ · t) / (n + κ)
        label  = round to `rounding` of clip((shrunk − low) / (high − low), 0, 1)

    `low` and `high` are the `outliers` and 1 − `outliers` quantiles of the training rows' shrunk
    rewards. For κ = 4, n = 1, m = 1.5 and t = 1: shrunk = (1.5 + 4) / 5 = 1.1. Rows of the held-out
    splits are for measuring: their label is the mean reward on the same scale, clipped, but neither
    shrunk nor rounded. Quantiles, unlike the extremes, don't move with one odd reaction. Rewards
    are counted in ten-thousandths, so that sums are exact and the same in whatever order.

    Args:
      transitions: TRANSITIONS; rows with shorter histories are left out.
      history_length: K.
      signal_weights: of the reward.
      shrinkage: κ, in users; None: estimated, see `estimate_shrinkage`.
      min_count: training moves made by fewer users are dropped.
      rounding: interval of the labels.
      outliers: share cut off at either end of the scale.

    Raises:
      InputError: an argument out of range, no training move is left, or all have one reward.
    """
    _check_arguments(history_length, shrinkage, min_count, rounding, outliers)
    cells, too_short = _cells(transitions, history_length, signal_weights)
    train = cells["split"] == "train"
    kept = ~train | (cells["count"] >= min_count)
    _check_training_moves(int(train.sum()), int((train & kept).sum()), history_length, min_count)
    if shrinkage is None:
        shrinkage = estimate_shrinkage(
            cells["next_cluster"][train],
            cells["count"][train],
            cells["reward"][train],
            cells["squares"][train],
        )
    targets, places = np.unique(cells["next_cluster"], return_inverse=True)
    count, mean = cells["count"].astype(np.float64), cells["reward"]
    sums = np.bincount(places[train], (count * mean)[train], minlength=len(targets))
    users = np.bincount(places[train], count[train], minlength=len(targets))
    overall = sums.sum() / max(users.sum(), 1)
    target_mean = np.where(users > 0, sums / np.maximum(users, 1), overall)[places]
    shrunk = (count * mean + shrinkage * target_mean) / (count + shrinkage)
    low, high = np.quantile(shrunk[train & kept], [outliers, 1 - outliers])
    if not high - low > 1 / _GRAIN:
        raise InputError(
            f"All {int((train & kept).sum())} training moves have the same shrunk reward, "
            f"{low:.4g}, so that none is better than another. Check the log's feedback columns "
            "and collective.collective_feedback.signal_weights, min_count and outliers."
        )
    scaled = np.clip((np.where(train, shrunk, mean) - low) / (high - low), 0, 1)
    labels = np.where(train, np.clip(np.round(scaled / rounding) * rounding, 0, 1), scaled)
    columns = {name: column for name, column in cells.items() if name != "squares"}
    table = pa.table({**columns, "label": labels.astype(np.float32)}).filter(pa.array(kept))
    dropped = {
        f"transitions with fewer than {history_length} clusters of history": too_short,
        f"training moves made by fewer than {min_count} users": int((~kept).sum()),
    }
    return Collective(table, float(shrinkage), float(low), float(high), dropped)


def estimate_shrinkage(
    targets: np.ndarray, counts: np.ndarray, means: np.ndarray, squares: np.ndarray
) -> float:
    """κ = σ² / τ² by the method of moments (one-way random effects within each next cluster).

    σ² is the variance of single rewards within a move: Σ_i (Σ_j r_ij² − n_i m_i²) / Σ_i (n_i − 1).
    τ² is the variance of moves' true means around their next cluster's mean t. With
    Q = Σ_i n_i (m_i − t)², its expectation is (k − 1) σ² + τ² (N − Σ n_i² / N) for each next
    cluster of k moves and N users; Q and the expectation are summed over next clusters and solved
    for τ².

    Args:
      targets: next cluster of each move.
      counts: n_i, its users.
      means: m_i, their mean reward.
      squares: their mean squared reward.

    Returns:
      κ; a very large number when moves don't differ more than noise explains.
    """
    n = counts.astype(np.float64)
    freedom = (n - 1).sum()
    if freedom == 0:
        return _ALL_SHRUNK
    within = max((n * (squares - means**2)).sum() / freedom, 1e-12)
    _, places = np.unique(targets, return_inverse=True)
    users, moves = np.bincount(places, n), np.bincount(places)
    centre = (np.bincount(places, n * means) / users)[places]
    spread = (n * (means - centre) ** 2).sum()
    scale = (users - np.bincount(places, n**2) / users).sum()
    if scale <= 0:
        return _ALL_SHRUNK
    between = (spread - (moves - 1).sum() * within) / scale
    return float(min(within / between, _ALL_SHRUNK)) if between > 0 else _ALL_SHRUNK


def _cells(
    transitions: ir.Table, history_length: int, weights: Mapping[str, float]
) -> tuple[dict[str, np.ndarray], int]:
    """Aggregates moves on the back end.

    Returns columns, sorted by split, history, next cluster, and how many rows were too short.
    """
    rows = transitions.filter(transitions.history.length() >= history_length)
    too_short = transitions.count() - rows.count().as_scalar()
    start = rows.history.length() - history_length
    places = {f"h{i}": rows.history[start + i] for i in range(history_length)}
    rows = rows.mutate(**places, reward=(reward(rows, weights) * _GRAIN).round().cast("float64"))
    cells = (
        rows.group_by("split", *places, "next_cluster")
        .aggregate(
            count=rows.count(),
            watch_fraction=rows.watch_fraction.mean(),
            liked=rows.liked.cast("float64").mean(),
            shared=rows.shared.cast("float64").mean(),
            skipped=rows.skipped.cast("float64").mean(),
            reward=rows.reward.sum(),
            squares=(rows.reward * rows.reward).sum(),
        )
        .order_by("split", *places, "next_cluster")
        .to_pyarrow()
    )
    columns = {n: cells[n].to_numpy() for n in cells.column_names if n not in places}
    columns["reward"] = columns["reward"] / _GRAIN / columns["count"]
    columns["squares"] = columns["squares"] / _GRAIN**2 / columns["count"]
    histories = np.stack([cells[name].to_numpy() for name in places], axis=1)
    return {**columns, "history": list(histories)}, too_short.to_pyarrow().as_py()


def _check_training_moves(found: int, kept: int, history_length: int, min_count: int) -> None:
    if not found:
        raise InputError(
            f"There is no novel transition from {history_length} clusters of history in the "
            "training period. Check transitions.split_times, pipeline.aggregate.history_length "
            "and pipeline.aggregate.look_back_days, or use a longer log."
        )
    if not kept:
        raise InputError(
            f"None of {found} training moves was made by collective.collective_feedback.min_count "
            f"= {min_count} users. Lower it."
        )


def _check_arguments(history_length, shrinkage, min_count, rounding, outliers) -> None:
    rules = {
        "history_length": (history_length, history_length >= 1, "at least 1"),
        "shrinkage": (shrinkage, shrinkage is None or shrinkage >= 0, "None or at least 0"),
        "min_count": (min_count, min_count >= 1, "at least 1"),
        "rounding": (rounding, 0 < rounding <= 0.5, "between 0 and 0.5"),
        "outliers": (outliers, 0 <= outliers < 0.5, "between 0 and 0.5"),
    }
    for name, (value, ok, rule) in rules.items():
        if not ok:
            raise InputError(
                f"collective.collective_feedback.{name} is {value}; it must be {rule}."
            )
