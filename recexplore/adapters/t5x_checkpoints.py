"""T5X's checkpoints, read and written without T5X or TensorFlow.

    checkpoint_<step>/state/        Orbax, one OCDBT database of zarr (version 2) arrays
    checkpoint_<step>/checkpoint    legacy: msgpack, and beside it one zarr folder an array

Either holds a nested dictionary:

    target                the parameters, ours without the outer "params"
    state/step            steps taken
    state/param_states    the optimizer's state: of an optax chain the index of each link, its
                          fields, then the parameters' names; links without state are left out
"""

import json
import os
import re
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import tensorstore as ts
from etils import epath
from flax import serialization, traverse_util

from recexplore.adapters import name_difference
from recexplore.errors import InputError
from recexplore.models.saved import abstract_parameters

PREFIX = "checkpoint"
_STATE = "state"  # Orbax's item
_DATASET, _FIRST_OF_ONE = "dataset", "train_ds-000-of-001"  # where data goes on, of one process
_OF_ANY = "train_ds-*-of-*"  # of one of several
CLUSTERS = "clusters"  # in that place: the fingerprint of the descriptions that were trained on
_LEGACY = "checkpoint"  # the legacy form's msgpack file
_OUTER = "params"  # the collection, which T5X's names don't have
Tree = dict[str, Any]


def read(path: epath.PathLike, parts: Sequence[str] | None = None) -> Tree:
    """The arrays of a checkpoint of any T5X model, as a plain nested dictionary of numpy arrays.

    Args:
      path: a `checkpoint_<step>` folder, or one that has some, of which the latest is read; here
        or in a bucket (gs://…).
      parts: names such as "target" or "state/step"; None: all.

    Raises:
      InputError: there is no checkpoint, it can't be read, or it lacks a part.
    """
    folder = find(path)
    try:
        if (folder / _STATE).is_dir():
            return read_orbax(folder / _STATE, parts)
        return _read_legacy(folder, parts)
    except InputError:
        raise
    except Exception as error:  # TensorStore has kinds of its own
        said = (str(error) or type(error).__name__).splitlines()[0][:200]
        raise InputError(
            f"The T5X checkpoint {folder} can't be read: {said}. If it is damaged or unfinished, "
            "take another."
        ) from error


def read_orbax(folder: epath.PathLike, parts: Sequence[str] | None = None) -> Tree:
    """The arrays of one Orbax item, such as `checkpoint_<step>/state`, whoever wrote it.

    Args:
      folder: of the item.
      parts: see `read`.

    Raises:
      InputError: it lacks a part.
    """
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
        said = reader.metadata(folder).item_metadata
        if said is None:  # the oldest say nothing of what they hold
            return jax.tree.map(np.asarray, _picked(reader.restore(folder), parts, folder))
        metadata = _picked(said.tree, parts, folder)
        as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), metadata)
        arguments = ocp.args.PyTreeRestore(
            item=metadata, restore_args=as_numpy, partial_restore=True
        )
        return reader.restore(folder, args=arguments)


def find(path: epath.PathLike) -> epath.Path:
    """The folder of a checkpoint: `path` itself, or the latest checkpoint in it.

    Raises:
      InputError: there is none.
    """
    path = _absolute(path)
    if (path / _STATE).is_dir() or (path / _LEGACY).is_file():
        return path
    found = {
        int(match[1]): folder
        for folder in path.glob(f"{PREFIX}_*")
        if (match := re.fullmatch(rf"{PREFIX}_(\d+)", folder.name))
    }
    if not found:
        raise InputError(
            f"{path} is no T5X checkpoint and holds none. Name a folder {PREFIX}_<step> that has "
            f"{_STATE}/ (Orbax) or the file {_LEGACY} (legacy), or a folder of such."
        )
    return found[max(found)]


def read_step(path: epath.PathLike) -> int:
    """Steps that were taken before a checkpoint.

    Raises:
      InputError: see `read`.
    """
    return int(read(path, ("state/step",))["state"]["step"])


