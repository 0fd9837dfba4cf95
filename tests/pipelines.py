"""Small pipelines for tests of the engine: a test states only what matters to it.

Every step has a routine `silver.<name>` that by default adds its name to `silver.trace`, so that what was
committed, and in which order, can be read from one table.
"""

from __future__ import annotations

import json
import threading
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Final, NamedTuple

import psycopg
import pytest
from psycopg import sql
from psycopg.rows import dict_row
from psycopg.types.json import Jsonb

from tests.servers import Connection, Database, wait_until

Row = dict[str, Any]

_OBJECTS: Final = """
create schema bronze authorization etl_owner;
create schema silver authorization etl_owner;
set role etl_owner;
create table silver.trace (position bigint generated always as identity, step text not null);
"""

_PROCEDURE: Final[Mapping[str, Any]] = {
    "type": "fact",
    "description": None,
    "dependencies": [],
    "allow_fact_dependency": False,
    "group": None,
    "tags": [],
    "default_mode": "incremental",
    "allow_full_refresh": False,
    "transaction_scope": "per_procedure",
    "isolation": "read committed",
    "params": [],
    "args": {},
    "watermark": None,
    "retries": {"attempts": 3, "backoff_ms": 1, "max_backoff_ms": 1},
    "timeout_ms": None,
    "lock_timeout_ms": None,
    "on_failure": "continue",
    "freshness_ms": None,
    "max_window": None,
    "checks": [],
    "mv_refresh": [],
}

_GATE: Final = 4242


class Run(NamedTuple):
    """What `call etl.start_run` returns."""

    run_id: int
    status: str


class Message(NamedTuple):
    """A notice or warning, as a client receives it."""

    severity: str
    sqlstate: str
    text: str
    detail: str


@dataclass(slots=True)
class Refusal:
    """An error of the server, as a client sees it."""

    sqlstate: str = ""
    message: str = ""
    hint: str = ""
    detail: Row = field(default_factory=dict)

    @property
    def code(self) -> str | None:
        """The stable code in DETAIL."""
        code: str | None = self.detail.get("code")
        return code

    @property
    def codes(self) -> list[str]:
        """The codes of all problems found."""
        return [problem["code"] for problem in self.detail["errors"]]

    @property
    def messages(self) -> list[str]:
        """The messages of all problems found."""
        return [problem["message"] for problem in self.detail["errors"]]


@contextmanager
def refused(sqlstate: str, code: str | None = None) -> Iterator[Refusal]:
    """Expect the server to refuse the statement inside with this SQLSTATE and stable code."""
    refusal = Refusal()
    with pytest.raises(psycopg.Error) as caught:
        yield refusal
    diagnostic = caught.value.diag
    refusal.sqlstate = diagnostic.sqlstate or ""
    refusal.message = diagnostic.message_primary or ""
    refusal.hint = diagnostic.message_hint or ""
    try:
        refusal.detail = json.loads(diagnostic.message_detail or "{}")
    except ValueError:
        refusal.detail = {}
    assert (refusal.sqlstate, refusal.code) == (sqlstate, code), caught.value


class Background:
    """A call in a thread of its own."""

    def __init__(self, work: Callable[[], Any]) -> None:
        self._work = work
        self._value: Any = None
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            self._value = self._work()
        except BaseException as error:  # noqa: BLE001 - handed to whoever asks for the result
            self._error = error

    def result(self, timeout: float = 30) -> Any:
        """What the call returned; an error of it is raised here."""
        self._thread.join(timeout)
        assert not self._thread.is_alive(), f"not finished within {timeout} s"
        if self._error is not None:
            raise self._error
        return self._value


