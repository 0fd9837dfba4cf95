"""Reads the routines that a database runs, and stores what their SQL says they read and write."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Final

from b2s.db import Connection
from b2s.lineage.static import Analysis, Static
from b2s.lint.database import read_sources
from b2s.lint.frontend import read
from b2s.lint.project import Project, Step
from b2s.lint.sources import Source

_PROCEDURES: Final = """
select p.name, (select r.oid::int8 from pg_catalog.pg_proc r
                 where r.proname = (parse_ident(p.routine_signature, false))[2]
                   and r.oid::regprocedure::text = p.routine_signature),
       s.definition is not distinct from etl._definition(p)
  from etl.procedures p
  join etl.pipelines l using (pipeline_id)
  left join etl.lineage_scans s on s.procedure_id = p.procedure_id and s.source = 'static'
 where p.is_active and l.name = %s
 order by p.name"""
_AS_STORED: Final = "set local search_path = pg_catalog, pg_temp; set local quote_all_identifiers = off"
"""So that signatures are written as in `etl.procedures`: to look one up takes a right on its schema."""
_SEARCH_PATH: Final = "select l.search_path from etl.pipelines l where l.name = %s"
_NAMES: Final = """
select p.oid::int8, n.nspname || '.' || p.proname
  from pg_catalog.pg_proc p join pg_catalog.pg_namespace n on n.oid = p.pronamespace
 where n.nspname not in ('pg_catalog', 'information_schema', 'etl')"""
_TABLES: Final = """
select format('%I.%I', n.nspname, c.relname), array_agg(a.attname::text order by a.attnum)
  from pg_catalog.pg_class c
  join pg_catalog.pg_namespace n on n.oid = c.relnamespace
  join pg_catalog.pg_attribute a on a.attrelid = c.oid and a.attnum > 0 and not a.attisdropped
 where c.relkind in ('r', 'p', 'v', 'm', 'f') and c.oid >= 16384 and c.relpersistence <> 't'
   and n.nspname <> 'etl'
 group by 1"""


@dataclass(frozen=True, slots=True)
class Scan:
    """What was read: by procedure; those of another language are left out."""

    found: dict[str, Static]
    skipped_count: int


class _Library:
    """The routines of a database, parsed when somebody asks for them."""

    def __init__(self, sources: dict[int, Source], names: Iterable[tuple[int, str]]) -> None:
        self._sources = sources
        self._steps: dict[int, Step | None] = {}
        self._oids: dict[str, list[int]] = {}
        for oid, name in names:
            self._oids.setdefault(name, []).append(oid)

    def step(self, oid: int) -> Step | None:
        """The routine of an oid; None when it is neither SQL nor PL/pgSQL."""
        if oid not in self._steps:
            source = self._sources.get(oid)
            steps = Project([read(source)]).steps if source is not None else []
            self._steps[oid] = steps[0] if steps else None
        return self._steps[oid]

    def lookup(self, name: str) -> Iterable[Step]:
        """The routines of a full name."""
        return [step for oid in self._oids.get(name, ()) if (step := self.step(oid)) is not None]


def scan(connection: Connection, pipeline: str, *, only_changed: bool = False) -> Scan:
    """Parses the routines of a pipeline; only_changed: those that are not as they were when last scanned."""
    with connection.transaction():
        connection.execute(_AS_STORED)
        procedures = connection.execute(_PROCEDURES, [pipeline]).fetchall()
    wanted = [(name, oid) for name, oid, is_known in procedures if not (only_changed and is_known)]
    if not wanted:
        return Scan({}, 0)
    library = _Library(read_sources(connection), connection.execute(_NAMES).fetchall())
    row = connection.execute(_SEARCH_PATH, [pipeline]).fetchone()
    analysis = Analysis(library.lookup, dict(connection.execute(_TABLES).fetchall()), row[0] if row else ())
    found = {name: analysis.of(step) for name, oid in wanted if (step := library.step(oid)) is not None}
    return Scan(found, len(wanted) - len(found))


def store(connection: Connection, pipeline: str, found: dict[str, Static]) -> int:
    """Replaces what is known from the SQL of these procedures; returns the number of edges."""
    document: dict[str, Any] = {name: static.document() for name, static in found.items()}
    row = connection.execute(
        "select etl.store_lineage(%s::jsonb, %s)", [json.dumps(document), pipeline]
    ).fetchone()
    return int(row[0]) if row else 0
