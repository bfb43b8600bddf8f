"""Checkpoints of a training run: parameters, optimizer, step and data position together.

Orbax writes each under a temporary name and renames it when it is whole. Kept are the latest, to go
on from, and the best on the validation split, to use.
"""

import base64
import errno
import logging
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers

from recexplore.errors import InputError

_log = logging.getLogger(__name__)
_METRIC = "validation"


class Restored(NamedTuple):
    """What a checkpoint held: the step it was made after, the state, and the data position."""

    step: int
    state: Any
    position: np.ndarray


class Checkpoints:
    """The checkpoints of one training run, in `folder`.

    Args:
      folder: made if it isn't there.
    """

    def __init__(self, folder: Path):
        keep = checkpoint_managers.AnyPreservationPolicy(
            [
                checkpoint_managers.LatestN(n=1),
                checkpoint_managers.BestN(
                    get_metric_fn=lambda metrics: metrics[_METRIC], reverse=True, n=1
                ),
            ]
        )
        self._folder = Path(folder).resolve()
        self._manager = ocp.CheckpointManager(
            self._folder,
            options=ocp.CheckpointManagerOptions(
                preservation_policy=keep,
                best_fn=lambda metrics: metrics[_METRIC],
                best_mode="min",
                enable_async_checkpointing=False,
            ),
        )

    def save(self, step: int, state: Any, position: np.ndarray, validation: float) -> None:
        """Saves a checkpoint, the better the lower `validation`; returns when it is on disk."""
        if step in self._manager.all_steps():  # a damaged one that `latest` left out
            self._manager.delete(step)
        self._manager.save(
            step,
            args=ocp.args.Composite(
                state=ocp.args.StandardSave(state),
                position=ocp.args.JsonSave({"base64": base64.b64encode(position).decode()}),
            ),
            metrics={_METRIC: validation},
        )

    def latest(self, abstract: Any) -> Restored | None:
        """The newest checkpoint that can be read, or None; damaged ones are named in a warning.

        Args:
          abstract: the state's shapes and shardings (jax.ShapeDtypeStruct).
        """
        for step in sorted(self._manager.all_steps(), reverse=True):
            try:
                items = self._manager.restore(
                    step,
                    args=ocp.args.Composite(
                        state=ocp.args.StandardRestore(abstract), position=ocp.args.JsonRestore()
                    ),
                )
            except Exception as error:  # TensorStore has kinds of its own
                if getattr(error, "errno", None) not in (None, errno.ENOENT):
                    raise  # the machine's trouble, such as too many open files, not the file's
                _log.warning(
                    "Checkpoint %s/%d is damaged and left out (%s).",
                    self._folder,
                    step,
                    str(error).splitlines()[0],
                )
                continue
            position = base64.b64decode(items["position"]["base64"])
            return Restored(step, items["state"], np.frombuffer(position, np.uint8))
        return None

    def best(self) -> tuple[int, float]:
        """Step of the best checkpoint, and what it was saved with as `validation`.

        Raises:
          InputError: there is none.
        """
        values = {step: self._manager.metrics(step)[_METRIC] for step in self._manager.all_steps()}
        if not values:
            raise InputError(f"{self._folder} holds no checkpoint. Run `recexplore train` first.")
        step = min(values, key=lambda step: (values[step], step))
        return step, values[step]

    def close(self) -> None:
        """Waits for what is being written."""
        self._manager.close()


def load_best(folder: Path, name: str, abstract: Any) -> Any:
    """One entry of the best checkpoint's state, without the rest of it.

    Args:
      folder: the run's checkpoints.
      name: the entry of the state, for instance "average".
      abstract: its shapes, dtypes and shardings.

    Raises:
      InputError: there is no checkpoint, or its shapes are others.
    """
    if not Path(folder).is_dir():
        raise InputError(f"{folder} holds no checkpoint. Run `recexplore train` first.")
    checkpoints = Checkpoints(folder)
    step, _ = checkpoints.best()
    checkpoints.close()
    path = Path(folder).resolve() / str(step) / "state"
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
        arguments = ocp.checkpoint_utils.construct_restore_args(abstract)
        try:
            state = reader.restore(
                path,
                args=ocp.args.PyTreeRestore(
                    item={name: abstract}, restore_args={name: arguments}, partial_restore=True
                ),
            )
        except Exception as error:  # TensorStore has kinds of its own
            raise InputError(
                f"{path} is damaged, or doesn't fit the model's configuration: "
                f"{str(error).splitlines()[0][:200]} Remove {Path(folder).parent} and run "
                "`recexplore train` again."
            ) from error
    found = state[name]
    shapes = jax.tree.map(lambda x, y: x.shape == y.shape, found, abstract)
    if not all(jax.tree.leaves(shapes)):
        raise InputError(f"{path} holds parameters of other shapes than the model's.")
    return found
