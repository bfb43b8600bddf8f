"""Both samplers against the enumerated distribution, drawn from with thousands of keys."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st
from small_pair import (
    EOS,
    LEFT_OUT,
    NOVELTY,
    NOVELTY_PARAMS,
    NOVELTY_PROMPTS,
    TRIE,
    B,
    M,
    V,
    agrees,
    enumerated,
    novelty_context,
    padded,
    pick,
    prompts_of,
)

from recexplore.inference import exhaustive, sampler
from recexplore.inference.sampler import log_inclusion, sample
from recexplore.models.trie import build_trie, exclude

ROWS = [0, 1, 2]  # six, four and all seven clusters allowed
KEYS = 4000  # for each


@functools.partial(jax.jit, static_argnames=("num_samples", "temperature", "distinct"))
def draw(trie, context, excluded, keys, **how):
    return sample(NOVELTY, NOVELTY_PARAMS, trie, context, excluded, keys, **how)


def ranks_of(left_out, width=M):
    return exclude(TRIE, jnp.asarray(padded([sorted(x) for x in left_out], width, -1)))


@functools.cache
def expected(temperature):
    """[rows, M] log-probabilities."""
    prompts = [NOVELTY_PROMPTS[row] for row in ROWS]
    return enumerated([LEFT_OUT[row] for row in ROWS], prompts, temperature=temperature)


@functools.cache
def many_contexts():
    """Every one of the rows, many times over."""
    rows = np.repeat(ROWS, KEYS)
    context = novelty_context(prompts_of([NOVELTY_PROMPTS[row] for row in rows]))
    return context, ranks_of([LEFT_OUT[row] for row in rows])


@functools.cache
def many_samples(num_samples, temperature):
    """Distinct draws with many keys; every array [rows, KEYS, …]."""
    keys = jax.random.split(jax.random.key(num_samples), len(ROWS) * KEYS)
    draws = draw(
        TRIE,
        *many_contexts(),
        keys,
        num_samples=num_samples,
        temperature=temperature,
        distinct=True,
    )
    inclusion = log_inclusion(draws)

    def split(array):
        return np.asarray(array).reshape(len(ROWS), KEYS, *array.shape[1:])

    return jax.tree.map(split, draws), split(inclusion)


ALL = 9  # more than there are
DISTINCT = pytest.mark.parametrize(
    ("num_samples", "temperature"), [(1, 1.0), (2, 1.0), (3, 2.5), (ALL, 0.7)]
)


@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_independent_draws_follow_the_enumerated_distribution(temperature):
    context = novelty_context(prompts_of(NOVELTY_PROMPTS))
    keys = jax.random.split(jax.random.key(0), B)
    draws = draw(
        TRIE,
        context,
        ranks_of(LEFT_OUT),
        keys,
        num_samples=8000,
        temperature=temperature,
        distinct=False,
    )
    plain, tempered = enumerated(LEFT_OUT), enumerated(LEFT_OUT, temperature=temperature)
    for row in range(B):
        counts = np.bincount(draws.clusters[row], minlength=M)
        assert agrees(counts, np.exp(tempered[row]))
    np.testing.assert_allclose(draws.log_probabilities, pick(plain, draws.clusters), atol=1e-4)
    np.testing.assert_allclose(draws.tempered, pick(tempered, draws.clusters), atol=1e-4)
    np.testing.assert_array_equal(draws.perturbed, draws.tempered)
    assert np.isneginf(draws.thresholds).all()


def one_after_the_other(chances, count):
    """Chance of every ordered draw without replacement."""
    found = np.zeros((M,) * count)
    for order in itertools.permutations(np.flatnonzero(chances), count):
        left, product = 1.0, 1.0
        for cluster in order:
            product *= chances[cluster] / left
            left -= chances[cluster]
        found[order] = product
    return found


@pytest.mark.parametrize(("num_samples", "temperature"), [(1, 1.0), (2, 1.0), (3, 2.5)])
def test_distinct_draws_follow_the_enumerated_sequential_distribution(num_samples, temperature):
    draws, _ = many_samples(num_samples, temperature)
    for row, clusters in enumerate(draws.clusters):
        orders = one_after_the_other(np.exp(expected(temperature)[row]), num_samples)
        counts = np.zeros_like(orders)
        np.add.at(counts, tuple(clusters.T), 1)
        assert agrees(counts, orders)
        sets, set_counts = {}, {}
        for order in np.ndindex(orders.shape):
            name = frozenset(order)
            sets[name] = sets.get(name, 0.0) + orders[order]
            set_counts[name] = set_counts.get(name, 0) + counts[order]
        assert agrees(list(set_counts.values()), list(sets.values()))


@DISTINCT
def test_distinct_draws_come_with_their_log_probabilities_in_order(num_samples, temperature):
    draws, _ = many_samples(num_samples, temperature)
    for row, clusters in enumerate(draws.clusters):
        plain, tempered = (np.broadcast_to(expected(t)[row], (KEYS, M)) for t in (1.0, temperature))
        np.testing.assert_allclose(draws.log_probabilities[row], pick(plain, clusters), atol=1e-4)
        np.testing.assert_allclose(draws.tempered[row], pick(tempered, clusters), atol=1e-4)
        perturbed, thresholds = draws.perturbed[row], draws.thresholds[row]
        assert (perturbed[:, 1:] <= perturbed[:, :-1]).all()
        assert (perturbed[:, min(num_samples, M - len(LEFT_OUT[ROWS[row]])) - 1] > thresholds).all()
        assert (np.isneginf(perturbed) == (clusters < 0)).all()


@DISTINCT
def test_importance_weighted_estimates_are_unbiased(num_samples, temperature):
    draws, inclusion = many_samples(num_samples, temperature)
    measured = np.random.default_rng(1).normal(size=(5, M + 1))  # any functions of a cluster
    measured[0] = 1.0
    weights = np.exp(draws.tempered) / np.exp(inclusion)
    assert np.isfinite(weights).all()
    for row, clusters in enumerate(draws.clusters):
        wanted = measured[:, :M] @ np.exp(expected(temperature)[row])
        estimates = (weights[row] * measured[:, clusters]).sum(axis=-1)
        errors = estimates.std(axis=1) / KEYS**0.5
        assert (abs(estimates.mean(axis=1) - wanted) < 4 * errors + 1e-4).all()


def test_with_enough_draws_every_allowed_cluster_comes_once():
    draws, inclusion = many_samples(ALL, 0.7)
    for row, clusters in enumerate(draws.clusters):
        allowed = sorted(set(range(M)) - LEFT_OUT[ROWS[row]])
        everything = np.broadcast_to(allowed, (KEYS, len(allowed)))
        np.testing.assert_array_equal(np.sort(clusters[:, : len(allowed)]), everything)
        assert (clusters[:, len(allowed) :] == -1).all()
        assert np.isneginf(draws.thresholds[row]).all()
        assert (inclusion[row] == 0).all()


def test_perturbed_log_probabilities_are_gumbels_around_the_tempered_ones():
    draws, _ = many_samples(ALL, 0.7)
    for row, clusters in enumerate(draws.clusters):
        for cluster in set(range(M)) - LEFT_OUT[ROWS[row]]:
            here = clusters == cluster
            of_cluster = draws.perturbed[row][here] - draws.tempered[row][here]
            assert scipy.stats.kstest(of_cluster, scipy.stats.gumbel_r.cdf).pvalue > 1e-4


@pytest.mark.parametrize("distinct", [False, True])
@settings(max_examples=3, deadline=None)
@given(data=st.data())
def test_draws_agree_with_the_exhaustive_pass_on_any_trie(distinct, data):
    bodies = data.draw(
        st.lists(st.lists(st.integers(2, 4), max_size=4).map(tuple), min_size=1, unique=True)
    )
    trie = build_trie([[*body, EOS] for body in bodies], EOS, V)
    tree = jax.device_put(exhaustive.build_tree(trie))
    trie = jax.device_put(trie)
    count, rows = len(bodies), 3
    some = st.sets(st.integers(0, count - 1), max_size=count - 1)
    banned = [sorted(data.draw(some)) for _ in range(rows)]
    excluded = exclude(trie, jnp.asarray(padded(banned, count, -1)))
    num_samples = data.draw(st.sampled_from([1, 3, count + 2]))
    temperature = data.draw(st.sampled_from([0.05, 1.0, 3.0]))
    context = novelty_context(prompts_of(NOVELTY_PROMPTS[:rows]))
    keys = jax.random.split(jax.random.key(0), rows)
    draws = sample(
        NOVELTY, NOVELTY_PARAMS, trie, context, excluded, keys, num_samples, temperature, distinct
    )
    exact = exhaustive.all_clusters(
        NOVELTY, NOVELTY_PARAMS, trie, tree, context, excluded, temperature
    )
    for row in range(rows):
        drawn = np.asarray(draws.clusters[row])
        real = drawn[drawn >= 0]
        assert not set(real.tolist()) & set(banned[row])
        if distinct:
            assert (
                len(set(real.tolist())) == len(real) == min(num_samples, count - len(banned[row]))
            )
        else:
            assert len(real) == num_samples
        for name in ("log_probabilities", "tempered"):
            found = np.asarray(getattr(draws, name))[row][drawn >= 0]
            wanted = np.asarray(getattr(exact, name))[row][real]
            np.testing.assert_allclose(found, wanted, atol=2e-3, rtol=1e-4)


def test_a_million_unlikely_children_are_told_apart():
    """Each has a mass below the spacing of float32 near 1, where their sums would be."""
    count, draws = 1 << 20, 1 << 21
    mass = np.full(count, 0.01 / (count - 1), np.float32)
    mass[0] = 0.99
    every = jnp.arange(count)[None, None]
    choices = sampler._Choices(
        every, every >= 0, jnp.log(mass)[None, None], jnp.log(mass)[None, None]
    )
    uniforms = jax.random.uniform(jax.random.key(0), (2, 1, draws))
    place = jnp.zeros((1, draws), jnp.int32)
    slots = np.asarray(jax.jit(sampler._draw_child)(choices, place, *uniforms))
    unlikely = slots[slots > 0]
    assert len(unlikely) == pytest.approx(0.01 * draws, rel=0.03)
    expected = count * (1 - np.exp(-len(unlikely) / count))  # different ones among so many
    assert len(np.unique(unlikely)) == pytest.approx(expected, rel=0.01)
