"""Chaos: a real pipeline, sessions that execute it together, and everything that may happen to them.

A round brings a batch of rows into Bronze and asks for a run, in one of the ways there are. While sessions
execute it, something happens to them at a random moment: see `FAULTS`. Then the run is resumed, or another
one is started with the next batch, until one succeeds. What must hold then is asked in `Chaos.problems`: each
query of `INVARIANTS` returns what is wrong. In the end `Chaos.differences` compares Silver with that of an
undisturbed run of the same batches.

Steps append to Silver without a key, so that a step that was executed twice, or in the wrong order, shows:
its rows are a function of its batch and of the rows of the steps it depends on.

What is random comes from the seed; how the server interleaves it does not.
"""

from __future__ import annotations

import itertools
import os
import random
import re
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any, Final, NamedTuple

import psycopg

from tests.pipelines import Background, Pipeline, Row, call
from tests.servers import Connection, Database, wait_until

LIMIT_S: Final = 60.0
"""How long one call may take before it is taken for stuck."""

_DONE: Final = ("succeeded", "completed_with_warnings")
_EVENTS_PER_BATCH: Final = 7

# -- the pipeline --

_OBJECTS: Final = """
create table bronze.events (
  id bigint primary key, batch int not null, at timestamptz not null default now(),
  etl_xid xid8 not null default pg_current_xact_id(), v bigint not null);
create index on bronze.events (at);
create index on bronze.events (etl_xid);
create table silver.rows (
  run_id bigint not null, batch int not null, step text not null, k int not null, v bigint not null);
create index on silver.rows (batch, step);
create table silver.skew (
  run_id bigint not null, batch int not null, step text not null, saw bigint not null);
create index on silver.skew (batch, step);
create table silver.pair (id int primary key, n bigint not null);
insert into silver.pair values (1, 0), (2, 0);
create table silver.seen (strategy text not null, event_id bigint not null, v bigint not null);
create table silver.gatekeeper (n int);
create table silver.switch (pace_ms int not null, victim text, fault text, fuse int not null default 0);
insert into silver.switch values (10);
create sequence silver.burnt;
create materialized view silver.by_step as
  select step, count(*) as n, sum(v) as v from silver.rows group by step;
create unique index on silver.by_step (step);
create materialized view silver.of_feeder as
  select batch, sum(v) as v from silver.rows where step = 'fact_feeder' group by batch;
create function silver.hazard(p_step text) returns void language plpgsql as $$
declare
  v_switch silver.switch := (select s from silver.switch s);
begin
  perform pg_sleep(random() * v_switch.pace_ms / 1000.0);
  if v_switch.victim is distinct from p_step then return; end if;
  if v_switch.fault = 'sleep' then
    perform pg_sleep(30);
  elsif v_switch.fuse = 0 or nextval('silver.burnt') <= v_switch.fuse then
    raise exception '% fails on purpose', p_step using errcode = v_switch.fault;
  end if;
end $$;
create function silver.load(p_step text, p_batch int, p_run_id bigint, p_needs text[]) returns void
language plpgsql as $$
begin
  perform silver.hazard(p_step);
  insert into silver.rows
  select p_run_id, p_batch, p_step, k,
         (hashtext(p_step || k || p_batch)
          + (select coalesce(sum(r.v), 0) from silver.rows r
              where r.batch = p_batch and r.step = any (p_needs))) % 1000000007
    from generate_series(1, 5) k;
end $$;
create function silver.skew(p_step text, p_other text, p_batch int, p_run_id bigint) returns void
language plpgsql as $$
declare
  v_saw bigint := (select count(*) from silver.skew s where s.batch = p_batch and s.step = p_other);
begin
  perform pg_sleep(0.005);
  insert into silver.skew values (p_run_id, p_batch, p_step, v_saw);
end $$;
"""

_WINDOWS: Final = {
    "timestamp": ("timestamptz", "at", "b.at < p_until and (p_since is null or b.at >= p_since)"),
    "id": ("bigint", "id", "b.id < p_until and (p_since is null or b.id >= p_since)"),
    "sliced": ("bigint", "id", "b.id < p_until and (p_since is null or b.id >= p_since)"),
    "xid": ("pg_snapshot", "etl_xid", "etl.arrived(b.etl_xid, p_since, p_until)"),
}
_EAGER: Final = {"attempts": 10, "backoff_ms": 5, "max_backoff_ms": 40}
_REFRESH: Final = {"on": "success", "concurrently": "auto"}
_BATCH: Final = {"name": "batch", "type": "integer", "required": True}


