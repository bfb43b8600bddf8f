"""A planner for a work directory: its table, its item recommender, the clusters of its items."""

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from recexplore.interests.cluster_table import ClusterTable
from recexplore.items import open_recommender
from recexplore.serving.exploration import Exploration
from recexplore.serving.planner import Budget, Planner


def open_planner(
    work: Path,
    look_up: Callable[[Sequence[int], Iterable[int]], Exploration],
    budget: Budget,
) -> Planner:
    """A planner that turns a table's clusters into items.

    Args:
      work: the work directory.
      look_up: of its table, or another source of clusters.
      budget: how much to explore.

    Raises:
      InputError: the work directory has no item recommender, or one of other clusters.
    """
    items = ClusterTable.read(work / "clusters").item_clusters
    pairs = zip(items["item_id"].to_pylist(), items["cluster_id"].to_pylist(), strict=True)
    return Planner(look_up, open_recommender(work), dict(pairs), budget)
