"""Scores of given clusters against whole forward passes, and how often the network is run."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_pair import (
    ALIGNMENT,
    ALIGNMENT_PARAMS,
    ALIGNMENT_PROMPTS,
    EOS,
    V,
    alignment_context,
    padded,
    prompts_of,
    whole_scores,
)

from recexplore.inference import scoring
from recexplore.models.reward_model import RewardModel
from recexplore.models.trie import build_trie

SEQUENCES = [[a, b, EOS] for a in range(2, 9) for b in range(2, 9)] + [[2, EOS], [EOS]]
M = len(SEQUENCES)
TRIE = jax.tree.map(jnp.asarray, build_trie(SEQUENCES, EOS, V))
PROMPTS = ALIGNMENT_PROMPTS[:3]
RUNS = []


@pytest.fixture(scope="module")
def score_each():
    """Notes in RUNS how many sequences every run of the network had, while the program runs."""
    plain, context = RewardModel.apply, alignment_context(prompts_of(PROMPTS))

    def noting(self, params, tokens, *args, method=None, **kwargs):
        if method == "extend":
            count = tokens.shape[1]
            jax.debug.callback(lambda: RUNS.append(count))
        return plain(self, params, tokens, *args, method=method, **kwargs)

    @jax.jit
    def run(clusters):
        return scoring.score_each(ALIGNMENT, ALIGNMENT_PARAMS, TRIE, context, clusters)

    def scores_and_runs(clusters):
        RUNS.clear()
        scores = jax.device_get(run(clusters))
        jax.effects_barrier()
        return scores, list(RUNS)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RewardModel, "apply", noting)
        yield scores_and_runs


def some_clusters(counts, width):
    random = np.random.default_rng(0)
    return padded([random.permutation(M)[:count].tolist() for count in counts], width, -1)


def check(scores, clusters):
    expected = np.take_along_axis(whole_scores(PROMPTS, SEQUENCES), np.maximum(clusters, 0), axis=1)
    np.testing.assert_allclose(scores[clusters >= 0], expected[clusters >= 0], atol=1e-4)


def test_a_few_clusters_are_scored_together(score_each):
    clusters = some_clusters((7, 1, 0), 7)
    scores, runs = score_each(clusters)
    check(scores, clusters)
    assert runs == [7]


@pytest.mark.parametrize(
    ("counts", "rounds"), [((M, 20, 0), 4), ((5, 33, 17), 3), ((16, 16, 2), 1), ((0, 0, 0), 0)]
)
def test_many_are_scored_in_rounds_that_end_with_the_last(score_each, counts, rounds):
    clusters = some_clusters(counts, M)
    scores, runs = score_each(clusters)
    assert scores.shape == clusters.shape
    check(scores, clusters)
    assert runs == [16] * rounds