@dataclass(slots=True)
class Gate:
    """A step whose body is `Gate.WAIT` stands still until the gate opens."""

    WAIT = f"perform pg_advisory_xact_lock_shared({_GATE})"

    conn: Connection

    def wait_for_arrivals(self, count: int = 1) -> list[int]:
        """Wait until so many backends stand at the gate; their process ids."""
        pids: list[int] = wait_until(
            self.conn,
            "select array_agg(pid) from pg_locks where locktype = 'advisory' and classid = 0 and objid = %s"
            " and not granted and database = (select oid from pg_database where datname = current_database())"
            " having count(*) >= %s",
            [_GATE, count],
        )
        return pids

    def open(self) -> None:
        self.conn.execute("select pg_advisory_unlock_all()")


class Pipeline:
    """A pipeline under construction in the database of a test, and the sessions that run it."""

    def __init__(self, db: Database, name: str = "bronze_to_silver") -> None:
        self.db = db
        self.name = name
        self.conn = db.connect(options="-c statement_timeout=60s")
        self.procedures: list[Row] = []
        self._roles: list[str] = []
        if self.value("select to_regnamespace('silver') is null"):
            self.sql(_OBJECTS)

    def __enter__(self) -> Pipeline:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for role in self._roles:
            with self.db.server.connect() as conn:
                conn.execute(
                    "select pg_terminate_backend(pid) from pg_stat_activity where usename = %s", [role]
                )
                conn.execute(sql.SQL("drop role {}").format(sql.Identifier(role)))

    # -- building --

    def sql(self, script: str, role: str = "etl_owner") -> None:
        """Run statements as etl_owner, whose are Bronze and Silver, or as etl_engine, whose is schema etl."""
        with self.db.connect() as conn:
            conn.execute(script.encode() if script == _OBJECTS else f"set role {role}; {script}".encode())

    def routine(
        self, name: str, body: str | None = None, arguments: str = "", returns: str = "bigint"
    ) -> None:
        """Create `silver.<name>`, owned by etl_owner; it returns the row count of its last statement."""
        body = body or f"insert into silver.trace (step) values ('{name}')"
        end = "get diagnostics n = row_count; return n;" if returns == "bigint" else ""
        self.sql(
            f"create or replace function silver.{name}({arguments}) returns {returns} language plpgsql as"
            f" $body$ declare n bigint; begin {body}; {end} end $body$"
        )

    def add(self, name: str, body: str | None = None, *, arguments: str = "", **settings: Any) -> None:
        """Configure a procedure, and create its routine unless settings name another one."""
        if "routine" not in settings:
            self.routine(name, body, arguments)
        unknown = set(settings) - set(_PROCEDURE) - {"routine"}
        assert not unknown, unknown
        self.procedures.append({**_PROCEDURE, "name": name, "routine": f"silver.{name}", **settings})

    def spec(self, **settings: Any) -> Row:
        groups = sorted({p["group"] for p in self.procedures if p["group"]})
        return {
            "version": 1,
            "pipeline": self.name,
            "description": None,
            "max_concurrency": 2,
            "search_path": [],
            "groups": [{"name": group, "description": None} for group in groups],
            "procedures": self.procedures,
            "schedules": [],
            **settings,
        }

    def apply(self, **settings: Any) -> Row:
        """Hand the configuration to the database."""
        applied: Row = self.value("select etl.apply_config(%s)", Jsonb(self.spec(**settings)))
        return applied

    def change(self, name: str, **settings: Any) -> None:
        """Change a configured procedure and apply."""
        next(p for p in self.procedures if p["name"] == name).update(settings)
        self.apply()

    # -- running --

    def start(self, conn: Connection | None = None, **arguments: Any) -> Run:
        """`call etl.start_run` with these arguments."""
        row = (conn or self.conn).execute(*call("etl.start_run", arguments)).fetchone()
        assert row is not None
        return Run(*row)

    def start_in_background(self, conn: Connection | None = None, **arguments: Any) -> Background:
        """The same in a session of its own, while the test goes on."""
        conn = conn or self.db.connect()
        return Background(lambda: self.start(conn, **arguments))

    def plan(self, conn: Connection | None = None, **arguments: Any) -> list[Row]:
        """`etl.plan_run` with these arguments."""
        with (conn or self.conn).cursor(row_factory=dict_row) as cursor:
            return cursor.execute(*call("etl.plan_run", arguments, "select * from")).fetchall()

    @contextmanager
    def gate(self) -> Iterator[Gate]:
        """Steps with the body `Gate.WAIT` wait until the gate opens, at the latest when the test leaves."""
        conn = self.db.connect()
        conn.execute("select pg_advisory_lock(%s)", [_GATE])
        gate = Gate(conn)
        try:
            yield gate
        finally:
            gate.open()

    def login(self, *roles: str) -> Connection:
        """A session of a new login role that is a member of these roles and of nothing else."""
        name = f"b2s_test_{uuid.uuid4().hex[:12]}"
        password = uuid.uuid4().hex
        self.conn.execute(
            sql.SQL("create role {} login password {}").format(sql.Identifier(name), sql.Literal(password))
        )
        self._roles.append(name)
        for role in roles:
            self.conn.execute(sql.SQL("grant {} to {}").format(sql.Identifier(role), sql.Identifier(name)))
        return self.db.connect(user=name, password=password)

    # -- reading --

    def rows(self, query: str, *parameters: Any) -> list[Row]:
        with self.conn.cursor(row_factory=dict_row) as cursor:
            return cursor.execute(query.encode(), parameters).fetchall()

    def value(self, query: str, *parameters: Any) -> Any:
        row = self.conn.execute(query.encode(), parameters).fetchone()
        assert row is not None
        return row[0]

    def column(self, query: str, *parameters: Any) -> list[Any]:
        return [row[0] for row in self.conn.execute(query.encode(), parameters).fetchall()]

    def run(self, run_id: int) -> Row:
        return self.rows("select * from etl.runs where run_id = %s", run_id)[0]

    def steps(self, run_id: int) -> list[Row]:
        """Every attempt of every step, in order."""
        return self.rows(
            "select * from etl.procedure_runs where run_id = %s order by order_index, attempt", run_id
        )

    def step(self, run_id: int, name: str) -> Row:
        """The last attempt of a step."""
        return next(s for s in reversed(self.steps(run_id)) if s["procedure_name"] == name)

    def outcomes(self, run_id: int) -> dict[str, str]:
        """How each step ended: its status, or why it was skipped."""
        return {s["procedure_name"]: s["skip_reason"] or s["status"] for s in self.steps(run_id)}

    def trace(self) -> list[str]:
        """The steps whose writes were committed, in the order of writing."""
        return self.column("select step from silver.trace order by position")

    def watermark(self, state_key: str) -> str | None:
        found = self.column("select last_success_watermark from etl.state where state_key = %s", state_key)
        return found[0] if found else None


def call(routine: str, arguments: Mapping[str, Any], verb: str = "call") -> tuple[sql.Composed, list[Any]]:
    """A CALL (or `select * from`) with named arguments; what the routine takes as JSON is passed as jsonb."""
    given = [
        Jsonb(value) if isinstance(value, dict) or name == "mv_refresh" else value
        for name, value in arguments.items()
    ]
    names = [sql.SQL("{} => %s").format(sql.Identifier(name)) for name in arguments]
    return sql.SQL("{} {}({})").format(sql.SQL(verb), sql.SQL(routine), sql.SQL(", ").join(names)), given


def messages_of(conn: Connection) -> list[Message]:
    """From now on, the notices and warnings this connection receives."""
    received: list[Message] = []

    def keep(diagnostic: psycopg.errors.Diagnostic) -> None:
        received.append(
            Message(
                diagnostic.severity_nonlocalized or "",
                diagnostic.sqlstate or "",
                diagnostic.message_primary or "",
                diagnostic.message_detail or "",
            )
        )

    conn.add_notice_handler(keep)
    return received
