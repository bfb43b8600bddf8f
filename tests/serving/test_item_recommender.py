"""Retrieval by cluster beside a full ranking that is filtered afterwards."""

import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from recexplore.errors import InputError
from recexplore.models import saved
from recexplore.models.sequential_recommender import SequentialRecommender, recommender_config
from recexplore.serving import item_recommender
from recexplore.serving.item_recommender import ItemRecommender

NUM_ITEMS, NUM_CLUSTERS, T = 40, 6, 5
RANDOM = np.random.default_rng(0)
CLUSTERS = RANDOM.choice([0, 0, 0, 1, 1, 2, 4, 5], NUM_ITEMS)  # nothing is in cluster 3
POPULARITY = RANDOM.dirichlet(np.ones(NUM_ITEMS))
IDS = [f"v{number * 7 % NUM_ITEMS}" for number in range(NUM_ITEMS)]
NETWORK = SequentialRecommender(
    recommender_config(
        NUM_ITEMS, T, num_layers=1, model_dim=8, num_heads=2, mlp_dim=8, dropout_rate=0.0
    )
)


def some_parameters():
    """Without `init`, which takes long to compile."""
    random = np.random.default_rng(1)
    shapes = saved.abstract_parameters(NETWORK)
    return jax.tree.map(lambda x: jnp.asarray(random.normal(size=x.shape), jnp.float32), shapes)


PARAMS = some_parameters()


READ = jax.jit(NETWORK.apply)


@pytest.fixture(scope="module")
def recommender():
    return ItemRecommender(NETWORK, PARAMS, IDS, CLUSTERS, POPULARITY, NUM_CLUSTERS)


def full_ranking(sequence):
    """The scores of all items, from the parameters."""
    items = np.full((1, T), -1, np.int32)
    last = sequence[-T:]
    items[0, : len(last)] = last
    query = READ(PARAMS, items, np.array([len(last)], np.int32))[0]
    params = PARAMS["params"]
    table = np.asarray(params["transformer"]["token_embedder"])[2 : 2 + NUM_ITEMS]
    return table @ np.asarray(query) / np.sqrt(8) + np.log(POPULARITY)


def filtered(sequence, cluster, count, excluded=()):
    """What a full ranking leaves of a cluster."""
    scores = full_ranking(sequence)
    left = [
        item
        for item in np.argsort(-scores, kind="stable").tolist()
        if CLUSTERS[item] == cluster and item not in {*sequence, *excluded}
    ][:count]
    return left, scores[left]


def assert_same(ranked, row, column, expected):
    items, scores = expected
    found = ranked.items[row, column].tolist()
    assert found == [*items, *[-1] * (len(found) - len(items))]
    np.testing.assert_allclose(
        ranked.scores[row, column, : len(items)], scores, rtol=1e-4, atol=1e-5
    )
    assert np.all(ranked.scores[row, column, len(items) :] == -np.inf)


numbers = st.integers(0, NUM_ITEMS - 1)
users = st.tuples(
    st.lists(numbers, max_size=8, unique=True),
    st.lists(numbers, max_size=6),
    st.lists(st.integers(-1, NUM_CLUSTERS - 1), min_size=3, max_size=3),
)


@settings(max_examples=40, deadline=None)
@given(asked=st.lists(users, min_size=1, max_size=6), count=st.integers(1, 12))
def test_only_the_clusters_rows_are_scored_and_it_is_the_full_ranking_filtered(
    recommender, asked, count
):
    sequences, excluded, clusters = map(list, zip(*asked, strict=True))
    ranked = recommender.recommend(sequences, np.array(clusters), count, excluded)
    assert ranked.items.shape == ranked.scores.shape == (len(asked), 3, count)
    for row, (sequence, others, of_user) in enumerate(asked):
        for column, cluster in enumerate(of_user):
            wanted = filtered(sequence, cluster, count, others) if cluster >= 0 else ([], [])
            assert_same(ranked, row, column, wanted)


