"""The compiled step against enumeration on a small model."""

import functools
import math

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from recexplore.distributed import partitioning
from recexplore.errors import InputError
from recexplore.evaluation.offline import choose
from recexplore.inference import exhaustive
from recexplore.inference.best_of_n import Batch, BestOfN, explore_step
from recexplore.inference.bulk import run_in_batches
from recexplore.inference.sampler import Prompts, sample
from recexplore.models.reward_model import RewardModel
from recexplore.models.transformer import Transformer, TransformerConfig
from recexplore.models.trie import build_trie

EOS = 1
# One is a prefix of another, one is a single token, two share most of their way.
SEQUENCES = [[2, 3, EOS], [2, 3, 4, EOS], [5, EOS], [2, 6, 7, EOS], [2, 6, 8, EOS], [9, 3, EOS]]
TRIE = jax.tree.map(jnp.asarray, build_trie(SEQUENCES, EOS, 12))
CONFIG = TransformerConfig(
    vocab_size=12,
    num_layers=2,
    model_dim=16,
    num_heads=2,
    num_kv_heads=1,
    head_dim=8,
    mlp_dim=24,
    max_length=16,
)
NOVELTY, ALIGNMENT = Transformer(CONFIG), RewardModel(CONFIG)
B, M = 3, len(SEQUENCES)


def parameters(model, seed):
    params = nn.unbox(
        model.init(jax.random.key(seed), jnp.ones((1, 2), jnp.int32), method="prefill")
    )
    if "head" in params["params"]:
        params["params"]["head"] = jax.random.normal(jax.random.key(seed + 1), (16,))
    return params


NOVELTY_PARAMS, ALIGNMENT_PARAMS = parameters(NOVELTY, 0), parameters(ALIGNMENT, 5)
PROMPTS = Prompts(
    jnp.array([[2, 5, 7, 3], [4, 4, 0, 0], [9, 8, 2, 0]], jnp.int32), jnp.array([4, 2, 3])
)
EXCLUDED = jnp.zeros((B, M), bool).at[0, 1].set(True).at[1, jnp.array([3, 4])].set(True)


@jax.jit
def logits_of(tokens):
    return NOVELTY.apply(NOVELTY_PARAMS, tokens)


def last_logits(tokens):
    """Of one whole forward pass; what stands after the last token has no say in it."""
    padded = np.zeros((1, CONFIG.max_length), np.int32)
    padded[0, : len(tokens)] = tokens
    return np.asarray(logits_of(padded)[0, len(tokens) - 1], np.float64)


def enumerate_log_probabilities(row):
    """Each cluster's log-probability, token by token with whole forward passes."""
    prompt = PROMPTS.tokens[row, : PROMPTS.lengths[row]].tolist()
    allowed = [s for i, s in enumerate(SEQUENCES) if not EXCLUDED[row, i]]
    found = []
    for index, sequence in enumerate(SEQUENCES):
        total = 0.0
        for depth in range(len(sequence)):
            logits = last_logits(prompt + sequence[:depth])
            options = {s[depth] for s in allowed if s[:depth] == sequence[:depth]}
            if sequence[depth] not in options:
                total = -math.inf
                break
            total += logits[sequence[depth]] - np.logaddexp.reduce([logits[o] for o in options])
        found.append(total if not EXCLUDED[row, index] else -math.inf)
    return np.array(found)


EXPECTED = np.stack([enumerate_log_probabilities(row) for row in range(B)])


def expected_scores(row):
    """Whole forward passes, all six sequences as one batch."""
    prompt = PROMPTS.tokens[row, : PROMPTS.lengths[row]].tolist()
    whole = [prompt + sequence for sequence in SEQUENCES]
    padded = np.zeros((M, CONFIG.max_length), np.int32)
    for place, tokens in zip(padded, whole, strict=True):
        place[: len(tokens)] = tokens
    lengths = np.array([len(tokens) for tokens in whole])
    return np.asarray(score_whole(ALIGNMENT_PARAMS, padded, lengths))


score_whole = jax.jit(ALIGNMENT.apply)
SCORES = np.stack([expected_scores(row) for row in range(B)])


def explore(batch=None, **settings):
    batch = batch or Batch(PROMPTS, PROMPTS, EXCLUDED, jnp.arange(B))
    return explore_step(
        NOVELTY_PARAMS,
        ALIGNMENT_PARAMS,
        TRIE,
        batch,
        jax.random.key(7),
        settings=BestOfN(**{"num_samples": 16, "num_chosen": 3, **settings}),
        novelty_model=NOVELTY,
        alignment_model=ALIGNMENT,
    )


def test_exhaustive_log_probabilities_are_those_of_enumeration():
    inner = jax.device_put(exhaustive.build_tree(TRIE, leaves=False))
    excluded = jnp.stack([EXCLUDED, jnp.zeros_like(EXCLUDED)], axis=1)
    found = exhaustive.log_probabilities(NOVELTY, NOVELTY_PARAMS, TRIE, inner, PROMPTS, excluded)
    np.testing.assert_allclose(found[:, 0], EXPECTED, atol=1e-4)
    np.testing.assert_allclose(np.exp(found).sum(axis=-1), 1.0, atol=1e-5)


