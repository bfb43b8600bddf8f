"""Readers of logs in files and databases."""

import csv
import glob
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import ibis
import ibis.expr.types as ir

from recexplore.errors import InputError
from recexplore.interactions.schema import InteractionLog, materialize

Columns = Mapping[str, str]
_DELIMITERS = (",", ";", "\t", "|")


def read_csv(
    interactions: str,
    items: str,
    *,
    interaction_columns: Columns | None = None,
    item_columns: Columns | None = None,
) -> InteractionLog:
    """A log in CSV files with a header line.

    Args:
      interactions: path or glob of the interactions.
      items: path or glob of the items.
      interaction_columns: our column names → the file's, where they differ.
      item_columns: likewise for the items.

    Raises:
      InputError: a file is missing, empty, not UTF-8 or not CSV, or a mapped column isn't there.
    """
    return _read_files(
        ibis.duckdb.connect().read_csv, interactions, items, interaction_columns, item_columns
    )


def read_parquet(
    interactions: str,
    items: str,
    *,
    interaction_columns: Columns | None = None,
    item_columns: Columns | None = None,
) -> InteractionLog:
    """A log in Parquet files; arguments and errors as for `read_csv`."""
    return _read_files(
        ibis.duckdb.connect().read_parquet, interactions, items, interaction_columns, item_columns
    )


def read_tables(
    url: str,
    interactions: str,
    items: str,
    *,
    interaction_columns: Columns | None = None,
    item_columns: Columns | None = None,
) -> InteractionLog:
    """A log in tables of any database that Ibis can connect to.

    Args:
      url: for `ibis.connect`, such as "bigquery://project/dataset" or "duckdb://log.db".
      interactions: name of the table of interactions.
      items: name of the table of items.
      interaction_columns: our column names → the table's, where they differ.
      item_columns: likewise for the items.

    Raises:
      InputError: the connection fails, or a table or mapped column isn't there.
    """
    connection = _guarded(lambda: ibis.connect(url), url)
    return InteractionLog(
        rename_columns(
            _guarded(lambda: connection.table(interactions), f"{url} table {interactions}"),
            interaction_columns,
            interactions,
        ),
        rename_columns(
            _guarded(lambda: connection.table(items), f"{url} table {items}"), item_columns, items
        ),
        source=f"{url} ({interactions}, {items})",
    )


def read_table_file(read: Callable[..., ir.Table], pattern: str, **options) -> ir.Table:
    """Reads a file now, so that what is wrong with it is said here and by name.

    Args:
      read: `read_csv` or `read_parquet` of an Ibis connection.
      pattern: path or glob.
      **options: for `read`.

    Raises:
      InputError: no such file, an empty one, or one that can't be read.
    """
    if not isinstance(pattern, str | Path):
        raise InputError(f"{pattern!r} is not a path. Several files are named by one pattern: '*'.")
    paths = [str(pattern)] if Path(pattern).exists() else sorted(glob.glob(str(pattern)))
    if not paths:
        raise InputError(f"{pattern}: there is no such file.")
    for path in paths:
        if Path(path).is_dir():
            raise InputError(f"{path} is a folder; name a file, or a pattern such as {path}/*.csv.")
        if Path(path).stat().st_size == 0:
            raise InputError(f"{path} is empty.")
        _check_format(path, "parquet" if read.__name__ == "read_parquet" else "csv")
    if read.__name__ == "read_csv":
        # All but the types is said, as guessing takes a ragged file for something else.
        options = {"header": True, "skip": 0, "quote": '"', "escape": '"', **options}
        options["delim"] = _delimiter(paths[0])
    try:
        return _guarded(lambda: materialize(read(paths, union_by_name=True, **options)), pattern)
    except InputError as error:
        wrong = [_ragged(path, options["delim"]) for path in paths if "delim" in options]
        raise InputError(next(filter(None, wrong), str(error))) from error


def rename_columns(table: ir.Table, columns: Columns | None, source: str) -> ir.Table:
    """Gives mapped columns our names.

    Raises:
      InputError: a column of the mapping isn't there.
    """
    if not isinstance(columns or {}, Mapping):
        raise InputError(
            f"{source}: the column mapping is {columns!r}; it must be written "
            "{'our name': 'the name in the file'}."
        )
    for ours, theirs in (columns or {}).items():
        if theirs not in table.columns:
            raise InputError(
                f"{source}: there is no column {theirs!r} to use as {ours}. There is: "
                f"{', '.join(table.columns)}."
            )
    if not columns:
        return table
    mapped = {ours: table[theirs] for ours, theirs in columns.items()}
    others = [name for name in table.columns if name not in columns]
    return table.select(*others, **mapped)


def _read_files(read, interactions, items, interaction_columns, item_columns) -> InteractionLog:
    return InteractionLog(
        rename_columns(read_table_file(read, interactions), interaction_columns, interactions),
        rename_columns(read_table_file(read, items), item_columns, items),
        source=f"{interactions}, {items}",
    )


def _delimiter(path: str) -> str:
    with open(path, encoding="utf-8") as file:
        header = file.readline()
    return max(_DELIMITERS, key=header.count)


def _ragged(path: str, delimiter: str) -> str | None:
    """What is wrong with the first row that has another number of fields than the header."""
    with open(path, encoding="utf-8", newline="") as file:
        rows = csv.reader(file, delimiter=delimiter, strict=True)
        try:
            header = next(rows, [])
            for row in rows:
                if row and len(row) != len(header):
                    return (
                        f"{path} line {rows.line_num}: {len(row)} fields, but the header has "
                        f"{len(header)}. Mend the row, or quote fields that hold the delimiter "
                        f"{delimiter!r}."
                    )
        except csv.Error as error:
            return f"{path} line {rows.line_num}: {error}. Is a quote not closed?"
    return None


def _check_format(path: str, wanted: str) -> None:
    with open(path, "rb") as file:
        found = "parquet" if file.read(4) == b"PAR1" else "csv"
    if found != wanted:
        raise InputError(
            f"{path} is {'' if found == 'parquet' else 'not '}Parquet. Use data/{found}.gin, or "
            f"name another file."
        )
    if wanted == "csv":
        _check_utf8(path)


def _check_utf8(path: str) -> None:
    with open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            try:
                line.decode("utf-8")
            except UnicodeDecodeError as error:
                raise InputError(
                    f"{path} line {number}: byte {error.start + 1} is not UTF-8 text. Convert the "
                    "file, for instance with iconv -f latin1 -t utf-8."
                ) from error


def _guarded(read: Callable[[], Any], source: str) -> Any:
    """Turns whatever a back end raises into one paragraph; each has exceptions of its own."""
    try:
        return read()
    except OSError:
        raise
    except Exception as error:
        reason = " ".join(str(error).split())[:300]
        raise InputError(f"{source} can't be read: {reason}") from error
