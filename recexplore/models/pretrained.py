"""Published language models: Hugging Face folders in and out.

`load` puts a checkpoint's tensors where they belong on a mesh, each device's piece read from the
files part by part; `save` writes a folder that transformers reads. Folders are local; nothing here
asks the network.
"""

import contextlib
import json
import math
import os
import shutil
import uuid
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.experimental import multihost_utils
from safetensors.numpy import save_file

from recexplore.distributed.partitioning import check_shapes
from recexplore.errors import InputError
from recexplore.models.checkpoint_files import (
    INDEX_FILE,
    SINGLE_FILE,
    StoredTensor,
    stored_tensors,
)
from recexplore.models.config_file import CONFIG_FILE, check_config, read_config, read_file
from recexplore.models.families import config_json, family_of
from recexplore.models.tensor_names import (
    EMBEDDING_TABLE,
    MODEL,
    OUTPUT_TABLE,
    Tensor,
    axis_sizes,
    tensor_names,
)
from recexplore.models.transformer import TransformerConfig

__all__ = ["check_config", "family_of", "load", "read_config", "save"]

_BLOCK_BYTES = 2**21  # read at once, as float32: it stays in the cache while it is laid out anew
_CACHE_LINE = 64  # XLA on CPU takes an array that begins at such an address without a copy
_SHARD_BYTES = 2 * 10**9
_Bounds = tuple[tuple[int, int], ...]  # start and stop on every axis


def load(folder: Path | str, config: TransformerConfig, shardings: Any = None) -> dict[str, Any]:
    """The parameters in a Hugging Face folder, as `Transformer` takes them.

    Every process reads only what its own devices hold. Beside the arrays themselves no more than
    one device's piece of one parameter is in the host's memory; on CPU the piece becomes the array.

    Args:
      folder: has config.json and safetensors files in float32, float16 or bfloat16.
      config: of the network; `check_config` must find nothing wrong with it.
      shardings: a tree of NamedSharding, {"params": …}; None puts everything on the first device.

    Returns:
      {"params": …} in config.param_dtype.

    Raises:
      InputError: as `check_config`; a file is missing or damaged; a tensor is missing, isn't
        expected or has another shape; the embeddings are tied in one and untied in the other; an
        axis can't be dealt out as its sharding says.
    """
    folder = Path(folder)
    check_config(folder, config)
    said = read_file(folder)
    stored = stored_tensors(folder, said.pictures)
    table = tensor_names(said.family, config.tied_embeddings)
    sizes = axis_sizes(config)
    _check_tensors(folder, stored, table, sizes, config)
    abstract = _abstract(table, config)
    here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    placed = dict.fromkeys(abstract, here)
    if shardings is not None:
        check_shapes(unflatten_dict(abstract, sep="/"), shardings["params"])
        placed = flatten_dict(shardings["params"], sep="/")
    params = {}
    for path, tensor in table.items():
        sources = [stored[name] for name in tensor.names(config.num_layers)]
        params[path] = _place(tensor, sources, abstract[path], placed[path], sizes)
    return {"params": unflatten_dict(params, sep="/")}


def save(
    folder: Path | str,
    params: Mapping[str, Any],
    config: TransformerConfig,
    tokenizer_files: Sequence[Path | str] = (),
    shard_bytes: int = _SHARD_BYTES,
) -> None:
    """Writes a folder that transformers reads: config.json, safetensors files and their index.

    The folder appears when it's whole. No more than one file's tensors are in the host's memory at
    a time. Of several processes all must call it; the first writes.

    Args:
      folder: made; an earlier export there is replaced.
      params: {"params": …} of `Transformer`; written in config.param_dtype.
      config: of the network; `family_of` must know it.
      tokenizer_files: copied into the folder.
      shard_bytes: of tensors in one file, if a single tensor isn't larger.

    Raises:
      InputError: as `family_of`; parameters of another network; a tokenizer's file is missing or
        has the name of one that is written; the folder holds something else.
    """
    folder = Path(folder)
    table = tensor_names(family_of(config), config.tied_embeddings)
    entries, dtype = config_json(config), config.param_dtype
    flat = _checked_parameters(params, _abstract(table, config))
    _check_destination(folder, tokenizer_files)
    shards = _shards(table, config, shard_bytes)
    files = [SINGLE_FILE]
    if len(shards) > 1:
        files = [f"model-{i + 1:05}-of-{len(shards):05}.safetensors" for i in range(len(shards))]
    writes = jax.process_index() == 0
    with _new_folder(folder) if writes else contextlib.nullcontext() as temporary:
        for file, shard in zip(files, shards, strict=True):
            tensors = {
                name: table[path].to_stored(
                    _on_host(flat[path], layer, table[path].in_layers, dtype)
                )
                for name, (path, layer) in shard.items()
            }
            if writes:
                save_file(tensors, temporary / file, metadata={"format": "pt"})
        if writes:
            _write_json(temporary / CONFIG_FILE, entries)
            if len(shards) > 1:
                _write_json(temporary / INDEX_FILE, _index(files, shards, _abstract(table, config)))
            for path in tokenizer_files:
                shutil.copyfile(path, temporary / Path(path).name)
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(f"saved {folder}")


