"""Installing and upgrading: one transaction, the same for a fresh database and for an old one."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Final

import psycopg

from b2s import __version__
from b2s.db import Connection, connect
from b2s.errors import DatabaseError
from b2s.output import remark
from b2s.sqlfiles import Manifest, load_manifest

_LOOKED_EVERY: Final = 0.2


@dataclass(frozen=True, slots=True)
class Migrated:
    """What an install did: the version before (None: fresh) and now, and the migrations it applied."""

    before: str | None
    after: str
    applied: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Pending:
    """What an install would do."""

    installed: str | None
    release: str
    migrations: tuple[str, ...]

    @property
    def is_current(self) -> bool:
        """Whether the database has this very release."""
        return self.installed == self.release and not self.migrations


def migrate(conninfo: str, *, dry_run: bool = False, wait: float | None = None) -> Migrated:
    """Brings a database to this release. With dry_run everything is executed and then rolled back.

    An active run is refused; with wait (seconds), no run is begun any more and the active ones may end first.
    """
    manifest = load_manifest()
    with connect(conninfo) as connection:
        connection.add_notice_handler(_pass_on)
        if wait is not None:
            _drain(connection, wait)
        with connection.transaction(force_rollback=dry_run):
            return _install(connection, manifest)


def _drain(connection: Connection, seconds: float) -> None:
    """Lets active runs end while none is begun: whoever starts one is told to try again in a moment.

    The lock is the session's, and goes with it.
    """
    deadline = time.monotonic() + seconds
    connection.execute("select set_config('lock_timeout', %s, false)", [f"{int(seconds * 1000) + 1}ms"])
    try:
        connection.execute("select pg_advisory_lock(6435443, 0)")
    except psycopg.errors.LockNotAvailable:
        message = f"another install has been going on for {seconds:g} s"
        raise DatabaseError(message, "wait for it, then try again", sqlstate="PT409") from None
    connection.execute("reset lock_timeout")
    said = ""
    while active := _active_runs(connection):
        if time.monotonic() > deadline:
            raise DatabaseError(
                f"run {active} has not ended within {seconds:g} s; nothing was changed, runs may start again",
                "wait for longer: b2s migrate --wait 2h; or stop it: b2s cancel RUN",
                sqlstate="PT409",
            )
        if active != said:
            remark(f"waiting for run {active} to end; no other run starts meanwhile")
            said = active
        time.sleep(_LOOKED_EVERY)


def _active_runs(connection: Connection) -> str:
    """The runs that any session executes, as text; empty where b2s is not installed.

    Asked as the owner of the schema: whoever installs need not inherit what its roles may do. Who may not
    become the owner either is told so by the install.
    """
    found = connection.execute(
        "select c.relowner::regrole::text from pg_catalog.pg_class c"
        " join pg_catalog.pg_namespace n on n.oid = c.relnamespace"
        " where n.nspname = 'etl' and c.relname = 'run_history'"
    ).fetchone()
    if found is None:
        return ""
    try:
        with connection.transaction():
            connection.execute(b"set local role " + found[0].encode())
            row = connection.execute(
                "select string_agg(run_id::text, ', ' order by run_id) from etl.run_history"
                " where status = 'running' and not is_dead"
            ).fetchone()
    except psycopg.errors.InsufficientPrivilege:
        return ""
    return (row and row[0]) or ""


def _pass_on(diagnostic: psycopg.errors.Diagnostic) -> None:
    """What an install could not do but does without is worth a line."""
    if diagnostic.severity_nonlocalized == "WARNING":
        remark(f"warning: {diagnostic.message_primary}")
        remark(f"hint: {diagnostic.message_hint}")


def _install(connection: Connection, manifest: Manifest) -> Migrated:
    connection.execute("select set_config('b2s.version', %s, true)", [__version__])
    _run(connection, manifest.begin)
    row = connection.execute("select version from etl.installation").fetchone()
    applied = []
    for migration in manifest.migrations:
        is_pending = connection.execute(
            "select etl._begin_migration(%s, %s)", [migration.name, migration.sha256]
        ).fetchone()
        if is_pending == (True,):
            _run(connection, migration.sql)
            applied.append(migration.name)
    for code in manifest.code:
        _run(connection, code)
    _run(connection, manifest.finish)
    return Migrated(row[0] if row else None, __version__, tuple(applied))


def _run(connection: Connection, script: str) -> None:
    connection.execute(script.encode(), prepare=False)


def pending(connection: Connection) -> Pending:
    """What migrate() would do to this database; reads only."""
    manifest = load_manifest()
    names = tuple(migration.name for migration in manifest.migrations)
    try:
        known = {name for (name,) in connection.execute("select name from etl.migrations")}
        row = connection.execute("select version from etl.installation").fetchone()
    except (psycopg.errors.UndefinedTable, psycopg.errors.InvalidSchemaName):
        return Pending(None, __version__, names)
    return Pending(row[0] if row else None, __version__, tuple(name for name in names if name not in known))


def script() -> str:
    """Everything migrate() executes, as one script for psql: psql -v ON_ERROR_STOP=1 -f FILE."""
    manifest = load_manifest()
    parts = [
        f"-- b2s {__version__}, for psql. One transaction: everything or nothing.",
        "\\set ON_ERROR_STOP on\n\\set ON_ERROR_ROLLBACK off\n\\set QUIET on",
        "begin;",
        f"do $$ begin perform pg_catalog.set_config('b2s.version', '{__version__}', true); end $$;",
        manifest.begin,
    ]
    for migration in manifest.migrations:
        parts += [
            f"select etl._begin_migration('{migration.name}', '{migration.sha256}') as is_pending \\gset",
            f"\\if :is_pending\n{migration.sql}\\endif",
        ]
    return "\n".join(
        [*parts, *manifest.code, manifest.finish, "commit;", f"\\echo b2s {__version__} is installed\n"]
    )
