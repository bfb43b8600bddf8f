"""From logical axes to shardings: the models name axes, a table of rules says where they go."""

import functools
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from recexplore.errors import InputError

MESH_AXES = ("data", "fsdp", "tensor")
Rules = Sequence[tuple[str, str | tuple[str, ...] | None]]
DEFAULT_RULES: Rules = (
    ("batch", ("data", "fsdp")),
    ("vocab", "tensor"),
    ("embed", "fsdp"),
    ("heads", "tensor"),
    ("kv", None),
    ("mlp", "tensor"),
    ("layers", None),
    ("lora_rank", None),
    ("relpos_buckets", None),
    ("activation_batch", ("data", "fsdp")),
    ("activation_embed", None),
    ("activation_heads", "tensor"),
    ("activation_mlp", "tensor"),
    ("activation_vocab", "tensor"),
)


def make_mesh(
    data: int = -1, fsdp: int = 1, tensor: int = 1, devices: Sequence[jax.Device] | None = None
) -> Mesh:
    """A mesh over all devices; one of the sizes may be -1 for "the rest".

    Args:
      data: number of shares of the batch.
      fsdp: number of shares of the parameters' embed axis, and of the batch again.
      tensor: number of shares of heads, mlp and vocab.
      devices: those of all processes; None: all there are.

    Raises:
      InputError: the sizes don't multiply to the number of devices.
    """
    sizes, devices = [data, fsdp, tensor], jax.devices() if devices is None else devices
    fixed = int(np.prod([size for size in sizes if size != -1]))
    if sizes.count(-1) == 1 and fixed >= 1 and len(devices) % fixed == 0:
        sizes[sizes.index(-1)] = len(devices) // fixed
    if min(sizes) < 1 or int(np.prod(sizes)) != len(devices):
        raise InputError(
            f"partitioning.make_mesh has data={data}, fsdp={fsdp}, tensor={tensor}, which don't "
            f"multiply to the {len(devices)} devices there are. Change them; one may be -1 for "
            "what is left over."
        )
    placed = mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=True)
    return Mesh(placed, MESH_AXES)


def check_rules(rules: Rules) -> None:
    """Checks that every logical axis is mapped once, and to mesh axes that exist.

    Raises:
      InputError: naming the rule.
    """
    seen = set()
    for logical, target in rules:
        targets = (target,) if isinstance(target, str) else target or ()
        unknown = [axis for axis in targets if axis not in MESH_AXES]
        if unknown:
            raise InputError(
                f"The sharding rule ({logical!r}, {target!r}) of trainer.train.rules names the "
                f"mesh axis {unknown[0]!r}; there are: {', '.join(MESH_AXES)}."
            )
        known = [name for name, _ in DEFAULT_RULES]
        if logical not in known:
            raise InputError(
                f"trainer.train.rules have a rule for {logical!r}, which no array has. The logical "
                f"axes are: {', '.join(known)}."
            )
        if logical in seen:
            raise InputError(f"trainer.train.rules map the axis {logical!r} twice. Keep one.")
        seen.add(logical)


def shardings_of(boxed: Any, mesh: Mesh, rules: Rules) -> Any:
    """Shardings for a tree whose leaves carry logical axes; others are replicated.

    Args:
      boxed: abstract parameters from `jax.eval_shape` over a model's `init`.
      mesh: where to.
      rules: logical axis → mesh axis.

    Raises:
      InputError: a rule names an axis that doesn't exist, or two axes of one array go to the same.
    """
    check_rules(rules)
    specs = nn.get_partition_spec(boxed)
    for path, spec in jax.tree_util.tree_leaves_with_path(specs):
        _check_collisions(jax.tree_util.keystr(path), spec, dict(rules))
    return nn.logical_to_mesh_sharding(specs, mesh, list(rules))


def _check_collisions(name: str, axes: PartitionSpec, rules: dict[str, Any]) -> None:
    """Checks that no two axes of an array go to the same mesh axis; flax would drop one."""
    taken: dict[str, str] = {}
    for logical in axes:
        target = rules.get(logical)
        for axis in (target,) if isinstance(target, str) else target or ():
            if axis in taken:
                raise InputError(
                    f"trainer.train.rules send both {taken[axis]!r} and {logical!r} of {name} to "
                    f"the mesh axis {axis!r}. Send one of them elsewhere, or to None."
                )
            taken[axis] = logical