def _abstract(
    table: Mapping[str, Tensor], config: TransformerConfig
) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes and dtypes of the network's parameters by path."""
    sizes = axis_sizes(config)
    shapes = {}
    for path, tensor in table.items():
        layers = [config.num_layers] if tensor.in_layers else []
        shapes[path] = jax.ShapeDtypeStruct(
            (*layers, *(sizes[axis] for axis in tensor.kept)), config.param_dtype
        )
    return shapes


def _check_tensors(
    folder: Path,
    stored: Mapping[str, StoredTensor],
    table: Mapping[str, Tensor],
    sizes: Mapping[str, int],
    config: TransformerConfig,
) -> None:
    """Every tensor is there, in the right shape, and no other."""
    expected = {
        name: tensor.stored_shape(sizes)
        for tensor in table.values()
        for name in tensor.names(config.num_layers)
    }
    if OUTPUT_TABLE in expected and OUTPUT_TABLE not in stored:
        raise InputError(
            f"{folder} lacks the tensor {OUTPUT_TABLE}, so its embeddings are tied, but "
            "transformer.TransformerConfig.tied_embeddings is False, as tie_word_embeddings is in "
            f"{CONFIG_FILE}. The folder's files don't belong together; download them again."
        )
    missing = [name for name in expected if name not in stored]
    if missing:
        raise InputError(
            f"{folder} lacks {len(missing)} of {len(expected)} tensors: {_some(missing)}. Its "
            f"files don't fit its {CONFIG_FILE}; download them again."
        )
    for name, shape in expected.items():
        if stored[name].shape != shape:
            raise InputError(
                f"{stored[name].file}: {stored[name].name} has shape {stored[name].shape}, but "
                f"{CONFIG_FILE} and transformer.TransformerConfig make it {shape}. The folder's "
                "files don't belong together; download them again."
            )
    extra = [stored[name] for name in stored if name not in expected]
    extra = [tensor for tensor in extra if not tensor.name.endswith("rotary_emb.inv_freq")]
    if OUTPUT_TABLE in stored and OUTPUT_TABLE not in expected:
        _check_tied(stored[OUTPUT_TABLE], stored[MODEL + EMBEDDING_TABLE])
        extra.remove(stored[OUTPUT_TABLE])
    if extra:
        raise InputError(
            f"{extra[0].file} has tensors that the network of {CONFIG_FILE} doesn't: "
            f"{_some([tensor.name for tensor in extra])}. It isn't that language model alone."
        )


