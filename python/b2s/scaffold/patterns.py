"""The SQL of a routine by a pattern: correct when it is repeated, in pieces, and on an old range.

The window chooses keys; each chosen key is computed from all of its rows. So a late correction arrives, and a
backfill never puts an older version back.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Final, Literal

from b2s.names import quoted

Pattern = Literal["upsert", "append", "scd2", "snapshot", "delete_insert"]
Strategy = Literal["timestamp", "id", "xid", "none"]

PATTERNS: Final = ("upsert", "append", "scd2", "snapshot", "delete_insert")
STRATEGIES: Final = ("timestamp", "id", "xid", "none")
ARGUMENT_TYPES: Final = {"timestamp": "timestamptz", "id": "bigint", "xid": "pg_snapshot"}
VALID_FROM: Final = "valid_from"
SNAPSHOT_ON: Final = "snapshot_on"
_INCOMPARABLE: Final = frozenset(
    {
        "json",
        "xml",
        "point",
        "line",
        "lseg",
        "box",
        "path",
        "polygon",
        "circle",
        "txid_snapshot",
        "pg_snapshot",
    }
)


@dataclass(frozen=True, slots=True)
class Column:
    """A column that is carried from the source to the target."""

    name: str
    type: str

    @property
    def sql(self) -> str:
        """Its name as it is written."""
        return quoted(self.name)


@dataclass(frozen=True, slots=True)
class Design:
    """What a routine is made of. Names of tables are as SQL writes them; `time` is the column that says when a
    version of a row began (scd2); has_target: the table is there already.
    """

    routine: str
    target: str
    source: str
    pattern: Pattern
    strategy: Strategy
    columns: tuple[Column, ...]
    key: tuple[str, ...]
    watermark: str | None = None
    time: str | None = None
    has_target: bool = False

    @property
    def values(self) -> tuple[Column, ...]:
        """The columns outside the key, and outside what the pattern itself fills."""
        own = {*self.key, self.time if self.pattern == "scd2" else None}
        return tuple(one for one in self.columns if one.name not in own)

    @property
    def keeps_history(self) -> bool:
        """Whether a full refresh would lose what the source does not hold any more."""
        return self.pattern == "snapshot" or (self.pattern == "scd2" and self.strategy == "none")

    @property
    def takes_mode(self) -> bool:
        """Whether the routine can fill its table from nothing."""
        return not self.keeps_history


def routine_sql(design: Design) -> str:
    """CREATE FUNCTION."""
    body = _BODIES[design.pattern](design)
    full = []
    if design.takes_mode:
        full = ["  if p_mode = 'full' then", f"    delete from {design.target};", "  end if;"]
    return "\n".join(
        [
            f"create or replace function {design.routine}({_arguments(design)}) returns bigint",
            "language plpgsql set search_path = '' as $$",
            "declare",
            "  v_rows bigint;",
            *_declared(design),
            "begin",
            *full,
            *body,
            "  return v_rows;",
            "end $$;",
        ]
    )


def _arguments(design: Design) -> str:
    if design.pattern == "snapshot":
        return f"p_{SNAPSHOT_ON} date default null"
    found = ["p_mode text"] if design.takes_mode else []
    if design.strategy != "none":
        type_ = ARGUMENT_TYPES[design.strategy]
        found += [f"p_since {type_}", f"p_until {type_}"]
    return ", ".join(found)


def _declared(design: Design) -> list[str]:
    if design.pattern != "snapshot":
        return []
    return [f"  v_on date := coalesce(p_{SNAPSHOT_ON}, (now() at time zone 'UTC')::date);"]


# -- parts of statements --


def _list(names: Iterable[str], prefix: str = "") -> str:
    return ", ".join(f"{prefix}{quoted(one)}" for one in names)


def _comparable(columns: Iterable[Column], prefix: str) -> str:
    return ", ".join(f"{prefix}{one.sql}{'::text' if one.type in _INCOMPARABLE else ''}" for one in columns)


def _window(design: Design, alias: str) -> str:
    """The condition that chooses the rows of the window."""
    column = f"{alias}.{quoted(design.watermark or '')}"
    if design.strategy == "xid":
        return f"etl.arrived({column}, p_since, p_until)"
    return f"(p_since is null or {column} >= p_since) and {column} < p_until"


def _touched(design: Design, alias: str = "s") -> str:
    """The condition that chooses the keys of the window, or rows with a key at all."""
    is_given = " and ".join(f"{alias}.{quoted(one)} is not null" for one in design.key)
    if design.strategy == "none":
        return is_given
    key = _list(design.key, f"{alias}.")
    shown = f"({key})" if len(design.key) > 1 else key
    return (
        f"{shown} in (\n"
        f"           select {_list(design.key, 'w.')} from {design.source} w\n"
        f"            where {_window(design, 'w')})"
    )


def _newest_first(design: Design, alias: str = "s") -> str:
    """An order in which equal rows are the only ties."""
    newest = [f"{alias}.{quoted(design.watermark)} desc nulls last"] if design.watermark else []
    rest = [one for one in design.values if one.name != design.watermark]
    return ", ".join([*newest, *([_comparable(rest, f"{alias}.")] if rest else [])])


def _update(design: Design, columns: tuple[Column, ...], conflict: str, qualified: str = "t") -> list[str]:
    """ON CONFLICT that leaves equal rows alone."""
    if not columns:
        return [f"  on conflict ({conflict}) do nothing;"]
    sets = ", ".join(f"{one.sql} = excluded.{one.sql}" for one in columns)
    old, new = _comparable(columns, f"{qualified}."), _comparable(columns, "excluded.")
    if len(columns) > 1:
        old, new = f"({old})", f"({new})"
    return [
        f"  on conflict ({conflict}) do update",
        f"    set {sets}",
        f"    where {old} is distinct from {new};",
    ]


_COUNT: Final = "  get diagnostics v_rows = row_count;"


# -- patterns --


def _upsert(design: Design) -> list[str]:
    names = [one.name for one in design.columns]
    order = ", ".join(part for part in (_list(design.key, "s."), _newest_first(design)) if part)
    note = (
        []
        if design.watermark
        else ["  -- Which row of a key counts is up to the order by: put the newest first."]
    )
    return [
        *note,
        f"  insert into {design.target} as t ({_list(names)})",
        f"  select distinct on ({_list(design.key, 's.')}) {_list(names, 's.')}",
        f"    from {design.source} s",
        f"   where {_touched(design)}",
        f"   order by {order}",
        *_update(design, design.values, _list(design.key)),
        _COUNT,
    ]


def _append(design: Design) -> list[str]:
    names = [one.name for one in design.columns]
    condition = _touched(design) if design.strategy == "none" else _window(design, "s")
    order = ", ".join(part for part in (_list(design.key, "s."), _newest_first(design)) if part)
    return [
        f"  insert into {design.target} ({_list(names)})",
        f"  select {_list(names, 's.')}",
        f"    from {design.source} s",
        f"   where {condition}",
        f"   order by {order}",
        f"  on conflict ({_list(design.key)}) do nothing;",
        _COUNT,
    ]


def _delete_insert(design: Design) -> list[str]:
    names = [one.name for one in design.columns]
    key = _list(design.key, "t.")
    shown = f"({key})" if len(design.key) > 1 else key
    window = _window(design, "w") if design.strategy != "none" else ""
    chosen = f"select {_list(design.key, 'w.')} from {design.source} w" + (
        f"\n            where {window}" if window else ""
    )
    return [
        f"  delete from {design.target} t",
        f"   where {shown} in (",
        f"           {chosen});",
        f"  insert into {design.target} ({_list(names)})",
        f"  select {_list(names, 's.')}",
        f"    from {design.source} s",
        f"   where {_touched(design)};",
        _COUNT,
    ]


def _snapshot(design: Design) -> list[str]:
    names = [one.name for one in design.columns]
    return [
        f"  delete from {design.target} t where t.{SNAPSHOT_ON} = v_on;",
        f"  insert into {design.target} ({SNAPSHOT_ON}, {_list(names)})",
        f"  select v_on, {_list(names, 's.')}",
        f"    from {design.source} s;",
        _COUNT,
    ]


def _scd2(design: Design) -> list[str]:
    return _scd2_of_state(design) if design.strategy == "none" else _scd2_of_changes(design)


def _scd2_of_changes(design: Design) -> list[str]:
    """The source holds every version: the history of a key is made anew from all of its rows."""
    key, values = _list(design.key), design.values
    names, time = [one.name for one in values], quoted(design.time or "")
    more = [one for one in (_newest_first(design),) if one]
    lags = ", ".join(f"lag({_comparable([one], 'v.')}) over versions" for one in values)
    now = _comparable(values, "v.")
    is_new = f"({now}) is distinct from ({lags})" if len(values) > 1 else f"{now} is distinct from {lags}"
    same = " and ".join(f"h.{quoted(one)} = t.{quoted(one)}" for one in design.key)
    carried = (Column("valid_to", "timestamptz"), Column("is_current", "boolean"), *values)
    return [
        "  with version as (",
        f"    select distinct on ({_list(design.key, 's.')}, s.{time}) {_list(design.key, 's.')}, s.{time} as valid_from, {_list(names, 's.')}",
        f"      from {design.source} s",
        f"     where s.{time} is not null and {_touched(design)}",
        f"     order by {', '.join([_list(design.key, 's.'), f's.{time}', *more])}",
        "  ), history as (",
        f"    select {key}, valid_from, lead(valid_from) over (partition by {key} order by valid_from) as valid_to, {_list(names)}",
        "      from (select v.*, row_number() over versions = 1",
        f"                        or {is_new} as is_new",
        "              from version v",
        f"            window versions as (partition by {_list(design.key, 'v.')} order by v.valid_from)) c",
        "     where is_new",
        "  ), gone as (",
        f"    delete from {design.target} t",
        f"     where {_touched(design, 't')}",
        f"       and not exists (select from history h where {same} and h.valid_from = t.valid_from)",
        "  )",
        f"  insert into {design.target} as t ({key}, valid_from, valid_to, is_current, {_list(names)})",
        f"  select {_list(design.key, 'h.')}, h.valid_from, h.valid_to, h.valid_to is null, {_list(names, 'h.')}",
        "    from history h",
        *_update(design, carried, f"{key}, valid_from"),
        _COUNT,
    ]


def _scd2_of_state(design: Design) -> list[str]:
    """The source holds what is true now: what has changed or is gone is closed, what is new begins."""
    names = [one.name for one in design.values]
    same = " and ".join(f"s.{quoted(one)} = t.{quoted(one)}" for one in design.key)
    old, new = _comparable(design.values, "t."), _comparable(design.values, "s.")
    if len(names) > 1:
        old, new = f"({old})", f"({new})"
    order = ", ".join(part for part in (_list(design.key, "s."), _comparable(design.values, "s.")) if part)
    return [
        f"  update {design.target} t set valid_to = now(), is_current = false",
        "   where t.is_current",
        f"     and not exists (select from {design.source} s where {same} and {new} is not distinct from {old});",
        f"  insert into {design.target} ({_list(design.key)}, valid_from, valid_to, is_current, {_list(names)})",
        f"  select distinct on ({_list(design.key, 's.')}) {_list(design.key, 's.')}, now(), null, true, {_list(names, 's.')}",
        f"    from {design.source} s",
        f"   where {_touched(design)}",
        f"     and not exists (select from {design.target} t where {same} and t.is_current)",
        f"   order by {order}",
        f"  on conflict ({_list(design.key)}, valid_from) do nothing;",
        _COUNT,
    ]


_BODIES: Final[dict[str, Callable[[Design], list[str]]]] = {
    "upsert": _upsert,
    "append": _append,
    "scd2": _scd2,
    "snapshot": _snapshot,
    "delete_insert": _delete_insert,
}


# -- the table --


def table_sql(design: Design) -> str:
    """CREATE TABLE for the target, with the key that the routine relies on."""
    carried = [
        f"  {one.sql} {one.type}{' not null' if one.name in design.key else ''}" for one in design.columns
    ]
    key = _list(design.key)
    if design.pattern == "scd2":
        carried = [
            *(f"  {one.sql} {one.type} not null" for one in design.columns if one.name in design.key),
            "  valid_from timestamptz not null",
            "  valid_to timestamptz",
            "  is_current boolean not null",
            *(f"  {one.sql} {one.type}" for one in design.values),
            f"  primary key ({key}, valid_from)",
        ]
    elif design.pattern == "snapshot":
        carried = [f"  {SNAPSHOT_ON} date not null", *(f"  {one.sql} {one.type}" for one in design.columns)]
    elif design.pattern != "delete_insert":
        carried.append(f"  primary key ({key})")
    lines = [f"create table if not exists {design.target} (", ",\n".join(carried), ");"]
    index = {"delete_insert": key, "snapshot": SNAPSHOT_ON}.get(design.pattern)
    if index:
        name = quoted(
            f"{design.target.rpartition('.')[2].strip(chr(34))}_{(design.key or (SNAPSHOT_ON,))[0]}_idx"
        )
        lines.append(f"create index if not exists {name} on {design.target} ({index});")
    return "\n".join(lines)
