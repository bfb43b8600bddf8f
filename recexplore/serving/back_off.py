"""What is answered for histories that the models were not asked about, worked out beforehand."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from jaxtyping import Bool, Float, Int
from scipy.special import expit, logit

from recexplore.serving.exploration import Answers, Popular

_SURE = 1e-6  # no mean label is closer to 0 or 1 than this


class _Pairs(NamedTuple):
    """Every cluster that is proposed after an end, once: P pairs, ordered by end, then cluster."""

    ends: Int[np.ndarray, "P"]
    clusters: Int[np.ndarray, "P"]
    values: Float[np.ndarray, "P"]
    scores: Float[np.ndarray, "P"]
    log_probabilities: Float[np.ndarray, "P"]


def shorter_histories(
    asked: Answers, counts: Int[np.ndarray, "R"], length: int, width: int
) -> Answers:
    """What is best after the last `length` clusters, whatever came before them.

    Averaged over the histories h that end so and are longer, each weighted by its count n(h), a
    cluster c among the chosen of some has the value

        Σ n(h) σ(score(c | h)) [c is chosen for h]  /  Σ n(h)

    the label that is expected of showing it, 0 where it isn't chosen. The clusters of highest value
    are kept, ties going to the smaller id. Where all counts of an end are 0, all count alike.

    Args:
      asked: histories in ascending order of their keys, so that those with the same end are
        neighbours.
      counts: how often users stood at each.
      length: of the ends.
      width: clusters kept for each end.
    """
    columns = asked.histories.shape[1]
    longer = asked.histories[:, columns - length - 1] >= 0
    asked, counts = Answers(*(values[longer] for values in asked)), counts[longer]
    ends = asked.histories[:, columns - length :]
    first = np.ones(len(ends), bool)
    first[1:] = (ends[1:] != ends[:-1]).any(axis=1)
    pairs = _pairs(asked, np.cumsum(first) - 1, counts.astype(np.float64))

    values = pairs.values.astype(np.float32)  # what differs by the order of summing is the same
    order = np.lexsort((pairs.clusters, -values, pairs.ends))
    place = np.arange(len(order)) - np.searchsorted(pairs.ends, pairs.ends)  # ends stay in order
    kept = place < width
    order, where = order[kept], (pairs.ends[kept], place[kept])
    histories = np.full((int(first.sum()), columns), -1, np.int32)
    histories[:, columns - length :] = ends[first]
    clusters = np.full((len(histories), width), -1, np.int32)
    scores, log_probabilities, propensities = np.zeros((3, *clusters.shape), np.float32)
    clusters[where] = pairs.clusters[order]
    scores[where] = pairs.scores[order]
    log_probabilities[where] = pairs.log_probabilities[order]
    propensities[where] = 1.0
    return Answers(histories, clusters, scores, log_probabilities, propensities)


def _pairs(asked: Answers, end: Int[np.ndarray, "R"], counts: Float[np.ndarray, "R"]) -> _Pairs:
    total = np.bincount(end, counts)
    weights = np.where(total[end] > 0, counts, 1.0)
    filled: Bool[np.ndarray, "R k"] = (asked.clusters >= 0) & (weights > 0)[:, None]
    row = np.nonzero(filled)[0]
    size = int(asked.clusters.max(initial=-1)) + 1
    pairs, pair = np.unique(
        end[row].astype(np.int64) * size + asked.clusters[filled], return_inverse=True
    )
    scores = asked.scores[filled].astype(np.float64)
    log_probabilities = asked.log_probabilities[filled].astype(np.float64)

    def sums(values: Float[np.ndarray, "C"]) -> Float[np.ndarray, "P"]:
        summed = np.bincount(pair, weights[row] * values, len(pairs))
        return summed.astype(np.float64)  # integers where there are none

    weight = sums(np.ones(len(row)))
    return _Pairs(
        pairs // max(size, 1),
        pairs % max(size, 1),
        sums(expit(scores)),  # the divisor is the same for all clusters of an end
        sums(scores) / weight,
        sums(log_probabilities) / weight,
    )


def popular_clusters(
    transitions: pa.Table, collective: pa.Table, num_clusters: int, banned: Sequence[int] = ()
) -> Popular:
    """All clusters by the number of novel moves into them in the training period.

    Ties go to the smaller id. Half a move is added for every cluster, and one user with the mean
    label of all, so that clusters nobody moved into have finite figures too.

    Args:
      transitions: TRANSITIONS.
      collective: COLLECTIVE.
      num_clusters: M.
      banned: clusters that nobody gets.
    """
    moves = transitions.filter(pc.equal(transitions["split"], "train"))
    moved = np.bincount(moves["next_cluster"].to_numpy(), minlength=num_clusters)
    told = collective.filter(pc.equal(collective["split"], "train"))
    clusters, users = told["next_cluster"].to_numpy(), told["weight"].to_numpy().astype(np.float64)
    labels = np.bincount(clusters, users * told["label"].to_numpy(), num_clusters)
    users = np.bincount(clusters, users, num_clusters)
    mean = labels.sum() / users.sum() if users.any() else 0.5
    scores = logit(np.clip((labels + mean) / (users + 1.0), _SURE, 1.0 - _SURE))
    shares = (moved + 0.5) / (moved.sum() + 0.5 * num_clusters)
    order = np.argsort(-moved, kind="stable")
    order = order[~np.isin(order, np.array(banned, np.int64))]
    return Popular(
        order.astype(np.int32),
        scores[order].astype(np.float32),
        np.log(shares)[order].astype(np.float32),
    )
