"""Objectives against hand-worked values."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from recexplore.models.reward_model import RewardModel
from recexplore.models.transformer import Transformer, TransformerConfig
from recexplore.models.trie import build_trie
from recexplore.training import objectives

EOS = 1
SEQUENCES = [[2, 3, EOS], [2, 4, EOS], [5, EOS], [6, 3, EOS]]
TRIE = jax.tree.map(jnp.asarray, build_trie(SEQUENCES, EOS, 8))
CONFIG = TransformerConfig(
    vocab_size=8,
    num_layers=1,
    model_dim=16,
    num_heads=2,
    num_kv_heads=2,
    head_dim=8,
    mlp_dim=16,
    max_length=12,
)


def make(network):
    model = network(CONFIG)
    tokens = jnp.ones((1, 2), jnp.int32)
    return model, nn.unbox(model.init(jax.random.key(0), tokens, method="prefill"))


def batch(prompts, targets, seen=(), weights=None, labels=None):
    rows = [[*p, *SEQUENCES[t]] for p, t in zip(prompts, targets, strict=True)]
    mask = np.zeros((len(rows), len(SEQUENCES)), bool)
    for row, clusters in zip(mask, seen or [()] * len(rows), strict=True):
        row[list(clusters)] = True
    return {
        "tokens": jnp.array([row + [0] * (10 - len(row)) for row in rows], jnp.int32),
        "prompt_lengths": jnp.array([len(p) for p in prompts], jnp.int32),
        "lengths": jnp.array([len(row) for row in rows], jnp.int32),
        "seen": jnp.asarray(mask),
        "weight": jnp.array(weights or [1.0] * len(rows), jnp.float32),
        "label": jnp.array(labels or [0.0] * len(rows), jnp.float32),
    }


def by_hand(model, params, prompt, target, options):
    """Sum over steps of log Σ exp z over `options(prefix)` minus the target's logit."""
    total, sequence = 0.0, SEQUENCES[target]
    for depth, token in enumerate(sequence):
        tokens = jnp.array([[*prompt, *sequence[:depth]]], jnp.int32)
        logits = np.asarray(model.apply(params, tokens)[0, -1], np.float64)
        total += np.logaddexp.reduce(logits[sorted(options(sequence[:depth]))]) - logits[token]
    return total


def leading_to(allowed):
    """prefix → tokens that lead to one of the sequences `allowed`."""
    return lambda prefix: {
        SEQUENCES[i][len(prefix)] for i in allowed if SEQUENCES[i][: len(prefix)] == prefix
    }


def test_the_constrained_loss_normalises_over_clusters_not_seen():
    model, params = make(Transformer)
    examples = batch([[7, 5], [3]], [0, 3], seen=[(2,), (0, 1)], weights=[1.0, 3.0])
    total, weight, _ = objectives.constrained_description_loss(model, params, TRIE, examples)
    first = by_hand(model, params, [7, 5], 0, leading_to([0, 1, 3]))
    second = by_hand(model, params, [3], 3, leading_to([2, 3]))
    assert float(total) == pytest.approx(first + 3 * second, rel=1e-4)
    assert float(weight) == 4.0


def test_the_vocabulary_loss_leaves_out_tokens_of_seen_clusters_only():
    model, params = make(Transformer)
    examples = batch([[7, 5]], [0], seen=[(2,)])
    total, _, _ = objectives.next_description_loss(model, params, TRIE, examples)
    everything = set(range(8))
    expected = by_hand(model, params, [7, 5], 0, lambda p: everything - ({5} if not p else set()))
    assert float(total) == pytest.approx(expected, rel=1e-4)


def test_smoothing_spreads_over_open_clusters_in_training_only():
    model, params = make(Transformer)
    examples = batch([[7, 5]], [2], seen=[(0,)])
    key = jax.random.key(0)
    loss = objectives.constrained_description_loss
    plain, _, _ = loss(model, params, TRIE, examples, key, label_smoothing=0.0)
    smooth, _, _ = loss(model, params, TRIE, examples, key, label_smoothing=0.3)
    logits = np.asarray(model.apply(params, jnp.array([[7, 5]]))[0, -1], np.float64)
    log_p = {t: logits[t] - np.logaddexp.reduce(logits[[2, 5, 6]]) for t in (2, 5, 6)}
    uniform = -(log_p[2] + log_p[5] + log_p[6]) / 3  # one open cluster below each
    assert float(smooth) == pytest.approx(0.7 * float(plain) + 0.3 * uniform, rel=1e-4)
    evaluated, _, _ = loss(model, params, TRIE, examples, label_smoothing=0.3)
    assert float(evaluated) == pytest.approx(float(plain), rel=1e-5)


def test_the_pointwise_loss_is_cross_entropy_with_soft_labels():
    model, params = make(RewardModel)
    params["params"]["head"] = jax.random.normal(jax.random.key(1), (16,))
    examples = batch([[7, 5], [3]], [0, 2], weights=[2.0, 1.0], labels=[0.25, 1.0])
    total, weight, _ = objectives.pointwise_loss(model, params, TRIE, examples)
    chance = 1 / (
        1 + np.exp(-np.asarray(model.apply(params, examples["tokens"], examples["lengths"])))
    )
    expected = 2 * -(0.25 * np.log(chance[0]) + 0.75 * np.log(1 - chance[0])) - np.log(chance[1])
    assert float(total) == pytest.approx(expected, rel=1e-4)
    assert float(weight) == 3.0


def test_misordered_pairs_are_counted_by_weight():
    model, params = make(RewardModel)
    params["params"]["head"] = jax.random.normal(jax.random.key(1), (16,))
    prompts, targets = [[7, 5], [3], [4, 4], [4, 4]], [0, 2, 1, 1]
    examples = batch(prompts, targets, weights=[2.0, 1.0, 3.0, 0.0], labels=[0.5, 1.0, 0.1, 0.9])
    scores = np.asarray(model.apply(params, examples["tokens"], examples["lengths"]))
    pairs = [(1, 0, 2.0), (0, 2, 6.0), (1, 2, 3.0)]  # better, worse, weight
    wrong, total, _ = objectives.misordered_pairs(model, params, TRIE, examples)
    assert float(total) == 11.0
    assert float(wrong) == sum(w for high, low, w in pairs if scores[high] < scores[low])
    constant = jax.tree.map(jnp.zeros_like, params)
    wrong, total, _ = objectives.misordered_pairs(model, constant, TRIE, examples)
    assert float(wrong) == 5.5
