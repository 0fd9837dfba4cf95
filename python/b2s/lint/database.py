"""Routines as a database has them, and what plpgsql_check says about them where it is installed."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import psycopg

from b2s.db import Connection
from b2s.lint.access import is_temporary, mentions_of
from b2s.lint.engine import Foreign
from b2s.lint.frontend import read
from b2s.lint.rule import Severity
from b2s.lint.sources import Source

if TYPE_CHECKING:
    from b2s.configmodel import Config

_ROUTINES: Final = """
select p.oid::int8, format('%%I.%%I(%%s)', n.nspname, p.proname, oidvectortypes(p.proargtypes)),
       pg_get_functiondef(p.oid),
       l.lanname = 'plpgsql' and p.prorettype <> all ('{trigger,event_trigger}'::regtype[])
  from pg_catalog.pg_proc p
  join pg_catalog.pg_namespace n on n.oid = p.pronamespace
  join pg_catalog.pg_language l on l.oid = p.prolang
 where p.prokind in ('f', 'p') and l.lanname in ('sql', 'plpgsql')
   and (%(names)s::text[] is null and n.nspname not in ('pg_catalog', 'information_schema', 'etl')
        and not exists (select from pg_catalog.pg_depend d where d.objid = p.oid and d.deptype = 'e'
                           and d.classid = 'pg_catalog.pg_proc'::regclass)
        or n.nspname || '.' || p.proname = any (%(names)s::text[]))
 order by 2"""
_CHECKER: Final = """
select quote_ident(n.nspname)
  from pg_catalog.pg_extension e join pg_catalog.pg_namespace n on n.oid = e.extnamespace
 where e.extname = 'plpgsql_check'"""
_CHECK: Final = (
    "select lineno, level, message, detail, hint, position, query"
    " from {}.plpgsql_check_function_tb(%s::oid, fatal_errors => false)"
)
_MISSING: Final = re.compile(r'relation "([^"]+)" does not exist')
_SEVERITIES: Final[dict[str, Severity]] = {"error": "error", "warning": "warning", "warning extra": "warning"}


@dataclass(frozen=True, slots=True)
class Live:
    """What a database holds: sources, findings of plpgsql_check (None: not installed), the server's major
    version.
    """

    sources: tuple[Source, ...]
    foreign: tuple[Foreign, ...] | None
    version: int


def read_sources(connection: Connection) -> dict[int, Source]:
    """The text of each routine that is neither the system's, an extension's nor b2s's own, by oid."""
    rows = connection.execute(_ROUTINES.encode(), {"names": None}).fetchall()
    return {oid: Source(signature, text, is_database=True) for oid, signature, text, _ in rows}


def read_database(connection: Connection, config: Config | None) -> Live:
    """Reads the configured routines, and checks them under the search_path that their runs have.

    Without a configuration: all routines that are neither the system's, an extension's nor b2s's own.
    """
    names = None
    if config is not None:
        names = [(one.routine or one.name).partition("(")[0].strip() for one in config.procedures]
    rows = connection.execute(_ROUTINES.encode(), {"names": names}).fetchall()
    sources = {oid: Source(signature, text, is_database=True) for oid, signature, text, _ in rows}
    checkable = [oid for oid, _, _, can_check in rows if can_check]
    checker = connection.execute(_CHECKER.encode()).fetchone()
    foreign = None
    if checker is not None:
        path = ", ".join(["pg_catalog", *config.search_path]) if config else None
        if path is not None:
            connection.execute("select set_config('search_path', %s, false)", [path])
        foreign = tuple(
            one for oid in checkable for one in _checked(connection, checker[0], oid, sources[oid])
        )
        connection.execute("reset search_path")
    return Live(tuple(sources.values()), foreign, connection.info.server_version // 10000)


def _checked(connection: Connection, schema: str, oid: int, source: Source) -> Iterator[Foreign]:
    """The findings about one routine; a line of theirs counts from where the body begins.

    plpgsql_check runs nothing, so it misses the temporary tables that the routine makes: that is no finding.
    """
    first = source.place(max(0, source.text.find("\nAS $") + 1))[0]
    temporary = {
        access.name
        for routine in read(source).routines
        for access in mentions_of(routine)
        if is_temporary(access)
    }
    try:
        rows = connection.execute(_CHECK.format(schema).encode(), [oid]).fetchall()
    except psycopg.Error as error:
        message = f"plpgsql_check failed: {error.diag.message_primary or error}"
        rows = [(None, "warning", message, None, None, None, None)]
    for line, level, message, detail, hint, position, query in rows:
        missing = _MISSING.search(message)
        if missing and missing[1] in temporary:
            continue
        shown = f"{message} ({detail})" if detail else message
        offset = _offset(source, first + (line or 1) - 1, position, query)
        yield Foreign(source, offset, shown, hint, _SEVERITIES.get(level, "info"), source.path)


def _offset(source: Source, line: int, position: int | None, query: str | None) -> int:
    """The place of a finding: in the statement where it is known, else the first word of its line."""
    text = source.line(line)
    begin = source.offset(line) + len(text) - len(text.lstrip())
    found = source.text.find(query, begin) if position and query else -1
    return found + position - 1 if position and found >= 0 else begin
