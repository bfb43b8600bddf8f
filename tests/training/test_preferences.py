"""Losses of tuning: against enumeration, and against numbers worked out by hand."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_models import some_parameters
from small_policy import (
    NETWORK,
    NOVELTY,
    SEQUENCES,
    answers_of,
    batch_of,
    draw,
    log_probabilities,
)

from recexplore.training.preferences import (
    direct_preference_loss,
    leave_one_out,
    policy_gradient_loss,
)

REFERENCE = some_parameters(NETWORK, seed=5)


def test_every_return_is_compared_with_the_others():
    found = leave_one_out(jnp.array([[1.0, 2.0, 6.0], [0.0, 0.0, 3.0]]))
    np.testing.assert_allclose(
        found, [[1 - 4, 2 - 3.5, 6 - 1.5], [0 - 1.5, 0 - 1.5, 3 - 0]], atol=1e-6
    )


@pytest.mark.parametrize("kl_weight", [0.0, 0.7])
def test_the_gradient_is_unbiased(kl_weight):
    """A directional derivative of E[r] − β KL by enumeration, and its estimates from many draws."""
    history, count, draws = 2, 4000, 3  # the history that leaves nothing out
    rewards = jnp.array([2.0, -1.0, 0.5, 1.0, -3.0])
    batch = jax.tree.map(jnp.asarray, batch_of([history]))
    every = answers_of(SEQUENCES, batch=1)
    reference = log_probabilities(REFERENCE, batch, every, "constrained")

    many = jax.tree.map(lambda x: jnp.repeat(x, count, axis=0), batch)
    keys = jax.random.split(jax.random.key(0), count)
    answers = draw(NOVELTY.params, many, keys, draws, "constrained")
    of_answers = log_probabilities(REFERENCE, many, answers, "constrained")

    def objective(params, reference):
        own = log_probabilities(params, batch, every, "constrained")
        return jnp.sum(jnp.exp(own) * (rewards[None] - kl_weight * (own - reference)))

    def losses(params, batch, answers, reference):
        own = log_probabilities(params, batch, answers, "constrained")
        rows = jax.tree.map(lambda x: x[:, None], (own, reference, rewards[answers.clusters]))
        return jax.vmap(lambda *row: policy_gradient_loss(*row, kl_weight))(*rows)

    @functools.partial(jax.jit, static_argnums=0)
    def derivative(function, direction, params, *rest):
        return jax.jvp(lambda p: function(p, *rest), (params,), (direction,))[1]

    for seed in range(5):
        direction = some_parameters(NETWORK, seed=100 + seed)
        exact = derivative(objective, direction, NOVELTY.params, reference)
        estimates = derivative(losses, direction, NOVELTY.params, many, answers, of_answers)
        estimates = -np.asarray(estimates, np.float64)
        error = estimates.std() / math.sqrt(count)
        assert abs(estimates.mean() - exact) < 4 * error
        assert error < 0.2 * max(abs(float(exact)), 0.5)


def test_the_preference_loss_in_numbers():
    """Two prompts, pairs (0, 2) and (1, 3) each; one pair is rewarded alike."""
    own = jnp.log(jnp.array([[0.4, 0.1, 0.2, 0.3], [0.5, 0.2, 0.2, 0.1]]))
    reference = jnp.log(jnp.array([[0.2, 0.2, 0.4, 0.2], [0.25, 0.4, 0.2, 0.1]]))
    rewards = jnp.array([[1.0, 0.0, 0.0, 5.0], [0.0, 2.0, 0.0, 3.0]])
    loss, accuracy = direct_preference_loss(own, reference, rewards, 0.5)

    def term(preferred, rejected):  # −log σ(β log of the quotient of ratios)
        return math.log(1 + (preferred / rejected) ** -0.5)

    # 0.4/0.2 against 0.2/0.4; 0.3/0.2 against 0.1/0.2; a tie; 0.1/0.1 against 0.2/0.4.
    pairs = [term(2, 0.5), term(1.5, 0.5), term(1, 0.5)]
    assert float(loss) == pytest.approx(sum(pairs) / 3, rel=1e-5)
    assert float(accuracy) == 1.0


def test_a_preference_has_the_gradient_of_the_published_formula():
    """∇ = −β σ(−margin) (∇ log π(y) − ∇ log π(y'))  (Rafailov et al. 2023, section 4)."""
    own, reference = jnp.array([[-1.0, -2.0]]), jnp.array([[-1.5, -1.0]])
    rewards, beta = jnp.array([[0.0, 1.0]]), 0.3
    gradient = jax.grad(lambda x: direct_preference_loss(x, reference, rewards, beta)[0])(own)
    margin = beta * ((-2.0 + 1.0) - (-1.0 + 1.5))
    pull = beta / (1 + math.exp(margin))
    np.testing.assert_allclose(gradient, [[pull, -pull]], rtol=1e-5)


def test_nothing_is_learnt_where_no_pair_differs():
    same = jnp.zeros((2, 4))
    value, gradient = jax.value_and_grad(lambda x: direct_preference_loss(x, same, same, 0.1)[0])(
        same
    )
    assert float(value) == 0 and not np.any(gradient)
