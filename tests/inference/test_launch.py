"""The door: what is refused, what is padded, and that nothing but the padding changes."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from recexplore.distributed import partitioning
from recexplore.errors import InputError
from recexplore.inference.best_of_n import Batch, BestOfN, explore_step
from recexplore.inference.context import Prompts
from recexplore.inference.launch import Model, Ready, bucket, pad_columns, pad_rows
from recexplore.models.reward_model import RewardModel
from recexplore.models.transformer import Transformer, TransformerConfig
from recexplore.models.trie import build_trie

EOS = 1
TRIE = build_trie([[2, 3, EOS], [2, 3, 4, EOS], [5, EOS], [2, 6, 7, EOS], [9, 3, EOS]], EOS, 12)
CONFIG = TransformerConfig(
    vocab_size=12,
    num_layers=1,
    model_dim=8,
    num_heads=2,
    num_kv_heads=1,
    head_dim=4,
    mlp_dim=8,
    max_length=16,
)
PREFIX = [3, 8]
SETTINGS = BestOfN(num_samples=4, num_chosen=2)
KEY = jax.random.key(3)


def model(network, seed, config=CONFIG):
    made = network(config)
    tokens = jnp.ones((1, 2), jnp.int32)
    return Model(made, nn.unbox(made.init(jax.random.key(seed), tokens, method="prefill")))


NOVELTY, ALIGNMENT = model(Transformer, 0), model(RewardModel, 1)
ALIGNMENT.params["params"]["head"] = jax.random.normal(jax.random.key(9), (8,))


def batch(**changes):
    tokens = np.array([[2, 5, 7], [4, 4, 0], [9, 0, 0]], np.int32)
    prompts = Prompts(tokens, np.array([3, 2, 1], np.int32))
    history = np.array([[1, 2, -1], [3, -1, -1], [0, 1, 2]], np.int32)
    banned = np.array([[-1], [4], [-1]], np.int32)
    return Batch(prompts, prompts, history, banned)._replace(**changes)


@pytest.fixture(scope="module")
def ready():
    return Ready(NOVELTY, ALIGNMENT, (PREFIX, PREFIX), TRIE)


def rows(some, *index):
    return jax.tree.map(lambda array: array[list(index)], some)


@pytest.mark.parametrize("sampler", ["independent", "distinct", "exhaustive"])
def test_a_batch_of_any_size_gets_the_same_answers(ready, sampler):
    settings = dataclasses.replace(SETTINGS, sampler=sampler)
    whole = ready.explore(batch(), KEY, settings)
    assert whole.clusters.shape == (3, 2)
    for row in range(3):
        alone = ready.explore(rows(batch(), row), KEY, settings)
        np.testing.assert_array_equal(alone.draws.clusters[0], whole.draws.clusters[row])
        np.testing.assert_array_equal(alone.clusters[0], whole.clusters[row])
        np.testing.assert_allclose(alone.scores[0], whole.scores[row], atol=1e-5)


def test_a_stream_of_sizes_needs_a_handful_of_programs(ready):
    wide = jax.tree.map(lambda array: np.concatenate([array] * 6), batch())
    before = explore_step._cache_size()
    for size in (9, 10, 11, 13, 15, 16):
        ready.explore(rows(wide, *range(size)), KEY, SETTINGS)
    assert explore_step._cache_size() - before == 1


def test_a_batch_is_dealt_out_to_all_devices(ready):
    mesh = partitioning.make_mesh()
    sharded = Ready(NOVELTY, ALIGNMENT, (PREFIX, PREFIX), TRIE, partitioning.batch_sharding(mesh))
    one, eight = (some.explore(batch(), KEY, SETTINGS) for some in (ready, sharded))
    np.testing.assert_array_equal(one.clusters, eight.clusters)
    np.testing.assert_allclose(one.scores, eight.scores, atol=1e-5)
    shares = sharded.launch(pad_rows(pad_columns(batch()), 8), KEY, SETTINGS).clusters
    assert shares.sharding.num_devices == 8 and shares.sharding.shard_shape((8, 2)) == (1, 2)


def test_padding_keeps_what_is_there():
    columns = pad_columns(batch())
    assert columns.history.shape == (3, 4) and (columns.history[:, 3] == -1).all()
    assert columns.novelty.tokens.shape == (3, 4) and (columns.novelty.tokens[:, 3] == 0).all()
    padded = pad_rows(columns)
    assert len(padded.history) == 4
    jax.tree.map(np.testing.assert_array_equal, rows(padded, 0, 1, 2), columns)
    jax.tree.map(np.testing.assert_array_equal, rows(padded, 3), rows(columns, 2))
    assert [bucket(size) for size in (0, 1, 2, 3, 8, 9)] == [1, 1, 2, 4, 8, 16]


def test_the_callers_arrays_stay_as_they_were(ready):
    given = batch()
    ready.explore(given, KEY, SETTINGS)
    ready.explore(given, KEY, SETTINGS)
    jax.tree.map(np.testing.assert_array_equal, given, batch())


def test_id_zero_may_be_a_token_where_it_is_not_padding(ready):
    order = np.arange(12)
    order[[0, 2]] = 2, 0  # two tokens and their embeddings change places

    def swapped(some):
        def rows(path, leaf):
            return leaf[order] if "token_embedder" in jax.tree_util.keystr(path) else leaf

        return Model(some.network, jax.tree_util.tree_map_with_path(rows, some.params))

    sequences = [
        order[row[:length]].tolist()
        for row, length in zip(TRIE.sequences, TRIE.lengths, strict=True)
    ]
    trie = build_trie(sequences, EOS, 12, pad_id=None)
    given = batch()
    renumbered = given.novelty._replace(tokens=order[given.novelty.tokens].astype(np.int32))
    models = swapped(NOVELTY), swapped(ALIGNMENT)
    other = Ready(*models, (PREFIX, PREFIX), trie, pad_id=None)
    settings = dataclasses.replace(SETTINGS, sampler="exhaustive")
    found = other.explore(given._replace(novelty=renumbered, alignment=renumbered), KEY, settings)
    expected = ready.explore(given, KEY, settings)
    np.testing.assert_array_equal(found.clusters, expected.clusters)
    np.testing.assert_allclose(found.scores, expected.scores, atol=1e-5)
    np.testing.assert_allclose(found.log_probabilities, expected.log_probabilities, atol=1e-5)


def test_padding_is_no_token_of_a_prompt_whichever_id_it_has():
    padded = Ready(NOVELTY, ALIGNMENT, (PREFIX, PREFIX), TRIE, pad_id=7)
    with pytest.raises(InputError, match="token 7 at place 2, outside .* 0..11 without 7, which"):
        padded.explore(batch(), KEY, SETTINGS)
    with pytest.raises(InputError, match="novelty prefix has token 8 at place 1.* without 8"):
        Ready(NOVELTY, ALIGNMENT, (PREFIX, PREFIX), TRIE, pad_id=8)


def prompts(tokens, lengths):
    return Prompts(np.array(tokens, np.int32), np.array(lengths, np.int32))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"history": np.zeros((2, 1), np.int32)}, r"have \[2, 3\] rows"),
        ({"novelty": prompts([[2] * 11] * 3, [11, 1, 1])}, "row 0 has 11 tokens .* room for 10"),
        ({"alignment": prompts([[2]] * 3, [1, 0, 1])}, "lengths 0..1; they must lie in 1..1"),
        ({"alignment": prompts([[2]] * 3, [1, 2, 1])}, "lengths 1..2; they must lie in 1..1"),
        (
            {"novelty": prompts([[2], [12], [3]], [1, 1, 1])},
            "Row 1 of the novelty prompts has token 12 at place 0, outside .* 1..11",
        ),
        ({"novelty": prompts([[2], [0], [3]], [1, 1, 1])}, "token 0 at place 0"),
        ({"history": np.zeros((3, 1))}, r"history must be .* whole numbers .* float64\(3, 1\)"),
        ({"banned": np.zeros(3, np.int32)}, r"banned must be .* 2 axes; it is .*\(3,\)"),
        ({"novelty": prompts([[2.0]] * 3, [1, 1, 1])._replace(lengths=[1, 1, 1])}, "lengths must"),
        ({"history": np.full((3, 1), 5, np.int32)}, r"Row 0 names cluster 5 .* 0..4"),
        ({"banned": np.full((3, 1), -2, np.int32)}, "Row 0 names cluster -2"),
        (
            {"banned": np.array([[-1, -1, -1], [0, 3, 3], [3, 4, 3]], np.int32)},
            r"Row 2, history \[0, 1, 2\], leaves no cluster to propose: all 5",
        ),
    ],
)
def test_batches_that_cannot_be_explored_are_refused(ready, changes, message):
    with pytest.raises(InputError, match=message):
        ready.explore(batch(**changes), KEY, SETTINGS)


def test_no_history_at_all_is_refused(ready):
    with pytest.raises(InputError, match="no history to explore"):
        ready.explore(rows(batch()), KEY, SETTINGS)


def spoilt(value):
    params = jax.tree.map(jnp.array, NOVELTY.params)
    params["params"]["token_embedder"] = params["params"]["token_embedder"].at[1, 2].set(value)
    return Model(NOVELTY.network, params)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_parameters_that_are_no_numbers_are_refused(value):
    with pytest.raises(InputError, match="novelty .*token_embedder.* not finite numbers"):
        Ready(spoilt(value), ALIGNMENT, (PREFIX, PREFIX), TRIE)


def test_parameters_of_another_configuration_are_refused():
    wider = dataclasses.replace(CONFIG, mlp_dim=12)
    mixed = Model(ALIGNMENT.network, model(RewardModel, 1, wider).params)
    with pytest.raises(InputError, match=r"alignment model's .*'mlp'.*\(1, 8, 12\).*\(1, 8, 8\)"):
        Ready(NOVELTY, mixed, (PREFIX, PREFIX), TRIE)
    with pytest.raises(InputError, match="'bias'.* missing"):
        Ready(NOVELTY, Model(ALIGNMENT.network, NOVELTY.params), (PREFIX, PREFIX), TRIE)
    with pytest.raises(InputError, match="novelty model is a RewardModel; it must be a T"):
        Ready(ALIGNMENT, NOVELTY, (PREFIX, PREFIX), TRIE)


@pytest.mark.parametrize(
    ("prefix", "trie", "message"),
    [
        ([], TRIE, "novelty model's prefix is empty"),
        ([3, 12], TRIE, "Row 0 of the novelty prefix has token 12 at place 1"),
        ([3] * 12, TRIE, "context of 16 tokens .* no room for a prompt beside a prefix of 12"),
        ([3], build_trie([[2, EOS], [13, EOS]], EOS, 20), "A description has token 13"),
    ],
)
def test_prefixes_and_tries_that_do_not_fit_are_refused(prefix, trie, message):
    with pytest.raises(InputError, match=message):
        Ready(NOVELTY, ALIGNMENT, (prefix, PREFIX), trie)
