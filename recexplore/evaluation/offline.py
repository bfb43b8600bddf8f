"""Evaluation on the held-out period of a log: every cluster ranked, nothing sampled."""

from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from jaxtyping import Bool, Float, Int

from recexplore.errors import InputError
from recexplore.evaluation import metrics
from recexplore.evaluation.baselines import Rows, tuned_prior
from recexplore.feedback.collective import target_mean
from recexplore.serving.exploration_table import ExplorationTable

SUFFIXES = {"history": "", "seen": "_unseen"}  # what is left out of the ranking → metric suffix


def rows_of(transitions: pa.Table, split: str, num_clusters: int) -> Rows:
    """The engaged transitions of a split, as arrays.

    Args:
      transitions: TRANSITIONS.
      split: train, validation or test.
      num_clusters: M.

    Raises:
      InputError: there are none, or `seen` is null where it is needed (validation and test).
    """
    wanted = pc.and_(pc.equal(transitions["split"], split), pc.invert(transitions["skipped"]))
    table = transitions.filter(wanted)
    if not table.num_rows:
        raise InputError(
            f"The {split} period has no novel transition that was not skipped: the log is too "
            "small, or too few clusters are new to anyone. Try other transitions.split_times."
        )
    seen = np.zeros((table.num_rows, num_clusters), bool)
    histories = table["history"].to_pylist()
    met = table["seen"].to_pylist()
    if split != "train" and None in met:
        raise InputError(
            f"Column seen of the transitions is null in a row of the {split} split; the rankings "
            "without the clusters a user has seen need it. Run `recexplore aggregate` again."
        )
    for row, history, clusters in zip(seen, histories, met, strict=True):
        row[history if clusters is None else clusters] = True
    return Rows(
        users=table["user_id"].to_numpy(),
        histories=histories,
        last_two=np.array([history[-2:] for history in histories]),
        targets=table["next_cluster"].to_numpy(),
        seen=seen,
    )


def popularity_shares(train: Rows) -> Float[np.ndarray, "M"]:
    """Each cluster's share of the training moves, all with one move more so that none has 0."""
    counts = np.bincount(train.targets, minlength=train.num_clusters) + 1.0
    return counts / counts.sum()


def alignment_metrics(
    collective: pa.Table,
    scores: Float[np.ndarray, "R"],
    num_clusters: int,
) -> tuple[dict[str, float], Float[np.ndarray, "3 bins"]]:
    """How well scores order held-out collective feedback, beside the next cluster's mean.

    The mean stands there twice: as it is, and shrunk towards the overall mean as the validation
    split likes best.

    Args:
      collective: COLLECTIVE of all splits.
      scores: the alignment model's logits for the rows of the test split, in order.
      num_clusters: M.

    Returns:
      Metrics of `alignment`, `target_mean` and `target_mean_shrunk`, and the alignment model's
      calibration by bin (see `metrics.calibration`). A metric that can't be told, such as the
      order within histories when each occurs once, is left out.

    Raises:
      InputError: the train or the test split has no rows.
    """
    parts = {split: _feedback_of(collective, split) for split in ("train", "validation", "test")}
    train, validation, test = parts["train"], parts["validation"], parts["test"]
    cells = (train.targets, train.rewards, train.weights)
    prior = tuned_prior(cells, (validation.targets, validation.rewards), num_clusters)
    orders = {"alignment": scores.astype(np.float64)}
    probabilities = {"alignment": 1 / (1 + np.exp(-orders["alignment"]))}
    labels = (train.targets, train.labels, train.weights)
    for name, mixed_in in (("target_mean", 0.0), ("target_mean_shrunk", prior)):
        orders[name] = target_mean(*cells, num_clusters, mixed_in)[test.targets]
        probabilities[name] = target_mean(*labels, num_clusters, mixed_in)[test.targets]
    found, bins = {}, {}
    for name, predicted in orders.items():
        bins[name] = metrics.calibration(probabilities[name], test.labels, test.weights)
        values = {
            "pairwise_accuracy": metrics.pairwise_accuracy(predicted, test.rewards),
            "pairwise_accuracy_same_history": metrics.pairwise_accuracy(
                predicted, test.rewards, test.groups
            ),
            "spearman": metrics.spearman(predicted, test.rewards),
            "spearman_same_history": metrics.spearman_within(predicted, test.rewards, test.groups),
            "calibration_error": metrics.calibration_error(bins[name]),
        }
        found |= {f"{name}/{key}": value for key, value in values.items() if np.isfinite(value)}
    return found, bins["alignment"]


