"""Several processes as one program: how they find each other, agree, and are told to stop.

Each process runs the same command. What only one of them may do, such as writing a record, is the
first one's; the others wait for it at a meeting point.
"""

import glob
import importlib.util
import itertools
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

from recexplore.errors import InputError, SharedError

_EXPLICIT = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
_MOMENT = 3.0  # seconds
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
    tasks = environment.get("SLURM_STEP_NUM_TASKS", "1")
    if tasks.isdecimal() and int(tasks) > 1:
        return {}
    wants_tpu = (environment.get("JAX_PLATFORMS") or "tpu").split(",")[0] == "tpu"
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
    return is_alone() or sys.modules["jax"].process_index() == 0


def first_says(function: Callable[[], Any]) -> Any:
    """What `function` returns in the first process, in all of them; the others wait for it.

    Args:
      function: returns JSON values. If it raises in the first process, all raise.

    Raises:
      SharedError: with the first process's words.
    """
    if is_alone():
        return function()
    told, raised = "", None
    if is_first():
        try:
            told = json.dumps({"value": function()})
        except Exception as error:
            told, raised = json.dumps({"error": str(error)}), error
    said = json.loads(_gather(told)[0])
    if "error" in said:
        raise SharedError(said["error"]) from raised
    return said["value"]


def all_agree(yes: bool) -> bool:
    """Whether all processes say yes."""
    return yes if is_alone() else set(_gather("yes" if yes else "no")) == {"yes"}


def meet() -> None:
    """Waits until all processes are here."""
    if not is_alone():
        _gather("")


def leave(status: int) -> None:
    """Ends a process that others may be waiting for, so that they end soon as well.

    The usual way out waits for all of them. The first process, whose end they notice at once, gives
    them a moment to say what they have to say.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    if is_first():
        time.sleep(_MOMENT)
    os._exit(status)


def take_share(share: tuple[int, int] | None) -> None:
    """Says which share of divisible work, (index, count), this process does beside others that it
    doesn't know; None: there are no such others."""
    global _share
    _share = share


def share() -> tuple[int, int]:
    """The share of divisible work that is this process's: (index, number of shares)."""
    if _share is not None:
        return _share
    if is_alone():
        return 0, 1
    jax = sys.modules["jax"]
    return jax.process_index(), jax.process_count()


def is_one_of_many() -> bool:
    """Whether this process was given a share by hand, and the others are on their own as well."""
    return _share is not None and _share[1] > 1


def _gather(text: str) -> list[str]:
    """One text from every process, in order."""
    import numpy as np
    from jax.experimental.multihost_utils import process_allgather

    data = np.frombuffer(text.encode(), np.uint8)
    sizes = process_allgather(np.int32(len(data))).ravel()
    padded = np.zeros(max(int(sizes.max()), 1), np.uint8)
    padded[: len(data)] = data
    rows = process_allgather(padded).reshape(len(sizes), -1)
    return [bytes(row[:size]).decode() for row, size in zip(rows, sizes, strict=True)]


def is_alone() -> bool:
    """Whether there are no others. JAX is not imported for it: who hasn't is alone."""
    jax = sys.modules.get("jax")
    return jax is None or not jax.distributed.is_initialized() or jax.process_count() == 1


class PreemptionNotice:
    """Whether the machine is about to be taken away: SIGTERM, to any of the processes.

    Several processes agree on the step after which all of them stop, through JAX's own service;
    alone, a flag is enough. Used with `with`, around all that must not be cut short.
    """

    def __enter__(self) -> "PreemptionNotice":
        global _noted
        _noted = False
        self._own = is_alone() and threading.current_thread() is threading.main_thread()
        if self._own:
            self._before = signal.signal(signal.SIGTERM, _note)
        return self

    def __exit__(self, *_: Any) -> None:
        if self._own:
            signal.signal(signal.SIGTERM, self._before or signal.SIG_DFL)

    def came(self) -> bool:
        """Whether to save and stop now; all processes ask equally often."""
        if is_alone():
            return stop_wanted()
        from jax.experimental import multihost_utils

        # The count goes on from one model to the next: JAX names a count at which all stop.
        return multihost_utils.reached_preemption_sync_point(next(_asked))


def stop_wanted() -> bool:
    """Whether a notice came to this process, alone, during its last piece of work."""
    return _noted


_noted = False
_share: tuple[int, int] | None = None
_asked = itertools.count()


def _note(*_: Any) -> None:
    global _noted
    _noted = True