def test_exhaustive_scores_are_those_of_whole_sequences():
    tree = jax.device_put(exhaustive.build_tree(TRIE, leaves=True))
    found = exhaustive.scores(ALIGNMENT, ALIGNMENT_PARAMS, TRIE, tree, PROMPTS)
    np.testing.assert_allclose(found, SCORES, atol=1e-4)


@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_draws_follow_the_enumerated_distribution(temperature):
    keys = jax.vmap(jax.random.fold_in, in_axes=(None, 0))(jax.random.key(0), jnp.arange(B))
    draws = sample(
        NOVELTY, NOVELTY_PARAMS, TRIE, PROMPTS, EXCLUDED, keys, num_samples=4000,
        temperature=temperature,
    )  # fmt: skip
    np.testing.assert_allclose(
        draws.log_probabilities, np.take_along_axis(EXPECTED, draws.clusters, axis=1), atol=1e-4
    )
    if temperature != 1.0:
        return
    for row in range(B):
        counts = np.bincount(draws.clusters[row], minlength=M)
        possible = np.isfinite(EXPECTED[row])
        assert counts[~possible].sum() == 0
        chances = np.exp(EXPECTED[row][possible])
        test = scipy.stats.chisquare(counts[possible], 4000 * chances / chances.sum())
        assert test.pvalue > 1e-3


def test_the_best_of_n_are_chosen_as_numpy_would():
    found = explore()
    drawn = np.asarray(found.draws.clusters)
    np.testing.assert_allclose(
        found.draw_scores, np.take_along_axis(SCORES, drawn, axis=1), atol=1e-4
    )
    np.testing.assert_array_equal(
        found.clusters, choose(drawn, SCORES[np.arange(B)[:, None], drawn], 3)
    )
    for row in range(B):
        for cluster, score in zip(found.clusters[row], found.scores[row], strict=True):
            assert cluster == -1 or score == pytest.approx(SCORES[row, cluster], abs=1e-4)
            assert cluster == -1 or not EXCLUDED[row, cluster]


def test_places_that_cannot_be_filled_are_marked():
    excluded = jnp.ones((B, M), bool).at[:, 2].set(False)
    found = explore(Batch(PROMPTS, PROMPTS, excluded, jnp.arange(B)))
    np.testing.assert_array_equal(found.clusters, [[2, -1, -1]] * B)
    assert np.isneginf(found.scores[:, 1:]).all()
    np.testing.assert_allclose(found.log_probabilities[:, 0], 0.0, atol=1e-6)


def test_an_answer_does_not_depend_on_the_batch_it_sits_in():
    whole = explore()
    for row in (0, 2):
        pick = jnp.array([row])
        alone = jax.tree.map(
            lambda x, pick=pick: x[pick], Batch(PROMPTS, PROMPTS, EXCLUDED, jnp.arange(B))
        )
        found = explore(alone)
        np.testing.assert_array_equal(found.draws.clusters[0], whole.draws.clusters[row])
        np.testing.assert_allclose(found.scores[0], whole.scores[row], atol=1e-5)


def test_eight_devices_give_what_one_gives():
    batch = Batch(PROMPTS, PROMPTS, EXCLUDED, jnp.arange(B))
    batch = jax.tree.map(lambda x: jnp.concatenate([x, x, x])[:8], batch)
    one = explore(batch)
    eight = explore(jax.device_put(batch, partitioning.batch_sharding(partitioning.make_mesh())))
    assert len(eight.clusters.sharding.device_set) == 8
    np.testing.assert_array_equal(one.clusters, eight.clusters)
    np.testing.assert_allclose(one.scores, eight.scores, atol=1e-5)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_samples": 0}, "num_samples is 0"),
        ({"num_samples": 2, "num_chosen": 3}, "num_chosen is 3"),
        ({"num_chosen": 0}, "num_chosen is 0"),
        ({"temperature": 0.0}, "temperature is 0.0"),
    ],
)
def test_settings_out_of_range_are_named(settings, message):
    with pytest.raises(InputError, match=f"best_of_n.BestOfN.{message}"):
        BestOfN(**settings)


def test_rows_come_back_in_order_from_one_program():
    rows = {"x": np.arange(10, dtype=np.float32), "y": np.ones((10, 2), np.float32)}
    step = jax.jit(chex.assert_max_traces(lambda r: (r["x"] * 2, r["y"].sum(axis=1)), n=1))
    done = []
    doubled, sums = run_in_batches(
        step, rows, batch_size=4, progress=lambda at, total: done.append((at, total))
    )
    np.testing.assert_array_equal(doubled, np.arange(10) * 2)
    np.testing.assert_array_equal(sums, np.full(10, 2.0))
    assert done[-1] == (10, 10)
    empty = functools.partial(run_in_batches, step, {"x": np.zeros((0,)), "y": np.zeros((0, 2))})
    with pytest.raises(InputError, match="no history"):
        empty(batch_size=4)
    with pytest.raises(InputError, match="batch_size is 0"):
        run_in_batches(step, rows, batch_size=0)
