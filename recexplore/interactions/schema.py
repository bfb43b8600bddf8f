"""What a log must look like, and the checks on the way in."""

import uuid
from typing import NamedTuple

import ibis
import ibis.expr.datatypes as dt
import ibis.expr.types as ir

from recexplore.errors import InputError

_REQUIRED = ("user_id", "item_id", "timestamp", "watch_fraction", "liked")
_OPTIONAL = {"shared": False, "skipped": False, "propensity": None, "policy": None}
_TYPES = {
    "user_id": "string",
    "item_id": "string",
    "timestamp": "int64",
    "watch_fraction": "float32",
    "liked": "boolean",
    "shared": "boolean",
    "skipped": "boolean",
    "propensity": "float32",
    "policy": "string",
}
_ITEM_TYPES = {
    "item_id": "string",
    "title": "string",
    "text": "string",
    "embedding": "array<float32>",
}
_YEAR_3000 = 32_503_680_000  # a timestamp beyond it is not in seconds


class InteractionLog(NamedTuple):
    """A log as Ibis expressions, on whatever back end holds it.

    Attributes:
      interactions: one user, one item, one time, with feedback.
      items: what can be shown.
      source: the files or tables it comes from, for messages.
      dropped: rows left out so far, by reason.
    """

    interactions: ir.Table
    items: ir.Table
    source: str = "the log"
    dropped: dict[str, int] = {}


def materialize(table: ir.Table) -> ir.Table:
    """Computes an expression now, into a temporary table where it lives."""
    backend = table.get_backend()
    return backend.create_table(f"recexplore_{uuid.uuid4().hex}", table, temp=True)


def check_log(log: InteractionLog, *, max_dropped_share: float = 0.01) -> InteractionLog:
    """Checks a log and brings it into recexplore's schema.

    Single bad rows (no user, item or time; a time that isn't in seconds since 1970; missing or
    out-of-range feedback; an item that isn't among the items) are left out and counted, as long as
    they are few. So are rows repeated word for word, however many. What is wrong with the log as a
    whole is an error.

    Args:
      log: as a reader gives it. Columns shared, skipped, propensity and policy may be missing from
        the interactions; text and embedding from the items.
      max_dropped_share: largest part of the interactions that may be left out.

    Returns:
      The log with exactly the columns of INTERACTIONS and ITEMS, and counts of dropped rows.

    Raises:
      InputError: a missing or mistyped column, no rows, an item id twice, or too many bad rows.
    """
    items = _check_items(log)
    if log.interactions.count().to_pyarrow().as_py() == 0:
        raise InputError(f"{log.source}: there are no interactions. Is it the right file?")
    rows = _with_types(log.interactions, log.source, _REQUIRED, _OPTIONAL, _TYPES, "interactions")
    total = rows.count().to_pyarrow().as_py()
    faults = {
        "no user_id, item_id or timestamp": rows.user_id.isnull()
        | rows.item_id.isnull()
        | rows.timestamp.isnull(),
        "timestamp not in seconds since 1970 (milliseconds?)": ~rows.timestamp.between(
            1, _YEAR_3000
        ),
        "watch_fraction missing or outside 0..1": _outside(rows.watch_fraction, False),
        "liked, shared or skipped missing or not 0 or 1": rows.liked.isnull()
        | rows.shared.isnull()
        | rows.skipped.isnull(),
        "propensity outside 0..1": _outside(rows.propensity, True),
        "item not among the items": ~rows.item_id.isin(items.item_id),
    }
    reason = ibis.cases(*((bad.fill_null(True), name) for name, bad in faults.items()))
    marked = materialize(rows.mutate(_fault=reason))
    counts = _count_faults(marked)
    _check_share(marked, counts, total, max_dropped_share, log.source)
    good = marked.filter(marked._fault.isnull()).drop("_fault")
    distinct = materialize(good.distinct())
    kept = distinct.count().to_pyarrow().as_py()
    repeated = total - sum(counts.values()) - kept
    if repeated:
        counts["row repeated"] = repeated
    if kept == 0:
        raise InputError(f"{log.source}: no interaction is left after the checks ({counts}).")
    return InteractionLog(distinct, items, log.source, {**log.dropped, **counts})