def read_position(path: epath.PathLike) -> dict[str, Any] | None:
    """Where training data goes on, as `t5x_data.Rows` has saved it; None where nothing says.

    Raises:
      InputError: see `find`.
    """
    files = sorted((find(path) / _DATASET).glob(_OF_ANY))
    try:
        found = json.loads(files[0].read_text())
    except (IndexError, OSError, ValueError):  # none, or TensorFlow's
        return None
    return found if isinstance(found, dict) else None


def read_parameters(
    path: epath.PathLike, model: nn.Module, mapping: name_difference.Rules = ()
) -> Tree:
    """A checkpoint's parameters, as variables of one of our networks, in its dtypes.

    Args:
      path: see `read`.
      model: the network.
      mapping: pairs (pattern of our names, name in the checkpoint), as T5X's assignment map: the
        first pattern that matches the whole of a name is taken, and may be followed by groups such
        as \\1. Names have slashes. A name that none matches is looked for as it is. What else the
        checkpoint has is then left out; without a mapping it is refused.

    Raises:
      InputError: names or shapes are others; it lists them and suggests a mapping.
    """
    folder = find(path)
    found = _flat(read(folder, ("target",))["target"])
    wanted = _flat(abstract_parameters(model)[_OUTER])
    named = name_difference.renamed(wanted, found, mapping)
    all_found = named if mapping and len(named) == len(wanted) else found
    name_difference.check(f"The T5X checkpoint {folder}", wanted, named, all_found)
    cast = {name: np.asarray(named[name], leaf.dtype) for name, leaf in wanted.items()}
    return {_OUTER: traverse_util.unflatten_dict(cast, sep="/")}


def read_optimizer(path: epath.PathLike, abstract: Any) -> Any:
    """A checkpoint's optimizer state, as our trainer's optimizer has it.

    Args:
      path: see `read`.
      abstract: its shapes: the optimizer's `init` of a network's variables.

    Raises:
      InputError: it is another optimizer's, or other parameters'.
    """
    folder = find(path)
    states = read(folder, (_STATE,))["state"].get("param_states")
    if states is None:
        raise InputError(
            f"The T5X checkpoint {folder} has no optimizer state (state/param_states). It can be "
            "used, but training can't go on from it: read its parameters alone."
        )
    reference = serialization.to_state_dict(abstract)
    flat = traverse_util.flatten_dict(reference, keep_empty_nodes=True, sep="/")
    wanted = {name: leaf for name, leaf in flat.items() if hasattr(leaf, "shape")}
    found = _flat(states)
    named = {name: found[theirs] for name in wanted if (theirs := _without_outer(name)) in found}
    name_difference.check(
        f"The optimizer state of the T5X checkpoint {folder}",
        {_without_outer(name): leaf for name, leaf in wanted.items()},
        {_without_outer(name): value for name, value in named.items()},
        found,
        "Train with the optimizer that it was written by, or read the parameters alone.",
    )
    cast = {name: np.asarray(named[name], leaf.dtype) for name, leaf in wanted.items()}
    return serialization.from_state_dict(
        abstract, traverse_util.unflatten_dict({**flat, **cast}, sep="/")
    )


