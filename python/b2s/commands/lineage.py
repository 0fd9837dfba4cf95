"""b2s lineage: what procedures read and write, where that differs from what is declared, and whom to tell."""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from b2s.db import Connection

_EPILOG: Final = """\
Three sources, in this order of trust: observed (locks that steps held), catalog (views, parsed bodies),
static (the SQL of the routines; b2s sync-config and --scan read it, with the extra b2s[lint]).

--openlineage takes a file, - for stdout, or a URL. B2S_OPENLINEAGE_API_KEY is sent to a URL as a bearer
token. With --cursor NAME, meant for a clock, each call sends the runs that ended since the last one.

Exit codes: 0 ok; 1 --check has findings (remarks do not count); 2 usage; 3 database or endpoint
unreachable or refused."""
_EDGES: Final = """
select l.pipeline, l.name, l.kind, l.relation, l.access,
       array_agg(distinct l.source order by l.source) as sources, max(l.via) as via,
       max(l.written_rows) as written_rows, max(l.last_seen_at) as last_seen_at,
       max(l.last_run_id) as last_run_id,
       (array_agg(to_jsonb(l.columns) order by l.columns is null, l.source desc))[1] as columns,
       (array_agg(l.derived_from order by l.derived_from is null))[1] as derived_from
  from etl.lineage l
 where l.is_current and (%(pipeline)s::text is null or l.pipeline = %(pipeline)s)
   and (%(names)s::text[] is null or l.name = any (%(names)s) or l.relation = any (%(names)s))
 group by l.pipeline, l.name, l.kind, l.relation, l.access
 order by l.pipeline, l.kind desc, l.name, l.access, l.relation"""
_FINDINGS: Final = """
select f.* from etl.lineage_findings f
 where (%(pipeline)s::text is null or f.pipeline = %(pipeline)s)
   and (%(names)s::text[] is null or f.name = any (%(names)s) or f.relation = any (%(names)s))
 order by array_position('{error,warning,info}', f.severity), f.finding, f.name, f.relation"""
_PIPELINES: Final = """
select l.name from etl.pipelines l
 where exists (select from etl.procedures p where p.pipeline_id = l.pipeline_id and p.is_active)
   and (%(pipeline)s::text is null or l.name = %(pipeline)s) order by 1"""
_COLOURS: Final = {"error": "red", "warning": "yellow", "info": "cyan"}


def configure(parser: argparse.ArgumentParser) -> None:
    """The options of b2s lineage."""
    parser.epilog = _EPILOG
    parser.add_argument("names", nargs="*", metavar="NAME", help="only these procedures or tables")
    parser.add_argument("--pipeline", metavar="NAME", help="only this pipeline")
    parser.add_argument("--columns", action="store_true", help="show columns, and what they are made of")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--check", action="store_true", help="what differs from what is declared")
    what.add_argument("--scan", action="store_true", help="read the SQL of all routines anew and store it")
    what.add_argument(
        "--openlineage", metavar="TARGET", nargs="?", const=os.environ.get("B2S_OPENLINEAGE", ""),
        help="send run events to a file, - or a URL (without one: B2S_OPENLINEAGE)",
    )  # fmt: skip
    parser.add_argument(
        "--ignore", action="append", default=[], metavar="FINDING[=NAME]",
        help="for --check: leave out two_writers, or two_writers=silver.log (repeatable)",
    )  # fmt: skip
    events = parser.add_argument_group("which runs --openlineage sends (default: the latest)")
    events.add_argument("--run", metavar="RUN", help="one run: a number, or latest")
    events.add_argument("--since", metavar="TIME", help="runs that ended at or after a time")
    events.add_argument("--cursor", metavar="NAME", help="runs that were not sent under this name yet")
    events.add_argument(
        "--namespace", metavar="URI", help="namespace of datasets (default: postgres://host:port)"
    )
    events.add_argument("--job-namespace", metavar="TEXT", help="namespace of jobs (default: b2s)")
    events.add_argument(
        "--timeout", type=float, default=10, metavar="SECONDS", help="for an answer to an event (default 10)"
    )


def execute(arguments: argparse.Namespace) -> int:
    """Lists, checks, scans or sends."""
    from b2s.db import connect

    _refuse_misuse(arguments)
    with connect(arguments.dsn) as connection:
        if arguments.scan:
            return _scan(connection, arguments)
        if arguments.check:
            return _check(connection, arguments)
        if arguments.openlineage is not None:
            return _send(connection, arguments)
        return _list(connection, arguments)