def connect(db: Database, **options: Any) -> Connection:
    """A session, as soon as the server takes any: it may just be recovering from a crash."""
    end = time.monotonic() + LIMIT_S
    while True:
        try:
            conn: Connection = psycopg.connect(db.dsn, autocommit=True, **options)
        except psycopg.OperationalError:
            if time.monotonic() > end:
                raise
            time.sleep(0.02)
        else:
            db.connections.append(conn)
            return conn


class Dag:
    """The pipeline, and how batches come into Bronze."""

    def __init__(self, db: Database) -> None:
        self.db = db
        self.pipeline = Pipeline(db)
        self.pipeline.sql(_OBJECTS)
        with db.server.connect() as conn:  # what was said to be committed must outlive a crash
            conn.execute(f"alter database {db.name} set synchronous_commit = on".encode())
            conn.execute(f"alter database {db.name} set deadlock_timeout = '50ms'".encode())
            conn.execute(f"alter database {db.name} set client_connection_check_interval = '50ms'".encode())
        self.plain: list[str] = []
        """Steps that append to silver.rows."""
        self._build()
        self.pipeline.apply(max_concurrency=4)
        self.reconnect()

    def _plain(self, name: str, *needs: str, **settings: Any) -> None:
        needed = "array[" + ", ".join(f"'{need}'" for need in needs) + "]::text[]"
        settings.setdefault("type", name.split("_")[0].replace("group", "fact"))
        before = settings.pop("before", "null")
        by_step = {**_REFRESH, "name": "silver.by_step", "after": "run"}
        self.pipeline.add(
            name,
            f"{before}; perform silver.load('{name}', batch, p_run_id, {needed})",
            arguments="batch int, p_run_id bigint",
            params=[_BATCH],
            dependencies=list(needs),
            mv_refresh=[*settings.pop("mv_refresh", []), by_step],
            **settings,
        )
        self.plain.append(name)

    def _build(self) -> None:
        rng = random.Random(4)  # the same pipeline whatever the seed of the chaos
        for n in range(6):
            self._plain(f"dimension_{n}", *(f"dimension_{m}" for m in range(n) if rng.random() < 0.3))
        for n in range(2):
            self._plain(f"dimension_g{n}", group="dimensions", transaction_scope="per_group")
        for n in range(9):
            needs = [f"dimension_{rng.randrange(6)}"] + [f"fact_{m}" for m in range(n) if rng.random() < 0.3]
            self._plain(f"fact_{n}", *needs, isolation=rng.choice(("read committed", "repeatable read")))
        for n, need in enumerate(("fact_1", "dimension_g0", "group_0")):
            self._plain(f"group_{n}", need, group="facts", transaction_scope="per_group")
        self._plain(
            "fact_locked",
            "dimension_1",
            lock_timeout_ms=60,
            before="lock table silver.gatekeeper in share mode",
        )
        self._plain("fact_timed", "dimension_2", timeout_ms=700)
        of_feeder = {**_REFRESH, "name": "silver.of_feeder", "after": "procedure"}
        self._plain("fact_feeder", "fact_3", mv_refresh=[of_feeder])
        self._plain("fact_last", "group_2", "fact_feeder", "fact_8")
        self._pairs()
        for name, (kind, column, window) in _WINDOWS.items():
            strategy = "id" if name == "sliced" else name
            self.pipeline.add(
                f"window_{name}",
                f"perform silver.hazard('window_{name}');"
                f" insert into silver.seen select '{name}', b.id, b.v from bronze.events b where {window}",
                arguments=f"p_since {kind}, p_until {kind}",
                watermark={
                    "strategy": strategy, "source": [f"bronze.events.{column}"], "delay_ms": 0,
                    "state_key": f"window_{name}",
                },
                max_window=3 if name == "sliced" else None,
            )  # fmt: skip

    def _pairs(self) -> None:
        """Two steps that only together break a rule, and two that lock each other out."""
        for mine, other in (("a", "b"), ("b", "a")):
            self.pipeline.add(
                f"skew_{mine}",
                f"perform silver.skew('skew_{mine}', 'skew_{other}', batch, p_run_id)",
                arguments="batch int, p_run_id bigint",
                params=[_BATCH],
                isolation="serializable",
                retries=_EAGER,
            )
        for name, first, second in (("a", 1, 2), ("b", 2, 1)):
            self.pipeline.add(
                f"deadlock_{name}",
                f"update silver.pair p set n = p.n + 1 where id = {first}; perform pg_sleep(0.01);"
                f" update silver.pair p set n = p.n + 1 where id = {second}",
                retries=_EAGER,
            )

    def reconnect(self) -> None:
        """A new session to ask from: the old one may have died with the server."""
        self.pipeline.conn.close()
        self.pipeline.conn = connect(self.db, options="-c statement_timeout=60s")

    def bring(self, batch: int, conn: Connection | None = None) -> None:
        """Write a batch into Bronze."""
        first = batch * 100
        (conn or self.pipeline.conn).execute(
            "insert into bronze.events (id, batch, v)"
            " select i, %s, i * 7 from generate_series(%s::bigint, %s) i",
            [batch, first, first + _EVENTS_PER_BATCH - 1],
        )

    def request(self, batch: int) -> Row:
        """The arguments of a run over everything."""
        steps = [p["name"] for p in self.pipeline.procedures if p["params"]]
        return {"params": {step: {"batch": batch} for step in steps}}

    def settle(self) -> None:
        """Let the windowed steps read what there is, undisturbed."""
        windowed = [p["name"] for p in self.pipeline.procedures if p["watermark"]]
        unread = (
            "select count(*) from bronze.events e cross join unnest(%s::text[]) s(strategy)"
            " where not exists ("
            "   select from silver.seen r where r.event_id = e.id and r.strategy = s.strategy)"
        )
        for _ in range(10):
            self.pipeline.start(procedures=windowed)
            if self.pipeline.value(unread, list(_WINDOWS)) == 0:
                return
            self.pipeline.value("select true from pg_sleep(0.5)")  # the margin of the clock


