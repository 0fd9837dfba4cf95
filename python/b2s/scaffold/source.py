"""What a new routine is to read: columns, key, watermark and time, given or found in the database."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Final

from b2s.db import Connection
from b2s.errors import UsageError
from b2s.names import parts_of
from b2s.scaffold.patterns import Column, Design, Pattern, Strategy

_COLUMNS: Final = """
select a.attname, format_type(a.atttypid, a.atttypmod), pg_get_expr(d.adbin, d.adrelid),
       a.attidentity <> '', a.attgenerated <> ''
  from pg_catalog.pg_attribute a
  left join pg_catalog.pg_attrdef d on d.adrelid = a.attrelid and d.adnum = a.attnum
 where a.attrelid = to_regclass(%s) and a.attnum > 0 and not a.attisdropped order by a.attnum"""
_KEYS: Final = """
select array(select a.attname::text from unnest(i.indkey::int2[]) with ordinality k(attnum, n)
               join pg_catalog.pg_attribute a on a.attrelid = i.indrelid and a.attnum = k.attnum order by k.n)
  from pg_catalog.pg_index i
 where i.indrelid = to_regclass(%s) and i.indisunique and i.indimmediate
   and i.indpred is null and i.indexprs is null
 order by i.indisprimary desc, i.indnatts"""
_TIMES: Final = (
    "ingested_at",
    "loaded_at",
    "received_at",
    "inserted_at",
    "created_at",
    "updated_at",
    "modified_at",
    "at",
)
_TIME_TYPES: Final = ("timestamptz", "timestamp with time zone")
_ID_TYPES: Final = ("bigint", "int8", "integer", "int4", "int")
_PIECE: Final = re.compile(r'\s*("(?:[^"]|"")+"|[^\s,]+)\s+((?:[^,(]|\([^)]*\))+?)\s*(?:,|$)')


@dataclass(frozen=True, slots=True)
class Table:
    """A table as it is, or as it was described."""

    name: str
    columns: tuple[Column, ...]
    keys: tuple[tuple[str, ...], ...] = ()
    identities: frozenset[str] = field(default_factory=frozenset)
    generated: frozenset[str] = field(default_factory=frozenset)

    def column(self, name: str) -> Column | None:
        """The column of a name."""
        return next((one for one in self.columns if one.name == name), None)


def read_table(connection: Connection, name: str) -> Table | None:
    """A table or view of the database; None when there is none of the name."""
    rows = connection.execute(_COLUMNS.encode(), [name]).fetchall()
    if not rows:
        return None
    keys = tuple(tuple(row[0]) for row in connection.execute(_KEYS.encode(), [name]))
    identities = frozenset(r[0] for r in rows if r[3] or (r[2] or "").startswith("nextval("))
    generated = frozenset(r[0] for r in rows if r[4])
    return Table(name, tuple(Column(r[0], r[1]) for r in rows), keys, identities, generated)


def described(name: str, text: str) -> Table:
    """A table from `--columns 'id bigint, amount numeric(10, 2)'`."""
    columns: list[Column] = []
    position = 0
    while position < len(text.rstrip()):
        match = _PIECE.match(text, position)
        if match is None:
            raise UsageError(
                f"--columns cannot be understood from {text[position:].strip()!r} on",
                "write name and type: --columns 'order_id bigint, amount numeric(10, 2), at timestamptz'",
            )
        columns.append(Column(parts_of(match[1])[0], match[2].strip()))
        position = match.end()
    names = [one.name for one in columns]
    twice = next((one for one in names if names.count(one) > 1), None)
    if not columns or twice:
        raise UsageError(
            f"--columns names {twice} twice" if twice else "--columns is empty", "name each column once"
        )
    return Table(name, tuple(columns))


@dataclass(frozen=True, slots=True)
class Wish:
    """What was asked for; None where it is to be found out."""

    target: str
    routine: str
    source: str
    pattern: Pattern
    strategy: Strategy | None
    watermark: str | None
    key: tuple[str, ...]
    time: str | None


def design(wish: Wish, source: Table, target: Table | None) -> Design:
    """Settles what was left open. Raises UsageError for what does not fit together, with the way out."""
    strategy, watermark = _watermark(wish, source)
    if wish.pattern == "snapshot" and strategy != "none":
        raise UsageError(
            f"a snapshot copies all of {source.name}: a window has no meaning for it",
            "leave --strategy out, or use --pattern scd2 for a history of changes",
        )
    time = _time(wish, source, strategy, watermark)
    reserved = {time, watermark if strategy == "xid" else None, *source.generated}
    if wish.pattern == "scd2":
        # What numbers or dates a delivery is no property of what was delivered: each would begin a version.
        reserved |= {watermark, *source.identities}
    carried = [one for one in source.columns if one.name not in reserved or one.name in wish.key]
    if target is not None:
        carried = [one for one in carried if target.column(one.name) is not None]
    if wish.pattern == "scd2":
        carried = [one for one in carried if one.name not in ("valid_from", "valid_to", "is_current")]
    key = _key(wish, source, target, carried)
    missing = [one for one in key if one not in {column.name for column in carried}]
    if missing:
        where = f"both {source.name} and {target.name}" if target else source.name
        raise UsageError(
            f"column {missing[0]} of the key is not in {where}", f"which there are: {_names(source.columns)}"
        )
    made = Design(
        wish.routine,
        wish.target,
        wish.source,
        wish.pattern,
        strategy,
        tuple(carried),
        key,
        watermark,
        time,
        target is not None,
    )
    if wish.pattern == "scd2" and not made.values:
        raise UsageError(
            "a history needs columns outside the key", f"name a smaller --key than {', '.join(key)}"
        )
    _check_target(made, target)
    return made


def _names(columns: Iterable[Column]) -> str:
    return ", ".join(one.name for one in columns)


def _watermark(wish: Wish, source: Table) -> tuple[Strategy, str | None]:
    found = _candidates(source)
    if wish.pattern == "snapshot" and wish.strategy is None:
        return "none", None
    strategy = wish.strategy
    if strategy is None:
        if wish.watermark is None:
            strategy = next((one for one in ("xid", "timestamp") if found[one]), "none")
        else:
            strategy = next((kind for kind, names in found.items() if wish.watermark in names), None)
        if strategy is None:
            raise UsageError(
                f"{source.name}.{wish.watermark} cannot tell new rows",
                "say how it does: --strategy timestamp, id or xid",
            )
    if strategy == "none":
        return "none", None
    watermark = wish.watermark or next(iter(found[strategy]), None)
    if watermark is None or source.column(watermark) is None:
        what = f"no column {wish.watermark}" if wish.watermark else f"no column for the {strategy} strategy"
        hint = (
            f"b2s watermark add-column {source.name}"
            if strategy == "xid"
            else f"name it: --watermark COLUMN; there are {_names(source.columns)}"
        )
        raise UsageError(f"{source.name} has {what}", hint)
    if watermark not in found[strategy]:
        column = source.column(watermark)
        shown = column.type if column else "unknown"
        raise UsageError(
            f"{source.name}.{watermark} is of type {shown}, which the {strategy} strategy cannot read",
            "timestamp needs timestamptz, id bigint or integer, xid xid8",
        )
    return strategy, watermark


def _candidates(source: Table) -> dict[Strategy, list[str]]:
    """For each strategy the columns that could serve it, the likeliest first."""
    times = [
        one.name for one in source.columns if one.type in _TIME_TYPES or one.type.startswith("timestamp")
    ]
    times.sort(key=lambda name: _TIMES.index(name) if name in _TIMES else len(_TIMES))
    ids = [one.name for one in source.columns if one.type in _ID_TYPES]
    ids.sort(key=lambda name: name not in source.identities)
    return {"xid": [one.name for one in source.columns if one.type == "xid8"], "timestamp": times, "id": ids}


def _time(wish: Wish, source: Table, strategy: Strategy, watermark: str | None) -> str | None:
    """When a version of a row began: for a history that is made of changes."""
    if wish.pattern != "scd2" or strategy == "none":
        return None
    time = wish.time or (
        watermark if strategy == "timestamp" else next(iter(_candidates(source)["timestamp"]), None)
    )
    column = source.column(time) if time else None
    if column is None or not (column.type in _TIME_TYPES or column.type.startswith("timestamp")):
        what = (
            f"{source.name}.{time} is no timestamp"
            if column
            else f"nothing in {source.name} says when a version began"
        )
        raise UsageError(what, "name a column of type timestamptz: --valid-from COLUMN")
    return time


def _key(wish: Wish, source: Table, target: Table | None, carried: list[Column]) -> tuple[str, ...]:
    if wish.key or wish.pattern == "snapshot":
        return wish.key
    names = {one.name for one in carried}
    for table in (target, source):
        for key in table.keys if table else ():
            own = tuple(one for one in key if one not in ("valid_from",))
            if own and set(own) <= names:
                return own
    raise UsageError(
        f"nothing says which columns tell the rows of {source.name} apart",
        f"name them: --key; there are {_names(carried)}",
    )


def _check_target(made: Design, target: Table | None) -> None:
    if target is None:
        return
    needed = {
        "scd2": ("valid_from", "valid_to", "is_current"), "snapshot": ("snapshot_on",),
    }.get(made.pattern, ())  # fmt: skip
    missing = [one for one in needed if target.column(one) is None]
    if missing:
        raise UsageError(
            f"{target.name} is there and has no column {missing[0]}, which the pattern {made.pattern} fills",
            f"alter table {target.name} add column ...; or name a table that is not there yet",
        )
    wanted = {*made.key, "valid_from"} if made.pattern == "scd2" else set(made.key)
    if made.pattern in ("upsert", "append", "scd2") and not any(set(key) == wanted for key in target.keys):
        shown = ", ".join([*made.key, *(["valid_from"] if made.pattern == "scd2" else [])])
        raise UsageError(
            f"{target.name} has no unique index on ({shown}), which ON CONFLICT needs",
            f"alter table {target.name} add primary key ({shown})",
        )
