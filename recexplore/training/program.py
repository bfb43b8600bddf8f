"""The compiled programs of a training run, with the shapes and shardings of all they take.

Shapes first, then shardings, then arrays: nothing is ever built in one place. The trainer runs
these programs; `aot` compiles the same ones for devices that aren't there.
"""

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import use_abstract_mesh
from jaxtyping import Array, Key

from recexplore.distributed import partitioning
from recexplore.errors import InputError
from recexplore.models import pretrained
from recexplore.models.lora import join, split
from recexplore.models.saved import fresh_variables
from recexplore.training.flops import count_flops
from recexplore.training.objectives import Sums
from recexplore.training.optimization import Optimization
from recexplore.training.train_step import State, evaluation_step, train_step

Objective = Callable[..., Sums]


class Variables(NamedTuple):
    """Of a training run.

    Attributes:
      state: what training changes.
      frozen: variables that it doesn't.
    """

    state: State
    frozen: Any


@dataclasses.dataclass(frozen=True)
class Program:
    """What is trained, how, and where.

    Attributes:
      model: the network.
      objective: one of recexplore.training.objectives.
      optimization: how long and how fast.
      mesh: the devices.
      rules: logical axis → mesh axis.
      measures: name → objective that the validation split is measured by.
    """

    model: nn.Module
    objective: Objective
    optimization: Optimization
    mesh: jax.sharding.Mesh
    rules: partitioning.Rules = partitioning.DEFAULT_RULES
    measures: tuple[tuple[str, Objective], ...] = ()

    def __post_init__(self):
        partitioning.check_shapes(self.state.params, self.state_shardings.params)
        partitioning.check_shapes(self.frozen, self.frozen_shardings)

    @property
    def everywhere(self) -> jax.NamedSharding:
        """The sharding of what every device has."""
        return jax.NamedSharding(self.mesh, jax.P())

    @property
    def on_batch(self) -> jax.NamedSharding:
        """The sharding of a batch."""
        return partitioning.batch_sharding(self.mesh)

    @functools.cached_property
    def boxed(self) -> Variables:
        """The shapes of all variables, boxed with their logical axes."""
        return jax.eval_shape(lambda: self._fresh(jax.random.key(0)))

    @functools.cached_property
    def state(self) -> State:
        """Shapes, dtypes and shardings of the state."""
        return partitioning.placed(nn.unbox(self.boxed.state), self.state_shardings)

    @functools.cached_property
    def frozen(self) -> Any:
        """Shapes, dtypes and shardings of the variables that aren't trained."""
        return partitioning.placed(nn.unbox(self.boxed.frozen), self.frozen_shardings)

    @functools.cached_property
    def state_shardings(self) -> State:
        """Where the state goes."""
        boxed = self.boxed.state
        found = partitioning.shardings_of(boxed, self.mesh, self.rules)
        shapes = nn.unbox(boxed)
        optimizer = partitioning.replicate_misfits(shapes.optimizer, found.optimizer)
        return found._replace(optimizer=optimizer)

    @functools.cached_property
    def frozen_shardings(self) -> Any:
        """Where the frozen variables go."""
        return partitioning.shardings_of(self.boxed.frozen, self.mesh, self.rules)

    def initialize(self, seed: int, folder: Path | None = None) -> State:
        """A fresh state, every device making its own part.

        Args:
          seed: of all that is drawn.
          folder: of a pretrained transformer; what it has is never drawn.
        """
        if folder is None or self.frozen:
            fresh = jax.jit(
                lambda: nn.unbox(self._fresh(jax.random.key(seed)).state),
                out_shardings=self.state_shardings,
            )
            return fresh()
        shardings = self.state_shardings.params
        read = self.read_transformer(folder, shardings)
        rest = _without(self.state.params, read)
        draw = jax.jit(
            lambda: _like(nn.unbox(fresh_variables(self.model, jax.random.key(seed))), rest),
            out_shardings=_like(shardings, rest),
        )
        around = jax.jit(
            lambda params: self._state_of(jax.random.key(seed), params),
            out_shardings=self.state_shardings,
            donate_argnums=0,
        )
        return around(join(draw(), read))

    def read_frozen(self, folder: Path | None) -> Any:
        """The frozen variables, from a pretrained transformer's folder.

        Raises:
          InputError: there are some, but no folder to read them from.
        """
        if not self.frozen:
            return {}
        if folder is None:
            raise InputError(
                f"transformer.TransformerConfig.lora_rank is {self.model.config.lora_rank}, but "
                "there is no pretrained transformer to add to: bind pipeline.train.pretrained to "
                "its folder, or set lora_rank to 0."
            )
        return self.read_transformer(folder, self.frozen_shardings)

    def read_transformer(self, folder: Path, shardings: Any) -> Any:
        """The pretrained transformer's parameters, placed where the network has them."""
        nested = "transformer" in shardings["params"]
        places = shardings["params"]["transformer"] if nested else shardings["params"]
        read = pretrained.load(folder, self.model.config, {"params": places})["params"]
        return {"params": {"transformer": read} if nested else read}

    def _fresh(self, key: Key[Array, ""]) -> Variables:
        trained, frozen = split(fresh_variables(self.model, key), self.model.config)
        return Variables(self._state_of(key, trained), frozen)

    def _state_of(self, key: Key[Array, ""], params: Any) -> State:
        average = None
        if self.optimization.average_decay:  # in float32: bfloat16 would round its small steps away
            average = jax.tree.map(lambda p: jnp.array(p, jnp.float32), params)
        optimizer = self.optimization.transformation().init(params)
        return State(jnp.int32(0), jax.random.key_data(key), params, average, optimizer)

    @functools.cached_property
    def step(self) -> Callable[..., tuple[State, dict[str, Array]]]:
        """`train_step` of (state, frozen, batch, constants), compiled when first called."""
        return jax.jit(
            self._in_place(
                functools.partial(
                    train_step,
                    model=self.model,
                    objective=self.objective,
                    optimizer=self.optimization.transformation(),
                    schedule=self.optimization.schedule(),
                    average_decay=self.optimization.average_decay,
                    microbatches=self.optimization.microbatches,
                )
            ),
            donate_argnums=0,
            in_shardings=(
                self.state_shardings,
                self.frozen_shardings,
                self.on_batch,
                self.everywhere,
            ),
            out_shardings=(self.state_shardings, self.everywhere),
        )

    @functools.cached_property
    def evaluations(self) -> dict[str, Callable[..., Sums]]:
        """For each measure `evaluation_step` of (variables, frozen, batch, constants)."""
        return {
            name: jax.jit(
                self._in_place(
                    functools.partial(evaluation_step, model=self.model, objective=measure)
                ),
                in_shardings=(
                    self.state_shardings.params,
                    self.frozen_shardings,
                    self.on_batch,
                    self.everywhere,
                ),
                out_shardings=self.everywhere,
            )
            for name, measure in self.measures
        }

    def _in_place(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """`function`, traced where the logical axes of its activations mean this mesh."""

        def traced(*arguments):
            with (
                use_abstract_mesh(self.mesh.abstract_mesh),
                nn.logical_axis_rules(list(self.rules)),
            ):
                return function(*arguments)

        return traced

    def flops(self, batch: Any, constants: Any) -> int:
        """Operations of the matrix products that one step needs, by the mathematics.

        What rematerialisation computes twice counts once.

        Args:
          batch: shapes of a whole batch.
          constants: shapes of what the objective needs besides.
        """
        config = dataclasses.replace(self.model.config, remat="none")
        model = self.model.clone(config=config)

        def loss(params, frozen, batch, constants):
            key = jax.random.key(0)  # training may need less than measuring, which has none
            return self.objective(model, join(params, frozen), constants, batch, key).loss

        return count_flops(jax.grad(loss), self.state.params, self.frozen, batch, constants)


def _without(tree: Any, other: Any) -> Any:
    """What of a nested dict isn't in another."""
    kept = {}
    for name, value in tree.items():
        if name not in other:
            kept[name] = value
        elif isinstance(value, dict) and (rest := _without(value, other[name])):
            kept[name] = rest
    return kept


def _like(tree: Any, other: Any) -> Any:
    """What of a nested dict is also in another."""
    if not isinstance(other, dict):
        return tree
    return {name: _like(tree[name], value) for name, value in other.items()}
