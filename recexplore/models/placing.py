"""From tensors in files to an array on a mesh: only what the devices here hold, part by part."""

import math
from collections.abc import Mapping, Sequence

import jax
import numpy as np

from recexplore.models.checkpoint_files import StoredTensor
from recexplore.models.tensor_names import Tensor

BLOCK_BYTES = 2**21  # read at once, as float32: it stays in the cache while it is laid out anew
_CACHE_LINE = 64  # XLA on CPU takes an array that begins at such an address without a copy
_Bounds = tuple[tuple[int, int], ...]  # start and stop on every axis


def place(
    tensor: Tensor,
    sources: list[StoredTensor],
    leaf: jax.ShapeDtypeStruct,
    sharding: jax.sharding.Sharding,
    sizes: Mapping[str, int],
) -> jax.Array:
    """One parameter, piece by piece onto the devices that hold it.

    Args:
      tensor: how it lies in the files and in the network.
      sources: where it stands: one tensor a layer, or the only one.
      leaf: its shape and dtype in the network, the axis of layers included.
      sharding: which device gets which piece.
      sizes: of `tensor_names.axis_sizes`.

    Raises:
      InputError: a file can't be read.
    """
    holders: dict[_Bounds, list[jax.Device]] = {}
    for device, index in sharding.addressable_devices_indices_map(leaf.shape).items():
        bounds = [part.indices(size) for part, size in zip(index, leaf.shape, strict=True)]
        holders.setdefault(tuple((start, stop) for start, stop, _ in bounds), []).append(device)
    arrays = []
    for bounds, devices in holders.items():
        piece = _read_piece(tensor, sources, bounds, leaf.dtype, sizes)
        arrays += [jax.device_put(piece, device) for device in devices]
        jax.block_until_ready(arrays)  # or pieces that are under way would pile up on the host
    return jax.make_array_from_single_device_arrays(leaf.shape, sharding, arrays)


def _read_piece(
    tensor: Tensor,
    sources: list[StoredTensor],
    bounds: _Bounds,
    dtype: np.dtype,
    sizes: Mapping[str, int],
) -> np.ndarray:
    """A part of one parameter, stacked over layers where it has such an axis."""
    piece = _empty([stop - start for start, stop in bounds], dtype)
    if not tensor.in_layers:
        _read_into(piece, tensor, sources[0], bounds, sizes)
        return piece
    for row, layer in enumerate(range(*bounds[0])):
        _read_into(piece[row], tensor, sources[layer], bounds[1:], sizes)
    return piece


def _read_into(
    out: np.ndarray,
    tensor: Tensor,
    source: StoredTensor,
    bounds: _Bounds,
    sizes: Mapping[str, int],
) -> None:
    """A part of one tensor, some rows at a time, laid out and cast as the network has it.

    Axes that come first among those joined in the file are cut in reading, the others after it.
    """
    wanted = dict(zip(tensor.kept, bounds, strict=True))
    leaders = [joined[0] for joined in tensor.stored]
    widths = [math.prod(sizes[axis] for axis in joined[1:]) for joined in tensor.stored]
    columns = tuple(
        slice(wanted[axis][0] * width, wanted[axis][1] * width)
        for axis, width in zip(leaders[1:], widths[1:], strict=True)
    )
    cuts = {axis: slice(*wanted[axis]) for axis in tensor.kept if axis not in leaders}
    part_sizes = {**sizes, **{axis: wanted[axis][1] - wanted[axis][0] for axis in leaders}}
    first, width = leaders[0], widths[0]
    row_bytes = 4 * width * math.prod(source.shape[1:])
    step = max(1, BLOCK_BYTES // row_bytes)
    begin, end = wanted[first]
    for start in range(begin, end, step):
        stop = min(start + step, end)
        block = source.read((slice(start * width, stop * width), *columns))
        # numpy moves numbers that it doesn't know, such as bfloat16, one by one: they go as words.
        words = block.astype(out.dtype, copy=False).view(f"u{out.itemsize}")
        kept = tensor.to_kept(words, {**part_sizes, first: stop - start})
        here = {first: slice(start - begin, stop - begin)}
        out.view(words.dtype)[_index_of(tensor, here)] = kept[_index_of(tensor, cuts)]


def _index_of(tensor: Tensor, cuts: Mapping[str, slice]) -> tuple[slice, ...]:
    return tuple(cuts.get(axis, slice(None)) for axis in tensor.kept)


def _empty(shape: Sequence[int], dtype: np.dtype) -> np.ndarray:
    """An array that the CPU's device takes over as it is."""
    size = math.prod(shape) * np.dtype(dtype).itemsize
    memory = np.empty(size + _CACHE_LINE, np.uint8)
    start = -memory.ctypes.data % _CACHE_LINE
    return memory[start : start + size].view(dtype).reshape(shape)
