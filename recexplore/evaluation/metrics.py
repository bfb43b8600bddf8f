"""Numbers that say how good rankings, scores and explorations are."""

import numpy as np
import scipy.stats
from jaxtyping import Bool, Float, Int


def ranks(
    scores: Float[np.ndarray, "R M"],
    targets: Int[np.ndarray, "R"],
    excluded: Bool[np.ndarray, "R M"],
) -> Float[np.ndarray, "R"]:
    """Place of each row's target among all clusters that aren't excluded; 0 is the top.

    Clusters with the same score as the target count half: the target's expected place when ties are
    broken at random. So scores (3, 2, 2, 1) give a target of score 2 the rank 1 + 1/2.

    Args:
      scores: higher is better; -inf for what a method can't propose.
      targets: cluster ids.
      excluded: clusters not ranked; never the target.

    Raises:
      ValueError: a score is not a number, or a target is excluded. Neither has a place, and
        comparisons would quietly put such a target on top.
    """
    rows = np.arange(len(targets))
    if np.isnan(scores).any():
        raise ValueError(f"{int(np.isnan(scores).any(axis=1).sum())} row(s) have NaN scores.")
    if excluded[rows, targets].any():
        raise ValueError(f"{int(excluded[rows, targets].sum())} target(s) are excluded.")
    own = scores[rows, targets][:, None]
    better = ((scores > own) & ~excluded).sum(axis=1)
    tied = ((scores == own) & ~excluded).sum(axis=1) - 1
    return better + tied / 2


def ranks_in_lists(
    lists: Int[np.ndarray, "R k"], targets: Int[np.ndarray, "R"]
) -> Float[np.ndarray, "R"]:
    """Place of each row's target in a list of cluster ids; infinite when it isn't in it.

    Args:
      lists: best first, -1 where a list is shorter.
      targets: cluster ids.
    """
    found = lists == targets[:, None]
    return np.where(found.any(axis=1), found.argmax(axis=1), np.inf)


def recall(rank: Float[np.ndarray, "R"], k: int) -> Float[np.ndarray, "R"]:
    """1 where the one relevant cluster is among the first k, else 0."""
    return (rank < k).astype(np.float64)


def ndcg(rank: Float[np.ndarray, "R"], k: int) -> Float[np.ndarray, "R"]:
    """1 / log2(rank + 2) where the one relevant cluster is among the first k, else 0."""
    inside = rank < k
    return np.where(inside, 1 / np.log2(np.where(inside, rank, 0) + 2), 0.0)


def serendipity(
    rank: Float[np.ndarray, "R"], primitive_ranks: Float[np.ndarray, "P R"], k: int
) -> Float[np.ndarray, "R"]:
    """1 where the relevant cluster is among the first k, and was so for no primitive; else 0.

    Args:
      rank: of the relevant cluster.
      primitive_ranks: of the same cluster by methods that need no model: `baselines.popularity` and
        `baselines.nearest`.
      k: places counted.
    """
    return recall(rank, k) * (primitive_ranks >= k).all(axis=0)


def top_lists(
    scores: Float[np.ndarray, "R M"], excluded: Bool[np.ndarray, "R M"], k: int
) -> Int[np.ndarray, "R k"]:
    """The k clusters of highest score in each row, best first; ties go to the smaller id.

    Args:
      scores: higher is better; -inf for what a method can't propose.
      excluded: clusters left out.
      k: how many; -1 where there are fewer.
    """
    value = np.where(excluded, -np.inf, scores)
    order = np.argsort(-value, axis=1, kind="stable")[:, :k]
    lists = np.full((len(scores), k), -1, order.dtype)
    proposed = np.isfinite(np.take_along_axis(value, order, axis=1))
    lists[:, : order.shape[1]] = np.where(proposed, order, -1)
    return lists


def coverage(lists: Int[np.ndarray, "R k"], num_clusters: int) -> float:
    """Share of all clusters that are in at least one list; -1 is none."""
    return len(np.unique(lists[lists >= 0])) / num_clusters


