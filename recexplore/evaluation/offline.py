"""Evaluation on the held-out period of a log: every cluster ranked, nothing sampled."""

from collections.abc import Mapping

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from jaxtyping import Bool, Float, Int

from recexplore.errors import InputError
from recexplore.evaluation import metrics
from recexplore.evaluation.baselines import Rows, target_mean
from recexplore.serving.exploration_table import ExplorationTable

KS = (5, 10, 20)
SUFFIXES = {"history": "", "seen": "_unseen"}  # what is left out of the ranking → metric suffix


def rows_of(transitions: pa.Table, split: str, num_clusters: int) -> Rows:
    """The engaged transitions of a split, as arrays.

    Args:
      transitions: TRANSITIONS.
      split: train, validation or test.
      num_clusters: M.

    Raises:
      InputError: there are none.
    """
    wanted = pc.and_(pc.equal(transitions["split"], split), pc.invert(transitions["skipped"]))
    table = transitions.filter(wanted)
    if not table.num_rows:
        raise InputError(
            f"The {split} period has no novel transition that was not skipped: the log is too "
            "small, or too few clusters are new to anyone. Try other transitions.split_times."
        )
    seen = np.zeros((table.num_rows, num_clusters), bool)
    for row, clusters in zip(seen, table["seen"].to_pylist(), strict=True):
        row[clusters] = True
    histories = table["history"].to_pylist()
    return Rows(
        users=table["user_id"].to_numpy(),
        histories=histories,
        last_two=np.array([history[-2:] for history in histories]),
        targets=table["next_cluster"].to_numpy(),
        seen=seen,
    )


def ranking_metrics(
    name: str, suffix: str, ranks: Float[np.ndarray, "R"], users: np.ndarray
) -> dict[str, float]:
    """NAME/recall@k and NAME/ndcg@k, with a 95 % interval over users at k = 10."""
    found = {}
    for k in KS:
        for kind, measure in (("recall", metrics.recall), ("ndcg", metrics.ndcg)):
            values = measure(ranks, k)
            key = f"{name}/{kind}@{k}{suffix}"
            found[key] = float(values.mean())
            if k == 10:
                found[f"{key}_low"], found[f"{key}_high"] = metrics.bootstrap_interval(
                    values, users
                )
    return found


def rank_all(
    scores: Mapping[str, Mapping[str, Float[np.ndarray, "R M"]]],
    lists: Mapping[str, Mapping[str, Int[np.ndarray, "R k"]]],
    rows: Rows,
) -> dict[str, float]:
    """Ranking metrics of all methods, by what is left out of the ranking.

    Args:
      scores: "history" or "seen" → method → a score for every cluster.
      lists: likewise → method → the clusters it chose, best first, -1 where fewer.
      rows: the held-out transitions.
    """
    masks = {"history": rows.history_mask, "seen": rows.known_mask}
    found = {}
    for kind, suffix in SUFFIXES.items():
        for name, values in scores[kind].items():
            ranks = metrics.ranks(values, rows.targets, masks[kind])
            found |= ranking_metrics(name, suffix, ranks, rows.users)
        for name, values in lists[kind].items():
            ranks = metrics.ranks_in_lists(values, rows.targets)
            found |= ranking_metrics(name, suffix, ranks, rows.users)
    return found


def alignment_metrics(
    collective: pa.Table,
    scores: Float[np.ndarray, "R"],
    num_clusters: int,
) -> tuple[dict[str, float], Float[np.ndarray, "3 bins"]]:
    """How well scores order held-out collective feedback, beside the next cluster's mean.

    Args:
      collective: COLLECTIVE of all splits.
      scores: the alignment model's logits for the rows of the test split, in order.
      num_clusters: M.

    Returns:
      Metrics of `alignment` and of the baseline `target_mean`, and the alignment model's
      calibration by bin (see `metrics.calibration`).
    """
    train = collective.filter(pc.equal(collective["split"], "train"))
    test = collective.filter(pc.equal(collective["split"], "test"))
    means = target_mean(
        train["next_cluster"].to_numpy(),
        train["reward"].to_numpy().astype(np.float64),
        train["count"].to_numpy(),
        num_clusters,
    )
    truth = test["reward"].to_numpy().astype(np.float64)
    _, groups = np.unique(np.array(test["history"].to_pylist()), axis=0, return_inverse=True)
    found = {}
    baseline = means[test["next_cluster"].to_numpy()]
    for name, predicted in (("alignment", scores.astype(np.float64)), ("target_mean", baseline)):
        found[f"{name}/pairwise_accuracy"] = metrics.pairwise_accuracy(predicted, truth)
        within = metrics.pairwise_accuracy(predicted, truth, groups.ravel())
        if np.isfinite(within):
            found[f"{name}/pairwise_accuracy_same_history"] = within
        found[f"{name}/spearman"] = metrics.spearman(predicted, truth)
    bins = metrics.calibration(
        1 / (1 + np.exp(-scores.astype(np.float64))),
        test["label"].to_numpy().astype(np.float64),
        test["count"].to_numpy().astype(np.float64),
    )
    found["alignment/calibration_error"] = metrics.calibration_error(bins)
    return found, bins


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
