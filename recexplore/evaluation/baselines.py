"""What a careful engineer would try before training a language model.

Each is fitted on the training period's engaged novel transitions and gives every cluster a score.
Constants are chosen on the validation period, among them a half-life: what people turn to drifts,
and counts in which the past fades are much harder to beat than counts of all time.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

from recexplore.evaluation import metrics
from recexplore.feedback.collective import target_mean
from recexplore.feedback.transitions import recency_weights

_HALF_LIVES = (None, 1 / 2, 1 / 4, 1 / 8, 1 / 16, 1 / 32)
_SMOOTHINGS = (5.0, 20.0, 100.0, 500.0, 2000.0)
_RIDGES = (3.0, 10.0, 30.0, 100.0, 200.0, 400.0, 800.0, 2000.0)
_PRIORS = (0.0, 5.0, 20.0, 50.0, 100.0, 300.0)


class Rows(NamedTuple):
    """Novel transitions as arrays, R of them, oldest first.

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


class Baseline(NamedTuple):
    """A fitted baseline: called with rows, it gives every cluster a score [R M].

    Attributes:
      constants: what was chosen, or given, by name.
      score: the function behind the call.
    """

    constants: Mapping[str, float | None]
    score: Callable[[Rows], Float[np.ndarray, "R M"]]

    def __call__(self, rows: Rows) -> Float[np.ndarray, "R M"]:
        return self.score(rows)


def popularity(train: Rows, half_life: float | None = None) -> Baseline:
    """How many moves into each cluster, weighted by recency."""
    counts = np.bincount(
        train.targets, recency_weights(len(train.targets), half_life), minlength=train.num_clusters
    )
    return Baseline({"half_life": half_life}, lambda rows: np.tile(counts, (len(rows.targets), 1)))


def nearest(centroids: Float[np.ndarray, "M E"]) -> Baseline:
    """Cosine of each cluster's centroid with the nearest one of the last two clusters.

    Not fitted, and nobody's idea of a recommender: what it proposes is expected of anyone.
    """
    lengths = np.linalg.norm(centroids, axis=1, keepdims=True)
    directions = centroids / np.maximum(lengths, 1e-12)
    cosine = (directions @ directions.T).astype(np.float64)
    return Baseline({}, lambda rows: cosine[rows.last_two].max(axis=1))


def markov(train: Rows, smoothing: float, half_life: float | None = None) -> Baseline:
    """P(next | last cluster), backed off to popularity.

    With moves of weight n from the last cluster, c of it into a cluster of popularity p:
    (c + smoothing · p) / (n + smoothing).
    """
    table = _markov_table(train, smoothing, half_life)
    constants = {"smoothing": smoothing, "half_life": half_life}
    return Baseline(constants, lambda rows: table[rows.last_two[:, 1]])


def pair_markov(
    train: Rows, smoothing: float, pair_smoothing: float, half_life: float | None = None
) -> Baseline:
    """P(next | last two clusters), backed off to P(next | last) as `markov` is to popularity."""
    size = train.num_clusters
    table = _markov_table(train, smoothing, half_life)
    pairs, place = np.unique(train.last_two @ np.array([size, 1]), return_inverse=True)
    counts = np.zeros((len(pairs), size))
    np.add.at(counts, (place, train.targets), recency_weights(len(train.targets), half_life))

    def score(rows: Rows) -> np.ndarray:
        wanted = rows.last_two @ np.array([size, 1])
        at = np.minimum(np.searchsorted(pairs, wanted), len(pairs) - 1)
        moved = np.where((pairs[at] == wanted)[:, None], counts[at], 0.0)
        back_off = table[rows.last_two[:, 1]]
        return (moved + pair_smoothing * back_off) / (
            moved.sum(axis=1, keepdims=True) + pair_smoothing
        )

    return Baseline(
        {"smoothing": smoothing, "pair_smoothing": pair_smoothing, "half_life": half_life}, score
    )


