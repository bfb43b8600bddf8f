"""Checkpoints of a training run: parameters, optimizer, step, data position and PRNG key together.

Orbax writes each in the background under a temporary name and renames it when it is whole; all
processes write their own shards. Then, still in the background, digests of its files are added, by
which damage is noticed before anything is restored. Kept are the latest, to go on from, and the
best on the validation split, to use.
"""

import contextlib
import errno
import logging
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import jax
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers

from recexplore.distributed import digests, processes
from recexplore.errors import InputError

_log = logging.getLogger(__name__)
_METRIC = "validation"
_METRICS = "metrics/metrics"  # where Orbax writes it
_UNFINISHED = "orbax-checkpoint-tmp"
_PASSING = ("RESOURCE_EXHAUSTED", "PERMISSION_DENIED", "UNAVAILABLE", "DEADLINE_EXCEEDED")
_USED = ("average", "params")  # entries of a state that are used, the first that is there


class Restored(NamedTuple):
    """What a checkpoint held: the step it was made after, the state, and the data position."""

    step: int
    state: Any
    position: dict[str, int]


class Checkpoints:
    """The checkpoints of one training run, in `folder`.

    Args:
      folder: made if it isn't there.
      keep_last: how many of the latest are kept.
      keep_best: how many of the best are kept besides.
    """

    def __init__(self, folder: Path, keep_last: int = 1, keep_best: int = 1):
        self._folder = Path(folder).resolve()
        self._clear_the_way()
        self._manager = ocp.CheckpointManager(
            self._folder,
            options=ocp.CheckpointManagerOptions(
                preservation_policy=checkpoint_managers.AnyPreservationPolicy(
                    [
                        checkpoint_managers.LatestN(n=keep_last),
                        checkpoint_managers.BestN(
                            get_metric_fn=_value,
                            reverse=True,
                            n=keep_best,
                            keep_checkpoints_without_metrics=False,
                        ),
                    ]
                ),
                best_fn=_value,
                best_mode="min",
                enable_async_checkpointing=True,
                cleanup_tmp_directories=True,
            ),
        )
        self._background = ThreadPoolExecutor(1, "digests")
        self._digested: Future[None] | None = None

    def _clear_the_way(self) -> None:
        """Warns of what Orbax will remove, and removes what it couldn't read.

        It reads what all checkpoints are compared by at once, and fails where one is damaged. That
        one will be left out as a checkpoint without it.
        """
        for path in sorted(self._folder.glob(f"*{_UNFINISHED}*")):
            _log.warning("Checkpoint %s was never finished and is left out.", path)
        if processes.is_first():
            for path, _ in _of_damaged_metrics(self._folder):
                (path / _METRICS).unlink(missing_ok=True)
        processes.meet()

    def save(
        self, step: int, state: Any, position: dict[str, int], validation: float | None
    ) -> None:
        """Begins to save a checkpoint; it is written while training goes on.

        Args:
          step: steps taken.
          state: a tree of arrays.
          position: of the training data.
          validation: the better the lower; None for one that is there to go on from only.
        """
        self._wait_for_digests()  # they must lie there before their checkpoint may be removed
        if step in self._manager.all_steps():  # a damaged one that `latest` left out
            self._manager.delete(step)
        self._manager.save(
            step,
            args=ocp.args.Composite(
                state=ocp.args.StandardSave(state), position=ocp.args.JsonSave(position)
            ),
            metrics=None if validation is None else {_METRIC: validation},
            force=True,
        )
        self._digested = self._background.submit(self._digest, step)

    def _digest(self, step: int) -> None:
        """Adds digests to a checkpoint once it is whole."""
        try:
            self._manager.wait_until_finished()
        except Exception:  # every thread that waits is told once, so the main one will be
            return
        digests.write(self._folder / str(step), jax.process_index())

    def _wait_for_digests(self) -> None:
        if self._digested is not None:
            self._digested.result()

    def latest(self, abstract: Any) -> Restored | None:
        """The newest checkpoint that can be read, or None; damaged ones are named in a warning.

        Args:
          abstract: the state's shapes and shardings (jax.ShapeDtypeStruct).
        """
        steps = sorted(self._manager.all_steps(), reverse=True)
        for step in steps:
            if self._all_can_read(step, self._is_whole(step)):
                restored = self._restore(step, abstract)
                if self._all_can_read(step, restored is not None):
                    return restored
        if steps:
            _log.warning("No checkpoint in %s can be read: training begins anew.", self._folder)
        return None

    def _all_can_read(self, step: int, this_one: bool) -> bool:
        """Whether no process has found a checkpoint damaged."""
        agreed = processes.all_agree(this_one)
        if this_one and not agreed:
            _log.warning("Checkpoint %s/%d: another process can't read it.", self._folder, step)
        return agreed

    def _is_whole(self, step: int) -> bool:
        """Whether this process's part of a checkpoint's files is as it was written."""
        folder = self._folder / str(step)
        damage = digests.find_damage(folder, jax.process_index(), jax.process_count())
        if damage:
            self._warn_of_damage(step, damage)
        return not damage

    def _warn_of_damage(self, step: int, reason: str) -> None:
        _log.warning("Checkpoint %s/%d is damaged and left out (%s).", self._folder, step, reason)

    def _restore(self, step: int, abstract: Any) -> Restored | None:
        """A checkpoint, or None if it is damaged.

        Read with Orbax's handlers, not its manager, in which a process that can read everything
        would wait for one that can't.
        """
        folder = self._folder / str(step)
        try:
            state = ocp.StandardCheckpointHandler().restore(
                folder / "state", args=ocp.args.StandardRestore(abstract)
            )
            position = ocp.JsonCheckpointHandler().restore(folder / "position")
            return Restored(step, state, position)
        except Exception as error:  # TensorStore has kinds of its own
            if _is_the_machine(error):
                raise
            self._warn_of_damage(step, str(error).splitlines()[0])
            return None

    def best(self) -> tuple[int, float]:
        """Step of the best checkpoint, and what it was saved with as `validation`.

        Raises:
          InputError: there is none.
        """
        self._manager.wait_until_finished()
        return _best(self._manager)

    def close(self) -> None:
        """Waits for what is being written."""
        try:
            self._wait_for_digests()
        finally:
            self._background.shutdown()
            self._manager.close()


