"""The clusters of a work directory: the one way to write and read them."""

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
from jaxtyping import Float

from recexplore import artifacts
from recexplore.errors import InputError

if TYPE_CHECKING:
    from recexplore.interests.clustering import ItemClustering

_CLUSTERS, _ITEM_CLUSTERS = "clusters.parquet", "item_clusters.parquet"


@dataclasses.dataclass(frozen=True)
class ClusterTable:
    """M interest clusters and the items in them.

    Attributes:
      clusters: CLUSTERS, a row for each cluster in order.
      item_clusters: ITEM_CLUSTERS, a row for each item.
    """

    clusters: pa.Table
    item_clusters: pa.Table

    @classmethod
    def build(
        cls,
        items: pa.Table,
        interactions: pa.Table,
        embeddings: Float[np.ndarray, "I E"],
        clustering: "ItemClustering",
        descriptions: list[str],
    ) -> "ClusterTable":
        """Puts together what clustering and describing have found.

        Args:
          items: ITEMS.
          interactions: INTERACTIONS, to count.
          embeddings: of the items.
          clustering: of the items.
          descriptions: of the clusters.

        Raises:
          InputError: an interaction with an unknown item.
        """
        from recexplore.interests.embeddings import places_of_items  # scikit-learn

        labels, count = clustering.labels, len(descriptions)
        watched = np.bincount(labels[places_of_items(items, interactions)], minlength=count)
        centroids = [embeddings[labels == c].mean(axis=0) for c in range(count)]
        clusters = pa.table(
            {
                "cluster_id": np.arange(count, dtype=np.int32),
                "description": descriptions,
                "path": clustering.paths,
                "num_items": np.bincount(labels, minlength=count).astype(np.int32),
                "num_interactions": watched.astype(np.int64),
                "centroid": centroids,
            }
        )
        return cls(clusters, pa.table({"item_id": items["item_id"], "cluster_id": labels}))

    @classmethod
    def read(cls, folder: Path) -> "ClusterTable":
        """Reads the clusters and checks them.

        Raises:
          InputError: a file is missing or damaged, or the two don't fit together.
        """
        table = cls(
            artifacts.read_table(folder / _CLUSTERS, artifacts.CLUSTERS),
            artifacts.read_table(folder / _ITEM_CLUSTERS, artifacts.ITEM_CLUSTERS),
        )
        ids = table.clusters["cluster_id"].to_numpy()
        used = table.item_clusters["cluster_id"].to_numpy()
        if not np.array_equal(ids, np.arange(len(ids))) or not np.isin(used, ids).all():
            raise InputError(f"{folder}: clusters and items don't fit. Run `recexplore cluster`.")
        if len(set(table.descriptions)) != len(ids):
            raise InputError(f"{folder / _CLUSTERS}: two clusters have the same description.")
        return table

    def write(self, folder: Path) -> None:
        """Writes both tables."""
        artifacts.write_table(folder / _CLUSTERS, self.clusters, artifacts.CLUSTERS)
        artifacts.write_table(folder / _ITEM_CLUSTERS, self.item_clusters, artifacts.ITEM_CLUSTERS)

    @property
    def fingerprint(self) -> str:
        """SHA-256 of what a cluster id stands for: descriptions, places in the tree, centroids.

        Counts are left out, and which items there are: new items may join clusters that stay what
        they are.
        """
        found = hashlib.sha256(json.dumps([self.descriptions, self.paths]).encode())
        found.update(self.centroids.tobytes())
        return found.hexdigest()

    @property
    def num_clusters(self) -> int:
        """M."""
        return self.clusters.num_rows

    @property
    def descriptions(self) -> list[str]:
        """Each cluster's description."""
        return self.clusters["description"].to_pylist()

    @property
    def num_interactions(self) -> np.ndarray:
        """How often items of each cluster were consumed."""
        return self.clusters["num_interactions"].to_numpy()

    @property
    def centroids(self) -> np.ndarray:
        """The mean embedding of each cluster's items, [M, E]."""
        return np.array(self.clusters["centroid"].to_pylist(), np.float32)

    @property
    def paths(self) -> list[list[int]]:
        """Inner nodes above each cluster, from the top."""
        return self.clusters["path"].to_pylist()
