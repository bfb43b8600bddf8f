"""What a careful engineer would try before training a language model.

Each is fitted on the training period's engaged novel transitions and gives every cluster a score;
constants are chosen on the validation period.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

from recexplore.evaluation import metrics


class Rows(NamedTuple):
    """Novel transitions as arrays, R of them.

    Attributes:
      users: whose they are.
      histories: distinct clusters, oldest first.
      last_two: the last two of each history.
      targets: the next cluster.
      seen: clusters the user had met.
    """

    users: np.ndarray
    histories: list[list[int]]
    last_two: Int[np.ndarray, "R 2"]
    targets: Int[np.ndarray, "R"]
    seen: Bool[np.ndarray, "R M"]

    @property
    def num_clusters(self) -> int:
        return self.seen.shape[1]

    @property
    def history_mask(self) -> Bool[np.ndarray, "R M"]:
        """The last two clusters, as a mask."""
        mask = np.zeros(self.seen.shape, bool)
        np.put_along_axis(mask, self.last_two, True, axis=1)
        return mask

    @property
    def known_mask(self) -> Bool[np.ndarray, "R M"]:
        """All clusters met, those of the history among them."""
        return self.seen | self.history_mask


Scorer = Callable[[Rows], Float[np.ndarray, "R M"]]


def popularity(train: Rows) -> Scorer:
    """How many users moved into each cluster."""
    counts = np.bincount(train.targets, minlength=train.num_clusters).astype(np.float64)
    return lambda rows: np.tile(counts, (len(rows.targets), 1))


def markov(train: Rows, smoothing: float) -> Scorer:
    """P(next | last cluster), backed off to popularity.

    With n transitions from the last cluster, c of them into a cluster of popularity p:
    (c + smoothing · p) / (n + smoothing).
    """
    table = _markov_table(train, smoothing)
    return lambda rows: table[rows.last_two[:, 1]]


def pair_markov(train: Rows, smoothing: float, pair_smoothing: float) -> Scorer:
    """P(next | last two clusters), backed off to P(next | last) as `markov` is to popularity."""
    size = train.num_clusters
    table = _markov_table(train, smoothing)
    keys = train.last_two @ np.array([size, 1])
    pairs, place = np.unique(keys, return_inverse=True)
    counts = np.zeros((len(pairs), size))
    np.add.at(counts, (place, train.targets), 1)

    def score(rows: Rows) -> np.ndarray:
        wanted = rows.last_two @ np.array([size, 1])
        at = np.minimum(np.searchsorted(pairs, wanted), len(pairs) - 1)
        seen = np.where((pairs[at] == wanted)[:, None], counts[at], 0.0)
        total = seen.sum(axis=1, keepdims=True)
        back_off = table[rows.last_two[:, 1]]
        return (seen + pair_smoothing * back_off) / (total + pair_smoothing)

    return score


def ease(train: Rows, ridge: float) -> Scorer:
    """EASE (Steck 2019) on the set of clusters a user has met.

    With X the users × clusters matrix, P = (XᵀX + ridge · I)⁻¹ and B = −P / diag(P) off the
    diagonal, 0 on it, the scores are x B for a user's set x.
    """
    _, place = np.unique(train.users, return_inverse=True)
    sets = np.zeros((place.max() + 1, train.num_clusters))
    np.maximum.at(sets, place, train.known_mask.astype(np.float64))
    np.maximum.at(sets, (place, train.targets), 1.0)
    precision = np.linalg.inv(sets.T @ sets + ridge * np.eye(train.num_clusters))
    weights = -precision / np.diag(precision)
    np.fill_diagonal(weights, 0.0)
    return lambda rows: rows.known_mask.astype(np.float64) @ weights


def fit_all(train: Rows, validation: Rows) -> dict[str, dict[str, Scorer]]:
    """All baselines, each tuned for the mask that it is used under.

    Args:
      train: to fit on.
      validation: to choose constants on, by recall@10.

    Returns:
      "history" and "seen" (which clusters are left out of the ranking) → name → scorer.
    """
    smoothings = (5.0, 20.0, 100.0, 500.0, 2000.0)
    families: dict[str, Sequence[Scorer]] = {
        "popularity": [popularity(train)],
        "markov": [markov(train, s) for s in smoothings],
        "pair_markov": [pair_markov(train, s, p) for s in smoothings for p in smoothings],
        "ease": [ease(train, ridge) for ridge in (3.0, 10.0, 50.0, 200.0, 500.0, 2000.0)],
    }
    masks = {"history": validation.history_mask, "seen": validation.known_mask}
    return {
        kind: {
            name: max(members, key=lambda scorer: _recall_at_10(scorer, validation, mask))
            for name, members in families.items()
        }
        for kind, mask in masks.items()
    }


def target_mean(
    targets: Int[np.ndarray, "R"],
    rewards: Float[np.ndarray, "R"],
    counts: Int[np.ndarray, "R"],
    num_clusters: int,
) -> Float[np.ndarray, "M"]:
    """Mean training feedback of each next cluster, whatever the history; the baseline of alignment.

    A cluster without training feedback gets the overall mean.
    """
    users = np.bincount(targets, counts, minlength=num_clusters)
    total = np.bincount(targets, counts * rewards, minlength=num_clusters)
    overall = total.sum() / users.sum()
    return np.where(users > 0, total / np.maximum(users, 1), overall)


def _recall_at_10(scorer: Scorer, rows: Rows, mask: np.ndarray) -> float:
    return float(metrics.recall(metrics.ranks(scorer(rows), rows.targets, mask), 10).mean())


def _markov_table(train: Rows, smoothing: float) -> np.ndarray:
    size = train.num_clusters
    counts = np.zeros((size, size))
    np.add.at(counts, (train.last_two[:, 1], train.targets), 1)
    popular = np.bincount(train.targets, minlength=size) + 1.0
    popular = popular / popular.sum()
    return (counts + smoothing * popular) / (counts.sum(axis=1, keepdims=True) + smoothing)
