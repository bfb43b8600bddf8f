"""One step of training: pure functions of state and batch."""

from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from recexplore.models.trie import Trie
from recexplore.training.objectives import Sums


class State(NamedTuple):
    """All that training changes.

    Attributes:
      step: steps taken.
      params: the parameters being trained.
      average: their exponential moving average, which is evaluated and used.
      optimizer: optax's state.
    """

    step: Int[Array, ""]
    params: Any
    average: Any
    optimizer: Any


def train_step(
    state: State,
    batch: dict[str, Array],
    trie: Trie,
    key: Array,
    *,
    model: nn.Module,
    objective: Any,
    optimizer: optax.GradientTransformation,
    schedule: optax.Schedule,
    average_decay: float,
) -> tuple[State, dict[str, Float[Array, ""]]]:
    """Takes one step.

    Args:
      state: before.
      batch: B examples.
      trie: the descriptions.
      key: of the run; dropout is drawn from fold_in(key, step).
      model: the network.
      objective: one of recexplore.training.objectives.
      optimizer: optax chain.
      schedule: learning rate by step, as the optimizer has it.
      average_decay: of the moving average; it grows from 0 so that early steps don't linger:
        min(average_decay, (1 + step) / (10 + step)).

    Returns:
      The state after it, and the loss, the gradient norm and the learning rate.
    """
    dropout_key = jax.random.fold_in(key, state.step)

    def mean_loss(params):
        total, weight, _ = objective(model, params, trie, batch, dropout_key)
        return total / jnp.maximum(weight, 1e-9)

    loss, gradients = jax.value_and_grad(mean_loss)(state.params)
    updates, optimizer_state = optimizer.update(gradients, state.optimizer, state.params)
    params = optax.apply_updates(state.params, updates)
    step = state.step.astype(jnp.float32)
    decay = jnp.minimum(average_decay, (1 + step) / (10 + step))
    average = jax.tree.map(lambda a, p: decay * a + (1 - decay) * p, state.average, params)
    metrics = {
        "loss": loss,
        "gradient_norm": optax.global_norm(gradients),
        "learning_rate": jnp.asarray(schedule(state.step), jnp.float32),
    }
    return State(state.step + 1, params, average, optimizer_state), metrics


def evaluation_step(
    params: Any, batch: dict[str, Array], trie: Trie, *, model: nn.Module, objective: Any
) -> Sums:
    """What a batch adds up to, without dropout."""
    return objective(model, params, trie, batch)
