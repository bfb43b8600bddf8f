"""Readers of logs in files and databases."""

import glob
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import ibis
import ibis.expr.types as ir

from recexplore.errors import InputError
from recexplore.interactions.schema import InteractionLog, materialize

Columns = Mapping[str, str]


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
    paths = sorted(glob.glob(pattern))
    if not paths:
        raise InputError(f"{pattern}: there is no such file.")
    for path in paths:
        if Path(path).is_dir():
            raise InputError(f"{path} is a folder; name a file, or a pattern such as {path}/*.csv.")
        if Path(path).stat().st_size == 0:
            raise InputError(f"{path} is empty.")
        if not path.endswith(".parquet"):
            _check_utf8(path)
    return _guarded(lambda: materialize(read(paths, **options)), pattern)


def rename_columns(table: ir.Table, columns: Columns | None, source: str) -> ir.Table:
    """Gives mapped columns our names.

    Raises:
      InputError: a column of the mapping isn't there.
    """
    for ours, theirs in (columns or {}).items():
        if theirs not in table.columns:
            raise InputError(
                f"{source}: there is no column {theirs!r} to use as {ours}. There is: "
                f"{', '.join(table.columns)}."
            )
    renamed = {ours: theirs for ours, theirs in (columns or {}).items() if ours != theirs}
    hidden = [ours for ours in renamed if ours in table.columns]
    return table.drop(*hidden).rename(renamed) if renamed else table


def _read_files(read, interactions, items, interaction_columns, item_columns) -> InteractionLog:
    return InteractionLog(
        rename_columns(read_table_file(read, interactions), interaction_columns, interactions),
        rename_columns(read_table_file(read, items), item_columns, items),
        source=f"{interactions}, {items}",
    )


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
