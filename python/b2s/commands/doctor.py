"""b2s doctor: looks at everything that can be wrong with an installation, and says how to repair it."""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from b2s.db import Connection

_CLOCK = """
select max(l.clock->>'executor'), max(l.clock->>'role'),
       exists (select from etl.schedules s where s.is_active)
  from etl.pipelines l"""
Status = Literal["ok", "hint", "warn", "fail"]


@dataclass(frozen=True, slots=True)
class Finding:
    """The outcome of one check; a remedy when it is not ok. A hint says what could be stronger."""

    check_name: str
    status: Status
    detail: str
    remedy: str | None = None


def configure(parser: argparse.ArgumentParser) -> None:
    """The options of b2s doctor."""
    parser.add_argument(
        "--cron-dsn",
        default=os.environ.get("B2S_CRON_DSN", ""),
        metavar="DSN",
        help="the database pg_cron lives in (B2S_CRON_DSN; default: this one, or where its scheduler is)",
    )
    parser.epilog = "Changes nothing. Exit code 1 when a check fails; hints and warnings do not count."


def execute(arguments: argparse.Namespace) -> int:
    """Prints each check with its outcome."""
    from b2s.output import print_json, style
    from b2s.render import visible

    findings = []
    look = style()
    for finding in _findings(arguments.dsn, Path(arguments.config), arguments.cron_dsn):
        findings.append(finding)
        if not arguments.json:
            padding = " " * (4 - len(finding.status))
            print(f"{look.status(finding.status)}{padding}  {finding.check_name}: {visible(finding.detail)}")
            if finding.remedy:
                print(f"      {look.paint('remedy:', 'cyan')} {visible(finding.remedy)}", flush=True)
    if arguments.json:
        print_json([asdict(finding) for finding in findings])
    return 1 if any(finding.status == "fail" for finding in findings) else 0


def _findings(dsn: str, config: Path, cron_dsn: str) -> Iterator[Finding]:
    from b2s.db import connect
    from b2s.errors import DatabaseError
    from b2s.failure import failure_of

    try:
        with connect(dsn) as connection:
            info = connection.info
            yield Finding(
                "connection", "ok", f"{info.user} at {info.host or 'local socket'}, database {info.dbname}"
            )
            is_usable, installation = _installation(connection)
            yield installation
            if is_usable:
                for row in connection.execute("select * from etl.diagnose()"):
                    yield Finding(*row)
                yield from _jobs(connection, dsn, cron_dsn)
                yield from _configuration(connection, config)
    except DatabaseError as error:
        failure = failure_of(error)
        yield Finding("connection", "fail", failure.message, failure.hint)


def _installation(connection: Connection) -> tuple[bool, Finding]:
    """Whether b2s can be asked anything here, and how its installation is."""
    import psycopg

    from b2s.migrate import pending

    name = "installation"
    try:
        found = pending(connection)
    except psycopg.errors.InsufficientPrivilege:
        user = connection.info.user
        detail = f"{user} may not use schema etl"
        return False, Finding(name, "fail", detail, f"grant etl_reader to {user}")
    row = connection.execute("select to_regprocedure('etl.diagnose()') is not null").fetchone()
    is_usable = row == (True,)
    if found.is_current and is_usable:
        return True, Finding(name, "ok", f"b2s {found.installed}, current")
    detail = f"b2s {found.installed or 'is not installed'}, this is {found.release}"
    return is_usable, Finding(name, "fail", detail, "b2s migrate")


def _jobs(connection: Connection, dsn: str, cron_dsn: str) -> Iterator[Finding]:
    """Whether pg_cron has the jobs it should have, and how they fare."""
    from b2s.jobs import NoCron, open_cron, owner_problem, wanted_jobs

    name = "jobs"
    row = connection.execute(_CLOCK).fetchone()
    executor, role, has_schedules = row or ("auto", None, False)
    try:
        with open_cron(connection, dsn, cron_dsn, role) as cron:
            wanted = wanted_jobs(connection, None, has_seconds=cron.has_seconds)
            changes = cron.changes(wanted)
            for change in changes:
                what = {"+": "is missing", "-": "is one too many", "~": "was changed"}[change.action]
                yield Finding(name, "fail", f"the job {change.name} {what}", "b2s sync-config puts it right")
            problem = owner_problem(connection, cron.owner) if wanted else None
            if problem:
                yield Finding(name, "fail", *problem)
            yield from (Finding(name, *found) for found in cron.troubles())
            if not changes:
                detail = f"{len(wanted)} of pg_cron, owned by {cron.owner}" if wanted else "none is needed"
                yield Finding(name, "ok", detail)
    except NoCron as absence:
        if executor == "pg_cron" or (executor == "auto" and has_schedules and not _is_alive(connection)):
            yield Finding(name, "fail", str(absence), absence.hint)
        else:
            yield Finding(name, "ok", f"none: {absence}")


def _is_alive(connection: Connection) -> bool:
    row = connection.execute(
        "select exists (select from etl.heartbeats h"
        " where h.name = 'clock' and h.beat_at > clock_timestamp() - interval '3 minutes')"
    ).fetchone()
    return row == (True,)


def _configuration(connection: Connection, path: Path) -> Iterator[Finding]:
    """Whether the file, when there is one, is what the database has."""
    from b2s.config import ConfigError, load_config
    from b2s.render import plural
    from b2s.sync import plan_config

    if not path.is_file():
        yield Finding("configuration file", "ok", f"{path} is not here, so nothing is compared with it")
        return
    try:
        plan = plan_config(connection, load_config(path))
    except ConfigError as error:
        count = plural(len(error.problems), "problem")
        yield Finding(
            "configuration file", "fail", f"{path} has {count}", "b2s sync-config --dry-run shows them"
        )
        return
    if plan.changes:
        detail = f"{path} has {plural(len(plan.changes), 'change')} that the database does not"
        yield Finding(
            "configuration file",
            "warn",
            detail,
            "b2s sync-config --dry-run shows them, b2s sync-config applies them",
        )
    else:
        yield Finding("configuration file", "ok", f"{path} is what the database has")
