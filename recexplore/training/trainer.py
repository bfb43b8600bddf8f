"""One trainer for all models: mesh, programs, data, restore, steps, evaluation, save."""

import collections
import contextlib
import dataclasses
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import flax.linen as nn
import jax
import numpy as np

from recexplore.distributed import partitioning
from recexplore.distributed.checkpoints import Checkpoints
from recexplore.distributed.devices import peak_flops
from recexplore.distributed.processes import PreemptionNotice
from recexplore.errors import InputError, Preempted, SharedError
from recexplore.models.saved import CHECKPOINTS
from recexplore.training import model_info
from recexplore.training.optimization import Optimization
from recexplore.training.program import Objective, Program
from recexplore.training.telemetry import Curves, Meter, Profile
from recexplore.training.train_step import State

Batch = dict[str, np.ndarray]
_IDS_SHOWN = 64  # examples that an error names
_CHECKED_LATER = 2  # steps that run ahead of the check that their loss is a number


@runtime_checkable
class TrainingBatches(Protocol):
    """Endless batches whose position can be saved and restored exactly."""

    def __next__(self) -> Batch: ...

    def position(self) -> dict[str, int]: ...

    def move_to(self, position: dict[str, int]) -> None: ...


@runtime_checkable
class TrainingData(Protocol):
    """What to train on. Every process reads its own rows of the same batches.

    Attributes:
      batch_size: rows of a whole batch.
    """

    batch_size: int

    def training(self, rows: np.ndarray) -> TrainingBatches: ...

    def validation(self, rows: np.ndarray) -> Sequence[Batch]: ...


@dataclasses.dataclass(frozen=True)
class TrainResult:
    """How training ended: steps taken; the best checkpoint's step, and by what value it is best."""

    steps: int
    best_step: int
    best_validation: float


def train(
    folder: Path,
    model: nn.Module,
    objective: Objective,
    constants: Any,
    data: TrainingData,
    progress: Callable[..., None],
    *,
    optimization: Optimization,
    choose_by: Objective | None = None,
    pretrained: Path | None = None,
    evaluate_every: int = 100,
    log_every: int = 20,
    keep_last: int = 2,
    keep_best: int = 1,
    profile_from: int = 0,
    profile_steps: int = 5,
    seed: int = 0,
    make_mesh: Callable[[], jax.sharding.Mesh] = partitioning.make_mesh,
    rules: partitioning.Rules = partitioning.DEFAULT_RULES,
) -> TrainResult:
    """Trains a model, or goes on where an interrupted run in the same folder stopped.

    Args:
      folder: gets checkpoints/, metrics.jsonl, TensorBoard events and model-info.txt.
      model: the network.
      objective: one of recexplore.training.objectives.
      constants: what the objective needs besides model and batch, the same in every step: the trie
        of descriptions, or the catalogue of items.
      data: of training and validation; all batches have equal shapes.
      progress: called as progress(step, steps, **figures).
      optimization: how long and how fast.
      choose_by: what the best checkpoint has least of on the validation split: another objective;
        None: the one trained for.
      pretrained: folder of the transformer to start from; None: from nothing.
      evaluate_every: steps between two evaluations, each followed by a checkpoint.
      log_every: steps between two lines of metrics.jsonl.
      keep_last: how many of the latest checkpoints are kept.
      keep_best: how many of the best are kept besides.
      profile_from: step from which a profiler trace is taken; 0 for none.
      profile_steps: steps in it.
      seed: of initialisation and dropout.
      make_mesh: the devices.
      rules: logical axis → mesh axis.

    Returns:
      Where the best checkpoint is.

    Raises:
      InputError: a batch doesn't divide by the mesh, or the loss isn't finite any more.
      Preempted: the machine is to be taken away; a checkpoint is saved.
    """
    _check_counts(
        evaluate_every=evaluate_every,
        log_every=log_every,
        keep_last=keep_last,
        keep_best=keep_best,
        profile_steps=profile_steps,
    )
    if type(profile_from) is not int or not 0 <= profile_from <= optimization.steps:
        raise InputError(
            f"trainer.train.profile_from is {profile_from!r}; it must be a step of the "
            f"{optimization.steps} there are, or 0 for no trace."
        )
    mesh = make_mesh()
    partitioning.check_batch_size(data.batch_size, mesh, optimization.microbatches)
    chosen = "choice" if choose_by else "loss"
    measures = {"loss": objective} | ({chosen: choose_by} if choose_by else {})
    program = Program(model, objective, optimization, mesh, rules, tuple(measures.items()))
    rows = partitioning.local_rows(data.batch_size, mesh)
    batches, validation = data.training(rows), data.validation(rows)
    constants = jax.device_put(constants, program.everywhere)
    frozen = program.read_frozen(pretrained)
    steps = optimization.steps
    if jax.process_index() == 0:
        model_info.write(folder, program)

    def put(batch: Batch) -> dict[str, jax.Array]:
        return partitioning.put_batch(batch, data.batch_size, mesh)

    with contextlib.ExitStack() as stack:
        notice = stack.enter_context(PreemptionNotice())  # first in, last out: it guards the saving
        checkpoints = Checkpoints(folder / CHECKPOINTS, keep_last, keep_best)
        stack.enter_context(contextlib.closing(checkpoints))
        restored = checkpoints.latest(program.state.saved)
        if restored is None:
            start, state = 0, program.initialize(seed, pretrained)
        else:
            start, state = restored.step, State(**{"average": None} | restored.state)
            batches.move_to(restored.position)
        curves = stack.enter_context(contextlib.closing(Curves(folder, start)))
        profile = Profile(folder, profile_from, profile_steps)
        stack.enter_context(contextlib.closing(profile))
        stack.enter_context(jax.transfer_guard("disallow"))
        meter, recent, shown = None, _Recent(start), {}
        for step in range(start + 1, steps + 1):
            profile.before(step)
            asked = time.perf_counter()
            batch = next(batches)
            waited = time.perf_counter() - asked
            state, metrics = program.step(state, frozen, put(batch), constants)
            recent.add(step, metrics, batch)
            profile.after(step, metrics["loss"])
            if meter is None:  # the first step compiles, and says nothing about speed
                jax.block_until_ready(metrics)
                meter = _make_meter(program, batch, data.batch_size, constants)
            else:
                meter.count(batch, waited)
            evaluate = step % evaluate_every == 0 or step == steps
            if evaluate or step % log_every == 0:
                figures = recent.check_all()
                curves.write(step, figures | meter.read())
            stop = notice.came()
            if evaluate:
                shown = _validate(program, state, frozen, map(put, validation), constants)
                recent.check_validation(step, shown)
                curves.write(step, shown)
            if evaluate or stop:
                value = shown[f"validation_{chosen}"] if evaluate else None
                recent.check_all()
                checkpoints.save(step, state.saved, batches.position(), value)
                recent.saved_step = step
                meter.restart()
            progress(step, steps, **shown)
            if stop and step < steps:
                raise Preempted(f"Training stopped after step {step} of {steps} and is saved.")
        return TrainResult(steps, *checkpoints.best())


