"""Packed batches give what the same examples give one a row, and each alone."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_models import (
    batch_of,
    language_model,
    packed_batch_of,
    random_examples,
    reward_model,
)

from recexplore.errors import InputError
from recexplore.models.trie import build_trie
from recexplore.training import objectives, reading

EOS = 1
SEQUENCES = [[2, 3, EOS], [2, 4, EOS], [5, EOS], [6, 3, 3, EOS], [6, 4, EOS]]
TRIE = jax.tree.map(jnp.asarray, build_trie(SEQUENCES, EOS, 12))
EXAMPLES = random_examples(SEQUENCES, 5)
ROWS = [EXAMPLES[:2], EXAMPLES[2:5], []]  # of up to three examples; padding after them
BATCH = batch_of(EXAMPLES, len(SEQUENCES))
PACKED = packed_batch_of(ROWS, len(SEQUENCES), width=30)
NOVELTY = ("next_description_loss", "constrained_description_loss")


@pytest.mark.parametrize(
    ("name", "windows"),
    [(NOVELTY[0], (3, 0)), (NOVELTY[1], (0,)), (NOVELTY[1], (3, 0)), ("ordinal_loss", (3, 0))],
)
def test_packed_losses_and_gradients_are_those_of_one_example_a_row(name, windows):
    make = language_model if name in NOVELTY else functools.partial(reward_model, "ordinal")
    model, params = make(attention_windows=windows)

    @jax.jit
    def run(batch):
        def loss(params):
            key = jax.random.key(0)
            found = getattr(objectives, name)(model, params, TRIE, batch, key, label_smoothing=0.1)
            return found.loss, found

        return jax.value_and_grad(loss, has_aux=True)(params)

    (_, packed), packed_gradient = run(PACKED)
    (_, unpacked), gradient = run(BATCH)
    np.testing.assert_allclose(packed, unpacked, rtol=1e-5)
    assert float(unpacked.weight) == sum(e["weight"] for e in EXAMPLES)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5),
        packed_gradient,
        gradient,
    )


def test_every_example_of_a_packed_batch_is_read_as_if_alone():
    model, params = reward_model(attention_windows=(3, 0))

    @jax.jit
    def states(batch):
        return reading.last_states(model, params, None, batch)

    packed = states(PACKED).reshape(len(ROWS), 4, -1)
    alone = [states(batch_of([e], len(SEQUENCES)))[0] for e in EXAMPLES]
    places = [(i, j) for i, row in enumerate(ROWS) for j in range(len(row))]
    for (i, j), expected in zip(places, alone, strict=True):
        np.testing.assert_allclose(packed[i, j], expected, rtol=1e-5, atol=1e-5)


def test_pairs_are_counted_across_the_rows_of_a_packed_batch():
    model, params = reward_model()
    run = jax.jit(lambda batch: objectives.misordered_pairs(model, params, TRIE, batch))
    np.testing.assert_allclose(run(PACKED), run(BATCH), rtol=1e-6)


def test_packed_pairs_are_refused():
    model, params = reward_model()
    batch = {**PACKED, "other_tokens": PACKED["tokens"], "other_lengths": PACKED["lengths"]}
    with pytest.raises(InputError, match="and not packed; the batch has label, lengths, other"):
        objectives.bradley_terry_loss(model, params, TRIE, batch)