# -- what must hold --

_CHAIN: Final = """
with recursive chain(run_id, root) as (
  select r.run_id, r.run_id from etl.runs r where r.parent_run_id is null
  union all
  select r.run_id, c.root from etl.runs r join chain c on c.run_id = r.parent_run_id)
"""

INVARIANTS: Final = {
    "a run or an attempt has no end": """
        select run_id, status from etl.runs where ended_at is null
        union all
        select run_id, procedure_name || ' ' || status from etl.procedure_runs where ended_at is null
        union all select run_id, mv_name || ' ' || status from etl.mv_refreshes where ended_at is null""",
    "a step succeeded twice in one chain of runs": _CHAIN
    + """select c.root, p.procedure_name, array_agg(p.run_id order by p.run_id)
           from etl.procedure_runs p join chain c using (run_id)
          where p.status = 'succeeded' group by 1, 2 having count(*) > 1""",
    "a step ran before what it needs had ended": """
        select p.run_id, p.procedure_name, n.procedure_name, p.started_at, n.ended_at
          from etl.dependencies d
          join etl.procedure_runs p using (procedure_id)
          join etl.procedure_runs n on n.run_id = p.run_id and n.procedure_id = d.depends_on_id
         where p.status in ('succeeded', 'advanced', 'failed', 'retrying') and n.started_at is not null
           and (n.scope_index <> p.scope_index or n.attempt = p.attempt and p.status = 'succeeded')
           and (n.ended_at > p.started_at
                or n.status not in ('succeeded', 'retrying', 'advanced', 'rolled_back'))""",
    "a fact started before the dimensions had ended": """
        select f.run_id, f.procedure_name, f.started_at, d.ended_at from
          (select run_id, procedure_name, started_at from etl.procedure_runs
            where procedure_type = 'fact' and status <> 'skipped' and started_at is not null) f
          join (select run_id, max(ended_at) as ended_at from etl.procedure_runs
                 where procedure_type = 'dimension' and started_at is not null
                 group by run_id) d using (run_id)
         where f.started_at < d.ended_at""",
    "a refresh started before its feeders had ended": """
        select m.run_id, m.mv_name, p.procedure_name from etl.mv_refreshes m
          join etl.procedure_runs p on p.run_id = m.run_id and p.order_index = any (m.feeders)
         where m.status = 'succeeded' and p.ended_at > m.started_at""",
    "Silver and the record of a step disagree": """
        select * from (
          select run_id, procedure_name as step, count(*) * 5 as recorded from etl.procedure_runs
           where status = 'succeeded' and procedure_name = any (%(plain)s) group by 1, 2) r
          full join (select run_id, step, count(*) as written from silver.rows group by 1, 2) w
              using (run_id, step)
         where recorded is distinct from written""",
    "the pair was updated more or less often than is on record": """
        select n, recorded from silver.pair, lateral (
          select count(*) as recorded from etl.procedure_runs
           where procedure_name like 'deadlock%%' and status = 'succeeded') r
         where n <> recorded""",
    "two serializable steps saw what no order explains": """
        select batch, array_agg(step || ' saw ' || saw) from silver.skew group by batch
        having count(*) > 2 or count(*) = 2 and sum(saw) <> 1""",
    "a group was committed in part": """
        select run_id, array_agg(step) from (
          select distinct run_id, step from silver.rows where step like 'group%%') s
         group by run_id having count(*) <> 3
        union all
        select run_id, array_agg(step) from (
          select distinct run_id, step from silver.rows where step like 'dimension_g%%') s
         group by run_id having count(*) <> 2""",
    "a row was read twice": """
        select strategy, event_id, count(*) from silver.seen group by 1, 2 having count(*) > 1""",
    "a watermark moved from elsewhere": """
        select * from (
          select state_key, old_watermark,
                 lag(new_watermark) over (partition by state_key order by state_history_id) as before
            from etl.state_history) h
         where old_watermark is distinct from before""",
    "a lock of b2s was left behind": """
        select pid, classid, objid, mode from pg_locks
         where locktype = 'advisory' and classid between 6435443 and 6435449
           and database = (select oid from pg_database where datname = current_database())""",
    "a session was left in a transaction": """
        select pid, state, query from pg_stat_activity
         where datname = current_database() and state like 'idle in%%' and pid <> pg_backend_pid()""",
}
"""What is wrong after a round, by name: each query returns no row."""