def _check_counts(**counts: int) -> None:
    for name, value in counts.items():
        if type(value) is not int or value < 1:
            raise InputError(
                f"trainer.train.{name} is {value!r}; it must be a whole number from 1 on."
            )


def _make_meter(program: Program, batch: Batch, batch_size: int, constants: Any) -> Meter:
    whole = {
        name: jax.ShapeDtypeStruct((batch_size, *rows.shape[1:]), rows.dtype)
        for name, rows in batch.items()
    }
    devices = list(program.mesh.devices.flat)
    times = batch_size / len(batch["tokens"])
    return Meter(program.flops(whole, constants), peak_flops(devices), len(devices), times)


def _validate(program: Program, state: State, frozen, batches, constants: Any) -> dict[str, float]:
    """The measures over the whole validation split."""
    parts: dict[str, list] = {name: [] for name in program.evaluations}
    for batch in batches:
        for name, evaluate in program.evaluations.items():
            parts[name].append(evaluate(state.used, frozen, batch, constants))
    found = {}
    for name, sums in parts.items():
        columns = zip(*jax.device_get(sums), strict=True)
        total, weight, correct = (np.sum(column, dtype=np.float64) for column in columns)
        if name == "loss":
            found["validation_accuracy"] = float(correct / max(weight, 1e-9))
        found[f"validation_{name}"] = float(total / max(weight, 1e-9))
    return found


class _Recent:
    """The last steps, whose losses haven't been looked at.

    Looking at a step's loss at once would keep the devices waiting, so it is done two steps later.

    Attributes:
      saved_step: of the latest checkpoint; 0 for none.
    """

    def __init__(self, saved_step: int) -> None:
        self.saved_step = saved_step
        self._waiting: collections.deque = collections.deque()
        self._last: dict[str, float] = {}

    def add(self, step: int, metrics: dict[str, jax.Array], batch: Batch) -> None:
        self._waiting.append((step, metrics, batch["example_id"]))
        while len(self._waiting) > _CHECKED_LATER:
            self._check_oldest()

    def check_all(self) -> dict[str, float]:
        """Checks all steps; returns the figures of the last one."""
        while self._waiting:
            self._check_oldest()
        return dict(self._last)

    def check_validation(self, step: int, figures: dict[str, float]) -> None:
        """Checks figures of the validation split, taken after a step."""
        for name, value in figures.items():
            self._check(step, f"{name}, over the whole split,", value, [])

    def _check_oldest(self) -> None:
        step, metrics, ids = self._waiting.popleft()
        self._last = {name: float(value) for name, value in jax.device_get(metrics).items()}
        real = [int(i) for i in ids.flat if i >= 0]
        self._check(step, "The loss", self._last["loss"], real)
        self._check(step, "The gradient's norm", self._last["gradient_norm"], real)

    def _check(self, step: int, what: str, value: float, ids: list[int]) -> None:
        if math.isfinite(value):
            return
        more, shown = len(ids) - _IDS_SHOWN, ", ".join(map(str, ids[:_IDS_SHOWN]))
        whose = "the batch's" if jax.process_count() == 1 else "this process's"
        examples = f"; {whose} examples are {shown}{f' and {more} more' if more > 0 else ''}"
        kept = "There is no checkpoint yet"
        if self.saved_step:
            kept = f"The checkpoint of step {self.saved_step} is kept"
        raise SharedError(
            f"{what} is {value} at step {step} (learning rate {self._last['learning_rate']:.3g}"
            f"{examples if ids else ''}). {kept}. Try a lower "
            "optimization.Optimization.learning_rate."
        )