def _is_the_machine(error: Exception) -> bool:
    """Whether a file can't be read for the machine's sake, such as too many open files."""
    if isinstance(error, (MemoryError, jax.errors.JaxRuntimeError)):
        return True
    if getattr(error, "errno", None) not in (None, errno.ENOENT):
        return True
    return any(word in str(error) for word in _PASSING)


def _value(metrics: dict[str, float]) -> float:
    return metrics[_METRIC]


def _of_damaged_metrics(folder: Path) -> list[tuple[Path, str]]:
    """Checkpoints that can't be compared with others, and why."""
    steps = sorted(path for path in folder.glob("*") if path.name.isdecimal())
    damages = [(path, digests.find_damage(path, under=_METRICS)) for path in steps]
    return [(path, damage) for path, damage in damages if damage]


def _best(manager: ocp.CheckpointManager) -> tuple[int, float]:
    metrics = {step: manager.metrics(step) for step in manager.all_steps()}
    values = {step: found[_METRIC] for step, found in metrics.items() if found}
    if not values:
        raise InputError(f"{manager.directory} holds no checkpoint. Run `recexplore train` first.")
    step = min(values, key=lambda step: (values[step], step))
    return step, values[step]


def best_step(folder: Path) -> int:
    """Steps taken before the best checkpoint.

    Raises:
      InputError: there is none.
    """
    reading = ocp.CheckpointManagerOptions(read_only=True, best_fn=_value)
    with ocp.CheckpointManager(Path(folder).resolve(), options=reading) as manager:
        return _best(manager)[0]


def load_best(folder: Path, abstract: Any) -> Any:
    """The variables to use, of the best checkpoint: their average, where one was kept.

    Args:
      folder: the run's checkpoints.
      abstract: shapes, dtypes and shardings of the variables.

    Raises:
      InputError: there is no checkpoint, it is damaged, or its shapes are others.
    """
    folder = Path(folder).resolve()
    if not folder.is_dir():
        raise InputError(f"{folder} holds no checkpoint. Run `recexplore train` first.")
    with _quiet():
        return _load_best(folder, abstract)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without Orbax's warnings that what is only to be read can't be written."""
    logger = logging.getLogger("absl")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)


def _damaged(checkpoint: Path, damage: str) -> InputError:
    return InputError(
        f"{checkpoint} is damaged ({damage}). Remove {checkpoint.parents[1]} and run `recexplore "
        "train` again."
    )


def _load_best(folder: Path, abstract: Any) -> Any:
    for path, damage in _of_damaged_metrics(folder):
        raise _damaged(path, damage)
    path = folder / str(best_step(folder)) / "state"
    if damage := digests.find_damage(path.parent):
        raise _damaged(path.parent, damage)
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
        arguments = ocp.checkpoint_utils.construct_restore_args(abstract)
        try:
            name = next(n for n in _USED if n in reader.metadata(path).item_metadata.tree)
            state = reader.restore(
                path,
                args=ocp.args.PyTreeRestore(
                    item={name: abstract}, restore_args={name: arguments}, partial_restore=True
                ),
            )
        except Exception as error:  # TensorStore has kinds of its own
            raise InputError(
                f"{path} is damaged, or doesn't fit the model's configuration: "
                f"{str(error).splitlines()[0][:200]} Remove {folder.parent} and run "
                "`recexplore train` again."
            ) from error
    found = state[name]
    shapes = jax.tree.map(lambda x, y: x.shape == y.shape, found, abstract)
    if not all(jax.tree.leaves(shapes)):
        raise InputError(f"{path} holds parameters of other shapes than the model's.")
    return found
