"""All clusters in one pass against whole forward passes, one description at a time."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_pair import (
    ALIGNMENT,
    ALIGNMENT_PARAMS,
    ALIGNMENT_PROMPTS,
    EOS,
    NOVELTY,
    NOVELTY_PARAMS,
    NOVELTY_PROMPTS,
    SEQUENCES,
    V,
    alignment_context,
    enumerated,
    novelty_context,
    padded,
    prompts_of,
    whole_scores,
)

from recexplore.errors import InputError
from recexplore.inference import exhaustive
from recexplore.models.trie import build_trie, exclude

PROMPTS = 3
_RANDOM = np.random.default_rng(0)
_BODIES = {tuple(_RANDOM.integers(2, 6, _RANDOM.integers(1, 6)).tolist()) for _ in range(40)}
SHAPES = {
    "mixed": SEQUENCES,
    "single": [[2, 3, 4, EOS]],
    "end alone": [[EOS]],
    "no trunk": [[2, 3, EOS], [4, EOS], [5, 6, 7, EOS], [EOS]],
    "beginnings": [[2] * length + [EOS] for length in (3, 1, 5, 0, 2, 4)],
    "bushy": [[*body, EOS] for body in _BODIES],
}


def left_out_of(count):
    """Nothing, every other one, all but the last."""
    return [set(), set(range(0, count - 1, 2)), set(range(count - 1))]


@pytest.mark.parametrize("shape", SHAPES)
def test_everything_is_as_enumerated(shape, monkeypatch):
    monkeypatch.setattr(exhaustive, "_GROUP", 2)  # several groups of tails
    sequences = SHAPES[shape]
    count, temperature = len(sequences), 0.6
    trie = build_trie(sequences, EOS, V)
    trie, tree = jax.tree.map(jnp.asarray, (trie, exhaustive.build_tree(trie)))
    assert tree.tails.clusters.shape[0] == -(-count // 2)
    left_out = left_out_of(count)

    @jax.jit
    def run(novelty, alignment, ids):
        draws = exhaustive.all_clusters(
            NOVELTY, NOVELTY_PARAMS, trie, tree, novelty, exclude(trie, ids), temperature
        )
        return draws, exhaustive.all_scores(ALIGNMENT, ALIGNMENT_PARAMS, trie, tree, alignment)

    novelty, alignment = NOVELTY_PROMPTS[:PROMPTS], ALIGNMENT_PROMPTS[:PROMPTS]
    draws, scores = run(
        novelty_context(prompts_of(novelty)),
        alignment_context(prompts_of(alignment)),
        padded([sorted(some) for some in left_out], count, -1),
    )
    expected = enumerated(left_out, novelty, sequences)
    np.testing.assert_allclose(draws.log_probabilities, expected, atol=1e-4)
    np.testing.assert_allclose(np.exp(draws.log_probabilities).sum(axis=1), 1.0, atol=1e-5)
    tempered = enumerated(left_out, novelty, sequences, temperature)
    np.testing.assert_allclose(draws.tempered, tempered, atol=1e-4)
    np.testing.assert_array_equal(
        draws.clusters, np.where(np.isfinite(expected), np.arange(count), -1)
    )
    np.testing.assert_allclose(scores, whole_scores(alignment, sequences), atol=1e-4)


@pytest.mark.parametrize("shape", SHAPES)
def test_trunk_and_tails_spell_every_description(shape, monkeypatch):
    monkeypatch.setattr(exhaustive, "_GROUP", 3)
    trie = build_trie(SHAPES[shape], EOS, V)
    trunk, tails = exhaustive.build_tree(trie)
    spelled = {}
    for group, row in np.argwhere(tails.clusters >= 0):
        leading = tails.trunk[group][tails.above[group, row]]
        ancestors = trunk.ancestors[leading[-1]] if len(leading) else np.zeros(0, bool)
        assert np.flatnonzero(ancestors).tolist() == leading.tolist()
        assert trunk.depths[leading].tolist() == list(range(1, len(leading) + 1))
        assert tails.starts[group, row] == len(leading)
        tail = tails.tokens[group, row, : tails.lengths[group, row]]
        spelled[tails.clusters[group, row]] = trie.tokens[trunk.nodes[leading]].tolist() + [*tail]
    assert [spelled[cluster] for cluster in range(len(SHAPES[shape]))] == SHAPES[shape]


def test_a_trunk_that_is_too_large_is_refused(monkeypatch):
    monkeypatch.setattr(exhaustive, "_LARGEST_TRUNK", 1)
    deep = build_trie([[2, 3, 4, EOS], [2, 3, 5, EOS], [6, 7, EOS], [6, 8, EOS]], EOS, 12)
    with pytest.raises(InputError, match="4 descriptions share 3 beginnings; up to 1 "):
        exhaustive.build_tree(deep)
