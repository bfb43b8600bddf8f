"""The next item's loss against brute force: exact, sampled, corrected, within clusters."""

import itertools
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from small_models import language_model, some_parameters

from recexplore.errors import InputError
from recexplore.models.sequential_recommender import SequentialRecommender, recommender_config
from recexplore.training import item_objectives
from recexplore.training.item_objectives import (
    draw_items,
    make_catalogue,
    next_in_cluster_loss,
    next_item_loss,
)

ITEMS, T = 7, 3
CLUSTERS = np.array([0, 1, 0, 1, 0, 2, 0])
POPULARITY = np.array([5.0, 1, 2, 8, 1, 3, 4]) / 24
MODEL = SequentialRecommender(
    recommender_config(
        ITEMS, T, num_layers=1, model_dim=8, num_heads=2, mlp_dim=8, dropout_rate=0.0
    )
)
PARAMS = some_parameters(MODEL)
CATALOGUE = jax.tree.map(jnp.asarray, make_catalogue(CLUSTERS, POPULARITY, POPULARITY))
BATCH = {
    "tokens": jnp.array([[3, 0, 6], [5, -1, -1], [-1, -1, -1]], jnp.int32),
    "targets": jnp.array([[-1, 0, 6, 2], [5, 4, -1, -1], [1, -1, -1, -1]], jnp.int32),
}
KEY = jax.random.key(0)


def scores_by_hand():
    """[B, T + 1, ITEMS]: products, biases and prior, straight from the parameters."""
    hidden, _ = MODEL.apply(PARAMS, BATCH["tokens"], method="prefill")
    params = jax.tree.map(np.asarray, PARAMS["params"])
    table = params["transformer"]["token_embedder"][2 : 2 + ITEMS]
    scores = np.asarray(hidden) @ table.T / np.sqrt(8)
    return scores + np.log(POPULARITY)


def losses_by_hand(groups):
    """(loss, whether it is the best) of each target, by loops."""
    scores, found = scores_by_hand(), []
    for row, targets in enumerate(np.asarray(BATCH["targets"]).tolist()):
        for place, target in enumerate(targets):
            if target < 0:
                continue
            named = np.asarray(BATCH["tokens"])[row, :place].tolist()
            among = [i for i in range(ITEMS) if groups[i] == groups[target] and i not in named]
            own = scores[row, place]
            loss = np.log(sum(np.exp(own[i]) for i in among)) - own[target]
            found.append((loss, own[target] == max(own[among])))
    return np.array(found)


@pytest.mark.parametrize("block", [2, 4, 1024])
@pytest.mark.parametrize(
    ("objective", "groups"), [(next_item_loss, np.zeros(ITEMS)), (next_in_cluster_loss, CLUSTERS)]
)
def test_the_exact_losses_are_those_of_a_softmax_over_what_is_not_named(
    monkeypatch, objective, groups, block
):
    monkeypatch.setattr(item_objectives, "_BLOCK", block)
    losses, right = losses_by_hand(groups).T
    sums = jax.jit(lambda: objective(MODEL, PARAMS, CATALOGUE, BATCH))()
    assert float(sums.loss) == pytest.approx(losses.sum(), rel=1e-5)
    assert float(sums.weight) == len(losses)
    assert float(sums.correct) == right.sum()


def sampled_loss(params, draws, batch=BATCH, catalogue=CATALOGUE):
    """The loss in training, with these draws."""
    with mock.patch.object(item_objectives, "draw_items", lambda *_: draws):
        return next_item_loss(MODEL, params, catalogue, batch, KEY, num_negatives=len(draws)).loss


def exact_loss(params, batch=BATCH, catalogue=CATALOGUE):
    return next_item_loss(MODEL, params, catalogue, batch).loss


def test_with_all_items_for_negatives_the_loss_and_its_gradient_are_the_full_softmax_s():
    """Each is drawn once where once is expected."""
    even = jax.tree.map(jnp.asarray, make_catalogue(CLUSTERS, POPULARITY, POPULARITY, power=0.0))
    draws = jnp.arange(ITEMS, dtype=jnp.int32)
    sampled = jax.jit(jax.value_and_grad(lambda p: sampled_loss(p, draws, catalogue=even)))
    (ours, gradient), (exact, expected) = (
        sampled(PARAMS),
        jax.jit(jax.value_and_grad(exact_loss))(PARAMS),
    )
    assert float(ours) == pytest.approx(float(exact), rel=1e-5)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), gradient, expected
    )


