"""What the compiled step chooses, over many keys, is the policy that evaluation works with."""

import functools

import jax
import numpy as np
from small_pair import LEFT_OUT, M, agrees, batch_of, enumerated, explore, prefixes, whole_scores

from recexplore.evaluation import policies

KEYS = 2000
ROWS = [0, 1, 2]


@functools.cache
def scores():
    return whole_scores()[ROWS].astype(np.float64)


def first_choices(**settings):
    """How often each cluster is chosen for each of a few histories, [3, M]."""
    given = dict(batch=batch_of(ROWS), prefixes=prefixes(), num_chosen=1, **settings)

    @jax.jit
    def chosen(seeds):
        return jax.vmap(lambda seed: explore(seed=seed, **given).clusters[:, 0])(seeds)

    clusters = np.asarray(chosen(np.arange(KEYS)))
    return [np.bincount(column, minlength=M) for column in clusters.T]


def all_agree(counts, policy):
    return all(agrees(*pair) for pair in zip(counts, policy, strict=True))


def test_the_best_of_independent_draws_is_distributed_as_computed():
    log_p = enumerated(LEFT_OUT, temperature=1.7)[ROWS]
    counts = first_choices(num_samples=3, sampler="independent", temperature=1.7)
    assert all_agree(counts, policies.best_of_n(log_p, scores(), 3))
    assert not all_agree(counts, policies.best_of_n(log_p, scores(), 2))  # it could have failed


def test_the_best_of_distinct_draws_is_distributed_as_computed():
    log_p = enumerated(LEFT_OUT)[ROWS]
    counts = first_choices(num_samples=3, sampler="distinct")
    assert all_agree(counts, policies.best_of_distinct(log_p, scores(), 3, samples=200_000))
    assert not all_agree(counts, policies.best_of_n(log_p, scores(), 3))
