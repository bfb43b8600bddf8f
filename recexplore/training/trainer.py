"""One trainer for all models: mesh, shapes, shardings, state, restore, steps, evaluation, save."""

import dataclasses
import functools
import json
import logging
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from recexplore.distributed import partitioning
from recexplore.distributed.checkpoints import Checkpoints
from recexplore.errors import InputError
from recexplore.models.trie import Trie
from recexplore.training.train_step import State, evaluation_step, train_step

CURVES = "metrics.jsonl"
_log = logging.getLogger(__name__)


@runtime_checkable
class TrainingBatches(Protocol):
    """Endless batches whose position can be saved and restored exactly."""

    def __next__(self) -> dict[str, np.ndarray]: ...

    def position(self) -> np.ndarray: ...

    def move_to(self, position: np.ndarray) -> None: ...


@dataclasses.dataclass(frozen=True)
class TrainResult:
    """How training ended: steps taken; the best checkpoint's step, and by what value it is best."""

    steps: int
    best_step: int
    best_validation: float


@dataclasses.dataclass(frozen=True)
class Optimization:
    """AdamW with linear warm-up and cosine decay.

    Attributes:
      steps: of training.
      learning_rate: at its peak.
      warmup_share: part of the steps in which it rises from 0.
      weight_decay: on matrices; norms and biases have none.
      clip_norm: gradients are scaled down to this global norm.
      average_decay: of the moving average of the parameters.
    """

    steps: int
    learning_rate: float
    warmup_share: float = 0.05
    weight_decay: float = 0.1
    clip_norm: float = 1.0
    average_decay: float = 0.995

    def __post_init__(self):
        rules = {
            "steps": isinstance(self.steps, int) and self.steps >= 1,
            "learning_rate": self.learning_rate > 0,
            "warmup_share": 0 <= self.warmup_share < 1,
            "weight_decay": self.weight_decay >= 0,
            "clip_norm": self.clip_norm > 0,
            "average_decay": 0 <= self.average_decay < 1,
        }
        for name, ok in rules.items():
            if not ok:
                raise InputError(
                    f"trainer.Optimization.{name} is {getattr(self, name)!r}, which is out of range"
                    f"{' (a whole number from 1 on)' if name == 'steps' else ''}."
                )

    def schedule(self) -> optax.Schedule:
        """Learning rate by step."""
        warmup = int(self.steps * self.warmup_share)
        return optax.warmup_cosine_decay_schedule(
            0.0, self.learning_rate, warmup, max(self.steps, warmup + 1)
        )

    def optimizer(self) -> optax.GradientTransformation:
        """The optax chain."""

        return optax.chain(
            optax.clip_by_global_norm(self.clip_norm),
            optax.adamw(self.schedule(), weight_decay=self.weight_decay, mask=_decays),
        )