def ease(train: Rows, ridge: float, half_life: float | None = None) -> Baseline:
    """EASE (Steck 2019, arXiv 1905.03375) on the set of clusters a user has met.

    With X the users × clusters matrix, W the recency weights of the users' last moves and
    P = (XᵀWX + ridge · I)⁻¹, B = −P / diag(P) off the diagonal, 0 on it (eq. 8); the scores are
    x B for a user's set x.
    """
    _, place = np.unique(train.users, return_inverse=True)
    sets = np.zeros((place.max() + 1, train.num_clusters))
    np.maximum.at(sets, place, train.known_mask.astype(np.float64))
    sets[place, train.targets] = 1.0
    weights = np.zeros(len(sets))
    np.maximum.at(weights, place, recency_weights(len(place), half_life))
    gram = sets.T @ (sets * weights[:, None])
    precision = np.linalg.inv(gram + ridge * np.eye(train.num_clusters))
    coefficients = -precision / np.diag(precision)
    np.fill_diagonal(coefficients, 0.0)
    return Baseline(
        {"ridge": ridge, "half_life": half_life},
        lambda rows: rows.known_mask.astype(np.float64) @ coefficients,
    )


def fit_counts(train: Rows, validation: Rows, *, pairs: bool = True) -> dict[str, Baseline]:
    """Popularity and Markov, tuned on validation by recall@10 with all seen left out.

    Args:
      train: to fit on.
      validation: to choose constants on.
      pairs: Markov may go by the last two clusters, if that suits better than the last one.

    Returns:
      "popularity" and "markov".
    """
    best = _fit_under(train, validation, validation.known_mask)
    names = ("markov", "pair_markov") if pairs else ("markov",)
    markov = max((best[name] for name in names), key=lambda found: found.recall)
    return {"popularity": best["popularity"].baseline, "markov": markov.baseline}


def fit_all(train: Rows, validation: Rows) -> dict[str, dict[str, Baseline]]:
    """All baselines, each tuned for the mask that it is used under.

    Args:
      train: to fit on.
      validation: to choose constants on, by recall@10.

    Returns:
      "history" and "seen" (which clusters are left out of the ranking) → name → baseline.
    """
    masks = {"history": validation.history_mask, "seen": validation.known_mask}
    eases = [ease(train, r, h) for r in _RIDGES for h in _HALF_LIVES]
    found = {}
    for kind, mask in masks.items():
        best = _fit_under(train, validation, mask)
        best["ease"] = _best(eases, validation, mask)
        found[kind] = {name: fitted.baseline for name, fitted in best.items()}
    return found


class _Fitted(NamedTuple):
    baseline: Baseline
    recall: float  # on validation


def _fit_under(train: Rows, validation: Rows, mask: Bool[np.ndarray, "R M"]) -> dict[str, _Fitted]:
    """Popularity and both Markov models, with the constants that validate best under a mask."""
    popular = (popularity(train, h) for h in _HALF_LIVES)
    singles = (markov(train, s, h) for s in _SMOOTHINGS for h in _HALF_LIVES)
    single = _best(singles, validation, mask)
    half_life = single.baseline.constants["half_life"]
    pairs = (pair_markov(train, s, p, half_life) for s in _SMOOTHINGS for p in _SMOOTHINGS)
    return {
        "popularity": _best(popular, validation, mask),
        "markov": single,
        "pair_markov": _best(pairs, validation, mask),
    }


def _best(members: Iterable[Baseline], validation: Rows, mask: Bool[np.ndarray, "R M"]) -> _Fitted:
    def judge(member: Baseline) -> _Fitted:
        rank = metrics.ranks(member(validation), validation.targets, mask)
        return _Fitted(member, float(metrics.recall(rank, 10).mean()))

    return max(map(judge, members), key=lambda fitted: fitted.recall)


def tuned_prior(
    train: tuple[np.ndarray, np.ndarray, np.ndarray],
    validation: tuple[np.ndarray, np.ndarray],
    num_clusters: int,
) -> float:
    """The prior of `target_mean` that orders validation feedback best; 0 if that can't be told.

    Args:
      train: targets, rewards and counts, as `target_mean` takes them.
      validation: targets and rewards.
      num_clusters: M.
    """
    targets, truth = validation
    accuracy = {
        prior: metrics.pairwise_accuracy(target_mean(*train, num_clusters, prior)[targets], truth)
        for prior in _PRIORS
    }
    known = {prior: value for prior, value in accuracy.items() if np.isfinite(value)}
    return max(known, key=known.__getitem__, default=0.0)


def _markov_table(train: Rows, smoothing: float, half_life: float | None) -> np.ndarray:
    size = train.num_clusters
    weights = recency_weights(len(train.targets), half_life)
    counts = np.zeros((size, size))
    np.add.at(counts, (train.last_two[:, 1], train.targets), weights)
    popular = np.bincount(train.targets, weights, minlength=size) + 1.0
    popular = popular / popular.sum()
    return (counts + smoothing * popular) / (counts.sum(axis=1, keepdims=True) + smoothing)
