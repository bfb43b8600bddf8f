"""Items → a hierarchy of interest clusters."""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int
from sklearn.cluster import BisectingKMeans

from recexplore.errors import InputError


class ItemClustering(NamedTuple):
    """Where items went.

    Attributes:
      labels: the leaf cluster of each item, 0 .. M - 1.
      paths: for each leaf the inner nodes above it, from the top; numbers from M on.
    """

    labels: Int[np.ndarray, "I"]
    paths: list[list[int]]


def cluster_items(
    embeddings: Float[np.ndarray, "I E"],
    *,
    num_clusters: int,
    seed: int = 0,
    restarts: int = 3,
) -> ItemClustering:
    """Bisecting k-means: splits the widest cluster in two until there are `num_clusters`.

    Args:
      embeddings: one row for each item.
      num_clusters: M, number of leaves.
      seed: of the splits.
      restarts: splits tried for each, the best of which is kept.

    Raises:
      InputError: fewer different items than clusters, fewer than 2 clusters, or no restarts.
    """
    different = len(np.unique(embeddings, axis=0))
    if not isinstance(num_clusters, int) or not 2 <= num_clusters <= different:
        raise InputError(_TOO_MANY.format(num_clusters, different))
    if not isinstance(restarts, int) or restarts < 1:
        raise InputError(
            f"clustering.cluster_items.restarts is {restarts}; it must be a whole number from 1 on."
        )
    model = BisectingKMeans(
        num_clusters, random_state=seed, n_init=restarts, bisecting_strategy="biggest_inertia"
    ).fit(embeddings)
    used = len(np.unique(model.labels_))
    if used < num_clusters:  # items that differ by no more than rounding
        raise InputError(_TOO_MANY.format(num_clusters, used))
    paths = _paths(model._bisecting_tree, num_clusters)
    return ItemClustering(model.labels_.astype(np.int32), paths)


_TOO_MANY = (
    "clustering.cluster_items.num_clusters is {}; it must be a whole number between 2 and the "
    "number of different items, {}."
)


def _paths(tree, num_clusters: int) -> list[list[int]]:
    """The inner nodes above each leaf of scikit-learn's tree, numbered from the top."""
    paths: list[list[int]] = [[] for _ in range(num_clusters)]
    next_id = num_clusters
    waiting = [(tree, [])]
    while waiting:
        node, above = waiting.pop(0)
        if node.left is None:
            paths[node.label] = above
            continue
        here, next_id = [*above, next_id], next_id + 1
        waiting += [(node.left, here), (node.right, here)]
    return paths
