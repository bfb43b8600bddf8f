"""Items → clusters in words."""

import numpy as np
import pyarrow as pa
import pytest

from recexplore import artifacts
from recexplore.errors import InputError
from recexplore.interests import clustering, embeddings
from recexplore.interests.cluster_table import ClusterTable

WORDS = {"space": "space rocket star", "cook": "cook oven bread", "sport": "goal ball team"}


def items_table(per_topic=20, embedding=None):
    rows = [(f"{topic}{i}", words) for topic, words in WORDS.items() for i in range(per_topic)]
    ids, texts = zip(*rows, strict=True)
    table = {"item_id": ids, "title": ["x"] * len(ids), "text": texts}
    vectors = pa.array(embedding or [None] * len(ids), pa.list_(pa.float32()))
    return pa.table({**table, "embedding": vectors})


def watched(pairs):
    return pa.table({"user_id": [u for u, _ in pairs], "item_id": [i for _, i in pairs]})


def test_items_with_the_same_words_embed_alike():
    vectors = embeddings.embed_items(items_table(), watched([("u", "space0")]), text_dimensions=3)
    assert np.linalg.norm(vectors, axis=1) == pytest.approx(1.0, abs=1e-5)
    similar = vectors[1:20] @ vectors[1]
    different = vectors[20:] @ vectors[1]
    assert similar.min() > 0.99 and different.max() < 0.5


def test_items_watched_together_embed_alike_whatever_they_say():
    pairs = [(f"a{u}", f"space{u % 5}") for u in range(40)] + [
        (f"a{u}", "cook0") for u in range(40)
    ]
    pairs += [(f"b{u}", f"sport{u % 5}") for u in range(40)]
    apart = embeddings.embed_items(items_table(), watched([("u", "space0")]))
    together = embeddings.embed_items(items_table(), watched(pairs))
    assert together[0] @ together[20] > apart[0] @ apart[20] + 0.1


def test_a_given_embedding_replaces_the_text():
    given = np.eye(60, dtype=np.float32)
    table = items_table(embedding=given.tolist())
    vectors = embeddings.embed_items(table, watched([]), consumption_dimensions=0)
    assert vectors == pytest.approx(given)


def test_texts_without_words_are_refused():
    table = items_table().set_column(2, "text", pa.array([""] * 60))
    table = table.set_column(1, "title", pa.array([""] * 60))
    with pytest.raises(InputError, match="share no words"):
        embeddings.embed_items(table, watched([]))


ONE, NAN = [1.0, 0.0], float("nan")


@pytest.mark.parametrize(
    ("vectors", "message"),
    [
        ([ONE, None, ONE], "item 'b' has 0 numbers, the longest has 2"),
        ([ONE, ONE, [1.0]], "item 'c' has 1 numbers, the longest has 2"),
        ([ONE, [NAN, 1.0], ONE], "item 'b' holds a missing or infinite number"),
        ([ONE, ONE, [1.0, None]], "item 'c' holds a missing or infinite number"),
        ([[], [], []], "item 'a' has 0 numbers"),
    ],
)
def test_embeddings_that_cannot_be_used_are_named(vectors, message):
    given = pa.array(vectors, pa.list_(pa.float32()))
    words = ["x y z"] * 3
    table = pa.table({"item_id": list("abc"), "title": words, "text": words, "embedding": given})
    with pytest.raises(InputError, match=message):
        embeddings.embed_items(table, watched([("u", "a")]))


@pytest.mark.parametrize(
    ("pairs", "arguments", "message"),
    [
        ([("u", "space0"), ("u", "gone")], {}, "1 interactions are with items .* instance 'gone'"),
        ([], {}, "no interactions in the training period"),
        ([("u", "space0")], {"text_dimensions": 0}, "embed_items.text_dimensions is 0"),
        (
            [("u", "space0")],
            {"consumption_dimensions": -1},
            "embed_items.consumption_dimensions is -1",
        ),
        ([("u", "space0")], {"consumption_weight": 0.0}, "embed_items.consumption_weight is 0.0"),
    ],
)
def test_what_cannot_be_embedded_is_refused(pairs, arguments, message):
    with pytest.raises(InputError, match=message):
        embeddings.embed_items(items_table(), watched(pairs), **arguments)


def test_clusters_are_all_used_and_paths_nest():
    vectors = np.random.default_rng(0).normal(size=(200, 5))
    labels, paths = clustering.cluster_items(vectors, num_clusters=12)
    assert set(labels) == set(range(12))
    assert all(path[0] == 12 for path in paths), "all leaves hang from one root"
    children = {}
    for leaf, path in enumerate(paths):
        for parent, child in zip(path, [*path[1:], leaf], strict=True):
            children.setdefault(parent, set()).add(child)
    assert all(len(found) == 2 for found in children.values())
    assert len(children) == 11


def test_inner_nodes_are_two_means_of_the_items_below_them():
    """Labels and paths belong together: k-means leaves every item nearer to its own half's mean."""
    vectors = np.random.default_rng(0).normal(size=(200, 5))
    labels, paths = clustering.cluster_items(vectors, num_clusters=12)
    ways = [[*path, leaf] for leaf, path in enumerate(paths)]
    for node in sorted({node for path in paths for node in path}):
        below = {}
        for way in ways:
            if node in way:
                below.setdefault(way[way.index(node) + 1], []).append(way[-1])
        halves = [vectors[np.isin(labels, leaves)] for leaves in below.values()]
        means = np.stack([half.mean(axis=0) for half in halves])
        for own, half in enumerate(halves):
            distances = np.linalg.norm(half[:, None] - means, axis=2)
            assert (distances.argmin(axis=1) == own).all()


def test_clustering_is_the_same_every_time():
    vectors = np.random.default_rng(0).normal(size=(200, 5))
    first = clustering.cluster_items(vectors, num_clusters=12, seed=1)
    again = clustering.cluster_items(vectors, num_clusters=12, seed=1)
    assert np.array_equal(first.labels, again.labels) and first.paths == again.paths


@pytest.mark.parametrize("count", [1, 5])
def test_a_number_of_clusters_that_cannot_be_is_refused(count):
    vectors = np.repeat(np.eye(4), 10, axis=0)
    with pytest.raises(InputError, match=f"num_clusters is {count}; .* between 2 and.* 4"):
        clustering.cluster_items(vectors, num_clusters=count)


def test_the_cluster_table_reads_back_and_notices_damage(tmp_path):
    table = items_table()
    vectors = embeddings.embed_items(table, watched([("u", "space0")]), text_dimensions=3)
    found = clustering.cluster_items(vectors, num_clusters=3)
    names = ["one a", "two b", "three c"]
    clusters = ClusterTable.build(table, watched([("u", "space0")] * 4), vectors, found, names)
    clusters.write(tmp_path)
    read = ClusterTable.read(tmp_path)
    assert read.descriptions == names and read.num_clusters == 3
    assert read.num_interactions[found.labels[0]] == 4 and read.num_interactions.sum() == 4
    assert read.centroids.shape == (3, vectors.shape[1])
    same = clusters.clusters.set_column(1, "description", pa.array(["one a", "one a", "c d"]))
    artifacts.write_table(tmp_path / "clusters.parquet", same, artifacts.CLUSTERS)
    with pytest.raises(InputError, match="two clusters have the same description"):
        ClusterTable.read(tmp_path)
    (tmp_path / "clusters.parquet").write_bytes(b"PAR1 cut short")
    with pytest.raises(InputError, match="can't be read as Parquet"):
        ClusterTable.read(tmp_path)
