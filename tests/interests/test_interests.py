"""Items → clusters in words."""

import numpy as np
import pyarrow as pa
import pytest

from recexplore import artifacts
from recexplore.errors import InputError
from recexplore.interests import clustering, descriptions, embeddings
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


def test_clustering_is_the_same_every_time():
    vectors = np.random.default_rng(0).normal(size=(200, 5))
    first = clustering.cluster_items(vectors, num_clusters=12, seed=1)
    again = clustering.cluster_items(vectors, num_clusters=12, seed=1)
    assert np.array_equal(first.labels, again.labels) and first.paths == again.paths


@pytest.mark.parametrize("count", [1, 5])
def test_a_number_of_clusters_that_cannot_be_is_refused(count):
    vectors = np.repeat(np.eye(4), 10, axis=0)
    with pytest.raises(InputError, match=f"num_clusters is {count}; it must lie between 2 and.* 4"):
        clustering.cluster_items(vectors, num_clusters=count)


def test_descriptions_name_what_sets_a_cluster_apart():
    table = items_table()
    labels = np.repeat(np.arange(3), 20)
    texts = [f"common {text}" for text in table["text"].to_pylist()]
    found = descriptions.describe_clusters(texts, labels)
    for description, words in zip(found, WORDS.values(), strict=True):
        assert set(description.split()) <= set(words.split())
        assert "common" not in description


def test_descriptions_are_unique_and_two_to_six_words():
    random = np.random.default_rng(0)
    words = np.array([f"word{letter}" for letter in "abcdefghij"])
    texts = [" ".join(random.choice(words, 4, replace=False)) for _ in range(300)]
    found = descriptions.describe_clusters(texts, np.arange(300) % 20)
    assert len({frozenset(text.split()) for text in found}) == 20
    assert all(2 <= len(text.split()) <= 6 for text in found)


def test_clusters_that_words_cannot_tell_apart_are_refused():
    with pytest.raises(InputError, match="Clusters 0 and 1 can't be told apart"):
        descriptions.describe_clusters(["apple pear"] * 6, np.array([0, 0, 0, 1, 1, 1]))
    with pytest.raises(InputError, match="describe_clusters.words is 7"):
        descriptions.describe_clusters(["apple pear"] * 6, np.zeros(6, int), words=7)


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