class _Feedback(NamedTuple):
    targets: np.ndarray
    rewards: np.ndarray
    labels: np.ndarray
    weights: np.ndarray
    groups: np.ndarray  # rows of the same history have the same number


def _feedback_of(collective: pa.Table, split: str) -> _Feedback:
    table = collective.filter(pc.equal(collective["split"], split))
    if split != "validation" and not table.num_rows:
        raise InputError(
            f"There is no collective feedback in the {split} period. Lower "
            "collective.collective_feedback.min_count, or try other transitions.split_times."
        )
    groups = np.zeros(0, np.int64)
    if table.num_rows:
        histories = np.array(table["history"].to_pylist())
        groups = np.unique(histories, axis=0, return_inverse=True)[1].ravel()
    return _Feedback(
        targets=table["next_cluster"].to_numpy(),
        rewards=table["reward"].to_numpy().astype(np.float64),
        labels=table["label"].to_numpy().astype(np.float64),
        weights=table["weight"].to_numpy().astype(np.float64),
        groups=groups,
    )


def exploration_metrics(table: ExplorationTable, num_clusters: int) -> dict[str, float]:
    """What the exploration table shows: valid, novel, and how diverse.

    Args:
      table: the whole of it.
      num_clusters: M.
    """
    shown, valid, novel = np.zeros(num_clusters, np.int64), 0, 0
    total = 0
    for history, exploration in table:
        for cluster in exploration.clusters:
            total += 1
            if 0 <= cluster < num_clusters:
                valid += 1
                shown[cluster] += 1
            novel += cluster not in history
    if not total:
        raise InputError("The exploration table is empty: no history had a cluster to explore.")
    return {
        "explore/histories": float(len(table)),
        "explore/valid_fraction": valid / total,
        "explore/novel_fraction": novel / total,
        "explore/distinct_clusters": float((shown > 0).sum()),
        "explore/entropy_bits": metrics.entropy(shown),
        "explore/mean_chosen": total / len(table),
    }


def exclusions(rows: Rows) -> Bool[np.ndarray, "R 2 M"]:
    """Both sets of clusters left out of a row's ranking, in the order of `SUFFIXES`."""
    return np.stack([rows.history_mask, rows.known_mask], axis=1)


def choose(
    clusters: Int[np.ndarray, "R N"], values: Float[np.ndarray, "R N"], num_chosen: int
) -> Int[np.ndarray, "R k"]:
    """The distinct clusters of highest value in each row, best first; -1 where there are fewer.

    Ties go to the smaller cluster id.

    Args:
      clusters: proposals, possibly several times the same.
      values: of the proposals; the same for the same cluster.
      num_chosen: k.
    """
    order = np.lexsort((clusters, -values), axis=-1)
    ranked = np.take_along_axis(clusters, order, axis=1)
    first = np.ones(ranked.shape, bool)
    first[:, 1:] = ranked[:, 1:] != ranked[:, :-1]
    # The same cluster has the same value, and ties are ordered by id: repeats stand side by side.
    place = np.cumsum(first, axis=1) - 1
    chosen = np.full((len(clusters), num_chosen), -1, clusters.dtype)
    row, column = np.nonzero(first & (place < num_chosen))
    chosen[row, place[row, column]] = ranked[row, column]
    return chosen


def scaling(
    clusters: Int[np.ndarray, "R N"],
    scores: Float[np.ndarray, "R N"],
    targets: Int[np.ndarray, "R"],
    counts: tuple[int, ...],
    num_chosen: int,
) -> dict[str, list[float]]:
    """Best of n for several n, from the first n of N independent proposals.

    Args:
      clusters: N proposals for each held-out transition.
      scores: the alignment model's logits of them.
      targets: where the users went.
      counts: the n.
      num_chosen: k.

    Returns:
      A value for each n of "n", "score" (mean predicted feedback of the best) and "recall"
      (recall@k).
    """
    best = [1 / (1 + np.exp(-scores[:, :n].max(axis=1).astype(np.float64))) for n in counts]
    lists = [choose(clusters[:, :n], scores[:, :n], num_chosen) for n in counts]
    found = [metrics.recall(metrics.ranks_in_lists(each, targets), num_chosen) for each in lists]
    return {
        "n": [float(n) for n in counts],
        "score": [float(values.mean()) for values in best],
        "recall": [float(values.mean()) for values in found],
    }
