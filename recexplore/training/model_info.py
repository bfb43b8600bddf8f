"""What a model is made of, in words: model-info.txt, as T5X writes it."""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax

from recexplore.training.program import Program

MODEL_INFO = "model-info.txt"


def write(folder: Path, program: Program) -> None:
    """Writes a line for every variable, and how many parameters there are.

    Args:
      folder: of the model.
      program: that trains it.
    """
    boxed = program.boxed
    lines = [
        *_variables("params", boxed.state.params, program.state_shardings.params),
        *_variables("frozen", boxed.frozen, program.frozen_shardings),
    ]
    trained, frozen = (_size(shapes) for shapes in (boxed.state.params, boxed.frozen))
    lines.append(f"Total number of parameters: {trained + frozen}")
    if frozen:
        lines.append(f"of which are trained: {trained}")
    folder.mkdir(parents=True, exist_ok=True)
    temporary = folder / f"{MODEL_INFO}.tmp"
    temporary.write_text("".join(f"{line}\n" for line in lines))
    temporary.replace(folder / MODEL_INFO)


def _variables(kind: str, boxed: Any, shardings: Any) -> Iterator[str]:
    shapes = jax.tree_util.tree_leaves_with_path(nn.unbox(boxed))
    axes = jax.tree.leaves(nn.get_partition_spec(boxed), is_leaf=_is_spec)
    for (path, shape), names, sharding in zip(
        shapes, axes, jax.tree.leaves(shardings), strict=True
    ):
        name = "/".join(str(getattr(key, "key", key)) for key in path).removeprefix("params/")
        named = [*names, *[None] * (len(shape.shape) - len(names))]
        sizes = ", ".join(
            f"{axis}={size}" if axis else f"{size}"
            for axis, size in zip(named, shape.shape, strict=True)
        )
        yield (
            f"Variable {kind}/{name:<80} size {math.prod(shape.shape):<12} shape "
            f"{f'({sizes})':<40} partition spec {tuple(sharding.spec)}"
        )


def _is_spec(leaf: Any) -> bool:
    return isinstance(leaf, jax.sharding.PartitionSpec)


def _size(boxed: Any) -> int:
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(nn.unbox(boxed)))