_AFTER_A_SUCCESS: Final = {
    "a step of a run that succeeded did not": _CHAIN
    + """select p.procedure_id, p.name from etl.procedures p
          where not exists (
            select from etl.procedure_runs s join chain c using (run_id)
             where s.procedure_id = p.procedure_id and s.status in ('succeeded', 'advanced')
               and c.root = (select root from chain where run_id = %(run_id)s))""",
    "a materialized view is not what its query says": """
        (select 'by_step', step, n, v from silver.by_step
         except select 'by_step', step, count(*), sum(v) from silver.rows group by step)
        union all
        (select 'missing', step, count(*), sum(v) from silver.rows group by step
         except select 'missing', step, n, v from silver.by_step)
        union all
        (select 'of_feeder', batch::text, null::bigint, sum(v) from silver.rows
          where step = 'fact_feeder' group by batch
         except select 'of_feeder', batch::text, null::bigint, v from silver.of_feeder)""",
}

# -- sessions --

_SETTINGS: Final = (
    "synchronous_commit",
    "search_path",
    "lock_timeout",
    "statement_timeout",
    "application_name",
)
_LOOK: Final = (
    "select array["
    + ", ".join(f"current_setting('{name}')" for name in _SETTINGS)
    + ", session_user, current_user]"
)
_ALLOWED: Final = {None, "57P01", "57P02", "57P03", "57014", "PT409"}
"""What a call may end with when sessions are killed and cancelled and the server crashes."""


def reason(error: psycopg.Error) -> str:
    """SQLSTATE and stable code of an error."""
    code = re.search(r'"code": "([^"]+)"', error.diag.message_detail or "")
    return f"{error.sqlstate or 'connection lost'} {code[1] if code else ''}".rstrip()


class Ending(NamedTuple):
    """How a call of a session ended."""

    value: Any
    sqlstate: str | None
    is_alive: bool


