"""The jobs of pg_cron: what this database should have, what pg_cron has, and how the one becomes the other.

pg_cron lives in one database of a server, which may be another one than b2s is installed in. Of its jobs only
those are looked at that run in this database and whose name begins with `b2s ` and its name.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Final, Literal

import psycopg
from psycopg import conninfo, sql

from b2s.db import Connection, connect
from b2s.errors import DatabaseError

EVERY_FEW_SECONDS: Final = (1, 5)
"""The version from which on pg_cron takes `10 seconds`."""
_SCHEDULER: Final = """
select a.datname from pg_catalog.pg_stat_activity a
 where a.application_name = 'pg_cron scheduler' and a.datname is not null limit 1"""
_EXTENSION: Final = """
select e.extversion, has_schema_privilege('cron', 'usage') from pg_catalog.pg_extension e
 where e.extname = 'pg_cron'"""
_EXISTING: Final = """
select j.jobname::text, j.schedule, j.command, j.jobid, j.username, j.active from cron.job j
 where j.database = %(database)s
   and (starts_with(j.jobname::text, 'b2s ' || %(database)s || ' ')
        or j.jobname ~ '^b2s .{1,10} [0-9a-f]{8}$')
 order by j.jobname, j.jobid"""
_LAST: Final = """
select j.jobname::text, d.status, d.return_message,
       j.schedule = '* * * * *' and d.status not in ('starting', 'running', 'sending')
         and coalesce(d.end_time, d.start_time) < clock_timestamp() - interval '3 minutes',
       j.command like 'select %%' and d.status in ('starting', 'running', 'sending')
         and d.start_time < clock_timestamp() - interval '3 minutes'
  from cron.job j
  left join lateral (
    select * from cron.job_run_details d where d.jobid = j.jobid order by d.runid desc limit 1) d on true
 where j.database = %(database)s and j.active and starts_with(j.jobname::text, 'b2s ' || %(database)s || ' ')
 order by j.jobname"""
_SHOW: Final = "select * from cron.job_run_details order by runid desc"
_WANTED: Final = "select jobname, schedule, command from etl.list_jobs(%s, %s)"
_MEMBER: Final = """
select r.rolname is not null and pg_has_role(%(role)s, 'etl_operator', 'usage'), r.rolcanlogin
  from (select %(role)s::text as name) n left join pg_catalog.pg_roles r on r.rolname = n.name"""


@dataclass(frozen=True, slots=True)
class Job:
    """A job as it should be."""

    name: str
    schedule: str
    command: str


@dataclass(frozen=True, slots=True)
class ExistingJob:
    """A job that pg_cron has."""

    job: Job
    job_id: int
    owner: str
    is_active: bool


@dataclass(frozen=True, slots=True)
class JobChange:
    """What turns the jobs that there are into those that there should be: + new, ~ changed, - gone."""

    action: str
    name: str
    fields: dict[str, tuple[Any, Any]]
    wanted: Job | None = None
    existing: ExistingJob | None = None


class NoCron(Exception):
    """No jobs can be seen or made: the message says why, `hint` what to do."""

    def __init__(self, message: str, hint: str) -> None:
        super().__init__(message)
        self.hint = hint


@dataclass(frozen=True, slots=True)
class Cron:
    """A way to pg_cron, for the jobs of one database, as the role that owns them."""

    connection: Connection
    version: tuple[int, ...]
    database: str
    """The database that the jobs are for."""
    home: str
    """The database that pg_cron lives in."""
    owner: str
    role: str | None
    """What to become for that, when it is not the login."""

    @property
    def has_seconds(self) -> bool:
        return self.version >= EVERY_FEW_SECONDS

    def existing(self) -> list[ExistingJob]:
        """The jobs of b2s for this database that its role may see."""
        with _as_owner(self.connection, self.role):
            rows = self.connection.execute(_EXISTING.encode(), {"database": self.database}).fetchall()
        return [ExistingJob(Job(name, when, what), *rest) for name, when, what, *rest in rows]

    def changes(self, wanted: Sequence[Job]) -> list[JobChange]:
        """What is to be done, in the order of the names. A job of another owner is one too many."""
        found = self.existing()
        own = {one.job.name: one for one in found if one.owner == self.owner}
        names = {job.name for job in wanted}
        changes = [
            JobChange("-", one.job.name, {"owner": (one.owner, None)}, existing=one)
            for one in found
            if one.owner != self.owner or one.job.name not in names
        ]
        for job in wanted:
            one = own.get(job.name)
            if one is None:
                changes.append(JobChange("+", job.name, {}, job))
            elif fields := _difference(one, job):
                changes.append(JobChange("~", job.name, fields, job, one))
        return sorted(changes, key=lambda change: (change.name, change.action))

    def apply(self, changes: Sequence[JobChange]) -> None:
        """Does it, in one transaction. A job that goes on keeps its number, and the session it has."""
        with _as_owner(self.connection, self.role), self.connection.transaction():
            for change in changes:
                gone = change.existing if change.action == "-" or "active" in change.fields else None
                if gone is not None:
                    self.connection.execute("select cron.unschedule(%s)", [gone.job_id])
                if change.wanted is not None:
                    self._schedule(change.wanted)

    def troubles(self) -> list[tuple[Literal["warn", "fail"], str, str]]:
        """Jobs whose last execution failed, or that have not been executed when they should have been."""
        with _as_owner(self.connection, self.role):
            rows = self.connection.execute(_LAST.encode(), {"database": self.database}).fetchall()
        found: list[tuple[Literal["warn", "fail"], str, str]] = []
        for name, status, message, is_late, is_stuck in rows:
            if is_stuck:
                detail = f"the job {name} began more than three minutes ago and has not ended"
                found.append(("fail", detail, f"in {self.home}: {_SHOW}; what does its backend wait for?"))
            elif is_late:
                detail = f"the job {name} has not begun for three minutes"
                found.append(("fail", detail, f"in {self.home}: {_SHOW}; is the scheduler alive?"))
            elif status == "failed":
                said = (message or "").strip().splitlines() or ["no reason given"]
                hint = f"in {self.home}: {_SHOW}"
                found.append(("fail", f"the job {name} failed when it was last executed: {said[0]}", hint))
        return found

    def _schedule(self, job: Job) -> None:
        values = [job.name, job.schedule, job.command]
        if self.home == self.database:
            self.connection.execute("select cron.schedule(%s, %s, %s)", values)
            return
        try:
            self.connection.execute(
                "select cron.schedule_in_database(%s, %s, %s, %s)", [*values, self.database]
            )
        except psycopg.errors.InsufficientPrivilege as error:
            raise DatabaseError(
                f"{self.owner} may not make jobs for another database than {self.home}, where pg_cron lives",
                f"in {self.home}: grant execute on function cron.schedule_in_database to {self.owner}",
                sqlstate=error.sqlstate,
            ) from error


def _difference(one: ExistingJob, job: Job) -> dict[str, tuple[Any, Any]]:
    fields: dict[str, tuple[Any, Any]] = {}
    if one.job.schedule != job.schedule:
        fields["schedule"] = (one.job.schedule, job.schedule)
    if one.job.command != job.command:
        fields["command"] = (one.job.command, job.command)
    if not one.is_active:
        fields["active"] = (False, True)
    return fields


def wanted_jobs(connection: Connection, config: Mapping[str, Any] | None, *, has_seconds: bool) -> list[Job]:
    """The jobs this database should have; with a configuration, once that is applied."""
    document = json.dumps(config) if config is not None else None
    return [Job(*row) for row in connection.execute(_WANTED.encode(), [document, has_seconds])]


@contextmanager
def open_cron(connection: Connection, dsn: str, cron_dsn: str, role: str | None) -> Iterator[Cron]:
    """The way to pg_cron: here, or in the database where its scheduler runs, or where cron_dsn leads.

    Raises NoCron where there is none, or none that this login may use.
    """
    database = connection.info.dbname
    with ExitStack() as stack:
        home = connection
        if cron_dsn or connection.execute(_EXTENSION.encode()).fetchone() is None:
            elsewhere = cron_dsn or _scheduler_dsn(connection, dsn)
            try:
                home = stack.enter_context(connect(elsewhere))
            except DatabaseError as error:
                raise NoCron(
                    f"cannot reach the database of pg_cron: {error}", "give the way: --cron-dsn"
                ) from error
        yield _cron(home, database, role)


def _scheduler_dsn(connection: Connection, dsn: str) -> str:
    row = connection.execute(_SCHEDULER.encode()).fetchone()
    if row is None or row[0] == connection.info.dbname:
        if row is not None:
            raise NoCron("pg_cron runs here, but its extension is missing", "create extension pg_cron")
        raise NoCron(
            "pg_cron does not run on this server, so nothing fires schedules or executes what is queued",
            "b2s worker --schedule does both; or install pg_cron (docs/clock.md)",
        )
    return conninfo.make_conninfo(dsn, dbname=row[0])


@contextmanager
def _as_owner(connection: Connection, role: str | None) -> Iterator[None]:
    if role is None:
        yield
        return
    try:
        connection.execute(sql.SQL("set role {}").format(sql.Identifier(role)))
    except psycopg.errors.InvalidParameterValue as error:
        raise NoCron(f"clock.role: there is no role {role}", f"create role {role} login") from error
    except psycopg.errors.InsufficientPrivilege as error:
        user = connection.info.user
        raise NoCron(f"clock.role: {user} may not become {role}", f"grant {role} to {user}") from error
    try:
        yield
    finally:
        if not connection.closed:
            connection.execute("reset role")


def _cron(connection: Connection, database: str, role: str | None) -> Cron:
    home = connection.info.dbname
    with _as_owner(connection, role):
        row = connection.execute(_EXTENSION.encode()).fetchone()
        (owner,) = connection.execute("select current_user::text").fetchone() or ("",)
    if row is None:
        raise NoCron(
            f"the extension pg_cron is missing in database {home}", f"in {home}: create extension pg_cron"
        )
    if not row[1]:
        hint = f"in database {home}: grant usage on schema cron to {owner}"
        raise NoCron(f"{owner} may not use pg_cron", hint)
    version = tuple(int(part) for part in row[0].split("-")[0].split("."))
    return Cron(connection, version, database, home, owner, role)


def owner_problem(connection: Connection, owner: str) -> tuple[str, str] | None:
    """Why jobs of a role would fail, and what to do; asked in the database of b2s."""
    row = connection.execute(_MEMBER.encode(), {"role": owner}).fetchone()
    if row is None or not row[0]:
        return f"the jobs run as {owner}, who may not run procedures", f"grant etl_operator to {owner}"
    if not row[1]:
        return f"the jobs run as {owner}, who cannot log in", f"alter role {owner} login"
    return None
