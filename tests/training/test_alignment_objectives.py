"""Alignment objectives: hand-worked values, what they refuse, and that each learns an order.

The network is a table: a sequence's hidden state is its last token, so that score = head[token] +
bias, and a test can say what every sequence scores.
"""

import functools
import inspect
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.test_util import check_grads
from small_models import language_model

from recexplore.errors import InputError
from recexplore.feedback.collective import collective_feedback
from recexplore.models.reward_model import RewardModel
from recexplore.models.transformer import TransformerConfig
from recexplore.models.trie import build_trie
from recexplore.training import objectives

V = 8
CONFIG = TransformerConfig(
    vocab_size=V,
    num_layers=1,
    model_dim=V,
    num_heads=1,
    num_kv_heads=1,
    head_dim=2,
    mlp_dim=2,
    max_length=4,
)
TRIE = jax.tree.map(jnp.asarray, build_trie([[2, 1]], 1, V))
KEY = jax.random.key(0)


class Table(RewardModel):
    """Reads nothing but the last token."""

    def prefill(self, tokens, deterministic=True):
        return jax.nn.one_hot(tokens, V), None


def table(scores, head="scalar", **more):
    """A model by whose head token i has the score (or for bins the logits) `scores[i]`."""
    num_bins = len(scores[0]) if head == "bins" else 4
    weights = np.zeros((V, *np.shape(scores)[1:]), np.float32)
    weights[: len(scores)] = scores
    rest = {"bias": jnp.zeros(weights.shape[1:])} if head != "ordinal" else {}
    params = {"head": jnp.asarray(weights), **rest, **more}
    return Table(CONFIG, head, num_bins), {"params": params}


def batch_of(tokens, labels=None, weights=None, others=None):
    """Sequences that end in `tokens`, one after another token, the next after two, and so on."""
    labels = [0.0] * len(tokens) if labels is None else labels
    rows, lengths = _rows(tokens)
    batch = {
        "tokens": rows,
        "lengths": lengths,
        "label": jnp.array(labels, jnp.float32),
        "weight": jnp.array(weights or [1.0] * len(tokens), jnp.float32),
    }
    if others is not None:
        batch["other_tokens"], batch["other_lengths"] = _rows(others)
    return batch


def _rows(tokens):
    rows, lengths = np.full((len(tokens), 4), 7, np.int32), 1 + np.arange(len(tokens)) % 4
    rows[np.arange(len(tokens)), lengths - 1] = tokens
    return jnp.asarray(rows), jnp.asarray(lengths, jnp.int32)


def sums(objective, model, params, batch, key=None, **options):
    return tuple(map(float, objective(model, params, TRIE, batch, key, **options)))


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


def test_the_pointwise_loss_is_cross_entropy_with_soft_labels():
    model, params = table([0.8, -0.4])
    batch = batch_of([0, 1, 0], labels=[0.25, 0.0, 1.0], weights=[2.0, 1.0, 0.5])
    expected = (
        2 * -(0.25 * math.log(sigmoid(0.8)) + 0.75 * math.log(sigmoid(-0.8)))
        - math.log(sigmoid(0.4))
        - 0.5 * math.log(sigmoid(0.8))
    )
    found = sums(objectives.pointwise_loss, model, params, batch)
    assert found == pytest.approx((expected, 3.5, 1.5), rel=1e-5)  # the first is on the wrong side


def test_the_regression_loss_is_the_squared_error_of_the_predicted_label():
    model, params = table([0.8, -0.4])
    batch = batch_of([0, 1], labels=[0.25, 0.0], weights=[2.0, 1.0])
    expected = 2 * (sigmoid(0.8) - 0.25) ** 2 + sigmoid(-0.4) ** 2
    found = sums(objectives.regression_loss, model, params, batch)
    assert found == pytest.approx((expected, 3.0, 1.0), rel=1e-5)


@pytest.mark.parametrize("name", ["pointwise_loss", "regression_loss"])
def test_smoothing_shrinks_labels_towards_the_prior_in_training_only(name):
    model, params = table([0.8])
    objective = getattr(objectives, name)
    options = {"label_smoothing": 0.2, "prior": 0.3}
    smooth = sums(objective, model, params, batch_of([0], labels=[1.0]), KEY, **options)
    shrunk = sums(objective, model, params, batch_of([0], labels=[0.8 * 1.0 + 0.2 * 0.3]))
    assert smooth == pytest.approx(shrunk, rel=1e-5)
    evaluated = sums(objective, model, params, batch_of([0], labels=[1.0]), **options)
    assert evaluated == sums(objective, model, params, batch_of([0], labels=[1.0]))


