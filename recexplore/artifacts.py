"""Names and schemas of everything in a work directory; atomic write and checked read.

A reader never meets half an artefact: files and folders are built under a temporary name in the
same directory and renamed into place when they are whole.
"""

import contextlib
import fcntl
import json
import os
import shutil
import uuid
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from recexplore.errors import InputError

_HISTORY = pa.list_(pa.int32())
_TURN = ".turn"  # whoever has it locked may write in its folder


def _required(*fields: tuple[str, pa.DataType]) -> list[pa.Field]:
    return [pa.field(name, kind, nullable=False) for name, kind in fields]


INTERACTIONS = pa.schema(
    [
        *_required(
            ("user_id", pa.string()),
            ("item_id", pa.string()),
            ("timestamp", pa.int64()),  # seconds since 1970
            ("watch_fraction", pa.float32()),  # 0..1
            ("liked", pa.bool_()),
            ("shared", pa.bool_()),
            ("skipped", pa.bool_()),
        ),
        pa.field("propensity", pa.float32()),  # probability with which the policy showed the item
        pa.field("policy", pa.string()),  # which policy showed it
    ]
)
ITEMS = pa.schema(
    [
        *_required(("item_id", pa.string()), ("title", pa.string()), ("text", pa.string())),
        pa.field("embedding", pa.list_(pa.float32())),
    ]
)
CLUSTERS = pa.schema(
    _required(
        ("cluster_id", pa.int32()),  # 0..M-1, in order
        ("description", pa.string()),
        ("path", _HISTORY),  # inner nodes of the cluster tree above this leaf, from the top
        ("num_items", pa.int32()),
        ("num_interactions", pa.int64()),
        ("centroid", pa.list_(pa.float32())),
    )
)
ITEM_CLUSTERS = pa.schema(_required(("item_id", pa.string()), ("cluster_id", pa.int32())))
ITEM_CATALOGUE = pa.schema(
    _required(
        ("item_id", pa.string()),
        ("cluster_id", pa.int32()),
        ("popularity", pa.float64()),  # share of the training period's engagements, above 0
        ("recent_popularity", pa.float64()),  # likewise, where the past fades
    )
)
TRANSITIONS = pa.schema(
    [
        *_required(
            ("user_id", pa.string()),
            ("timestamp", pa.int64()),
            ("split", pa.string()),  # train, validation or test
            ("history", _HISTORY),  # distinct clusters, oldest first
            ("next_cluster", pa.int32()),
            ("watch_fraction", pa.float32()),
            ("liked", pa.bool_()),
            ("shared", pa.bool_()),
            ("skipped", pa.bool_()),
        ),
        pa.field("propensity", pa.float32()),
        pa.field("seen", _HISTORY),  # clusters met before, ascending; null where nobody asks
    ]
)
COLLECTIVE = pa.schema(
    _required(
        ("split", pa.string()),
        ("history", _HISTORY),
        ("next_cluster", pa.int32()),
        ("count", pa.int32()),
        ("weight", pa.float32()),  # that many users' worth; the count where all count alike
        ("watch_fraction", pa.float32()),  # the signals' means over the transition's users
        ("liked", pa.float32()),
        ("shared", pa.float32()),
        ("skipped", pa.float32()),
        ("reward", pa.float32()),  # mean of the combined signal
        ("label", pa.float32()),  # 0..1
    )
)
HISTORIES = pa.schema(_required(("history", _HISTORY), ("count", pa.int64())))
PLANS = pa.schema(
    _required(
        ("user_id", pa.string()),
        ("item_id", pa.string()),
        ("timestamp", pa.int64()),
        ("propensity", pa.float32()),
        ("policy", pa.string()),
        ("cluster_id", pa.int32()),
    )
)
TUNING_OUTPUTS = pa.schema(
    _required(
        ("step", pa.int32()),  # of tuning, after which the policy answered
        ("history", pa.int32()),  # place among the histories it was asked about
        ("cluster", pa.int32()),  # -1: the answer is no description, or a cluster of the history
        ("reward", pa.float32()),  # the alignment model's score of the answer
        ("text", pa.string()),
    )
)