class Actor:
    """A session that executes runs; it connects anew when it was killed."""

    def __init__(self, chaos: Chaos, name: str) -> None:
        self.chaos = chaos
        self.name = name
        self.conn: Connection | None = None
        self.settings: Any = None
        self.pid = 0

    def connect(self) -> Connection:
        while self.conn is None or self.conn.closed:
            self.conn = connect(self.chaos.db, application_name=self.name)
            self.pid = self.conn.info.backend_pid
            try:
                self.settings = self._look()
            except psycopg.OperationalError:  # the server has just crashed
                self.conn.close()
        return self.conn

    def _look(self) -> Any:
        row = self.conn.execute(_LOOK.encode()).fetchone() if self.conn else None
        return row and row[0]

    def call(self, routine: str, arguments: Row) -> Ending:
        """Call, and note what must not have happened."""
        conn = self.connect()
        try:
            row = conn.execute(*call(routine, arguments)).fetchone()
            if (now := self._look()) != self.settings:
                self.chaos.note(f"{routine} left behind the settings {now} instead of {self.settings}")
        except psycopg.Error as error:
            self.chaos.answers[f"{routine}: {reason(error)}"] += 1
            if error.sqlstate not in _ALLOWED:
                self.chaos.note(f"{routine}({arguments.get('run_id', '')}) raised {error.sqlstate}: {error}")
            # Interrupted between two transactions, a session keeps the run lock until it ends or calls again.
            if error.sqlstate in (None, "57P01", "57P02", "57P03", "57014"):
                conn.close()
                self.chaos.lost.append(self.pid)
            else:  # who is refused, or interrupted in the middle, keeps the name of the step
                conn.execute("select set_config('application_name', %s, false)", [self.name])
            return Ending(None, error.sqlstate, not conn.closed)
        return Ending(row, None, True)

    def hang_up(self) -> None:
        """The client is gone without a word."""
        if self.conn is not None and not self.conn.closed:
            with (
                suppress(OSError, psycopg.Error),
                socket.socket(fileno=os.dup(self.conn.fileno())) as raw,
            ):
                raw.shutdown(socket.SHUT_RDWR)


# -- what happens to them --

Fault = Callable[["Chaos", Connection], None]


def _kill(chaos: Chaos, conn: Connection, pids: str, verb: str = "terminate") -> None:
    """Signal backends of the active run, as far as they belong to actors."""
    chaos.hits += len(
        conn.execute(
            f"select pg_{verb}_backend(w.pid) from ({pids}) w(pid) where w.pid = any (%s)".encode(),
            [[actor.pid for actor in chaos.actors]],
        ).fetchall()
    )


_TAKER: Final = "select worker_pid from etl.runs where status = 'running'"
_HELPERS: Final = "select w.pid from etl.run_workers w join etl.runs using (run_id) where status = 'running'"
_LOCK_HOLDERS: Final = "select pid from pg_locks where locktype = 'advisory' and classid = 6435444"


def kill_the_taker(chaos: Chaos, conn: Connection) -> None:
    """The session that took the run up is terminated."""
    _kill(chaos, conn, _TAKER)


def kill_a_helper(chaos: Chaos, conn: Connection) -> None:
    """A session that helps is terminated."""
    _kill(chaos, conn, f"{_HELPERS} order by random() limit 1")


def kill_one_in_a_step(chaos: Chaos, conn: Connection) -> None:
    """Whoever executes a step is terminated in it."""
    _kill(
        chaos,
        conn,
        "select worker_pid from etl.procedure_runs where status = 'running' order by random() limit 1",
    )


def kill_all(chaos: Chaos, conn: Connection) -> None:
    """All sessions that execute the run are terminated."""
    _kill(chaos, conn, f"select distinct pid from ({_LOCK_HOLDERS}) l")


def cancel_a_statement(chaos: Chaos, conn: Connection) -> None:
    """The statement of one of the sessions is cancelled, wherever it is."""
    _kill(chaos, conn, f"select pid from ({_LOCK_HOLDERS}) l order by random() limit 1", "cancel")


def _cancel_run(chaos: Chaos, conn: Connection, force: bool) -> None:
    answered = conn.execute(
        "select etl.cancel_run(run_id, reason => 'chaos', force => %s) from etl.runs"
        " where status in ('running', 'queued')",
        [force],
    ).fetchall()
    chaos.hits += len(answered)


def cancel_the_run(chaos: Chaos, conn: Connection) -> None:
    """Somebody asks the run to stop."""
    _cancel_run(chaos, conn, False)


