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
from types import MappingProxyType
from typing import Any

import jax
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.experimental import multihost_utils
from safetensors.numpy import save_file

from recexplore.distributed.partitioning import check_shapes
from recexplore.errors import InputError, gin_name
from recexplore.models import t5_names, tensor_names
from recexplore.models.checkpoint_files import (
    INDEX_FILE,
    SINGLE_FILE,
    StoredTensor,
    stored_tensors,
)
from recexplore.models.config_file import (
    CONFIG_FILE,
    check_config,
    longest_context,
    read_config,
    read_file,
)
from recexplore.models.families import config_json, family_of
from recexplore.models.networks import Config
from recexplore.models.placing import BLOCK_BYTES, place
from recexplore.models.tensor_names import OUTPUT_TABLE, Tensor

_SHARD_BYTES = 2 * 10**9
_T5_COPIES = ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight")
_UNUSED = (  # ends of names of what old files have and no network reads
    "rotary_emb.inv_freq",
    "EncDecAttention.relative_attention_bias.weight",
)
# transformers takes another model's ids where a config.json says nothing.
_NO_TOKENS = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))


def check_folder(folder: Path | str) -> Config:
    """Checks all of a Hugging Face folder that can be told without reading a tensor.

    Args:
      folder: has config.json and safetensors files.

    Returns:
      The network's configuration, as long as the network reads at most.

    Raises:
      InputError: as `load`, but for embeddings that are said to be tied and aren't.
    """
    folder = Path(folder)
    config = read_config(folder, longest_context(folder))
    _stored(folder, config)
    return config


def load(folder: Path | str, config: Config, shardings: Any = None) -> dict[str, Any]:
    """The parameters in a Hugging Face folder, as the network takes them.

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
    table, stored = _stored(folder, config)
    sizes = _axis_sizes(config)
    for copy in _copies(config):
        if copy in stored:
            _check_copy(stored[copy], stored[table["token_embedder"].name], config)
    abstract = _abstract(table, config)
    here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    placed = dict.fromkeys(abstract, here)
    if shardings is not None:
        check_shapes(unflatten_dict(abstract, sep="/"), shardings["params"])
        placed = flatten_dict(shardings["params"], sep="/")
    params = {}
    for path, tensor in table.items():
        sources = [stored[name] for name in tensor.names(sizes)]
        params[path] = place(tensor, sources, abstract[path], placed[path], sizes)
    return {"params": unflatten_dict(params, sep="/")}


def save(
    folder: Path | str,
    params: Mapping[str, Any],
    config: Config,
    tokenizer_files: Sequence[Path | str] = (),
    shard_bytes: int = _SHARD_BYTES,
    *,
    beside: Mapping[str, bytes] = MappingProxyType({}),
    token_ids: Mapping[str, int | None] = MappingProxyType({}),
    context_length: int | None = None,
) -> None:
    """Writes a folder that transformers reads: config.json, safetensors files and their index.

    The folder appears when it's whole. No more than one file's tensors are in the host's memory at
    a time. Of several processes all must call it; the first writes.

    Args:
      folder: made; an earlier export there is replaced.
      params: {"params": …} of the network; written in config.param_dtype.
      config: of the network; `family_of` must know it.
      tokenizer_files: copied into the folder; generation_config.json may be among them.
      shard_bytes: of tensors in one file, if a single tensor isn't larger.
      beside: further files, name → content.
      token_ids: what config.json says about tokens that aren't text: bos_token_id, eos_token_id and
        pad_token_id, each null unless it's given. Without an eos_token_id, here or in a
        generation_config.json, transformers doesn't know where this model's answers end.
      context_length: the tokens that it can read at most, for config.json; None:
        config.max_length, which for a model that was trained here is the length of a training row.

    Raises:
      InputError: as `family_of`; parameters of another network; a context shorter than
        config.max_length; a tokenizer's file is missing or has the name of one that is written; the
        folder holds something else.
    """
    folder = Path(folder)
    table = _table(family_of(config), config)
    context_length = config.max_length if context_length is None else context_length
    if context_length < config.max_length:
        raise InputError(
            f"The context length to export is {context_length}, but "
            f"{gin_name(type(config))}.max_length is {config.max_length} already."
        )
    entries = {**_NO_TOKENS, **config_json(config), **token_ids}
    if not config.has_encoder:  # whose relative positions have no end
        entries["max_position_embeddings"] = context_length
    dtype = config.param_dtype
    flat = _checked_parameters(params, _abstract(table, config), config)
    _check_destination(folder, tokenizer_files)
    shards = _shards(table, config, shard_bytes)
    files = [SINGLE_FILE]
    if len(shards) > 1:
        files = [f"model-{i + 1:05}-of-{len(shards):05}.safetensors" for i in range(len(shards))]
    writes = jax.process_index() == 0
    with _new_folder(folder) if writes else contextlib.nullcontext() as temporary:
        if writes:
            _write_json(temporary / CONFIG_FILE, entries)
        for file, shard in zip(files, shards, strict=True):
            tensors = {
                name: table[path].to_stored(
                    _on_host(flat[path], layer, table[path].in_layers, dtype)
                )
                for name, (path, layer) in shard.items()
            }
            if writes:
                save_file(tensors, temporary / file, metadata={"format": "pt"})
                # The library lets nobody but the owner read it.
                shutil.copymode(temporary / CONFIG_FILE, temporary / file)
            del tensors  # or they would still be there while the next file's are fetched
        if writes:
            if len(shards) > 1:
                _write_json(temporary / INDEX_FILE, _index(files, shards, _abstract(table, config)))
            for path in tokenizer_files:
                shutil.copyfile(path, temporary / Path(path).name)
            for name, content in beside.items():
                (temporary / name).write_bytes(content)
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(f"saved {folder}")


def _abstract(table: Mapping[str, Tensor], config: Config) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes and dtypes of the network's parameters by path."""
    sizes = _axis_sizes(config)
    return {
        path: jax.ShapeDtypeStruct(tensor.kept_shape(sizes), config.param_dtype)
        for path, tensor in table.items()
    }


