"""One step of training: pure functions of state and batch."""

from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int, UInt32

from recexplore.models.lora import join
from recexplore.training.objectives import Sums

Batch = dict[str, Array]


class State(NamedTuple):
    """All that training changes, and the key that its randomness comes from.

    Attributes:
      step: steps taken.
      key: of the run, as data; dropout is drawn from fold_in(key, step).
      params: the variables being trained.
      average: their exponential moving average, which is evaluated and used; None: they are
        themselves.
      optimizer: optax's state.
    """

    step: Int[Array, ""]
    key: UInt32[Array, "..."]
    params: Any
    average: Any
    optimizer: Any

    @property
    def used(self) -> Any:
        """The variables that are evaluated and used."""
        return self.params if self.average is None else self.average

    @property
    def saved(self) -> dict[str, Any]:
        """What goes into a checkpoint."""
        return {name: value for name, value in self._asdict().items() if value is not None}


def train_step(
    state: State,
    frozen: Any,
    batch: Batch,
    constants: Any,
    *,
    model: nn.Module,
    objective: Callable[..., Sums],
    optimizer: optax.GradientTransformation,
    schedule: optax.Schedule,
    average_decay: float,
    microbatches: int = 1,
) -> tuple[State, dict[str, Float[Array, ""]]]:
    """Takes one step.

    Args:
      state: before.
      frozen: the variables that aren't trained, see `models.lora`.
      batch: B examples.
      constants: what the objective needs besides, the same in every step: the descriptions' trie,
        or the catalogue of items.
      model: the network.
      objective: one of recexplore.training.objectives.
      optimizer: optax chain.
      schedule: learning rate by step, as the optimizer has it.
      average_decay: of the moving average; it grows from 0 so that early steps don't linger:
        min(average_decay, (1 + step) / (10 + step)).
      microbatches: parts that the batch is read in; the result is the whole batch's.

    Returns:
      The state after it; the loss, the accuracy, the gradient's norm and the learning rate.
    """
    key = jax.random.fold_in(jax.random.wrap_key_data(state.key), state.step)
    gradients_of = _gradients_by(model, objective, constants, frozen)
    if microbatches == 1:
        sums, gradients = gradients_of(state.params, batch, key)
    else:
        sums, gradients = _accumulate(gradients_of, state.params, batch, key, microbatches)
    weight = jnp.maximum(sums.weight, 1e-9)
    gradients = jax.tree.map(lambda g, p: (g / weight).astype(p.dtype), gradients, state.params)
    updates, optimizer_state = optimizer.update(gradients, state.optimizer, state.params)
    params = optax.apply_updates(state.params, updates)
    average = state.average
    if average is not None:
        step = state.step.astype(jnp.float32)
        decay = jnp.minimum(average_decay, (1 + step) / (10 + step))
        average = jax.tree.map(lambda a, p: decay * a + (1 - decay) * p, average, params)
    metrics = {
        "loss": sums.loss / weight,
        "accuracy": sums.correct / weight,
        "gradient_norm": optax.tree.norm(gradients),
        "learning_rate": jnp.asarray(schedule(state.step), jnp.float32),
    }
    return State(state.step + 1, state.key, params, average, optimizer_state), metrics


def _gradients_by(
    model: nn.Module, objective: Callable[..., Sums], constants: Any, frozen: Any
) -> Callable[[Any, Batch, Array], tuple[Sums, Any]]:
    """A function (trained variables, batch, key) → (sums, gradient of the sum of losses)."""

    def loss(params, batch, key):
        sums = objective(model, join(params, frozen), constants, batch, key)
        return sums.loss, sums

    def gradients_of(params, batch, key):
        gradients, sums = jax.grad(loss, has_aux=True)(params, batch, key)
        return sums, gradients

    return gradients_of


def _accumulate(gradients_of, params, batch: Batch, key, parts: int) -> tuple[Sums, Any]:
    """Sums and gradients over parts of a batch, one after the other.

    Part i has rows i, parts + i, 2 · parts + i, …, so that each device keeps its own rows.
    """

    def deal(x):
        return x.reshape(x.shape[0] // parts, parts, *x.shape[1:]).swapaxes(0, 1)

    def add(total, part):
        index, batch = part
        found = gradients_of(params, batch, jax.random.fold_in(key, index))
        return jax.tree.map(jnp.add, total, found), None

    dealt = jax.tree.map(deal, batch)
    first = jax.tree.map(lambda x: x[0], dealt)
    zeros = jax.tree.map(
        lambda x: jnp.zeros(x.shape, jnp.float32), jax.eval_shape(gradients_of, params, first, key)
    )
    return jax.lax.scan(add, zeros, (jnp.arange(parts), dealt))[0]


def evaluation_step(
    params: Any,
    frozen: Any,
    batch: Batch,
    constants: Any,
    *,
    model: nn.Module,
    objective: Callable[..., Sums],
) -> Sums:
    """Sums of a batch, without dropout."""
    return objective(model, join(params, frozen), constants, batch)