def test_an_answer_does_not_depend_on_who_else_is_asked_for(recommender, monkeypatch):
    random = np.random.default_rng(2)
    sequences = [random.permutation(NUM_ITEMS)[: random.integers(0, 9)].tolist() for _ in range(13)]
    clusters = random.integers(-1, NUM_CLUSTERS, (13, 2))
    together = recommender.recommend(sequences, clusters, 4)
    monkeypatch.setattr(item_recommender, "_NUMBERS_AT_ONCE", 1)  # a row a call
    chunked = recommender.recommend(sequences, clusters, 4)
    monkeypatch.undo()
    for row, sequence in enumerate(sequences):
        alone = recommender.recommend([sequence], clusters[row : row + 1], 4)
        for other in (together, chunked):
            np.testing.assert_array_equal(other.items[row], alone.items[0])
            np.testing.assert_allclose(other.scores[row], alone.scores[0], rtol=1e-5, atol=1e-6)


def test_a_stream_of_sizes_needs_a_handful_of_programs(recommender):
    before = item_recommender._rank_step._cache_size()
    for size in range(1, 9):
        recommender.recommend([[1, 2, 3, 4, 5]] * size, np.zeros((size, 5), int), size)
    assert item_recommender._rank_step._cache_size() <= before + 4


def test_a_user_without_items_and_a_cluster_without_items_have_answers(recommender):
    ranked = recommender.recommend([[]], np.array([[0, 3]]), 3)
    assert_same(ranked, 0, 0, filtered([], 0, 3))
    assert_same(ranked, 0, 1, ([], []))
    nobody = recommender.recommend([], np.zeros((0, 2), int), 3)
    assert nobody.items.shape == (0, 2, 3)
    assert recommender.recommend([[1]], np.zeros((1, 0), int), 3).items.shape == (1, 0, 3)


def test_ids_and_numbers_go_together(recommender):
    assert [recommender.number(item) for item in recommender.item_ids] == [*range(NUM_ITEMS)]
    assert recommender.number("nobody's") is None


@pytest.mark.parametrize(
    ("sequences", "clusters", "count", "excluded", "message"),
    [
        ([[1]], [[6]], 3, (), r"no cluster 6: there are 0\.\.5"),
        ([[1]], [[-2]], 3, (), "no cluster -2"),
        ([[1], [40]], [[0], [0]], 3, (), r"sequence of user 1 .*item 40.*0\.\.39"),
        ([[1]], [[0]], 3, [[-1]], "excluded items of user 0 .*item -1"),
        ([[1]], [[0], [1]], 3, (), r"1 sequences, clusters of shape \(2, 1\) and 1 lists"),
        ([[1]], [[0]], 3, [[], []], "2 lists of excluded"),
        ([[1]], [[0]], 0, (), "0 items of a cluster are asked for"),
    ],
)
def test_what_does_not_exist_is_named(recommender, sequences, clusters, count, excluded, message):
    with pytest.raises(InputError, match=message):
        recommender.recommend(sequences, np.array(clusters), count, excluded)


def test_it_is_not_opened_for_other_clusters_or_without_a_model(tmp_path):
    catalogue = pa.table(
        {
            "item_id": IDS,
            "cluster_id": CLUSTERS.astype(np.int32),
            "popularity": POPULARITY,
            "recent_popularity": POPULARITY,
        }
    )
    described = {**saved.describe(NETWORK), "clusters": "these"}
    item_recommender.write_description(tmp_path, described, catalogue)
    with pytest.raises(InputError, match="trained with other clusters.*train --model items"):
        ItemRecommender.open(tmp_path, "those", NUM_CLUSTERS)
    with pytest.raises(InputError, match="checkpoint"):
        ItemRecommender.open(tmp_path, "these", NUM_CLUSTERS)
    shutil.rmtree(tmp_path)
    with pytest.raises(InputError, match="network.json is missing"):
        ItemRecommender.open(tmp_path, "these", NUM_CLUSTERS)