def _refuse_misuse(arguments: argparse.Namespace) -> None:
    from b2s.errors import UsageError

    chosen = [name for name in ("run", "since", "cursor") if getattr(arguments, name)]
    if arguments.openlineage == "":
        raise UsageError("--openlineage needs a target", "name a file, - or a URL, or set B2S_OPENLINEAGE")
    if chosen and arguments.openlineage is None:
        raise UsageError(f"--{chosen[0]} says which runs to send", "add --openlineage TARGET")
    if arguments.run and len(chosen) > 1:
        raise UsageError(f"--run names one run, --{chosen[1]} names others", "leave one of them out")
    if arguments.timeout <= 0:
        raise UsageError("--timeout must be longer than zero")


def _parameters(arguments: argparse.Namespace) -> dict[str, Any]:
    return {"pipeline": arguments.pipeline, "names": arguments.names or None}


# -- list and check --


def _list(connection: Connection, arguments: argparse.Namespace) -> int:
    from b2s.output import documents, print_json, print_lines, remark, style
    from b2s.render import Column, table

    edges = documents(connection, _EDGES, _parameters(arguments))
    if arguments.json:
        print_json(edges)
        return 0
    if not edges:
        of = f"of {', '.join(arguments.names)}" if arguments.names else "yet"
        remark(
            f"nothing is known {of}: a run shows what steps read and write, "
            "b2s lineage --scan what their SQL says"
        )
        return 0
    columns = [
        Column("name"), Column("access"), Column("relation"), Column("rows", is_number=True),
        Column("known from"), Column("last seen"), Column("run", is_number=True),
    ]  # fmt: skip
    rows = [_row(edge) for edge in edges]
    if arguments.columns:
        columns.append(Column("columns", may_wrap=True))
        rows = [[*row, _columns(edge)] for row, edge in zip(rows, edges, strict=True)]
    print_lines(table(columns, rows, style()))
    return 0


def _row(edge: dict[str, Any]) -> list[object]:
    relation = edge["relation"] + (f" (through {edge['via']})" if edge["via"] else "")
    seen = (edge["last_seen_at"] or "")[:19].replace("T", " ")
    sources = ", ".join(edge["sources"])
    return [edge["name"], edge["access"], relation, edge["written_rows"], sources, seen, edge["last_run_id"]]


def _columns(edge: dict[str, Any]) -> str:
    derived = edge["derived_from"] or {}
    return ", ".join(
        f"{one} <- {' + '.join(derived[one])}" if one in derived else one for one in edge["columns"] or ()
    )


def _check(connection: Connection, arguments: argparse.Namespace) -> int:
    from b2s.output import documents, print_json, print_lines, remark, style
    from b2s.render import plural

    ignored = [word.partition("=") for word in arguments.ignore]
    findings = [
        one
        for one in documents(connection, _FINDINGS, _parameters(arguments))
        if not any(
            finding == one["finding"] and (not name or name in (one["name"], one["relation"]))
            for finding, _, name in ignored
        )
    ]
    failing = [one for one in findings if one["severity"] in ("error", "warning")]
    if arguments.json:
        print_json({"findings": findings, "is_clean": not failing})
    else:
        look = style()
        for one in findings:
            label = look.paint(f"{one['severity']}[{one['finding']}]:", _COLOURS[one["severity"]])
            print_lines([f"{label} {one['detail']} ({', '.join(one['sources'])})"])
            print_lines([f"  {look.paint('hint:', 'cyan')} {one['remedy']}"])
        remark(plural(len(findings), "finding") if findings else "what is declared is what was found")
        _remark_unknown(connection, arguments.pipeline)
    return 1 if failing else 0


def _remark_unknown(connection: Connection, pipeline: str | None) -> None:
    """Says of how many procedures nothing is known: their silence is no proof."""
    from b2s.output import remark
    from b2s.render import plural

    row = connection.execute(
        "select count(*)::int from etl.procedures p join etl.pipelines l using (pipeline_id)"
        " where p.is_active and (%(pipeline)s::text is null or l.name = %(pipeline)s)"
        " and not exists (select from etl.lineage_scans s where s.procedure_id = p.procedure_id"
        " and s.definition is not distinct from etl._definition(p))",
        {"pipeline": pipeline},
    ).fetchone()
    if row and row[0]:
        remark(
            f"nothing is known of {plural(row[0], 'procedure')}, not run and not read since the last change"
        )


# -- scan --