def test_the_binned_loss_is_cross_entropy_over_the_nearest_bins():
    model, params = table([[1.0, 0.0, -1.0], [0.0, 0.0, 2.0]], "bins")
    batch = batch_of([0, 1, 1], labels=[0.2, 0.6, 0.8], weights=[2.0, 1.0, 1.0])  # bins 0, 1, 2
    first = math.log(math.e + 1 + 1 / math.e) - 1
    second = math.log(1 + 1 + math.e**2)
    expected = 2 * first + second + (second - 2)
    found = sums(objectives.binned_loss, model, params, batch)
    assert found == pytest.approx((expected, 4.0, 3.0), rel=1e-5)
    smooth = sums(
        objectives.binned_loss, model, params, batch_of([1], [1.0]), KEY, label_smoothing=0.3
    )
    assert smooth[0] == pytest.approx(0.7 * (second - 2) + 0.1 * (3 * second - 2), rel=1e-5)


def test_labels_between_two_bins_belong_to_the_upper_one():
    model, params = table([[0.0, 1.0, 2.0, 3.0, 4.0, 5.0]], "bins")
    found = [
        sums(objectives.binned_loss, model, params, batch_of([0], [label]))[0]
        for label in (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7)
    ]
    steps = [1, 1, 2, 2, 3, 3, 4]
    normaliser = math.log(sum(math.exp(z) for z in range(6)))
    assert found == pytest.approx([normaliser - step for step in steps], rel=1e-5)


def test_every_label_of_the_default_grid_has_a_bin_of_its_own():
    rounding = inspect.signature(collective_feedback).parameters["rounding"].default
    assert (RewardModel(CONFIG, "bins").num_bins - 1) * rounding == pytest.approx(1)


def test_the_ordinal_loss_is_of_differences_of_the_cumulative_link():
    model, params = table([0.7, -2.0], "ordinal", thresholds=jnp.array([-1.0, 0.5, 0.2]))
    low = -1.0
    middle = low + math.log(1 + math.exp(0.5))
    high = middle + math.log(1 + math.exp(0.2))
    batch = batch_of([0, 0, 1, 0], labels=[1 / 3, 0.7, 0.0, 1.0], weights=[2.0, 1.0, 1.0, 1.0])
    expected = -(
        2 * math.log(sigmoid(0.7 - low) - sigmoid(0.7 - middle))
        + math.log(sigmoid(0.7 - middle) - sigmoid(0.7 - high))
        + math.log(1 - sigmoid(-2.0 - low))
        + math.log(sigmoid(0.7 - high))
    )
    found = sums(objectives.ordinal_loss, model, params, batch)
    assert found[:2] == pytest.approx((expected, 5.0), rel=1e-3)
    chances = [
        sigmoid(0.7 - low) - sigmoid(0.7 - middle),
        sigmoid(0.7 - middle) - sigmoid(0.7 - high),
        sigmoid(0.7 - high),
    ]
    assert found[2] == 1.0 + [2.0, 1.0, 1.0][int(np.argmax(chances))]


def test_the_pairwise_loss_is_conservative_about_pairs_that_may_be_the_wrong_way_round():
    model, params = table([0.8, -0.4, 0.8])
    batch = batch_of([0, 1, 0], weights=[2.0, 1.0, 4.0], others=[1, 0, 2])
    d = 0.8 + 0.4
    expected = -2 * math.log(sigmoid(d)) - math.log(sigmoid(-d)) + 4 * math.log(2)
    found = sums(objectives.bradley_terry_loss, model, params, batch)
    assert found == pytest.approx((expected, 7.0, 2 + 4 / 2), rel=1e-5)
    noisy = sums(objectives.bradley_terry_loss, model, params, batch, KEY, label_smoothing=0.1)
    expected = (
        -2 * (0.9 * math.log(sigmoid(d)) + 0.1 * math.log(sigmoid(-d)))
        - (0.9 * math.log(sigmoid(-d)) + 0.1 * math.log(sigmoid(d)))
        + 4 * math.log(2)
    )
    assert noisy[0] == pytest.approx(expected, rel=1e-5)


def test_weights_are_raised_to_a_power_and_padding_stays_without_weight():
    model, params = table([0.8])
    batch = batch_of([0, 0, 0], labels=[1.0] * 3, weights=[9.0, 4.0, 0.0])
    loss = -math.log(sigmoid(0.8))
    for power, weight in ((1.0, 13.0), (0.5, 5.0), (0.0, 2.0)):
        found = sums(objectives.pointwise_loss, model, params, batch, weight_power=power)
        assert found == pytest.approx((loss * weight, weight, weight), rel=1e-5)


def test_misordered_pairs_are_counted_by_weight():
    model, params = table([0.3, 0.1, 0.2, 5.0])
    batch = batch_of([0, 1, 2, 3], labels=[0.5, 1.0, 0.1, 0.9], weights=[2.0, 1.0, 3.0, 0.0])
    # better, worse, weight: (1, 0, 2) wrong, (0, 2, 6) right, (1, 2, 3) wrong
    assert sums(objectives.misordered_pairs, model, params, batch) == (5.0, 11.0, 6.0)
    constant = jax.tree.map(jnp.zeros_like, params)
    assert sums(objectives.misordered_pairs, model, constant, batch) == (5.5, 11.0, 5.5)


