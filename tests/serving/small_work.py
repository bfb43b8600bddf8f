"""A work directory with six clusters, their items and a small exploration table, ready to serve."""

import numpy as np
import pyarrow as pa
from small_tables import FINGERPRINTS, build

from recexplore import artifacts
from recexplore.interests.cluster_table import ClusterTable

DESCRIPTIONS = [
    "cooking, bread",
    "cooking, noodles",
    'space, <b>rockets</b> & "probes"',  # text that a page must not take for markup
    "music, cello",
    "gardens, roses",
    "Кино, комедии",
]


def make_work(folder, offset=0.0):
    """Writes it; returns the clusters."""
    clusters = ClusterTable(
        pa.table(
            {
                "cluster_id": np.arange(6, dtype=np.int32),
                "description": DESCRIPTIONS,
                "path": [[0]] * 6,
                "num_items": np.full(6, 4, np.int32),
                "num_interactions": np.full(6, 10, np.int64),
                "centroid": [[float(c), 1.0] for c in range(6)],
            }
        ),
        pa.table(
            {
                "item_id": [f"i{number}" for number in range(24)],
                "cluster_id": np.arange(24, dtype=np.int32) % 6,
            }
        ),
    )
    clusters.write(folder / "clusters")
    items = pa.table(
        {
            "item_id": [f"i{number}" for number in range(24)],
            "title": [f"Title <{number}>" for number in range(24)],
            "text": [""] * 24,
            "embedding": pa.nulls(24, pa.list_(pa.float32())),
        }
    )
    artifacts.write_table(folder / "interactions" / "items.parquet", items, artifacts.ITEMS)
    add_table(folder, offset)
    return clusters


def add_table(folder, offset, **changed):
    """A further version of the table, with `offset` added to all scores; returns its number."""
    clusters = ClusterTable.read(folder / "clusters").fingerprint
    rows = {
        (0, 1): (3, [2, 3], [0.5 + offset, 0.25 + offset]),
        (1, 0): (1, [4], [1.5 + offset]),
        (2, 1): (1, [3, 0], [0.75 + offset, -0.5 + offset]),
        (4, 3): (2, [1, 5], [0.25 + offset, -1.0 + offset]),
    }
    table = build(
        rows,
        num_clusters=6,
        popular=[3, 0, 5, 1, 2, 4],
        fingerprints={**FINGERPRINTS, "clusters": clusters, **changed},
    )
    return table.write(folder / "exploration")