def test_the_correction_is_unbiased_over_all_draws_there_are():
    """E[Ẑ] over all pairs of draws, each with its probability, is Z exactly."""
    one = {**BATCH, "targets": jnp.full((3, 4), -1).at[0, 2].set(6)}
    q = np.exp(np.asarray(CATALOGUE.log_q, np.float64))
    pairs = np.array([*itertools.product(range(ITEMS), repeat=2)], np.int32)
    losses = jax.jit(jax.vmap(lambda draws: sampled_loss(PARAMS, draws, one)))(pairs)
    ratios = np.exp(np.asarray(losses, np.float64))  # Ẑ / exp s_y
    exact = np.exp(float(exact_loss(PARAMS, one)))
    assert q[pairs].prod(axis=1) @ ratios == pytest.approx(exact, rel=1e-4)


def test_many_negatives_come_near_the_full_softmax():
    sums = next_item_loss(MODEL, PARAMS, CATALOGUE, BATCH, KEY, num_negatives=20_000)
    exact = next_item_loss(MODEL, PARAMS, CATALOGUE, BATCH)
    assert float(sums.loss) == pytest.approx(float(exact.loss), rel=0.02)
    assert float(sums.correct) == float(exact.correct)


def test_gradients_are_those_of_finite_differences():
    def loss(table):
        transformer = {**PARAMS["params"]["transformer"], "token_embedder": table}
        params = {"params": {**PARAMS["params"], "transformer": transformer}}
        return next_item_loss(MODEL, params, CATALOGUE, BATCH, KEY, num_negatives=5).loss

    table = PARAMS["params"]["transformer"]["token_embedder"]
    gradient, value = jax.jit(jax.grad(loss))(table), jax.jit(loss)
    for row in range(2 + ITEMS):
        step = jnp.zeros_like(table).at[row, row % 8].set(1e-2)
        slope = (value(table + step) - value(table - step)) / 2e-2
        assert float(gradient[row, row % 8]) == pytest.approx(float(slope), abs=5e-3)


def test_training_has_the_popularity_of_its_own_period_and_use_the_recent_one():
    training = make_catalogue(CLUSTERS, POPULARITY, POPULARITY[::-1], power=0.0)
    use = make_catalogue(CLUSTERS, POPULARITY[::-1], POPULARITY, power=0.0)
    draws = jnp.arange(ITEMS, dtype=jnp.int32)
    training, use = (jax.tree.map(jnp.asarray, each) for each in (training, use))
    in_training = sampled_loss(PARAMS, draws, catalogue=training)
    assert float(in_training) == pytest.approx(float(exact_loss(PARAMS, catalogue=use)), rel=1e-5)


@settings(max_examples=20, deadline=None)
@given(
    st.lists(st.floats(1e-6, 1.0), min_size=1, max_size=40),
    st.floats(0, 1),
)
def test_q_is_what_random_bits_draw_and_near_the_power_of_popularity(popularity, power):
    made = make_catalogue(np.zeros(len(popularity), int), *[np.array(popularity)] * 2, power=power)
    q = np.exp(made.log_q.astype(np.float64))
    wanted = np.array(popularity) ** power
    np.testing.assert_allclose(q, wanted / wanted.sum(), rtol=1e-3, atol=1e-9)
    # Of 2³² words of bits, item i is drawn by those from upto[i − 1] to upto[i] − 1.
    ends = np.array([0, *made.upto[:-1].tolist(), 2**32])
    np.testing.assert_allclose(np.diff(ends) / 2**32, q, rtol=1e-5, atol=1e-12)


def test_draws_are_as_frequent_as_q():
    draws = np.bincount(np.asarray(draw_items(KEY, CATALOGUE, 200_000)), minlength=ITEMS)
    q = np.exp(np.asarray(CATALOGUE.log_q))
    spread = np.sqrt(200_000 * q * (1 - q))
    assert np.all(np.abs(draws - 200_000 * q) < 5 * spread)


def test_wrong_settings_and_networks_are_named():
    with pytest.raises(InputError, match="num_negatives is -1"):
        next_item_loss(MODEL, PARAMS, CATALOGUE, BATCH, KEY, num_negatives=-1)
    with pytest.raises(InputError, match="make_catalogue.power is 2.0"):
        make_catalogue(CLUSTERS, POPULARITY, POPULARITY, power=2.0)
    with pytest.raises(InputError, match="no item to recommend"):
        make_catalogue(np.zeros(0, int), np.zeros(0), np.zeros(0))
    model, params = language_model()
    with pytest.raises(InputError, match="A Transformer scores no items"):
        next_item_loss(model, params, CATALOGUE, BATCH)