def _check_items(log: InteractionLog) -> ir.Table:
    if log.items.count().to_pyarrow().as_py() == 0:
        raise InputError(f"{log.source}: there are no items. Is it the right file?")
    optional = {"text": "", "embedding": None}
    items = _with_types(log.items, log.source, ("item_id", "title"), optional, _ITEM_TYPES, "items")
    items = materialize(
        items.mutate(title=items.title.fill_null(""), text=items.text.fill_null(""))
    )
    counted = items.group_by("item_id").aggregate(n=items.count())
    twice = counted.filter((counted.n > 1) | counted.item_id.isnull()).order_by("item_id").limit(1)
    row = twice.to_pyarrow().to_pylist()
    if row:
        raise InputError(
            f"{log.source}: items.item_id must be unique and present; {row[0]['item_id']!r} stands "
            f"in {row[0]['n']} rows. Keep one row for each item."
        )
    return items


def _with_types(table, source, required, optional, types, what) -> ir.Table:
    """Selects and casts columns; a column that can't be what it should is an error."""
    missing = [name for name in required if name not in table.columns]
    if missing:
        raise InputError(
            f"{source}: {what} have no column {', '.join(missing)}. There is: "
            f"{', '.join(table.columns)}. Map your names in gin, for instance "
            f"readers.read_csv.{what[:-1] if what == 'items' else 'interaction'}_columns = "
            f"{{'{missing[0]}': 'YOUR_NAME'}}."
        )
    columns = {}
    for name, kind in types.items():
        if name not in table.columns:
            columns[name] = ibis.literal(optional[name], type=kind) if name in optional else None
            continue
        found, wanted = table[name].type(), dt.dtype(kind)
        if not _can_become(found, wanted):
            raise InputError(
                f"{source}: {what}.{name} is of type {found}, expected {kind}. Convert the column, "
                "or map another one to it."
            )
        columns[name] = _as_boolean(table[name]) if wanted.is_boolean() else table[name].cast(kind)
    return table.select(**columns)


def _can_become(found: dt.DataType, wanted: dt.DataType) -> bool:
    if wanted.is_string():
        return found.is_string() or found.is_integer()
    if wanted.is_integer():
        return found.is_integer()
    if wanted.is_floating():
        return found.is_numeric()
    if wanted.is_boolean():
        return found.is_boolean() or found.is_numeric()
    return found.is_array() or found.is_null()


def _as_boolean(column: ir.Value) -> ir.Value:
    """0 and 1 become false and true, other numbers null."""
    if column.type().is_boolean():
        return column
    return ibis.cases((column == 1, True), (column == 0, False))


def _outside(column: ir.Value, may_be_null: bool) -> ir.BooleanValue:
    wrong = column.isnan() | ~column.between(0, 1)
    return column.notnull() & wrong if may_be_null else column.isnull() | wrong


def _count_faults(marked: ir.Table) -> dict[str, int]:
    bad = marked.filter(marked._fault.notnull())
    counted = bad.group_by("_fault").aggregate(n=bad.count()).order_by("_fault").to_pyarrow()
    return dict(zip(counted["_fault"].to_pylist(), counted["n"].to_pylist(), strict=True))


def _check_share(marked, counts, total, max_dropped_share, source) -> None:
    if sum(counts.values()) <= max_dropped_share * total:
        return
    bad = marked.filter(marked._fault.notnull())
    first = bad.order_by("user_id", "timestamp", "item_id").limit(1).to_pyarrow().to_pylist()[0]
    fault = first.pop("_fault")
    values = ", ".join(f"{name}={value}" for name, value in first.items() if value is not None)
    raise InputError(
        f"{source}: {sum(counts.values())} of {total} interactions are bad, more than "
        f"schema.check_log.max_dropped_share = {max_dropped_share}: "
        f"{'; '.join(f'{n} × {name}' for name, n in counts.items())}. For instance {fault}: "
        f"{values}. Mend the log or its column mapping."
    )
