"""Runs as OpenLineage events (https://openlineage.io, spec 2-0-2), made from the run tables as plain JSON.

A run of a pipeline, each attempt of each step and each refresh are runs of OpenLineage: START, then COMPLETE,
FAIL or ABORT. Their ids are computed from what they name, so that sending them again says nothing new. A step
that was skipped never ran and has no event.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, Final
from uuid import UUID

from b2s import __version__
from b2s.db import Connection
from b2s.names import parts_of
from b2s.output import documents

Json = dict[str, Any]

PRODUCER: Final = f"urn:b2s:{__version__}"
_SPEC: Final = "https://openlineage.io/spec"
_EVENT: Final = f"{_SPEC}/2-0-2/OpenLineage.json#/$defs/RunEvent"
_ENDS: Final = {
    "succeeded": "COMPLETE", "advanced": "COMPLETE", "completed_with_warnings": "COMPLETE",
    "failed": "FAIL", "retrying": "FAIL",
    "rolled_back": "ABORT", "cancelled": "ABORT", "abandoned": "ABORT",
}  # fmt: skip
_RUN: Final = """
select h.*, l.description, r.session_user_name from etl.run_history h join etl.runs r using (run_id)
  join etl.pipelines l on l.name = h.pipeline where h.run_id = %(run_id)s"""
_STEPS: Final = """
select s.*, p.watermark_strategy, c.description from etl.step_history s
  join etl.procedure_runs p using (run_id, order_index, attempt)
  join etl.procedures c using (procedure_id)
 where s.run_id = %(run_id)s and s.started_at is not null order by s.order_index, s.attempt"""
_REFRESHES: Final = """
select m.* from etl.mv_refreshes m
 where m.run_id = %(run_id)s and m.started_at is not null order by m.scope_index"""
_LINEAGE: Final = """
select l.pipeline, l.name, l.relation, l.access, l.derived_from from etl.lineage l where l.is_current"""
_COLUMNS: Final = """
select format('%I.%I', n.nspname, c.relname), a.attname, format_type(a.atttypid, a.atttypmod),
       col_description(c.oid, a.attnum), a.attnum::int
  from pg_catalog.pg_class c
  join pg_catalog.pg_namespace n on n.oid = c.relnamespace
  join pg_catalog.pg_attribute a on a.attrelid = c.oid and a.attnum > 0 and not a.attisdropped
 where c.relkind in ('r', 'p', 'v', 'm', 'f') and c.oid >= 16384 and n.nspname <> 'etl'
 order by 1, a.attnum"""
_PARTITIONS: Final = """
select format('%I.%I', n.nspname, c.relname), format('%I.%I', m.nspname, r.relname)
  from pg_catalog.pg_class c
  join pg_catalog.pg_namespace n on n.oid = c.relnamespace
  join pg_catalog.pg_class r on r.oid = pg_partition_root(c.oid)
  join pg_catalog.pg_namespace m on m.oid = r.relnamespace
 where c.relispartition and c.relkind in ('r', 'p', 'f')"""


@dataclass(frozen=True, slots=True)
class Naming:
    """How datasets and jobs are called: `postgres://host:port` and `database.schema.table`."""

    datasets: str
    jobs: str
    database: str

    @classmethod
    def of(cls, connection: Connection, datasets: str | None = None, jobs: str | None = None) -> Naming:
        """The names of a connection; a socket has no host, so it is called localhost."""
        info = connection.info
        host = "localhost" if info.host.startswith(("/", "@")) or not info.host else info.host
        return cls(datasets or f"postgres://{host}:{info.port}", jobs or "b2s", info.dbname)

    def dataset(self, relation: str) -> Json:
        """A relation as a dataset."""
        return {"namespace": self.datasets, "name": ".".join([self.database, *parts_of(relation)])}

    def job(self, *parts: str) -> Json:
        """A job of the pipeline."""
        return {"namespace": self.jobs, "name": ".".join([self.database, *parts])}


@dataclass(slots=True)
class Knowledge:
    """What is known about relations and about who reads and writes them, once for all runs."""

    columns: dict[str, list[Json]] = field(default_factory=dict)
    roots: dict[str, str] = field(default_factory=dict)
    inputs: dict[tuple[str, str], set[str]] = field(default_factory=dict)
    outputs: dict[tuple[str, str], dict[str, dict[str, list[str]]]] = field(default_factory=dict)
    server_version: str = ""

    @classmethod
    def of(cls, connection: Connection) -> Knowledge:
        """Reads it from the catalog and from etl.lineage."""
        known = cls(roots=dict(connection.execute(_PARTITIONS).fetchall()))
        known.server_version = connection.info.parameter_status("server_version") or ""
        for relation, name, type_, description, position in connection.execute(_COLUMNS):
            column = {"name": name, "type": type_, "ordinal_position": position}
            if description:
                column["description"] = description
            known.columns.setdefault(relation, []).append(column)
        for pipeline, name, relation, access, derived in connection.execute(_LINEAGE):
            key = (pipeline, name)
            if access == "write":
                known.outputs.setdefault(key, {}).setdefault(relation, {}).update(derived or {})
            elif access in ("read", "use"):
                known.inputs.setdefault(key, set()).add(relation)
        return known


def static_uuid(instant: datetime, text: str) -> str:
    """A UUID (version 7) that is the same each time for the same instant and text."""
    instant = instant.astimezone(UTC)
    digest = hashlib.sha256(f"{instant.isoformat()} {text}".encode()).digest()
    value = int(instant.timestamp() * 1000) << 80 | int.from_bytes(digest[:10])
    value = value & ~(0xF000 << 64) & ~(0xC000 << 48) | 7 << 76 | 0x8000 << 48
    return str(UUID(int=value))


def events_of(connection: Connection, run_id: int, naming: Naming, known: Knowledge) -> list[Json]:
    """The events of a run, in order of time; of an active one those that have happened."""
    found = documents(connection, _RUN, {"run_id": run_id})
    if not found or found[0]["started_at"] is None:
        return []
    builder = _Builder(found[0], naming, known)
    events = list(builder.run())
    for step in documents(connection, _STEPS, {"run_id": run_id}):
        events += builder.step(step)
    for refresh in documents(connection, _REFRESHES, {"run_id": run_id}):
        events += builder.refresh(refresh)
    # The run begins before its steps and ends after them, also where the clock does not tell them apart.
    order = {"START": 0}
    own = builder.run_uuid
    return sorted(
        events,
        key=lambda one: (
            one["eventTime"],
            order.get(one["eventType"], 1),
            (one["run"]["runId"] == own) == (one["eventType"] != "START"),
        ),
    )


class _Builder:
    """Makes events of the rows of one run."""

    def __init__(self, run: Json, naming: Naming, known: Knowledge) -> None:
        self._run = run
        self._naming = naming
        self._known = known
        self._pipeline: str = run["pipeline"]
        self.run_uuid = self._uuid(run["started_at"])
        self._parent = _facet(
            "ParentRunFacet", "1-2-0", run={"runId": self.run_uuid}, job=naming.job(self._pipeline)
        )

    def run(self) -> Iterator[Json]:
        """The events of the run itself."""
        run = self._run
        facets: Json = {"processing_engine": self._engine(), "b2s_run": self._own(run, _RUN_FIELDS)}
        yield from self._events(
            run, self.run_uuid, facets, self._job([self._pipeline], "PIPELINE", run["description"]), [], []
        )

    def step(self, step: Json) -> Iterator[Json]:
        """The events of one attempt of a step."""
        name = step["procedure"]
        facets: Json = {
            "parent": self._parent,
            "processing_engine": self._engine(),
            "b2s_step": self._own(step, _STEP_FIELDS),
        }
        if step["watermark_strategy"] == "timestamp" and step["window_since"] and step["window_until"]:
            facets["nominalTime"] = _facet(
                "NominalTimeRunFacet", "1-0-1",
                nominalStartTime=_time(step["window_since"]), nominalEndTime=_time(step["window_until"]),
            )  # fmt: skip
        job = self._job([self._pipeline, name], "PROCEDURE", step["description"])
        job["facets"]["sql"] = _facet("SQLJobFacet", "1-1-0", query=step["statement"], dialect="postgresql")
        counts = self._by_root(step["table_counts"] or {})
        key = (self._pipeline, name)
        written = {**{table: {} for table in counts}, **self._known.outputs.get(key, {})}
        read = self._known.inputs.get(key, set()) - set(written)
        identity = self._uuid(step["started_at"], str(step["order_index"]), str(step["attempt"]))
        outputs = [self._output(one, written[one], counts.get(one, 0)) for one in sorted(written)]
        yield from self._events(
            step, identity, facets, job, [self._dataset(one) for one in sorted(read)], outputs
        )

    def refresh(self, refresh: Json) -> Iterator[Json]:
        """The events of the refresh of a materialized view."""
        name = refresh["mv_name"]
        facets: Json = {"parent": self._parent, "processing_engine": self._engine()}
        job = self._job([self._pipeline, name], "MATERIALIZED_VIEW", None)
        read = self._known.inputs.get((self._pipeline, name), set())
        identity = self._uuid(refresh["started_at"], "refresh", str(refresh["scope_index"]))
        inputs = [self._dataset(one) for one in sorted(read)]
        yield from self._events(refresh, identity, facets, job, inputs, [self._dataset(name)])

    # -- parts --

    def _events(
        self, row: Json, identity: str, facets: Json, job: Json, inputs: list[Json], outputs: list[Json]
    ) -> Iterator[Json]:
        started = [{key: value for key, value in one.items() if key != "outputFacets"} for one in outputs]
        yield _event("START", row["started_at"], {"runId": identity, "facets": facets}, job, inputs, started)
        kind = _ENDS.get(row["status"])
        if kind is None or row["ended_at"] is None:
            return
        if row["error_message"] and kind != "COMPLETE":
            facets = {**facets, "errorMessage": _error(row)}
        run = {"runId": identity, "facets": facets}
        yield _event(kind, row["ended_at"], run, job, inputs, outputs if kind == "COMPLETE" else started)

    def _uuid(self, started_at: str, *parts: str) -> str:
        names = [self._naming.jobs, self._naming.database, self._pipeline, str(self._run["run_id"]), *parts]
        return static_uuid(datetime.fromisoformat(started_at), "\0".join(names))

    def _engine(self) -> Json:
        return _facet(
            "ProcessingEngineRunFacet", "1-1-1",
            version=self._known.server_version, name="PostgreSQL", openlineageAdapterVersion=__version__,
        )  # fmt: skip

    def _own(self, row: Json, names: Iterable[str]) -> Json:
        """What b2s alone knows of a run, in a facet of its own."""
        given = {name: row[name] for name in names if row[name] is not None}
        return {
            "_producer": PRODUCER,
            "_schemaURL": f"{_SPEC}/2-0-2/OpenLineage.json#/$defs/RunFacet",
            **given,
        }

    def _job(self, parts: list[str], kind: str, description: str | None) -> Json:
        facets = {
            "jobType": _facet(
                "JobTypeJobFacet", "2-0-4", processingType="BATCH", integration="B2S", jobType=kind
            )
        }
        if description:
            facets["documentation"] = _facet("DocumentationJobFacet", "1-1-0", description=description)
        return {**self._naming.job(*parts), "facets": facets}

    def _by_root(self, counts: Mapping[str, Mapping[str, int]]) -> dict[str, int]:
        """Rows inserted and updated per table, partitions under the name of their table."""
        found: dict[str, int] = {}
        for relation, rows in counts.items():
            root = self._known.roots.get(relation, relation)
            found[root] = found.get(root, 0) + rows["inserted"] + rows["updated"]
        return found

    def _dataset(self, relation: str) -> Json:
        columns = self._known.columns.get(relation)
        facets = {"schema": _facet("SchemaDatasetFacet", "1-2-0", fields=columns)} if columns else {}
        return {**self._naming.dataset(relation), "facets": facets}

    def _output(self, relation: str, derived: Mapping[str, list[str]], rows: int) -> Json:
        dataset = self._dataset(relation)
        fields = {
            column: {"inputFields": [self._input_field(one) for one in sources]}
            for column, sources in sorted(derived.items())
        }
        if fields:
            dataset["facets"]["columnLineage"] = _facet("ColumnLineageDatasetFacet", "1-2-0", fields=fields)
        statistics = _facet("OutputStatisticsOutputDatasetFacet", "1-0-2", rowCount=rows)
        return {**dataset, "outputFacets": {"outputStatistics": statistics}}

    def _input_field(self, column: str) -> Json:
        schema, table, name = parts_of(column)
        dataset = ".".join([self._naming.database, schema, table])
        return {"namespace": self._naming.datasets, "name": dataset, "field": name}


_RUN_FIELDS: Final = ("run_id", "kind", "mode", "status", "requested_by", "as_of", "reason", "parent_run_id")
_STEP_FIELDS: Final = (
    "run_id", "order_index", "attempt", "mode", "status", "type", "group_name", "rows_affected",
    "window_since", "window_until", "error_code", "error_class",
)  # fmt: skip


def _facet(name: str, version: str, /, **fields: Any) -> Json:
    return {
        "_producer": PRODUCER,
        "_schemaURL": f"{_SPEC}/facets/{version}/{name}.json#/$defs/{name}",
        **fields,
    }


def _event(kind: str, at: str, run: Json, job: Json, inputs: list[Json], outputs: list[Json]) -> Json:
    return {
        "eventTime": _time(at),
        "eventType": kind,
        "producer": PRODUCER,
        "schemaURL": _EVENT,
        "run": run,
        "job": job,
        "inputs": inputs,
        "outputs": outputs,
    }


def _time(text: str) -> str:
    """A time as the server writes it, in UTC, with its microseconds: then text sorts as time does."""
    return datetime.fromisoformat(text).astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")


def _error(row: Json) -> Json:
    more = [row.get("error_code"), row.get("error_detail"), row.get("error_hint"), row.get("error_context")]
    trace = "\n".join(str(one) for one in more if one)
    facet = _facet("ErrorMessageRunFacet", "1-0-1", message=row["error_message"], programmingLanguage="SQL")
    return {**facet, "stackTrace": trace} if trace else facet