def test_of_pairs_those_given_are_counted():
    model, params = table([0.8, -0.4, 0.8])
    batch = batch_of([0, 1, 0], weights=[2.0, 1.0, 4.0], others=[1, 0, 2])
    assert sums(objectives.misordered_pairs, model, params, batch) == (1.0 + 2.0, 7.0, 4.0)


FITTING = {
    "pointwise_loss": "scalar",
    "regression_loss": "scalar",
    "binned_loss": "bins",
    "ordinal_loss": "ordinal",
    "bradley_terry_loss": "scalar",
}


@pytest.mark.parametrize("name", FITTING)
def test_every_objective_recovers_the_order_of_noisy_labels(name):
    head, random = FITTING[name], np.random.default_rng(0)
    truth = np.array([0.5, 0.1, 0.9, 0.3, 0.7, 0.0, 1.0])  # of the tokens 0 .. 6
    tokens, others = random.permutation(np.repeat(np.arange(7), 40)), random.integers(0, 7, 280)
    if name == "bradley_terry_loss":
        gaps = truth[tokens] - truth[others]
        swapped = random.random(280) > 1 / (1 + np.exp(-6 * gaps))
        tokens, others = np.where(swapped, others, tokens), np.where(swapped, tokens, others)
        batch = batch_of(tokens, others=others)
    else:
        batch = batch_of(tokens, labels=np.clip(truth[tokens] + random.normal(0, 0.1, 280), 0, 1))
    scores = np.zeros((7, 4) if head == "bins" else 7)
    more = {"thresholds": jnp.array([-1.0, 0.5, 0.5])} if head == "ordinal" else {}
    model, params = table(scores, head, **more)
    optimizer = optax.adam(0.1)

    def mean_loss(params):
        found = getattr(objectives, name)(model, params, TRIE, batch, KEY)
        return found.loss / found.weight

    def step(carry, _):
        params, state = carry
        loss, gradient = jax.value_and_grad(mean_loss)(params)
        updates, state = optimizer.update(gradient, state)
        return (optax.apply_updates(params, updates), state), loss

    run = jax.jit(lambda carry: jax.lax.scan(step, carry, length=150))
    (params, _), losses = run((params, optimizer.init(params)))
    assert np.isfinite(losses).all()
    assert losses[-1] < 0.9 * losses[0]
    found = model.apply(params, jnp.eye(V)[:7], method="score")
    np.testing.assert_array_equal(np.argsort(found), np.argsort(truth))


@pytest.mark.parametrize("name", ["pointwise_loss", "ordinal_loss", "bradley_terry_loss"])
def test_gradients_are_those_of_finite_differences(name):
    head = FITTING[name]
    more = {"thresholds": jnp.array([-1.0, 0.5, 0.2])} if head == "ordinal" else {}
    model, params = table([0.8, -0.4, 0.3], head, **more)
    batch = batch_of([0, 1, 2], labels=[0.2, 0.4, 1.0], weights=[1.0, 2.0, 3.0], others=[1, 2, 0])

    def loss(params):
        return getattr(objectives, name)(model, params, TRIE, batch, KEY, label_smoothing=0.1).loss

    check_grads(jax.jit(loss), (params,), order=1, modes="rev", atol=0.02, rtol=0.02)


@pytest.mark.parametrize("name", FITTING)
def test_a_head_that_does_not_fit_is_named(name):
    head = next(head for head in ("bins", "scalar") if head != FITTING[name])
    model, params = table([[0.0, 0.0]] if head == "bins" else [0.0], head)
    message = f"objectives.{name} needs.*{FITTING[name]}; this Table has the head '{head}'.*Bind"
    with pytest.raises(InputError, match=message):
        sums(getattr(objectives, name), model, params, batch_of([0]))


def test_what_an_objective_cannot_use_is_named():
    model, params = table([0.0])
    pointwise = functools.partial(sums, objectives.pointwise_loss, model, params, batch_of([0]))
    with pytest.raises(InputError, match="pointwise_loss.label_smoothing is 1.0; it must lie in"):
        pointwise(label_smoothing=1.0)
    with pytest.raises(InputError, match="pointwise_loss.prior is 2.0; it must lie in"):
        pointwise(prior=2.0)
    with pytest.raises(InputError, match="examples in pairs.*the batch has label, lengths, tok"):
        sums(objectives.bradley_terry_loss, model, params, batch_of([0]))
    with pytest.raises(InputError, match="this Transformer has none.*make_network") as raised:
        sums(objectives.pointwise_loss, *language_model(), batch_of([0]))
    assert "descriptions, such as @objectives.constrained_description_loss" in str(raised.value)
    assert "alignment/" not in str(raised.value)  # it may be any model
    with pytest.raises(InputError, match="this Transformer has none.*make_network"):
        sums(objectives.misordered_pairs, *language_model(), batch_of([0]))