def cancel_the_run_by_force(chaos: Chaos, conn: Connection) -> None:
    """Somebody asks the run to stop now."""
    _cancel_run(chaos, conn, True)


def hang_up(chaos: Chaos, conn: Connection) -> None:
    """The network of one of the clients is cut."""
    chaos.rng.choice(chaos.actors).hang_up()
    chaos.hits += 1


def crash(chaos: Chaos, conn: Connection) -> None:
    """The server crashes and recovers."""
    conn.close()
    chaos.db.server.restart("immediate")
    chaos.hits += 1


def deadlock_from_outside(chaos: Chaos, conn: Connection) -> None:
    """A session that is none of ours locks the same rows in another order."""
    conn.execute("begin")
    for row in (2, 1):
        conn.execute("update silver.pair set n = n where id = %s", [row])
        conn.execute("select pg_sleep(0.06)")
    conn.execute("commit")
    chaos.hits += 1


def lock_from_outside(chaos: Chaos, conn: Connection) -> None:
    """Somebody holds a table for longer than the step that needs it will wait."""
    conn.execute(
        "begin; lock table silver.gatekeeper in access exclusive mode; select pg_sleep(0.4); rollback"
    )
    chaos.hits += 1


def write_late(chaos: Chaos, conn: Connection) -> None:
    """A writer takes its time and its id early, and commits late."""
    conn.execute("begin")
    chaos.bring_late(conn)
    conn.execute("select pg_sleep(0.2)")
    conn.execute("commit")
    chaos.hits += 1


def _fail(fault: str, fuse: int, chaos: Chaos, conn: Connection, victim: str | None = None) -> None:
    conn.execute("alter sequence silver.burnt restart")
    conn.execute(
        "update silver.switch set victim = %s, fault = %s, fuse = %s",
        [victim or chaos.rng.choice(chaos.dag.plain), fault, fuse],
    )
    chaos.hits += 1


def take_too_long(chaos: Chaos, conn: Connection) -> None:
    """A step exceeds its timeout."""
    _fail("sleep", 0, chaos, conn, "fact_timed")


def fill_the_disk(chaos: Chaos, conn: Connection) -> None:
    """A step finds the disk full."""
    _fail("53100", 0, chaos, conn)


def stumble_once(chaos: Chaos, conn: Connection) -> None:
    """A step fails twice with what passes when it is tried again."""
    _fail(chaos.rng.choice(("40001", "40P01", "08006", "57P01")), 2, chaos, conn)


def break_a_step(chaos: Chaos, conn: Connection) -> None:
    """A step fails for good."""
    _fail("22012", 0, chaos, conn)


FAULTS: Final[dict[str, Fault]] = {
    fault.__name__: fault
    for fault in (
        kill_the_taker, kill_a_helper, kill_one_in_a_step, kill_all, cancel_a_statement, cancel_the_run,
        cancel_the_run_by_force, hang_up, crash, deadlock_from_outside, lock_from_outside, write_late,
        take_too_long, fill_the_disk, stumble_once, break_a_step,
    )
}  # fmt: skip
_ARMED_BEFORE: Final = {"take_too_long", "fill_the_disk", "stumble_once", "break_a_step"}
"""Faults of a step: they are there when the run begins."""


# -- the chaos --


