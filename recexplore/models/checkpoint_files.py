"""The tensors in a Hugging Face folder's safetensors files: where they stand, and parts of them."""

import json
from pathlib import Path
from typing import NamedTuple

import numpy as np
from safetensors import SafetensorError, safe_open

from recexplore.errors import InputError
from recexplore.models.tensor_names import EMBEDDING_TABLE, MODEL, OUTPUT_TABLE

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
_PREFIXES = ("model.", "language_model.model.", "model.language_model.", "")
_DTYPES = ("F32", "F16", "BF16")


class StoredTensor(NamedTuple):
    """One tensor of a checkpoint.

    Attributes:
      file: where it stands.
      name: in the file.
      shape: of all of it.
      dtype: as safetensors calls it, for instance BF16.
    """

    file: Path
    name: str
    shape: tuple[int, ...]
    dtype: str

    def read(self, part: tuple[slice, ...]) -> np.ndarray:
        """A copy of a part of the tensor.

        The file is opened anew each time: pages of a mapped file count as this process's memory
        until it is closed, and so never more than one part's do.

        Raises:
          InputError: the file has changed or can't be read.
        """
        try:
            with safe_open(self.file, framework="np") as file:
                return file.get_slice(self.name)[part]
        except (SafetensorError, OSError) as error:
            raise InputError(
                f"{self.file}: {self.name} can't be read ({error}). Download the file again."
            ) from error


def stored_tensors(
    folder: Path, pictures: bool = False, has_encoder: bool = False
) -> dict[str, StoredTensor]:
    """Every tensor of the language model in a folder, from the files' headers.

    Args:
      folder: has model.safetensors, or several files and their index.
      pictures: the folder holds a vision tower too, which is left out.
      has_encoder: the language model is one of the T5 family.

    Returns:
      Tensors by the name they have in a folder of a language model alone: "model.layers.0.…"; T5's
      as the files have them.

    Raises:
      InputError: a file is missing, truncated or damaged, or lacks what the index says.
    """
    found = _all_tensors(folder)
    return found if has_encoder else _of_language_model(folder, found, pictures)


def _all_tensors(folder: Path) -> dict[str, StoredTensor]:
    """By the names in the files."""
    found = {}
    for file, expected in _files(folder).items():
        tensors = _read_header(file)
        for name in expected:
            if name not in tensors:
                raise InputError(
                    f"{file} lacks the tensor {name}, which {folder / INDEX_FILE} says it has. "
                    "Download both again."
                )
        found |= tensors
    return found


def _of_language_model(
    folder: Path, found: dict[str, StoredTensor], pictures: bool
) -> dict[str, StoredTensor]:
    starts = [prefix for prefix in _PREFIXES if f"{prefix}{EMBEDDING_TABLE}" in found]
    if not starts:
        raise InputError(
            f"{folder} lacks the tensor {MODEL}{EMBEDDING_TABLE}; it isn't a language model's."
        )
    start = starts[0]
    output = f"{start.removesuffix(MODEL)}{OUTPUT_TABLE}" if start == _PREFIXES[1] else OUTPUT_TABLE
    named = {}
    for name, tensor in found.items():
        if name == output:
            named[OUTPUT_TABLE] = tensor
        elif name.startswith(start):
            named[MODEL + name.removeprefix(start)] = tensor
        elif not pictures:
            named[name] = tensor
    return named


def _files(folder: Path) -> dict[Path, list[str]]:
    """The folder's files, and the tensors that the index says are in each."""
    index, single = folder / INDEX_FILE, folder / SINGLE_FILE
    if not index.exists():
        if single.exists():
            return {single: []}
        hint = ""
        if [*folder.glob("*.bin")]:
            hint = " There are PyTorch files (*.bin); save them as safetensors with transformers."
        raise InputError(f"{folder} has neither {SINGLE_FILE} nor {INDEX_FILE}.{hint}")
    files: dict[Path, list[str]] = {}
    try:
        for name, file in json.loads(index.read_text())["weight_map"].items():
            files.setdefault(folder / file, []).append(name)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(
            f"{index} can't be read as an index of tensors ({error!r}). Download it again."
        ) from error
    for file, names in files.items():
        if not file.exists():
            raise InputError(
                f"{file} is missing; {index} says that it has {len(names)} tensors, {names[0]} "
                "among them. Download it."
            )
    return files


def _read_header(file: Path) -> dict[str, StoredTensor]:
    tensors = {}
    try:
        with safe_open(file, framework="np") as opened:
            for name in opened.keys():
                part = opened.get_slice(name)
                shape = tuple(part.get_shape())
                tensors[name] = StoredTensor(file, name, shape, part.get_dtype())
    except (SafetensorError, OSError) as error:
        raise InputError(f"{file} is damaged or not whole ({error}). Download it again.") from error
    for tensor in tensors.values():
        if tensor.dtype not in _DTYPES:
            raise InputError(
                f"{file}: {tensor.name} is stored as {tensor.dtype}; supported are "
                f"{', '.join(_DTYPES)}. Download a model that isn't quantised."
            )
    return tensors
