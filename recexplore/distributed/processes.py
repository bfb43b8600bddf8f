"""Several processes as one program: how they find each other, agree, and are told to stop.

Each process runs the same command. What only one of them may do, such as writing a record, is the
first one's; the others wait for it at a meeting point.
"""

import glob
import importlib.util
import os
import signal
import sys
import threading
from collections.abc import Mapping
from typing import Any

from recexplore.errors import InputError

_EXPLICIT = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
_TPU_CHIPS = ("/dev/accel[0-9]*", "/dev/vfio/[0-9]*")


def find_others(environment: Mapping[str, str] = os.environ) -> dict[str, Any] | None:
    """How this process is to find the others: arguments of `jax.distributed.initialize`, or None.

    None means that it is alone. Looked for are, in this order:

    - JAX_COORDINATOR_ADDRESS (host:port of the first process), JAX_NUM_PROCESSES and
      JAX_PROCESS_ID;
    - a step of several SLURM tasks, started by srun;
    - a TPU VM, on which even a single worker may be told that it is to be taken away.

    Raises:
      InputError: only some of the first three are set, or they contradict each other.
    """
    given = [name for name in _EXPLICIT if environment.get(name)]
    if given:
        missing = [name for name in _EXPLICIT if name not in given]
        if missing:
            raise InputError(
                f"{' and '.join(given)} is set in the environment, but {' and '.join(missing)} is "
                "not. Set all three, or none of them for a single process."
            )
        address, *numbers = (environment[name] for name in _EXPLICIT)
        if not all(number.isdecimal() for number in numbers):
            raise InputError(
                f"JAX_NUM_PROCESSES is {numbers[0]!r} and JAX_PROCESS_ID is {numbers[1]!r}; both "
                "must be whole numbers."
            )
        count, index = map(int, numbers)
        if not 0 <= index < count:
            raise InputError(
                f"JAX_PROCESS_ID is {index}; with JAX_NUM_PROCESSES={count} it must lie in "
                f"0..{count - 1}."
            )
        return {"coordinator_address": address, "num_processes": count, "process_id": index}
    if int(environment.get("SLURM_STEP_NUM_TASKS", "1")) > 1:
        return {}
    wants_tpu = environment.get("JAX_PLATFORMS", "tpu").split(",")[0] == "tpu"
    if wants_tpu and importlib.util.find_spec("libtpu") and any(map(glob.glob, _TPU_CHIPS)):
        return {}
    return None


def initialize() -> bool:
    """Joins the other processes, if there are any, before JAX touches a device.

    Returns:
      Whether there are others.

    Raises:
      InputError: they can't be reached.
    """
    arguments = find_others()
    if arguments is None:
        return False
    import jax

    if not jax.distributed.is_initialized():
        try:
            jax.distributed.initialize(**arguments)
        except (RuntimeError, ValueError) as error:
            raise InputError(
                f"This process couldn't join the others ({str(error).splitlines()[0]}). All of "
                "them must be started, with the same JAX_COORDINATOR_ADDRESS and JAX_NUM_PROCESSES "
                "and each with its own JAX_PROCESS_ID."
            ) from error
    return jax.process_count() > 1


def is_first() -> bool:
    """Whether this process is the one that writes what is written once."""
    return _alone() or sys.modules["jax"].process_index() == 0


def meet(name: str) -> None:
    """Waits until all processes are here.

    Args:
      name: of the meeting point, the same in all processes.
    """
    if not _alone():
        from jax.experimental import multihost_utils

        multihost_utils.sync_global_devices(name)


def _alone() -> bool:
    """Whether there are no others. JAX is not imported for it: who hasn't is alone."""
    jax = sys.modules.get("jax")
    return jax is None or not jax.distributed.is_initialized() or jax.process_count() == 1


class PreemptionNotice:
    """Whether the machine is about to be taken away: SIGTERM, to any of the processes.

    Several processes agree on the step after which all of them stop, through JAX's own service;
    alone, a flag is enough. Used with `with`, which gives SIGTERM back at the end.
    """

    def __init__(self) -> None:
        self._came = False
        self._before: Any = None

    def __enter__(self) -> "PreemptionNotice":
        import jax

        self._alone = not jax.distributed.is_initialized()  # JAX's service has SIGTERM otherwise
        if self._alone and threading.current_thread() is threading.main_thread():
            self._before = signal.signal(signal.SIGTERM, self._note)
        return self

    def __exit__(self, *_: Any) -> None:
        if self._before is not None:
            signal.signal(signal.SIGTERM, self._before)

    def _note(self, *_: Any) -> None:
        self._came = True

    def came(self, step: int) -> bool:
        """Whether to save and stop after `step`; all processes ask for every step, in order."""
        if self._alone:
            return self._came
        from jax.experimental import multihost_utils

        return multihost_utils.reached_preemption_sync_point(step)
