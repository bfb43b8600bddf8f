"""Examples by number: TFRecord shards with an index beside them, read at random, in numpy.

An example's id is its place in the index. The shards are what any reader of TFRecords understands:
each record is its size (8 bytes) and a checksum of it (4), the bytes, and a checksum of those (4).
"""

import mmap
import os
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int

from recexplore import artifacts
from recexplore.errors import InputError

NUM_SHARDS = 16  # more than hosts are likely to be, so that any reader can share them out
HEADER, FOOTER = 12, 4  # bytes around those of a record
INDEX = np.dtype(
    [
        ("shard", "<i4"),
        ("offset", "<i8"),  # of the record's header
        ("size", "<i4"),  # of its bytes
        ("checksum", "<u4"),  # CRC-32 of its bytes
        ("inputs", "<i4"),  # tokens of the prompt
        ("targets", "<i4"),  # of the description, EOS included
        ("rejected", "<i4"),  # of the worse description, EOS included; 0 where there is none
    ]
)


def shard_path(folder: Path, split: str, shard: int) -> Path:
    """Where a shard lies."""
    return folder / f"{split}-{shard:05d}-of-{NUM_SHARDS:05d}.tfrecord"


def index_path(folder: Path, split: str) -> Path:
    """Where a split's index lies."""
    return folder / f"{split}.index.npy"


def write_records(
    folder: Path, split: str, records: Sequence[bytes], open_shard: Callable[[str], Any]
) -> None:
    """Writes records as TFRecord shards, dealt out in turn.

    Args:
      folder: of the shards.
      split: of the records.
      records: serialised examples.
      open_shard: path → a writer, such as tf.io.TFRecordWriter.
    """
    for shard in range(NUM_SHARDS):
        with open_shard(os.fspath(shard_path(folder, split, shard))) as writer:
            for record in records[shard::NUM_SHARDS]:
                writer.write(record)


def write_index(folder: Path, split: str, index: np.ndarray) -> None:
    """Writes an array of `INDEX`."""
    with artifacts.new_file(index_path(folder, split)) as temporary:
        with open(temporary, "wb") as file:
            np.save(file, index)


def has_pairs(folder: Path) -> bool:
    """Whether the examples of a folder name a worse description each."""
    indices = [_read_index(path) for path in sorted(folder.glob("*.index.npy"))]
    return any(len(index) and index[0]["rejected"] > 0 for index in indices)


class ExampleFiles:
    """The examples of a split.

    Args:
      folder: as written by `seqio_tasks.write_examples`.
      split: train or validation.

    Raises:
      InputError: there are none, the index is missing or damaged, or the shards are not those that
        it was made with.
    """

    def __init__(self, folder: Path, split: str):
        self._path = index_path(folder, split)
        if not self._path.exists() and any(folder.glob(f"{split}-*.tfrecord")):
            raise InputError(f"{self._path} is missing. Run `recexplore tokenize` again.")
        self._index = _read_index(self._path) if self._path.exists() else np.zeros(0, INDEX)
        if not len(self._index):
            raise InputError(
                f"{folder} holds no {split} examples. The log has no novel transition in that "
                "period, or no item that a user engaged with: check transitions.split_times and "
                "the look-back window."
            )
        # Examples are dealt out in turn, so the last few are the ends of their shards.
        ends = np.zeros(NUM_SHARDS, np.int64)
        last = self._rows(np.arange(max(len(self._index) - NUM_SHARDS, 0), len(self._index)))
        ends[last["shard"]] = last["offset"] + HEADER + last["size"] + FOOTER
        self._shards = []
        for shard, end in enumerate(ends.tolist()):
            path = shard_path(folder, split, shard)
            size = path.stat().st_size if path.exists() else 0
            if size != end:
                raise self._wrong(f"{path.name} has {size} bytes, not {end}")
            self._shards.append(_mapped(path) if end else b"")

    def __len__(self) -> int:
        """N."""
        return len(self._index)

    @property
    def pairs(self) -> bool:
        """Whether each example names a worse description."""
        return bool(self._index[0]["rejected"] > 0)

    def token_counts(self, ids: Int[np.ndarray, "P"]) -> dict[str, Int[np.ndarray, "P"]]:
        """Tokens of some examples' `inputs`, `targets` and `rejected`, as in `INDEX`."""
        rows = self._rows(ids)
        return {name: rows[name].astype(np.int64) for name in ("inputs", "targets", "rejected")}

    def read(self, ids: Int[np.ndarray, "P"]) -> list[bytes]:
        """The records of some examples.

        Raises:
          InputError: a record is not the one that the index was made with.
        """
        rows = self._rows(ids)
        begins = rows["offset"] + HEADER
        found = []
        for example, shard, begin, end, checksum in zip(
            ids.tolist(),
            rows["shard"].tolist(),
            begins.tolist(),
            (begins + rows["size"]).tolist(),
            rows["checksum"].tolist(),
            strict=True,
        ):
            record = self._shards[shard][begin:end]
            if zlib.crc32(record) != checksum:
                raise self._wrong(f"example {example} in shard {shard} is another or damaged")
            found.append(record)
        return found

    def _rows(self, ids: np.ndarray) -> np.ndarray:
        rows = self._index[ids]
        if not np.array_equal(rows["shard"], ids % NUM_SHARDS):
            raise self._wrong("it names other shards")
        return rows

    def _wrong(self, why: str) -> InputError:
        return InputError(
            f"{self._path} doesn't match the shards beside it ({why}). Run `recexplore tokenize` "
            "again."
        )


def _read_index(path: Path) -> np.ndarray:
    try:
        index = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, OSError, EOFError) as error:
        raise InputError(
            f"{path} is damaged ({error}). Run `recexplore tokenize` again."
        ) from error
    if index.dtype != INDEX or index.ndim != 1:
        raise InputError(
            f"{path} was not written by this version of recexplore. Run `recexplore tokenize` "
            "again."
        )
    return index


def _mapped(path: Path) -> mmap.mmap:
    with open(path, "rb") as file:
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)


def entries(records: Sequence[bytes]) -> np.ndarray:
    """The index of records that will be dealt out to the shards in turn, its token counts empty."""
    index = np.zeros(len(records), INDEX)
    index["shard"] = np.arange(len(records)) % NUM_SHARDS
    index["size"] = [len(record) for record in records]
    index["checksum"] = [zlib.crc32(record) for record in records]
    for shard in range(NUM_SHARDS):
        sizes = index["size"][shard::NUM_SHARDS].astype(np.int64) + HEADER + FOOTER
        index["offset"][shard::NUM_SHARDS] = np.cumsum(sizes) - sizes
    return index