def _table(family: str, config: Config) -> Mapping[str, Tensor]:
    """Every parameter's tensor."""
    if config.has_encoder:
        return t5_names.tensor_names(config)
    return tensor_names.tensor_names(family, config.tied_embeddings)


def _axis_sizes(config: Config) -> dict[str, int]:
    return (t5_names if config.has_encoder else tensor_names).axis_sizes(config)


def _copies(config: Config) -> list[str]:
    """Tensors that may stand beside the embedding table, and must be copies of it."""
    copies = [OUTPUT_TABLE] if config.tied_embeddings else []
    return [*copies, *_T5_COPIES] if config.has_encoder else copies


def _stored(folder: Path, config: Config) -> tuple[Mapping[str, Tensor], dict[str, StoredTensor]]:
    """Which parameters there are by path, and the folder's tensors by name, which fit them."""
    said = read_file(folder)
    stored = stored_tensors(folder, said.pictures, config.has_encoder)
    table = _table(said.family, config)
    if config.has_encoder:  # of equal tensors transformers stores one, whichever comes first
        there = [name for name in _T5_COPIES if name in stored]
        if there and t5_names.EMBEDDING_TABLE not in stored:
            stored[t5_names.EMBEDDING_TABLE] = stored[there[0]]
    _check_tensors(folder, stored, table, _axis_sizes(config), config)
    return table, stored


def _check_tensors(
    folder: Path,
    stored: Mapping[str, StoredTensor],
    table: Mapping[str, Tensor],
    sizes: Mapping[str, int],
    config: Config,
) -> None:
    """Every tensor is there, in the right shape, and no other."""
    expected = {
        name: tensor.stored_shape(sizes)
        for tensor in table.values()
        for name in tensor.names(sizes)
    }
    if OUTPUT_TABLE in expected and OUTPUT_TABLE not in stored:
        raise InputError(
            f"{folder} lacks the tensor {OUTPUT_TABLE}, so its embeddings are tied, but "
            f"{gin_name(type(config))}.tied_embeddings is False, as tie_word_embeddings is in "
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
                f"{CONFIG_FILE} and {gin_name(type(config))} make it {shape}. The folder's "
                "files don't belong together; download them again."
            )
    known = {*expected, OUTPUT_TABLE, *_copies(config)}
    extra = [stored[name] for name in stored if name not in known]
    extra = [tensor for tensor in extra if not tensor.name.endswith(_UNUSED)]
    if extra:
        raise InputError(
            f"{extra[0].file} has tensors that the network of {CONFIG_FILE} doesn't: "
            f"{_some([tensor.name for tensor in extra])}. It isn't that language model alone."
        )


def _check_copy(output: StoredTensor, embedding: StoredTensor, config: Config) -> None:
    """An output table beside tied embeddings must be a copy of them."""
    same = output.shape == embedding.shape
    rows = max(1, BLOCK_BYTES // (4 * output.shape[-1]))
    for start in range(0, output.shape[0] if same else 0, rows):
        part = (slice(start, min(start + rows, output.shape[0])),)
        same = same and np.array_equal(output.read(part), embedding.read(part))
    if not same and output.name in _T5_COPIES:
        raise InputError(
            f"{output.file}: {output.name} isn't {embedding.name}, but encoder and decoder share "
            "one embedding table. It isn't a T5 that recexplore can read."
        )
    if not same:
        raise InputError(
            f"{output.file}: {output.name} isn't {embedding.name}, but "
            f"{gin_name(type(config))}.tied_embeddings is True, as tie_word_embeddings is in "
            f"{CONFIG_FILE}. Set both to false, or remove the tensor."
        )


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (" …" if len(names) > 3 else "")


def _checked_parameters(
    params: Mapping[str, Any], wanted: Mapping[str, jax.ShapeDtypeStruct], config: Config
) -> dict[str, Any]:
    """Parameters by path.

    Raises:
      InputError: they aren't those of the network.
    """
    flat = flatten_dict(dict(params.get("params", {})), sep="/")
    if {*params} != {"params"} or {*flat} != {*wanted}:
        odd = {*params} - {"params"} or {*flat} ^ {*wanted}
        raise InputError(
            f"The parameters to export aren't those of the {gin_name(type(config))} "
            f"given: {_some(sorted(odd))} is in one of them only."
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
    table: Mapping[str, Tensor], config: Config, shard_bytes: int
) -> list[dict[str, tuple[str, int]]]:
    """What is in each file: the tensor's name → the parameter's path and the layer."""
    sizes, width = _axis_sizes(config), np.dtype(config.param_dtype).itemsize
    shards: list[dict[str, tuple[str, int]]] = [{}]
    filled = 0
    # Layer by layer, as such folders usually are: whoever wants some layers reads some files.
    tensors = [
        (layer, path, name, tensor)
        for path, tensor in table.items()
        for layer, name in enumerate(tensor.names(sizes))
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