def _check_tied(output: StoredTensor, embedding: StoredTensor) -> None:
    """An output table beside tied embeddings must be a copy of them."""
    same = output.shape == embedding.shape
    rows = max(1, _BLOCK_BYTES // (4 * output.shape[-1]))
    for start in range(0, output.shape[0] if same else 0, rows):
        part = (slice(start, min(start + rows, output.shape[0])),)
        same = same and np.array_equal(output.read(part), embedding.read(part))
    if not same:
        raise InputError(
            f"{output.file}: {output.name} isn't {embedding.name}, but "
            "transformer.TransformerConfig.tied_embeddings is True, as tie_word_embeddings is in "
            f"{CONFIG_FILE}. Set both to false, or remove the tensor."
        )


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (" …" if len(names) > 3 else "")


def _place(
    tensor: Tensor,
    sources: list[StoredTensor],
    leaf: jax.ShapeDtypeStruct,
    sharding: jax.sharding.Sharding,
    sizes: Mapping[str, int],
) -> jax.Array:
    """One parameter, piece by piece onto the devices that hold it."""
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
    step = max(1, _BLOCK_BYTES // row_bytes)
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


def _checked_parameters(
    params: Mapping[str, Any], wanted: Mapping[str, jax.ShapeDtypeStruct]
) -> dict[str, Any]:
    """Parameters by path.

    Raises:
      InputError: they aren't those of the network.
    """
    flat = flatten_dict(dict(params.get("params", {})), sep="/")
    if {*params} != {"params"} or {*flat} != {*wanted}:
        odd = {*params} - {"params"} or {*flat} ^ {*wanted}
        raise InputError(
            "The parameters to export aren't those of transformer.Transformer with the "
            f"configuration given: {_some(sorted(odd))} is in one of them only."
        )
    for path, leaf in wanted.items():
        if flat[path].shape != leaf.shape:
            raise InputError(
                f"The parameter {path} to export has shape {flat[path].shape}, but the "
                f"configuration given makes it {leaf.shape}."
            )
    return flat


def _check_destination(folder: Path, tokenizer_files: Sequence[Path | str]) -> None:
    for path in map(Path, tokenizer_files):
        if not path.is_file():
            raise InputError(f"{path}, a file of the tokenizer to export, is missing.")
        if path.name == CONFIG_FILE or "safetensors" in path.name:
            raise InputError(f"{path} isn't a tokenizer's file: an export writes its own.")
    if folder.exists() and (not folder.is_dir() or [*folder.iterdir()]):
        if not (folder / CONFIG_FILE).is_file():
            raise InputError(
                f"{folder} holds something that isn't a model. Choose another place to export to."
            )


def _shards(
    table: Mapping[str, Tensor], config: TransformerConfig, shard_bytes: int
) -> list[dict[str, tuple[str, int]]]:
    """What is in each file: the tensor's name → the parameter's path and the layer."""
    sizes, width = axis_sizes(config), np.dtype(config.param_dtype).itemsize
    shards: list[dict[str, tuple[str, int]]] = [{}]
    filled = 0
    # Layer by layer, as such folders usually are: whoever wants some layers reads some files.
    tensors = [
        (layer, path, name, tensor)
        for path, tensor in table.items()
        for layer, name in enumerate(tensor.names(config.num_layers))
    ]
    for layer, path, name, tensor in sorted(tensors, key=lambda row: row[0]):
        size = math.prod(tensor.stored_shape(sizes)) * width
        if shards[-1] and filled + size > shard_bytes:
            shards.append({})
            filled = 0
        shards[-1][name] = (path, layer)
        filled += size
    return shards


def _on_host(parameter: Any, layer: int, in_layers: bool, dtype: str) -> np.ndarray:
    """One tensor of a parameter, from wherever its pieces are."""
    part = parameter[layer] if in_layers else parameter
    if isinstance(part, jax.Array) and not part.is_fully_addressable:
        part = multihost_utils.process_allgather(part, tiled=True)
    return np.asarray(part).astype(dtype, copy=False)


def _index(
    files: list[str],
    shards: list[dict[str, tuple[str, int]]],
    abstract: Mapping[str, jax.ShapeDtypeStruct],
) -> dict[str, Any]:
    total = sum(x.size * x.dtype.itemsize for x in abstract.values())
    return {
        "metadata": {"total_size": total},
        "weight_map": {
            name: file for file, shard in zip(files, shards, strict=True) for name in shard
        },
    }


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n")


@contextlib.contextmanager
def _new_folder(folder: Path) -> Iterator[Path]:
    """An empty temporary folder, which takes `folder`'s place when the block ends well."""

    def beside() -> Path:
        return folder.with_name(f".{folder.name}.{uuid.uuid4().hex[:8]}.tmp")

    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary, retired = beside(), beside()
    temporary.mkdir()
    try:
        yield temporary
        if folder.exists():
            os.replace(folder, retired)
        os.replace(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        shutil.rmtree(retired, ignore_errors=True)