def write(
    folder: epath.PathLike,
    step: int,
    params: Any,
    optimizer: Any = None,
    position: dict[str, int] | None = None,
) -> epath.Path:
    """Writes a checkpoint that `t5x.train` and `t5x.infer` restore.

    Args:
      folder: gets `checkpoint_<step>`.
      step: steps taken.
      params: a network's variables, "params" alone.
      optimizer: the trainer's optimizer state; without it `t5x.train` can't go on as it is, see
        docs/t5x.md.
      position: of our training data, for `t5x_data.get_dataset` in one process to go on from.

    Returns:
      The checkpoint's folder.

    Raises:
      InputError: there is a checkpoint of this step already, or variables that T5X has no room for.
    """
    others = sorted(set(params) - {_OUTER})
    if others:
        raise InputError(
            f"A T5X checkpoint has parameters alone, but the model has {', '.join(others)} too. "
            "Merge adapters into the kernels first, as scripts/export_t5x.py does without "
            "--to_train."
        )
    folder = _absolute(folder)
    state: Tree = {"step": np.asarray(step, np.int32)}
    if optimizer is not None:
        flat = _flat(serialization.to_state_dict(optimizer))
        without = {_without_outer(name): value for name, value in flat.items()}
        state["param_states"] = traverse_util.unflatten_dict(without, sep="/")
    target = traverse_util.unflatten_dict(_flat(params[_OUTER]), sep="/")
    tree = jax.tree.map(np.asarray, jax.device_get({"target": target, "state": state}))
    manager = ocp.CheckpointManager(
        folder,
        options=ocp.CheckpointManagerOptions(step_prefix=PREFIX, enable_async_checkpointing=False),
        item_handlers={
            _STATE: ocp.PyTreeCheckpointHandler(use_ocdbt=True, use_zarr3=False),
            _DATASET: ocp.JsonCheckpointHandler(filename=_FIRST_OF_ONE),
        },
    )
    items = {_STATE: ocp.args.PyTreeSave(tree)}
    if position is not None:
        items[_DATASET] = ocp.args.JsonSave(position)
    with manager:
        if step in manager.all_steps():
            raise InputError(
                f"{folder} has a {PREFIX}_{step} already. Remove it, or write elsewhere."
            )
        manager.save(step, args=ocp.args.Composite(**items))
    return folder / f"{PREFIX}_{step}"


def _absolute(path: epath.PathLike) -> epath.Path:
    """As Orbax wants it; what has a scheme is so already, and `resolve` would spoil it."""
    path = epath.Path(path)
    return path if "://" in os.fspath(path) else path.resolve()


def _read_legacy(folder: epath.Path, parts: Sequence[str] | None) -> Tree:
    contents = serialization.msgpack_restore((folder / _LEGACY).read_bytes())
    contents = contents.get("optimizer", contents)  # the oldest have no version around them
    picked = _picked(contents, parts, folder)

    def array(leaf: Any) -> np.ndarray:
        if not _is_spec(leaf):
            return np.asarray(leaf)
        inner = leaf["kvstore"]
        path = inner.get("path", leaf.get("path", "")).rstrip("/")
        place = os.fspath(folder / path.rpartition("/")[2])  # wherever it was, it is beside now
        store = f"{place}/" if "://" in place else {"driver": "file", "path": f"{place}/"}
        found = ts.open({"driver": "zarr", "kvstore": store}, open=True).result().read().result()
        return found.view(jnp.bfloat16) if found.dtype == np.uint16 else found  # version 2's bits

    return jax.tree.map(array, picked, is_leaf=_is_spec)


def _is_spec(leaf: Any) -> bool:
    """Whether something in a legacy file says where an array lies."""
    return isinstance(leaf, dict) and {"driver", "kvstore", "metadata"} <= set(leaf)


def _picked(tree: Tree, parts: Sequence[str] | None, folder: epath.PathLike) -> Tree:
    if parts is None:
        return tree
    flat = traverse_util.flatten_dict(tree, True, lambda _, leaf: _is_spec(leaf), sep="/")
    picked = {}
    for part in parts:
        below = {name: x for name, x in flat.items() if f"{name}/".startswith(f"{part}/")}
        if not below:
            raise InputError(
                f"The T5X checkpoint {folder} has no {part!r}; it has {', '.join(sorted(tree))}."
            )
        picked |= below
    return traverse_util.unflatten_dict(picked, sep="/")


def _flat(tree: Any) -> dict[str, Any]:
    return traverse_util.flatten_dict(serialization.to_state_dict(tree), sep="/")


def _without_outer(name: str) -> str:
    return name.replace(f"/{_OUTER}/", "/")
