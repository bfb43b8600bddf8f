"""The sequential recommender reads forwards only, starts by itself, and scores as it should."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from recexplore.models import saved
from recexplore.models.sequential_recommender import SequentialRecommender, recommender_config

ITEMS, T, D = 30, 6, 8
MODEL = SequentialRecommender(
    recommender_config(ITEMS, T, num_layers=2, model_dim=D, num_heads=2, mlp_dim=16)
)


@functools.cache
def parameters():
    random = np.random.default_rng(0)
    shapes = saved.abstract_parameters(MODEL)
    return jax.tree.map(lambda x: jnp.asarray(random.normal(size=x.shape), jnp.float32), shapes)


@jax.jit
def read(params, items):
    return MODEL.apply(params, items, method="prefill")[0]


def queries(items):
    """After 0, 1, … T items."""
    return read(parameters(), items)


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(-1, ITEMS - 1), min_size=2 * T, max_size=2 * T), st.integers(0, T))
def test_later_items_change_no_earlier_query(items, kept):
    first, second = np.array(items, np.int32).reshape(2, 1, T)
    second[:, :kept] = first[:, :kept]
    ours, theirs = queries(first), queries(second)
    np.testing.assert_allclose(ours[:, : kept + 1], theirs[:, : kept + 1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("length", [0, 1, 4, T])
def test_the_query_is_that_after_the_last_item_whatever_pads_follow(length):
    items = np.full((1, T), -1, np.int32)
    items[0, :length] = np.arange(3, 3 + length)
    lengths = jnp.array([length], jnp.int32)
    padded = MODEL.apply(parameters(), jnp.asarray(items), lengths)
    plain = MODEL.apply(parameters(), jnp.asarray(items[:, : max(length, 1)]), lengths)
    np.testing.assert_allclose(padded, plain, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(padded, queries(items)[:, length], rtol=1e-4, atol=1e-5)


def test_scores_are_products_with_the_items_vectors():
    params, items = parameters(), jnp.array([4, 0, 29], jnp.int32)
    query = jnp.asarray(np.random.default_rng(1).normal(size=(3, D)), jnp.float32)
    table = np.asarray(params["params"]["transformer"]["token_embedder"])[2:]
    expected = np.asarray(query) @ table[items].T / np.sqrt(D)
    scores = MODEL.apply(params, query, items, method="scores")
    np.testing.assert_allclose(scores, expected, rtol=1e-5, atol=1e-5)
    paired = MODEL.apply(params, query, items, method="paired_scores")
    np.testing.assert_allclose(paired, np.diag(expected), rtol=1e-5, atol=1e-5)
    vectors = MODEL.apply(params, items, method="item_vectors")
    np.testing.assert_allclose(np.asarray(query) @ vectors.T, scores, rtol=1e-5, atol=1e-5)


def test_it_is_described_and_rebuilt():
    assert saved.rebuild(saved.describe(MODEL)) == MODEL
    assert MODEL.max_items == T
    assert MODEL.config.vocab_size >= ITEMS + 2