def _temporary_beside(path: Path) -> Path:
    return path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")


@contextlib.contextmanager
def new_file(path: Path | str) -> Iterator[Path]:
    """Gives a temporary path to write to; renames it to `path` when the block ends well."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = _temporary_beside(path)
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def new_folder(path: Path | str) -> Iterator[Path]:
    """Gives an empty temporary folder to fill; swaps it for `path` when the block ends well."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = _temporary_beside(path)
    temporary.mkdir()
    try:
        yield temporary
        if path.exists():
            retired = _temporary_beside(path)
            os.replace(path, retired)
            os.replace(temporary, path)
            shutil.rmtree(retired)
        else:
            os.replace(temporary, path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextlib.contextmanager
def locked(folder: Path | str) -> Iterator[None]:
    """One process at a time, also on network file systems, which lock nothing but open files."""
    handle = os.open(Path(folder) / _TURN, os.O_RDWR | os.O_CREAT)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def remove_leftovers(folder: Path | str) -> None:
    """Removes what an interrupted run left under temporary names in `folder`."""
    for leftover in Path(folder).glob(".*.tmp"):
        if leftover.is_dir():
            shutil.rmtree(leftover, ignore_errors=True)
        else:
            leftover.unlink(missing_ok=True)


def write_table(path: Path | str, table: pa.Table, schema: pa.Schema) -> None:
    """Writes `table` as Parquet in exactly `schema`, atomically.

    Raises:
      InputError: a column is missing, can't be cast, or holds nulls where none are allowed.
    """
    missing = [name for name in schema.names if name not in table.column_names]
    if missing:
        raise InputError(f"{path}: can't write the table, column(s) {', '.join(missing)} missing.")
    try:
        table = table.select(schema.names).cast(schema)
    except (pa.ArrowInvalid, ValueError) as error:
        raise InputError(f"{path}: the table doesn't fit its schema: {error}") from error
    for field in schema:
        if not field.nullable and table[field.name].null_count:
            count = table[field.name].null_count
            raise InputError(f"{path}: column {field.name} holds {count} null(s), none expected.")
    with new_file(path) as temporary:
        pq.write_table(table, temporary)


def read_table(path: Path | str, schema: pa.Schema) -> pa.Table:
    """Reads a Parquet file and checks that it has `schema`.

    Raises:
      InputError: the file is missing, damaged, or has other columns or types.
    """
    path = Path(path)
    if not path.exists():
        raise InputError(f"{path} is missing. Run the stage that writes it, or `recexplore run`.")
    try:
        table = pq.read_table(path, partitioning=None)
    except (pa.ArrowInvalid, OSError) as error:
        raise InputError(
            f"{path} can't be read as Parquet ({error}). Remove it and run its stage again."
        ) from error
    expected = {field.name: field.type for field in schema}
    found = {field.name: field.type for field in table.schema}
    wrong = [
        f"{name} (expected {kind}, found {found.get(name, 'nothing')})"
        for name, kind in expected.items()
        if found.get(name) != kind
    ]
    if wrong:
        raise InputError(
            f"{path} was not written by this version of recexplore: column {'; '.join(wrong)}. "
            "Run its stage again in a new work directory."
        )
    return table.select(schema.names)


def write_json(path: Path | str, value: Any) -> None:
    """Writes `value` as readable JSON with sorted keys, atomically."""
    text = json.dumps(value, indent=2, sort_keys=True, allow_nan=False) + "\n"
    with new_file(path) as temporary:
        temporary.write_text(text)


def write_lines(path: Path | str, values: Iterable[Any]) -> None:
    """Writes a line of JSON for every value, atomically."""
    with new_file(path) as temporary, open(temporary, "w") as file:
        for value in values:
            file.write(json.dumps(value, allow_nan=False) + "\n")


def read_json(path: Path | str) -> Any:
    """Reads JSON.

    Raises:
      InputError: the file is missing or damaged.
    """
    try:
        return json.loads(Path(path).read_text())
    except FileNotFoundError as error:
        raise InputError(f"{path} is missing. Run the stage that writes it.") from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{path} is not valid JSON ({error}). Run its stage again.") from error
