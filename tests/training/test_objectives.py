"""Novelty objectives against hand-worked values and against the slow form."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from slow_description_loss import slow_description_loss
from small_models import (
    batch_of,
    bigram,
    language_model,
    packed_batch_of,
    random_examples,
    reward_model,
)

from recexplore.errors import InputError
from recexplore.models.trie import build_trie
from recexplore.training import objectives

EOS = 1
SEQUENCES = [[2, 3, EOS], [2, 4, EOS], [5, EOS], [6, 3, EOS]]
TRIE = jax.tree.map(jnp.asarray, build_trie(SEQUENCES, EOS, 12))
# Shared beginnings at several depths, one description the beginning of another, long certain ends.
MANY = [
    *([2, b, c, EOS] for b in (3, 4, 5) for c in (2, 6, 7)),
    *([3, b, EOS] for b in range(2, 8)),
    [2, 3, EOS],
    [8, 9, 9, 9, EOS],
    [9, EOS],
]
MANY_TRIE = build_trie(MANY, EOS, 12)
OBJECTIVES = {
    "vocabulary": objectives.next_description_loss,
    "constrained": objectives.constrained_description_loss,
}


def example(prompt, target, seen=(), weight=1.0):
    return {
        "prompt": prompt,
        "description": SEQUENCES[target],
        "seen": seen,
        "weight": weight,
        "label": 0.0,
    }


def loss_of(objective, model, params, examples, key=None, **options):
    batch = batch_of(examples, len(SEQUENCES))
    run = jax.jit(lambda p, k: objective(model, p, TRIE, batch, k, **options))
    return objectives.Sums(*map(float, run(params, key)))


@functools.partial(jax.jit, static_argnames="model")
def all_logits(model, params, tokens):
    return model.apply(params, tokens)


def by_hand(model, params, prompt, target, options):
    """Sum over steps of log Σ exp z over `options(prefix)` minus the target's logit; and the share
    of steps at which that logit is the highest."""
    total, right, sequence = 0.0, 0, SEQUENCES[target]
    padded = [*prompt, *sequence, 0, 0, 0, 0, 0][:8]
    logits = np.asarray(all_logits(model, params, jnp.array([padded])), np.float64)[0]
    for depth, token in enumerate(sequence):
        at = logits[len(prompt) + depth - 1, sorted(options(sequence[:depth]))]
        wanted = logits[len(prompt) + depth - 1, token]
        total += np.logaddexp.reduce(at) - wanted
        right += wanted == at.max()
    return total, right / len(sequence)


def leading_to(allowed):
    """prefix → tokens that lead to one of the sequences `allowed`."""
    return lambda prefix: {
        SEQUENCES[i][len(prefix)] for i in allowed if SEQUENCES[i][: len(prefix)] == prefix
    }


def test_the_constrained_loss_normalises_over_clusters_not_seen():
    model, params = bigram()
    examples = [example([7, 5], 0, (2,)), example([3], 3, (0, 1), weight=3.0)]
    found = loss_of(objectives.constrained_description_loss, model, params, examples)
    first, right = by_hand(model, params, [7, 5], 0, leading_to([0, 1, 3]))
    second, also_right = by_hand(model, params, [3], 3, leading_to([2, 3]))
    assert found.loss == pytest.approx(first + 3 * second, rel=1e-4)
    assert found.weight == 4.0
    assert found.correct == pytest.approx(right + 3 * also_right)


def test_the_vocabulary_loss_leaves_out_tokens_of_seen_clusters_only():
    model, params = bigram()
    found = loss_of(objectives.next_description_loss, model, params, [example([7, 5], 0, (2,))])
    everything = set(range(12))
    expected, right = by_hand(
        model, params, [7, 5], 0, lambda p: everything - ({5} if not p else set())
    )
    assert found.loss == pytest.approx(expected, rel=1e-4)
    assert found.correct == pytest.approx(right)


def test_smoothing_spreads_over_open_clusters_in_training_only():
    model, params = bigram()
    loss = functools.partial(
        loss_of,
        objectives.constrained_description_loss,
        model,
        params,
        [example([7, 5], 2, (0,))],
    )
    key = jax.random.key(0)
    plain, smooth = loss(key, label_smoothing=0.0).loss, loss(key, label_smoothing=0.3).loss
    logits = np.asarray(all_logits(model, params, jnp.array([[7, 5]]))[0, -1], np.float64)
    log_p = {t: logits[t] - np.logaddexp.reduce(logits[[2, 5, 6]]) for t in (2, 5, 6)}
    uniform = -(log_p[2] + log_p[5] + log_p[6]) / 3  # one open cluster below each
    assert smooth == pytest.approx(0.7 * plain + 0.3 * uniform, rel=1e-4)
    assert loss(label_smoothing=0.3).loss == pytest.approx(plain, rel=1e-5)


@pytest.mark.parametrize("smoothing", [0.0, 0.3])
@pytest.mark.parametrize("name", OBJECTIVES)
def test_losses_and_gradients_are_those_of_the_slow_form(name, smoothing):
    model, params = bigram()
    batch = batch_of(random_examples(MANY, 8, seed=3), len(MANY))

    def fast(params):
        trie = jax.tree.map(jnp.asarray, MANY_TRIE)
        key = jax.random.key(0)
        return OBJECTIVES[name](model, params, trie, batch, key, label_smoothing=smoothing).loss

    def slow(params):
        within = name == "constrained"
        return slow_description_loss(model, params, MANY_TRIE, batch, smoothing, within)

    found, gradient = jax.jit(jax.value_and_grad(fast))(params)
    expected, expected_gradient = jax.jit(jax.value_and_grad(slow))(params)
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4),
        gradient,
        expected_gradient,
    )


@pytest.mark.parametrize("name", OBJECTIVES)
def test_what_has_no_weight_or_no_cluster_unseen_leaves_everything_finite(name):
    model, params = bigram()
    padding = {"prompt": [0], "description": [], "seen": (), "weight": 0.0, "label": 0.0}
    everything = example([7], 1, range(4))  # even the target: it is taken for possible
    batch = batch_of([padding, everything], len(SEQUENCES))

    def loss(params):
        return OBJECTIVES[name](model, params, TRIE, batch, jax.random.key(0)).loss

    found, gradient = jax.jit(jax.value_and_grad(loss))(params)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))
    assert 0 <= float(found) < 30
    if name == "constrained":  # nothing else could follow
        assert float(found) == pytest.approx(0.0, abs=1e-6)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_an_absent_example_of_a_packed_row_changes_nothing(name):
    """Its "description" are the row's first tokens, among which a cluster is named further down:
    after a mismatch, deeper than any description begins."""
    sequences = [
        *([2, 3, 4, end, EOS] for end in (5, 6)),
        [2, 9, EOS],
        *([10, end, EOS] for end in range(3, 9)),
    ]
    trie = jax.tree.map(jnp.asarray, build_trie(sequences, EOS, 14))
    assert trie.symbols[trie.first_child[1] + 1] >= len(trie.levels[3].alphabet)
    named = {"prompt": [11, 12, 13, 2, 9, 12], "description": sequences[2], "seen": (7,)}
    model, params = language_model(vocab_size=14)

    def gradient(room):
        row = [{**named, "weight": 1.0, "label": 0.0}]
        batch = packed_batch_of([row], len(sequences), room=room)
        return jax.jit(jax.grad(lambda p: OBJECTIVES[name](model, p, trie, batch).loss))(params)

    found, expected = gradient(room=2), gradient(room=1)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(found))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), found, expected
    )


def test_a_single_cluster_is_certain():
    model, params = bigram()
    batch = batch_of([example([7], 2)], 1)
    trie = jax.tree.map(jnp.asarray, build_trie([[5, EOS]], EOS, 12))
    spelt = objectives.next_description_loss(model, params, trie, batch, jax.random.key(0))
    log_p = jax.nn.log_softmax(model.apply(params, jnp.array([7, 5])))
    assert float(spelt.loss) == pytest.approx(-float(log_p[0, 5] + log_p[1, EOS]), rel=1e-5)
    found = objectives.constrained_description_loss(model, params, trie, batch)
    assert tuple(map(float, found)) == (0.0, 1.0, 1.0)


def test_no_array_is_as_wide_as_the_vocabulary_but_the_logits_and_their_gradient():
    width, num_examples = 8192, 4
    model, params = bigram(width)
    batch = batch_of([example([7], 0, (1,))] * num_examples, len(SEQUENCES))
    size = num_examples * TRIE.max_length * width * 4

    def temporary_bytes(objective):
        def loss(params, batch):
            key = jax.random.key(0)
            return objective(model, params, TRIE, batch, key).loss

        program = jax.jit(jax.value_and_grad(loss)).lower(params, batch).compile()
        return program.memory_analysis().temp_size_in_bytes

    table = 2 * width * model.model_dim * 4  # the parameters
    assert temporary_bytes(objectives.next_description_loss) < 2.5 * size + 2 * table
    assert temporary_bytes(objectives.constrained_description_loss) < 2 * table


def test_wrong_models_and_settings_are_named():
    model, params = reward_model()
    batch = batch_of([example([7], 0)], len(SEQUENCES))
    with pytest.raises(InputError, match="RewardModel predicts no tokens.*pipeline.train.objec"):
        objectives.next_description_loss(model, params, TRIE, batch)
    model, params = bigram()
    with pytest.raises(InputError, match="next_description_loss.label_smoothing is 1.5; it must"):
        objectives.next_description_loss(model, params, TRIE, batch, label_smoothing=1.5)