def check_shapes(abstract: Any, shardings: Any) -> None:
    """Checks that every array can be dealt out as its sharding says.

    Args:
      abstract: shapes.
      shardings: of the same structure.

    Raises:
      InputError: an axis doesn't divide by its mesh axes.
    """
    for path, leaf in jax.tree_util.tree_leaves_with_path(abstract):
        sharding = functools.reduce(lambda tree, key: tree[key.key], path, shardings)
        misfit = _misfit(leaf, sharding)
        if misfit:
            axis, names, shares = misfit
            raise InputError(
                f"Parameter {jax.tree_util.keystr(path)} of shape {leaf.shape} can't be dealt "
                f"out: axis {axis} doesn't divide by {shares}, the mesh's "
                f"{' × '.join(names)}. Choose other partitioning.make_mesh sizes, other "
                "trainer.train.rules, or other sizes of the model."
            )


def _misfit(leaf: Any, sharding: NamedSharding) -> tuple[int, tuple[str, ...], int] | None:
    """The first axis that doesn't divide by its mesh axes: (axis, their names, their sizes)."""
    for axis, names in enumerate(sharding.spec):
        names = (names,) if isinstance(names, str) else tuple(names or ())
        shares = int(np.prod([sharding.mesh.shape[name] for name in names]))
        if leaf.shape[axis] % shares:
            return axis, names, shares
    return None


def placed(shapes: Any, shardings: Any) -> Any:
    """Shapes that say where they lie.

    Args:
      shapes: arrays, or shapes of them.
      shardings: of the same structure, or one for all.
    """
    if isinstance(shardings, jax.sharding.Sharding):
        shardings = jax.tree.map(lambda _: shardings, shapes)
    return jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, shardings
    )


def replicate_misfits(abstract: Any, shardings: Any) -> Any:
    """Shardings with those replicated that don't fit their arrays.

    For an optimizer's state: Adafactor's sums over rows and columns carry the logical axes of their
    parameter, but not its shape. They are small.

    Args:
      abstract: shapes.
      shardings: of the same structure.
    """

    def fit(leaf, sharding):
        if len(sharding.spec) <= leaf.ndim and not _misfit(leaf, sharding):
            return sharding
        return NamedSharding(sharding.mesh, PartitionSpec())

    return jax.tree.map(fit, abstract, shardings)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """The sharding of a batch's leading axis."""
    return NamedSharding(mesh, PartitionSpec(("data", "fsdp")))


def check_batch_size(
    batch_size: int, mesh: Mesh, microbatches: int = 1, name: str = "pipeline.train.batch_size"
) -> None:
    """Checks that a batch, and each part of it that is read at once, can be dealt out.

    Args:
      batch_size: rows of the whole batch.
      mesh: the devices.
      microbatches: parts that it is read in.
      name: of the batch size, in gin.

    Raises:
      InputError: it doesn't divide by the mesh's data and fsdp axes.
    """
    shares = mesh.shape["data"] * mesh.shape["fsdp"]
    if batch_size < 1 or batch_size % (shares * microbatches):
        parts = f", times {microbatches} microbatches" if microbatches > 1 else ""
        raise InputError(
            f"{name} is {batch_size}; it must be a positive multiple of "
            f"{shares * microbatches}: {shares}, the mesh's data × fsdp{parts}."
        )


def local_rows(batch_size: int, mesh: Mesh) -> np.ndarray:
    """The rows of a batch that the devices of this process hold, in order."""
    places = batch_sharding(mesh).addressable_devices_indices_map((batch_size,))
    rows = np.arange(batch_size)
    return np.unique(np.concatenate([rows[index] for index in places.values()]))


def put_batch(batch: dict[str, np.ndarray], batch_size: int, mesh: Mesh) -> dict[str, jax.Array]:
    """This process's rows of a batch → the batch, dealt out over the devices of all processes.

    Args:
      batch: arrays of `local_rows`.
      batch_size: rows of the whole batch.
      mesh: the devices.
    """
    sharding = batch_sharding(mesh)
    with jax.transfer_guard("allow"):  # it is asked for, though JAX can't see that
        return {
            name: jax.make_array_from_process_local_data(
                sharding, rows, (batch_size, *rows.shape[1:])
            )
            for name, rows in batch.items()
        }
