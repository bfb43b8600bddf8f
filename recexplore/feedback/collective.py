"""Collective feedback: how everyone who made the same move liked it.

Single reactions are noise; the reactions of all users who went from one history to one next
cluster, taken together, say how good that move is (arXiv 2504.05522). Few users make the same move,
so the mean is shrunk towards what is known of the next cluster alone.
"""

import math
from collections.abc import Mapping
from typing import NamedTuple

import ibis
import ibis.expr.types as ir
import numpy as np
import pyarrow as pa
from jaxtyping import Float, Int

from recexplore.errors import InputError

SIGNAL_WEIGHTS: Mapping[str, float] = {
    "watch_fraction": 1.0,
    "liked": 1.0,
    "shared": 1.0,
    "skipped": -1.0,
}
_ALL_SHRUNK = 1e6  # shrinkage when moves into a cluster don't differ beyond noise
_GRAIN = 1e4  # rewards are counted in ten-thousandths: sums of whole numbers have no order
_WEIGHT_GRAIN = 1e4  # likewise weights other than 1


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
    shrinkage: int | float | None = None,
    min_count: int = 1,
    rounding: float = 0.05,
    outliers: float = 0.02,
    min_propensity: float | None = None,
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

    A recommender shows what it believes in, so that what it showed flatters. With `min_propensity`
    ε, a reaction to an item shown with probability p has the weight w = ε / max(p, ε), a
    ten-thousandth at least: inverse propensities, up to a factor and never above 1. All means are
    weighted then; a move weighs Σw in t and in training, and n is (Σw)² / Σw², the number of equal
    weights whose mean is as certain.

    Args:
      transitions: TRANSITIONS; rows with shorter histories are left out.
      history_length: K.
      signal_weights: of the reward.
      shrinkage: κ, in users; None: estimated, see `estimate_shrinkage`.
      min_count: training moves made by fewer users are dropped.
      rounding: interval of the labels.
      outliers: share cut off at either end of the scale.
      min_propensity: ε, the propensity from which on a reaction counts less; for a log with a share
        of items shown at random, theirs. None: all reactions count alike.

    Raises:
      InputError: an argument out of range, propensities that are asked for and not there, no
        training move is left, or all have one reward.
    """
    _check_arguments(history_length, shrinkage, min_count, rounding, outliers, min_propensity)
    cells, too_short = _cells(transitions, history_length, signal_weights, min_propensity)
    train = cells["split"] == "train"
    kept = ~train | (cells["count"] >= min_count)
    _check_training_moves(int(train.sum()), int((train & kept).sum()), history_length, min_count)
    if shrinkage is None:
        shrinkage = estimate_shrinkage(
            *(
                cells[name][train]
                for name in ("next_cluster", "weight", "weight_squares", "reward", "squares")
            )
        )
    mean, weight = cells["reward"], cells["weight"]
    targets = cells["next_cluster"]
    of_targets = target_mean(targets, mean, np.where(train, weight, 0.0), int(targets.max()) + 1)
    users = weight**2 / cells["weight_squares"]
    shrunk = (users * mean + shrinkage * of_targets[targets]) / (users + shrinkage)
    low, high = np.quantile(shrunk[train & kept], [outliers, 1 - outliers])
    if not high - low > 1 / _GRAIN:
        raise InputError(
            f"All {int((train & kept).sum())} training moves have the same shrunk reward, "
            f"{low:.4g}, so that none is better than another. Check the log's feedback columns "
            "and collective.collective_feedback.signal_weights, min_count and outliers."
        )
    scaled = np.clip((np.where(train, shrunk, mean) - low) / (high - low), 0, 1)
    labels = np.where(train, np.clip(np.round(scaled / rounding) * rounding, 0, 1), scaled)
    columns = {n: column for n, column in cells.items() if not n.endswith("squares")}
    table = pa.table({**columns, "label": labels.astype(np.float32)}).filter(pa.array(kept))
    dropped = {
        f"transitions with fewer than {history_length} clusters of history": too_short,
        f"training moves made by fewer than {min_count} users": int((~kept).sum()),
    }
    return Collective(table, float(shrinkage), float(low), float(high), dropped)


def target_mean(
    targets: Int[np.ndarray, "R"],
    rewards: Float[np.ndarray, "R"],
    counts: Int[np.ndarray, "R"] | Float[np.ndarray, "R"],
    num_clusters: int,
    prior: float = 0.0,
) -> Float[np.ndarray, "M"]:
    """Mean training feedback of each next cluster, whatever the history; the baseline of alignment.

    With n moves into a cluster of total reward t, and overall mean m:
    (t + prior · m) / (n + prior). A cluster without training feedback gets m.

    Args:
      targets: next clusters of the collective feedback.
      rewards: their mean rewards.
      counts: how many moves each mean is of.
      num_clusters: M.
      prior: moves' worth of the overall mean mixed in.
    """
    moves = np.bincount(targets, counts, minlength=num_clusters)
    total = np.bincount(targets, counts * rewards, minlength=num_clusters)
    overall = total.sum() / moves.sum()
    mixed = np.maximum(moves + prior, 1e-9)
    return np.where(moves > 0, (total + prior * overall) / mixed, overall)


def estimate_shrinkage(
    targets: np.ndarray,
    weights: np.ndarray,
    weight_squares: np.ndarray,
    means: np.ndarray,
    squares: np.ndarray,
) -> float:
    """κ = σ² / τ² by the method of moments (one-way random effects within each next cluster).

    A move i is made by users j of weight w_ij, with W_i = Σ_j w_ij and v_i = Σ_j w_ij² / W_i; where
    all weigh 1, W_i is the number of users and v_i = 1.

    σ² is the variance of single rewards within a move: Σ_i (Σ_j w_ij r_ij² − W_i m_i²) is
    Σ_i (W_i − v_i) times it in expectation. τ² is the variance of moves' true means around their
    next cluster's mean t. With Q = Σ_i W_i (m_i − t)² and W = Σ_i W_i over a next cluster, its
    expectation is σ² Σ_i v_i (1 − W_i / W) + τ² (W − Σ_i W_i² / W); Q and the expectation are
    summed over next clusters and solved for τ².

    Args:
      targets: next cluster of each move.
      weights: W_i.
      weight_squares: Σ_j w_ij².
      means: m_i, the users' weighted mean reward.
      squares: their weighted mean squared reward.

    Returns:
      κ; a very large number when moves don't differ more than noise explains.
    """
    w = weights.astype(np.float64)
    v = weight_squares / w
    freedom = (w - v).sum()
    if not freedom > 1e-9 * w.sum():
        return _ALL_SHRUNK
    within = max((w * (squares - means**2)).sum() / freedom, 1e-12)
    _, places = np.unique(targets, return_inverse=True)
    total = np.bincount(places, w)
    centre = (np.bincount(places, w * means) / total)[places]
    spread = (w * (means - centre) ** 2).sum()
    noise = (v * (1 - w / total[places])).sum()
    scale = (total - np.bincount(places, w**2) / total).sum()
    if scale <= 0:
        return _ALL_SHRUNK
    between = (spread - noise * within) / scale
    return float(min(within / between, _ALL_SHRUNK)) if between > 0 else _ALL_SHRUNK


def _cells(
    transitions: ir.Table,
    history_length: int,
    signal_weights: Mapping[str, float],
    min_propensity: float | None,
) -> tuple[dict[str, np.ndarray], int]:
    """Aggregates moves on the back end.

    Returns columns, sorted by split, history, next cluster, and how many rows were too short.
    """
    rows = transitions.filter(transitions.history.length() >= history_length)
    too_short = transitions.count() - rows.count().as_scalar()
    start = rows.history.length() - history_length
    places = {f"h{i}": rows.history[start + i] for i in range(history_length)}
    rows = rows.mutate(
        **places,
        weight=_weight(rows, min_propensity),
        reward=(reward(rows, signal_weights) * _GRAIN).round().cast("float64"),
    )

    def mean(values: ir.Value) -> ir.Value:
        return (rows.weight * values.cast("float64")).sum() / rows.weight.sum()

    cells = (
        rows.group_by("split", *places, "next_cluster")
        .aggregate(
            count=rows.count(),
            weight=rows.weight.sum(),
            weight_squares=(rows.weight * rows.weight).sum(),
            watch_fraction=mean((rows.watch_fraction * _GRAIN).round()),
            liked=mean(rows.liked),
            shared=mean(rows.shared),
            skipped=mean(rows.skipped),
            reward=mean(rows.reward),
            squares=mean(rows.reward * rows.reward),
        )
        .order_by("split", *places, "next_cluster")
        .to_pyarrow()
    )
    columns = {n: cells[n].to_numpy() for n in cells.column_names if n not in places}
    unit = 1.0 if min_propensity is None else _WEIGHT_GRAIN
    for name, grain in (
        ("watch_fraction", _GRAIN),
        ("reward", _GRAIN),
        ("squares", _GRAIN**2),
        ("weight", unit),
        ("weight_squares", unit**2),
    ):
        columns[name] = columns[name] / grain
    histories = np.stack([cells[name].to_numpy() for name in places], axis=1)
    return {**columns, "history": list(histories)}, too_short.to_pyarrow().as_py()


def _weight(rows: ir.Table, min_propensity: float | None) -> ir.Value:
    """How much each reaction counts: 1, or in ten-thousandths, one of them at least."""
    if min_propensity is None:
        return ibis.literal(1.0)
    unknown = rows.filter(rows.propensity.isnull()).count().to_pyarrow().as_py()
    if unknown:
        raise InputError(
            f"collective.collective_feedback.min_propensity is {min_propensity}, but {unknown:,} "
            "transitions have no propensity. Log them, or set it to None."
        )
    propensity = rows.propensity.cast("float64")
    share = min_propensity / ibis.greatest(propensity, min_propensity)
    return ibis.greatest((share * _WEIGHT_GRAIN).round().cast("float64"), 1.0)


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


def _check_arguments(
    history_length, shrinkage, min_count, rounding, outliers, min_propensity
) -> None:
    rules = {
        "history_length": (history_length, history_length >= 1, "at least 1"),
        "shrinkage": (shrinkage, shrinkage is None or shrinkage >= 0, "None or at least 0"),
        "min_count": (min_count, min_count >= 1, "at least 1"),
        "rounding": (rounding, 0 < rounding <= 0.5, "between 0 and 0.5"),
        "outliers": (outliers, 0 <= outliers < 0.5, "between 0 and 0.5"),
        "min_propensity": (
            min_propensity,
            min_propensity is None or 0 < min_propensity <= 1,
            "None or a probability above 0",
        ),
    }
    for name, (value, ok, rule) in rules.items():
        if not ok:
            raise InputError(
                f"collective.collective_feedback.{name} is {value}; it must be {rule}."
            )