def _scan(connection: Connection, arguments: argparse.Namespace) -> int:
    from b2s.lineage.scan import scan, store
    from b2s.lint import parser
    from b2s.output import print_json
    from b2s.render import plural

    parser.require()
    counts: list[dict[str, Any]] = []
    for pipeline in _pipelines(connection, arguments.pipeline):
        found = scan(connection, pipeline)
        edges = store(connection, pipeline, found.found)
        opaque = sorted(name for name, static in found.found.items() if not static.is_complete)
        counts.append({"pipeline": pipeline, "procedures": len(found.found), "edges": edges,
                       "incomplete": opaque, "skipped": found.skipped_count})  # fmt: skip
    if arguments.json:
        print_json(counts)
        return 0
    for one in counts:
        print(f"{one['pipeline']}: {one['edges']} edges of {plural(one['procedures'], 'procedure')}")
        if one["incomplete"]:
            print(f"  text known at run time only, a run shows the rest: {', '.join(one['incomplete'])}")
        if one["skipped"]:
            print(f"  neither SQL nor PL/pgSQL: {one['skipped']}")
    return 0


def _pipelines(connection: Connection, pipeline: str | None) -> list[str]:
    from b2s.errors import UsageError

    found = [row[0] for row in connection.execute(_PIPELINES, {"pipeline": pipeline})]
    if not found:
        what = f"there is no pipeline {pipeline}" if pipeline else "no pipeline is configured"
        raise UsageError(what, "write transformations.yaml, then: b2s sync-config")
    return found


# -- OpenLineage --


def _send(connection: Connection, arguments: argparse.Namespace) -> int:
    from b2s.lineage.openlineage import Knowledge, Naming, events_of
    from b2s.lineage.sinks import sink_of
    from b2s.output import print_json, remark
    from b2s.render import plural

    api_key = os.environ.get("B2S_OPENLINEAGE_API_KEY")
    sink = sink_of(arguments.openlineage, api_key, arguments.timeout)
    naming = Naming.of(connection, arguments.namespace, arguments.job_namespace)
    known = Knowledge.of(connection)
    runs, sent = list(_wanted(connection, arguments)), 0
    for run_id in runs:
        sent += sink.send(events_of(connection, run_id, naming, known))
        if arguments.cursor:
            connection.execute(
                "select etl.move_lineage_cursor(%s, %s::bigint[])", [arguments.cursor, [run_id]]
            )
    if arguments.json and arguments.openlineage != "-":
        print_json({"runs": runs, "events": sent})
    else:
        remark(f"{plural(sent, 'event')} of {plural(len(runs), 'run')} sent")
    return 0


def _wanted(connection: Connection, arguments: argparse.Namespace) -> Iterable[int]:
    """The numbers of the runs to send, in order."""
    from b2s.commands.show import get_run, run_id_of

    if arguments.cursor:
        return _unsent(connection, arguments)
    if arguments.since:
        rows = connection.execute(
            (_ENDED_SINCE + _OF_PIPELINE).encode(), _parameters(arguments) | {"since": arguments.since}
        )
        return [row[0] for row in rows]
    run_id = run_id_of(connection, arguments.run or "latest")
    get_run(connection, run_id)
    return [run_id]


_ENDED_SINCE: Final = "select r.run_id from etl.run_history r where r.ended_at >= %(since)s::timestamptz"
_OF_PIPELINE: Final = " and (%(pipeline)s::text is null or r.pipeline = %(pipeline)s) order by r.run_id"
_UNSENT: Final = """
select r.run_id from etl.run_history r left join etl.lineage_cursors c on c.name = %(cursor)s
 where r.ended_at is not null and r.run_id > coalesce(c.floor_run_id, 0)
   and r.run_id <> all (coalesce(c.emitted_run_ids, '{}'))
   and (%(since)s::timestamptz is null or r.ended_at >= %(since)s::timestamptz)"""
_FLOOR: Final = """
select coalesce(max(r.run_id), 0) from etl.runs r
 where r.run_id < all (
         select o.run_id from etl.runs o where o.ended_at is null or o.ended_at >= %(since)s::timestamptz)"""


def _unsent(connection: Connection, arguments: argparse.Namespace) -> Iterator[int]:
    """A new cursor with --since begins there, so that what is older never has to be looked at again."""
    parameters = {"cursor": arguments.cursor, "since": arguments.since, "pipeline": arguments.pipeline}
    floor = 0
    if arguments.since:
        row = connection.execute(_FLOOR, parameters).fetchone()
        floor = row[0] if row else 0
    connection.execute("select etl.move_lineage_cursor(%s, '{}', %s)", [arguments.cursor, floor])
    for row in connection.execute((_UNSENT + _OF_PIPELINE).encode(), parameters).fetchall():
        yield row[0]