def train(
    folder: Path,
    model: nn.Module,
    objective: Callable[..., Any],
    trie: Trie,
    train_batches: TrainingBatches,
    validation_batches: Sequence[dict[str, np.ndarray]],
    progress: Callable[..., None],
    *,
    optimization: Optimization,
    choose_by: Callable[..., Any] | None = None,
    evaluate_every: int = 100,
    log_every: int = 20,
    seed: int = 0,
    make_mesh: Callable[[], jax.sharding.Mesh] = partitioning.make_mesh,
    rules: partitioning.Rules = partitioning.DEFAULT_RULES,
) -> TrainResult:
    """Trains a model, or goes on where an interrupted run in the same folder stopped.

    Args:
      folder: gets checkpoints/, metrics.jsonl and TensorBoard events.
      model: the network.
      objective: one of recexplore.training.objectives.
      trie: the descriptions.
      train_batches: endless; of equal shapes.
      validation_batches: the whole validation split.
      progress: called as progress(step, steps, **figures).
      optimization: how long and how fast.
      choose_by: what the best checkpoint has least of on the validation split: another objective;
        None: the one trained for.
      evaluate_every: steps between two evaluations, each followed by a checkpoint.
      log_every: steps between two lines of metrics.jsonl.
      seed: of initialisation and dropout.
      make_mesh: the devices.
      rules: logical axis → mesh axis.

    Returns:
      Where the best checkpoint is.

    Raises:
      InputError: a batch doesn't divide by the mesh, or the loss isn't finite any more.
    """
    for name, value in (("evaluate_every", evaluate_every), ("log_every", log_every)):
        if not isinstance(value, int) or value < 1:
            raise InputError(
                f"trainer.train.{name} is {value!r}; it must be a whole number from 1 on."
            )
    mesh = make_mesh()
    batch_size = len(validation_batches[0]["tokens"])
    partitioning.check_batch_size(batch_size, mesh)
    key = jax.random.key(seed)
    steps = optimization.steps

    # Shapes first, then shardings, then arrays: nothing is ever built in one place.
    optimizer = optimization.optimizer()
    some_tokens = validation_batches[0]["tokens"][:1]
    initialize = functools.partial(_initial_state, model, optimizer, some_tokens)
    abstract = jax.eval_shape(initialize, key)
    shardings = partitioning.shardings_of(abstract, mesh, rules)
    partitioning.check_shapes(nn.unbox(abstract.params), shardings.params)
    everywhere = jax.NamedSharding(mesh, jax.P())
    on_batch = partitioning.batch_sharding(mesh)
    trie = jax.device_put(trie, everywhere)
    key = jax.device_put(key, everywhere)
    one_step = jax.jit(
        functools.partial(
            train_step,
            model=model,
            objective=objective,
            optimizer=optimizer,
            schedule=optimization.schedule(),
            average_decay=optimization.average_decay,
        ),
        donate_argnums=0,
        in_shardings=(shardings, on_batch, everywhere, everywhere),
        out_shardings=(shardings, everywhere),
    )
    measures = {"validation_loss": objective}
    if choose_by is not None:
        measures["validation_choice"] = choose_by
    evaluations = {
        name: jax.jit(
            functools.partial(evaluation_step, model=model, objective=measure),
            in_shardings=(shardings.params, on_batch, everywhere),
            out_shardings=everywhere,
        )
        for name, measure in measures.items()
    }

    def on_validation(params) -> dict[str, float]:
        found = {}
        for name, evaluate_batch in evaluations.items():
            parts = [evaluate_batch(params, put(batch), trie) for batch in validation_batches]
            totals, weights, _ = zip(*jax.device_get(parts), strict=True)
            found[name] = float(sum(totals) / max(sum(weights), 1e-9))
        return found

    def put(batch):
        return jax.device_put(batch, on_batch)

    checkpoints = Checkpoints(folder / "checkpoints")
    unboxed = nn.unbox(abstract)
    targets = jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), unboxed, shardings
    )
    restored = checkpoints.latest(targets)
    if restored is None:
        start = 0
        state = jax.jit(lambda k: nn.unbox(initialize(k)), out_shardings=shardings)(key)
    else:
        start, state = restored.step, restored.state
        train_batches.move_to(restored.position)
    curves = _Curves(folder, start)
    began, num_tokens, shown = time.monotonic(), 0, {}

    with jax.transfer_guard("disallow"):
        for step in range(start + 1, steps + 1):
            batch = next(train_batches)
            num_tokens += int(batch["lengths"].sum())
            state, metrics = one_step(state, put(batch), trie, key)
            evaluate = step % evaluate_every == 0 or step == steps
            if evaluate or step % log_every == 0:
                figures = {name: float(x) for name, x in jax.device_get(metrics).items()}
                _check_finite(figures["loss"], step, figures, batch)
                seconds = time.monotonic() - began
                curves.write(step, {**figures, "tokens_per_second": num_tokens / seconds})
                began, num_tokens = time.monotonic(), 0
            if evaluate:
                shown = on_validation(state.average)
                for value in shown.values():
                    _check_finite(value, step, figures, batch)
                curves.write(step, shown)
                *_, value = shown.values()
                checkpoints.save(step, state._asdict(), train_batches.position(), value)
            progress(step, steps, **shown)
    curves.close()
    best_step, best_validation = checkpoints.best()
    checkpoints.close()
    return TrainResult(steps, best_step, best_validation)


def _initial_state(
    model: nn.Module, optimizer: optax.GradientTransformation, tokens: np.ndarray, key: jax.Array
) -> State:
    """A fresh state, its parameters boxed with their logical axes."""
    params = model.init(key, jnp.asarray(tokens), method="prefill")
    return State(jnp.int32(0), params, jax.tree.map(jnp.copy, params), optimizer.init(params))


def _decays(params: Any) -> Any:
    """Which parameters weight decay acts on: all but norms' scales and biases."""

    def decays(path: tuple, _: Any) -> bool:
        names = [getattr(key, "key", getattr(key, "name", "")) for key in path]
        return not {"scale", "bias"} & set(names)

    return jax.tree_util.tree_map_with_path(decays, params)


def _check_finite(loss: float, step: int, figures: dict[str, float], batch) -> None:
    if not math.isfinite(loss):
        ids = ", ".join(str(i) for i in batch["example_id"][:16].tolist())
        raise InputError(
            f"The loss is {loss} at step {step} (learning rate {figures['learning_rate']:.3g}; "
            f"examples of the batch begin with {ids}). The last good checkpoint is kept. Try a "
            "lower trainer.Optimization.learning_rate."
        )


class _Curves:
    """metrics.jsonl and TensorBoard events.

    What an interrupted run wrote past its checkpoint is taken out of metrics.jsonl; TensorBoard
    itself hides events that were written again.
    """

    def __init__(self, folder: Path, start: int):
        from clu import metric_writers  # brings TensorFlow, which only training needs

        path = folder / CURVES
        kept = []
        if path.exists():
            for line in path.read_text().splitlines():
                with_step = _parse(line)
                if with_step is not None and with_step["step"] <= start:
                    kept.append(line)
        whole = path.with_suffix(".tmp")
        whole.write_text("".join(f"{line}\n" for line in kept))
        whole.replace(path)
        self._file = open(path, "a")
        self._writer = metric_writers.SummaryWriter(str(folder))

    def write(self, step: int, figures: dict[str, float]) -> None:
        self._file.write(json.dumps({"step": step, **figures}) + "\n")
        self._file.flush()
        self._writer.write_scalars(step, figures)

    def close(self) -> None:
        self._file.close()
        self._writer.close()


def _parse(line: str) -> dict | None:
    try:
        return json.loads(line)
    except json.JSONDecodeError:  # a line that a kill cut short
        return None