class Chaos:
    """A pipeline in a database, and rounds of trouble."""

    def __init__(self, db: Database, *, seed: int, can_crash: bool = False) -> None:
        self.db = db
        self.rng = random.Random(seed)
        self.dag = Dag(db)
        self.actors = [Actor(self, f"actor {n}") for n in range(4)]
        self.batches: list[int] = []
        self.answers: Counter[str] = Counter()
        """How calls that failed ended."""
        self.counts: Counter[str] = Counter()
        """What happened how often: faults, ways to begin and to go on, statuses of runs."""
        self.lost: list[int] = []
        """Backends whose clients are gone; they may not know it yet."""
        self.hits = 0
        """How many sessions were hit, calls refused and steps armed."""
        self._noted: list[str] = []
        self._numbers = itertools.count(1)
        self._can_crash = can_crash
        self._bag: list[str] = []
        self._stop = threading.Event()

    def note(self, problem: str) -> None:
        self._noted.append(problem)

    @contextmanager
    def watchdog(self) -> Iterator[None]:
        """Somebody who calls etl.watchdog() all the time, whatever happens to the server."""
        self._stop.clear()
        watching = Background(self._watch)
        try:
            yield
        finally:
            self._stop.set()
            watching.result()

    def _watch(self) -> None:
        conn: Connection | None = None
        while not self._stop.wait(0.1):
            try:
                conn = conn if conn and not conn.closed else connect(self.db)
                row = conn.execute("select etl.watchdog()").fetchone()
                self.counts["statements timed out"] += row[0] if row else 0
            except psycopg.Error as error:
                if error.sqlstate not in _ALLOWED:
                    self.note(f"etl.watchdog raised {error.sqlstate}: {error}")
                if conn:
                    conn.close()

    # -- one round --

    def round(self) -> None:
        """A batch, a run, trouble, and recovery until a run has succeeded."""
        before, _ = self._last_run()
        self._disturbed(self._begin())
        for attempt in range(20):
            run_id, status = self._last_run()
            if status in _DONE and run_id > before:
                break
            self._disturbed(self._go_on(run_id, status), is_calm=attempt >= 2)
        else:
            self.note(f"no run succeeded: run {run_id} is {status}")
        self.counts["rounds"] += 1

    def bring_late(self, conn: Connection) -> None:
        """A batch of events for which no run was asked; the next one that looks will find it."""
        batch = next(self._numbers)
        self.dag.bring(batch, conn)

    def _last_run(self) -> tuple[int, str]:
        if self.dag.pipeline.conn.closed or self.dag.pipeline.conn.broken:
            self.dag.reconnect()
        try:
            row = self.dag.pipeline.rows("select run_id, status from etl.runs order by run_id desc limit 1")
        except psycopg.OperationalError:
            self.dag.reconnect()
            return self._last_run()
        return (row[0]["run_id"], row[0]["status"]) if row else (0, "none")

    def _begin(self) -> Callable[[], Any]:
        """Ask for a run over a new batch, to be executed at once or by whoever comes."""
        self._last_run()
        batch = next(self._numbers)
        self.dag.bring(batch)
        self.batches.append(batch)
        request = self.dag.request(batch)
        if self.rng.random() < 0.5:
            self.counts["begun by start_run"] += 1
            return lambda: self.actors[0].call("etl.start_run", request)
        self.counts["begun by submit_run"] += 1
        self.dag.pipeline.conn.execute(*call("etl.submit_run", request, "select * from"))
        return lambda: self.actors[0].call("etl.work", {})

    def _go_on(self, run_id: int, status: str) -> Callable[[], Any]:
        """What somebody would do who finds a run in this state."""
        if status == "queued":
            return lambda: self.actors[0].call("etl.work", {})
        if status == "running":
            how = self.rng.choice(("reap", "work", "start", "resume"))
            self.counts[f"after a death: {how}"] += 1
            if how == "reap":
                if self.dag.pipeline.value("select etl.reap()") != 1:
                    self.note(f"etl.reap did not find run {run_id} dead")
                return lambda: None
            if how == "work":
                return lambda: self.actors[0].call("etl.work", {})
            if how == "start":
                return self._begin()
        elif self.rng.random() < 0.2 or status == "none" or status in _DONE:  # it was not even begun
            return self._begin()
        self.counts[f"resumed after {status}"] += 1
        return lambda: self.actors[0].call("etl.resume_run", {"run_id": run_id})

    def _disturbed(self, primary: Callable[[], Any], is_calm: bool = False) -> None:
        """Let sessions execute what there is while something happens to them."""
        self.dag.pipeline.conn.execute("update silver.switch set victim = null, fuse = 0")
        done = threading.Event()
        faults = [] if is_calm else [self._next_fault() for _ in range(self.rng.choice((1, 1, 2)))]
        for fault in [f for f in faults if f in _ARMED_BEFORE][:1]:
            self._strike(fault, 0)
        helpers = self.actors[1 : self.rng.randint(1, 4)]
        working = [Background(partial(self._help, actor, done)) for actor in helpers]
        struck = [
            Background(partial(self._strike, fault, self.rng.random() ** 2 * 0.6))
            for fault in faults
            if fault not in _ARMED_BEFORE
        ]
        try:
            Background(primary).result(LIMIT_S)
        finally:
            done.set()
            for one in [*working, *struck]:
                one.result(LIMIT_S)
        self._last_run()
        gone = "select count(*) = 0 from pg_stat_activity where pid = any (%s)"
        connected = {actor.pid for actor in self.actors if actor.conn and not actor.conn.closed}
        wait_until(self.dag.pipeline.conn, gone, [list(set(self.lost) - connected)], LIMIT_S)
        self.lost.clear()
        _, status = self._last_run()
        self.counts[f"left {status}"] += 1

    def _help(self, actor: Actor, done: threading.Event) -> None:
        while not done.wait(0.02):
            if not actor.call("etl.work", {}).is_alive:
                return

    def _next_fault(self) -> str:
        """Every fault comes before any comes again."""
        if not self._bag:
            self._bag = [name for name in FAULTS if name != "crash" or self._can_crash]
            self.rng.shuffle(self._bag)
        return self._bag.pop()

    def _strike(self, fault: str, after: float) -> None:
        time.sleep(after)
        self.counts[f"fault {fault}"] += 1
        try:
            with connect(self.db) as conn:
                FAULTS[fault](self, conn)
        except psycopg.Error as error:
            self.answers[f"{fault}: {reason(error)}"] += 1
            if error.sqlstate not in _ALLOWED | {"40P01", "40001"}:
                self.note(f"{fault} raised {error.sqlstate}: {error}")

    # -- what came of it --

    def problems(self) -> list[str]:
        """What is wrong now; what was noted on the way included."""
        run_id, status = self._last_run()
        queries = INVARIANTS | (_AFTER_A_SUCCESS if status == "succeeded" else {})
        values = {"plain": self.dag.plain, "run_id": run_id}
        found, self._noted = self._noted, []
        for name, query in queries.items():
            rows = self.dag.pipeline.conn.execute(query.encode(), values).fetchall()
            if rows:
                found.append(f"{name}: {rows[:5]}")
        return found

    def differences(self, reference: Dag) -> list[str]:
        """Where Silver differs from that of undisturbed runs of the same batches."""
        self.dag.settle()
        reference.pipeline.conn.execute("update silver.switch set pace_ms = 0")
        brought = self.dag.pipeline.column("select distinct batch from bronze.events order by 1")
        for batch in brought:
            reference.bring(batch)
        for batch in self.batches:
            run = reference.pipeline.start(**reference.request(batch))
            assert run.status == "succeeded", reference.pipeline.run(run.run_id)["error_message"]
        reference.settle()
        mine, theirs = self._silver(self.dag), self._silver(reference)
        found = [
            f"{key} is {value}, not {theirs.get(key)}"
            for key, value in mine.items()
            if value != theirs.get(key)
        ]
        # A chain of runs that was given up has not executed every step; those it has are whole.
        given_up = self._given_up()
        found += [f"{key} is missing" for key in theirs if key not in mine and key[1] not in given_up]
        return found

    def _given_up(self) -> set[Any]:
        """Batches for which no run has succeeded, as another one was started instead."""
        finished = self.dag.pipeline.column(
            "select (parameters->'fact_last'->>'batch')::int from etl.runs where status = any (%s)",
            list(_DONE),
        )
        return set(self.batches) - set(finished)

    def _silver(self, dag: Dag) -> dict[tuple[str, Any], Any]:
        """Silver, and the watermarks that do not depend on the clock, by step and batch."""
        rows = dag.pipeline.rows(
            "select 'rows of ' || step as what, batch::text as part,"
            "       string_agg(k || ':' || v, ',' order by k, v) as is_there"
            "  from silver.rows group by step, batch"
            " union all"
            " select 'seen by ' || strategy, '', string_agg(event_id || ':' || v, ',' order by event_id)"
            "  from silver.seen group by strategy"
            " union all"
            " select 'steps of skew', batch::text, string_agg(step, ',' order by step)"
            "  from silver.skew group by batch having count(*) = 2"
            " union all"
            " select 'watermark', state_key, last_success_watermark from etl.state where strategy = 'id'"
        )
        return {(row["what"], _number(row["part"])): row["is_there"] for row in rows}


def _number(part: str) -> int | str:
    return int(part) if part.isdigit() else part
