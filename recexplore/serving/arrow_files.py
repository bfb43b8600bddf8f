"""Columns of numbers in an Arrow file that is read where it lies.

IPC files, uncompressed and in one batch: opening one maps it into memory, and the same values give
the same bytes.
"""

import hashlib
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa

from recexplore.errors import InputError

_KINDS = {
    pa.int64(): np.int64,
    pa.int32(): np.int32,
    pa.uint8(): np.uint8,
    pa.float32(): np.float32,
}


def number(name: str, kind: pa.DataType) -> pa.Field:
    """A column of numbers, one a row."""
    return pa.field(name, kind, nullable=False)


def numbers(name: str, kind: pa.DataType, size: int) -> pa.Field:
    """A column of `size` numbers a row."""
    values = pa.field("item", kind, nullable=False)
    return pa.field(name, pa.list_(values, size), nullable=False)


def write(path: Path, columns: Sequence[np.ndarray], schema: pa.Schema) -> None:
    """Writes arrays, in one batch, as the columns of a schema."""
    arrays = [
        pa.array(column)
        if column.ndim == 1
        else pa.FixedSizeListArray.from_arrays(pa.array(column.ravel()), type=field.type)
        for column, field in zip(columns, schema, strict=True)
    ]
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_file(file, schema) as writer:
        writer.write_batch(pa.record_batch(arrays, schema=schema))


def read(path: Path, schema: pa.Schema, described_by: str, remedy: str) -> list[np.ndarray]:
    """Maps a file into memory.

    Args:
      path: of the file.
      schema: that it must have, metadata aside.
      described_by: the file that says which columns there must be, for the error message.
      remedy: what to do about a file that isn't right, likewise.

    Returns:
      The columns, as they lie in the file.

    Raises:
      InputError: it isn't Arrow, or has other columns, or nulls.
    """
    try:
        reader = pa.ipc.open_file(pa.memory_map(str(path)))
        if reader.num_record_batches != 1 or not reader.schema.equals(schema):
            raise InputError(
                f"{path} doesn't have the columns of an exploration table that {described_by} "
                f"describes. {remedy}"
            )
        batch = reader.get_batch(0)
        batch.validate()
    except (pa.ArrowInvalid, OSError) as error:
        raise InputError(f"{path} can't be read as Arrow ({error}). {remedy}") from error
    if any(column.null_count for column in batch.columns):
        raise InputError(f"{path}: a value is null. {remedy}")
    return [_values(column) for column in batch.columns]


def _values(column: pa.Array) -> np.ndarray:
    """A column's values as they lie in memory; Arrow's own way to numpy imports pandas."""
    listed = pa.types.is_fixed_size_list(column.type)
    flat = column.values if listed else column
    kind = _KINDS[flat.type]
    values = np.frombuffer(flat.buffers()[1], kind, len(flat)) if len(flat) else np.zeros(0, kind)
    return values.reshape(-1, column.type.list_size) if listed else values


def digest(arrays: Iterable[np.ndarray], begins: bytes = b"") -> str:
    """SHA-256 of arrays: their types, shapes and values, after some bytes that go before them."""
    found = hashlib.sha256(begins)
    for values in arrays:
        found.update(f" {values.dtype.str} {values.shape} ".encode())
        found.update(np.ascontiguousarray(values).data if values.size else b"")
    return found.hexdigest()
