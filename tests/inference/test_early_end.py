"""How many tokens the novelty model really reads: none that are certain, none twice."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_pair import (
    EOS,
    NOVELTY,
    NOVELTY_PARAMS,
    NOVELTY_PROMPTS,
    V,
    novelty_context,
    padded,
    prompts_of,
)

from recexplore.inference.sampler import sample
from recexplore.models.transformer import Transformer
from recexplore.models.trie import build_trie, exclude

PROMPTS = 2
# Both branch at the root, below 2, and below 2 3.
SHORT = [[2, 3, 4, EOS], [2, 3, 5, EOS], [2, 6, EOS], [7, EOS], [2, EOS]]
LONG = [[*s[:-1], *[8, 9, 10] * tail, EOS] for s, tail in zip(SHORT, (3, 2, 1, 3, 0), strict=True)]


RUNS = []


@pytest.fixture(scope="module", autouse=True)
def noting():
    """Has every run of the network noted in RUNS while the compiled program runs."""
    plain = Transformer.apply
    context()  # read before, unnoted

    def noting(self, params, tokens, *args, method=None, **kwargs):
        if method == "extend":
            jax.debug.callback(functools.partial(RUNS.append, math.prod(tokens.shape)))
        return plain(self, params, tokens, *args, method=method, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Transformer, "apply", noting)
        yield


@functools.cache
def context():
    return novelty_context(prompts_of(NOVELTY_PROMPTS[:PROMPTS]))


@functools.cache
def sampler_of(sequences, num_samples, distinct):
    trie = jax.tree.map(jnp.asarray, build_trie(sequences, EOS, V))

    @jax.jit
    def run(ids, keys):
        excluded = exclude(trie, ids)
        return sample(
            NOVELTY, NOVELTY_PARAMS, trie, context(), excluded, keys, num_samples, 1.0, distinct
        )

    return run


def draw(sequences, left_out=((), ()), num_samples=8, distinct=False):
    """Draws, and how many tokens each run of the network had."""
    ids = jnp.asarray(padded([list(some) for some in left_out], len(sequences), -1))
    run = sampler_of(tuple(map(tuple, sequences)), num_samples, distinct)
    RUNS.clear()
    draws = jax.device_get(run(ids, jax.random.split(jax.random.key(0), PROMPTS)))
    jax.effects_barrier()
    return draws, list(RUNS)


def test_certain_tokens_cost_nothing():
    """One node branches at each of the two depths below the root, however many continuations."""
    short, tokens_of_short = draw(SHORT)
    long, tokens_of_long = draw(LONG)
    assert tokens_of_short == tokens_of_long == [PROMPTS, PROMPTS]
    np.testing.assert_array_equal(long.clusters, short.clusters)
    np.testing.assert_allclose(long.log_probabilities, short.log_probabilities, atol=1e-5)
    distinct, tokens = draw(LONG, distinct=True)
    assert tokens == [PROMPTS, PROMPTS]
    np.testing.assert_array_equal(np.sort(distinct.clusters), [[-1] * 3 + list(range(5))] * PROMPTS)


def test_continuations_share_their_tokens():
    """A depth costs its branching nodes, or fewer continuations."""
    sequences = [[a, b, c, EOS] for a in (2, 3, 4) for b in (5, 6) for c in (7, 8)]
    assert draw(sequences, num_samples=100)[1] == [PROMPTS * 3, PROMPTS * 6]
    assert draw(sequences, num_samples=2)[1] == [PROMPTS * 2, PROMPTS * 2]


def test_the_model_rests_when_exclusion_has_left_no_choice():
    draws, tokens = draw(LONG, left_out=([0, 1, 2, 3], [0, 1, 2, 4]), distinct=True)
    assert tokens == []
    np.testing.assert_array_equal(draws.clusters, [[4] + [-1] * 7, [3] + [-1] * 7])
    np.testing.assert_allclose(draws.log_probabilities[:, 0], 0.0, atol=1e-6)
    draws, tokens = draw(LONG, left_out=([0, 1, 2, 3], [0, 2, 3, 4]))
    assert tokens == []
    np.testing.assert_array_equal(draws.clusters, [[4] * 8, [1] * 8])
    np.testing.assert_allclose(draws.log_probabilities, 0.0, atol=1e-6)


@pytest.mark.parametrize("distinct", [False, True])
@pytest.mark.parametrize("only", [[EOS], [2, 3, 4, EOS]])
def test_a_single_description_needs_no_step(only, distinct):
    draws, tokens = draw([only], num_samples=2, distinct=distinct)
    assert tokens == []
    np.testing.assert_array_equal(draws.clusters, [[0, -1 if distinct else 0]] * PROMPTS)
    np.testing.assert_array_equal(draws.log_probabilities[:, 0], 0.0)