def engaged_pairs(
    lists: Int[np.ndarray, "R k"],
    users: np.ndarray,
    engaged_users: np.ndarray,
    engaged_clusters: Int[np.ndarray, "E"],
) -> Int[np.ndarray, "U"]:
    """Different clusters that each user was recommended and engaged with; their sum is like UEUC.

    Args:
      lists: clusters recommended, -1 where a list is shorter.
      users: whose list it is; the same user may have several.
      engaged_users: of each engagement in the held-out period.
      engaged_clusters: of each engagement; repeats count once.

    Returns:
      A count for each different user of `users`, in sorted order.
    """
    names, place = np.unique(users, return_inverse=True)
    width = int(max(lists.max(initial=0), engaged_clusters.max(initial=0))) + 1
    at = np.minimum(np.searchsorted(names, engaged_users), len(names) - 1)
    known = names[at] == engaged_users
    recommended = np.where(lists >= 0, place[:, None] * width + lists, -1)
    engaged = at[known] * width + engaged_clusters[known]
    both = np.intersect1d(recommended, engaged)
    return np.bincount(both // width, minlength=len(names))


def pairwise_accuracy(
    predicted: Float[np.ndarray, "R"],
    truth: Float[np.ndarray, "R"],
    groups: Int[np.ndarray, "R"] | None = None,
) -> float:
    """Part of all pairs with different truth that the prediction puts in the right order.

    A tie of the prediction counts one half, so that guessing gives 0.5.

    Args:
      predicted: higher is better.
      truth: what it should order like.
      groups: if given, only pairs within the same group count.

    Returns:
      nan when there is no such pair.
    """
    order = np.argsort(np.zeros(len(truth)) if groups is None else groups, kind="stable")
    labels = np.zeros(len(truth)) if groups is None else np.asarray(groups)[order]
    starts = np.flatnonzero(np.diff(labels, prepend=np.nan) != 0)
    right, total = 0.0, 0
    for start, stop in zip(starts, [*starts[1:], len(order)], strict=True):
        rows = order[start:stop]
        concordant, pairs = _concordant_pairs(predicted[rows], truth[rows])
        right, total = right + concordant, total + pairs
    return right / total if total else float("nan")


def _concordant_pairs(predicted: np.ndarray, truth: np.ndarray, block: int = 1024):
    right, total = 0.0, 0
    for start in range(0, len(truth), block):
        rows = slice(start, start + block)
        lower = truth[rows, None] < truth[None, :]
        right += (lower & (predicted[rows, None] < predicted[None, :])).sum()
        right += 0.5 * (lower & (predicted[rows, None] == predicted[None, :])).sum()
        total += int(lower.sum())
    return right, total


def spearman(predicted: Float[np.ndarray, "R"], truth: Float[np.ndarray, "R"]) -> float:
    """Rank correlation; 0 when one side is constant."""
    if np.ptp(predicted) == 0 or np.ptp(truth) == 0:
        return 0.0
    return float(scipy.stats.spearmanr(predicted, truth).statistic)


def spearman_within(
    predicted: Float[np.ndarray, "R"], truth: Float[np.ndarray, "R"], groups: Int[np.ndarray, "R"]
) -> float:
    """Mean of the groups' rank correlations, weighted by rows; only where the truth differs.

    Returns:
      nan when no group has different truths.
    """
    order = np.argsort(groups, kind="stable")
    starts = np.flatnonzero(np.diff(groups[order], prepend=-np.inf))
    parts = [part for part in np.split(order, starts[1:]) if np.ptp(truth[part]) > 0]
    if not parts:
        return float("nan")
    values = [spearman(predicted[part], truth[part]) for part in parts]
    return float(np.average(values, weights=[len(part) for part in parts]))


def entropy(counts: Int[np.ndarray, "M"]) -> float:
    """Entropy in bits of how often each cluster was shown; log2 M when all are shown alike."""
    share = counts[counts > 0] / counts.sum()
    return float(-(share * np.log2(share)).sum())


def calibration(
    predicted: Float[np.ndarray, "R"],
    truth: Float[np.ndarray, "R"],
    weights: Float[np.ndarray, "R"],
    bins: int = 10,
) -> Float[np.ndarray, "3 bins"]:
    """Mean prediction, mean truth and weight of equally many rows each, by predicted value.

    Args:
      predicted: in 0..1.
      truth: in 0..1.
      weights: of the rows.
      bins: how many; fewer rows than that give fewer.
    """
    order = np.argsort(predicted, kind="stable")
    parts = np.array_split(order, min(bins, len(order)))
    rows = [
        (
            np.average(predicted[part], weights=weights[part]),
            np.average(truth[part], weights=weights[part]),
            weights[part].sum(),
        )
        for part in parts
    ]
    return np.array(rows).T


def calibration_error(bins: Float[np.ndarray, "3 bins"]) -> float:
    """Expected calibration error: the weighted mean distance of prediction and truth by bin."""
    predicted, truth, weight = bins
    return float(np.average(np.abs(predicted - truth), weights=weight))
