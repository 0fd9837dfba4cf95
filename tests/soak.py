"""A soak for windows: writers that commit in every awkward way, readers beside them, Silver against Bronze.

What a writer does is a generator over its session: it yields where others may come in between, with the
seconds that may pass there. The threads of a soak sleep that long; a test that wants one interleaving steps
writers by hand. A subject is one way of reading: Bronze tables, a watermark and the routine of a step.
`NAIVE` are the readers one would write without b2s, on the same tables, compared in the same way.

What is random comes from the seed; how the server interleaves it does not.
"""

from __future__ import annotations

import itertools
import queue
import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial
from typing import Any, Final, NamedTuple

import psycopg

from tests.pipelines import Background, Pipeline
from tests.servers import Connection, Database

Steps = Iterator[float]

# What a writer may run into when others hold what it needs; it rolls back, as an application would.
_CONTENTION: Final = {"40001", "40P01", "55P03"}
# What a reader may run into when it is killed, cancelled, or not the only one.
_HARMLESS: Final = {"57P01", "57014", "PT409", None}

# -- Bronze --


class Table(NamedTuple):
    """Where writers write. In a mutable one they also update rows of others."""

    name: str
    part: int = 0
    is_mutable: bool = False
    is_stamped: bool = False
    """The application makes the timestamps."""


_COLUMNS: Final = (
    "rid bigint not null, part int not null default 0, writer text not null, v int not null default 1,"
    " at timestamptz not null default {clock}(), etl_xid xid8 not null default pg_current_xact_id()"
)
_PLAIN: Final = (
    f"create table bronze.{{name}} (id bigint generated always as identity, {_COLUMNS});"
    " create index on bronze.{name} (id); create index on bronze.{name} (at);"
    " create index on bronze.{name} (etl_xid);"
)
_MUTABLE: Final = (
    f"create table bronze.{{name}} ({_COLUMNS}, primary key (rid));"
    " create index on bronze.{name} (at); create index on bronze.{name} (etl_xid);"
    " create function bronze.touch() returns trigger language plpgsql as $$"
    " begin new.at := now(); new.etl_xid := pg_current_xact_id(); return new; end $$;"
    " create trigger touch before update on bronze.{name} for each row execute function bronze.touch();"
)
_PARTITIONED: Final = (
    "create sequence bronze.{name}_id_seq;"
    " create table bronze.{name} (id bigint not null default nextval('bronze.{name}_id_seq'),"
    f" {_COLUMNS}) partition by list (part);"
    " create index on bronze.{name} (id); create index on bronze.{name} (at);"
    " create table bronze.{name}_0 partition of bronze.{name} for values in (0);"
    " create table bronze.{name}_1 partition of bronze.{name} for values in (1);"
)
_BRONZE: Final = {
    "events": (_PLAIN.format(name="events", clock="now"), (Table("events"),)),
    "clocked": (_PLAIN.format(name="clocked", clock="clock_timestamp"), (Table("clocked"),)),
    "stamped": (_PLAIN.format(name="stamped", clock="now"), (Table("stamped", is_stamped=True),)),
    "others": (_PLAIN.format(name="others", clock="now"), (Table("others"),)),
    "accounts": (_MUTABLE.format(name="accounts", clock="now"), (Table("accounts", is_mutable=True),)),
    "parted": (
        _PARTITIONED.format(name="parted", clock="now"),
        (Table("parted"), Table("parted", 1), Table("parted_0"), Table("parted_1", 1)),
    ),
}

# Statements that are run by the server itself: at COMMIT, and in a procedure that commits as it goes.
_MACHINERY: Final = """
create table bronze.at_commit (statement text not null);
create function bronze.do_at_commit() returns trigger language plpgsql as $$
begin perform pg_sleep(0.03); execute new.statement; return null; end $$;
create constraint trigger do_at_commit after insert on bronze.at_commit deferrable initially deferred
  for each row execute function bronze.do_at_commit();
create procedure bronze.commit_each(statements text[]) language plpgsql as $$
declare s text;
begin
  foreach s in array statements loop execute s; perform pg_sleep(0.02); commit; end loop;
end $$;
create table silver.faults (rate float8 not null);
insert into silver.faults values (0);
create function silver.stumble() returns trigger language plpgsql as $$
declare n int := floor(random() / (select nullif(rate, 0) from silver.faults));
begin
  if n = 0 then
    raise exception 'the reader stumbles'
      using errcode = (array['40001', '22000', '53400', 'P0001'])[1 + floor(random() * 4)];
  end if;
  return null;
end $$;
"""

# -- the ways of reading --


@dataclass(frozen=True, slots=True)
class Subject:
    """One way of reading Bronze with b2s."""

    name: str
    strategy: str
    bronze: tuple[str, ...]
    source: str | None = None
    """A query, instead of the column of the strategy."""
    delay_ms: int = 0
    max_window: int | None = None
    isolation: str = "read committed"
    readers: int = 1

    @property
    def is_mutable(self) -> bool:
        return any(table.is_mutable for name in self.bronze for table in _BRONZE[name][1])

    @property
    def column(self) -> str:
        return {"timestamp": "at", "id": "id", "xid": "etl_xid"}[self.strategy]

    @property
    def watermark(self) -> dict[str, Any]:
        columns = [f"bronze.{name}.{self.column}" for name in self.bronze]
        return {
            "strategy": self.strategy,
            "source": [self.source] if self.source else columns,
            "state_key": self.name,
            "delay_ms": self.delay_ms,
        }

    @property
    def window(self) -> str:
        if self.strategy == "xid":
            return "etl.arrived(b.etl_xid, p_since, p_until)"
        return f"b.{self.column} < p_until and (p_since is null or b.{self.column} >= p_since)"

    @property
    def arguments(self) -> str:
        kind = {"timestamp": "timestamptz", "id": "bigint", "xid": "pg_snapshot"}[self.strategy]
        return f"p_since {kind}, p_until {kind}"

    @property
    def newest_is_read(self) -> str:
        """A condition on the watermark $1: no row of Bronze lies at or beyond it."""
        tests = {
            "timestamp": "b.at >= $1::timestamptz",
            "id": "b.id >= $1::bigint",
            "xid": "not pg_visible_in_snapshot(b.etl_xid, $1::pg_snapshot)",
        }
        return " and ".join(
            f"not exists (select from bronze.{name} b where {tests[self.strategy]})" for name in self.bronze
        ).replace("$1", "%(watermark)s")


SUBJECTS: Final = (
    Subject("timestamp", "timestamp", ("events",)),
    Subject("timestamp_of_the_clock", "timestamp", ("clocked",)),
    Subject("timestamp_of_the_application", "timestamp", ("stamped",), delay_ms=1500),
    Subject("timestamp_mutable", "timestamp", ("accounts",)),
    Subject("timestamp_partitioned", "timestamp", ("parted",)),
    Subject("timestamp_two_sources", "timestamp", ("events", "others")),
    Subject("timestamp_query", "timestamp", ("events",), source="select max(at) from bronze.events"),
    Subject("timestamp_sliced", "timestamp", ("events",), max_window=100),
    Subject("timestamp_repeatable_read", "timestamp", ("events",), isolation="repeatable read"),
    Subject("id", "id", ("events",)),
    Subject("id_partitioned", "id", ("parted",)),
    Subject("id_sliced", "id", ("events",), max_window=7),
    Subject("id_query", "id", ("events",), source="select max(id) from bronze.events"),
    Subject("xid", "xid", ("events",)),
    Subject("xid_mutable", "xid", ("accounts",)),
    Subject("xid_two_sources", "xid", ("events", "others")),
    Subject("xid_sliced", "xid", ("events",), max_window=5),
    Subject("xid_serializable", "xid", ("events",), isolation="serializable"),
    Subject("xid_three_readers", "xid", ("events",), readers=3),
)

# The textbook: a transaction reads what is newer than last time and remembers how far it came.
_NAIVE_FUNCTION: Final = """
create table silver.{name} (rid bigint not null, writer text not null, v int not null,
  read_at timestamptz not null default clock_timestamp());
create table silver.{name}_last (value {type});
insert into silver.{name}_last values (null);
create function silver.read_{name}() returns void language plpgsql as $$
declare
  v_last {type} := (select value from silver.{name}_last for update);
begin
  with fresh as materialized (
    select b.* from bronze.{bronze} b where v_last is null or b.{column} > v_last),
  written as (insert into silver.{name} (rid, writer, v) select rid, writer, v from fresh)
  update silver.{name}_last set value = {next};
end $$;
"""


class Naive(NamedTuple):
    """One way of reading Bronze that loses rows."""

    name: str
    bronze: str
    column: str
    type: str
    next: str

    @property
    def is_mutable(self) -> bool:
        return False


_MAX: Final = "coalesce((select max(f.{column}) from fresh f), v_last)"
NAIVE: Final = (
    Naive("naive_now", "events", "at", "timestamptz", "now()"),
    Naive("naive_clock", "clocked", "at", "timestamptz", "clock_timestamp()"),
    Naive("naive_max_timestamp", "events", "at", "timestamptz", _MAX.format(column="at")),
    Naive("naive_max_id", "events", "id", "bigint", _MAX.format(column="id")),
    Naive(
        "naive_xid", "events", "etl_xid", "xid8",
        "coalesce((select f.etl_xid from fresh f order by f.etl_xid desc limit 1), v_last)",
    ),
)  # fmt: skip


# -- writers --


class Session:
    """A writer's connection, and the statements that write a row of its kind."""

    def __init__(self, soak: Soak, kind: str, number: int) -> None:
        self.soak = soak
        self.kind = kind
        self.rng = random.Random(f"{soak.seed}/{kind}/{number}")
        self.conn = soak.connect()
        self.table = self.rng.choice(soak.tables)
        self._rids = itertools.count(number * 10_000_000 + 1)
        self._oldest_stamp: float | None = None

    def run(self, script: str) -> None:
        """Send one message, which may hold several statements."""
        self.conn.execute(script.encode())

    def begin(self, how: str = "") -> None:
        self._oldest_stamp = None
        self.run(f"begin {how}")

    def commit(self, how: str = "commit") -> None:
        """End the transaction; what carries timestamps of its own that have become too old is taken back."""
        stale = self._oldest_stamp is not None and time.time() - self._oldest_stamp > self.soak.promise
        self._oldest_stamp = None
        self.run(how if not stale else "rollback and chain" if "chain" in how else "rollback")

    def soon(self) -> float:
        return self.rng.uniform(0, 0.04)

    def later(self) -> float:
        return self.rng.uniform(0.2, 1) * self.soak.longest

    def write(self, count: int = 1) -> None:
        for statement in self.statements(count):
            self.run(statement)

    def statements(self, count: int = 1) -> list[str]:
        """Statements that write a row each, as the table allows."""
        return [self._statement() for _ in range(count)]

    def rows(self, count: int) -> list[tuple[str, ...]]:
        """The columns of new rows: rid, part, writer and, where the application makes it, at."""
        stamp: tuple[str, ...] = ()
        if self.table.is_stamped:
            now = time.time()
            self._oldest_stamp = min(now, self._oldest_stamp or now)
            stamp = (datetime.fromtimestamp(int(now * 100) / 100, UTC).isoformat(),)
        return [(str(next(self._rids)), str(self.table.part), self.kind, *stamp) for _ in range(count)]

    @property
    def target(self) -> str:
        return f"bronze.{self.table.name} ({', '.join(self._names)})"

    @property
    def _names(self) -> tuple[str, ...]:
        return ("rid", "part", "writer", "at")[: 4 if self.table.is_stamped else 3]

    def insert(self, count: int = 1) -> str:
        """One statement that inserts so many rows."""
        values = ", ".join("(" + ", ".join(f"'{value}'" for value in row) + ")" for row in self.rows(count))
        return f"insert into {self.target} values {values}"

    def _statement(self) -> str:
        if self.table.is_mutable and self.rng.random() < 0.6:
            return self.update()
        return self.insert()

    def update(self) -> str:
        """Update some row of anybody; where rows do not change, insert."""
        if not self.table.is_mutable:
            return self.insert()
        return (
            f"update bronze.{self.table.name} set v = v + 1, writer = '{self.kind}' where rid ="
            f" (select rid from bronze.{self.table.name} where rid >= {self.rng.randrange(220_000_000)}"
            " order by rid limit 1)"
        )


def single(s: Session) -> Steps:
    """One statement, its own transaction."""
    s.conn.execute(s.statements()[0].encode())
    yield s.soon()


def multi(s: Session) -> Steps:
    """One statement with many rows: equal timestamps, neighbouring ids."""
    s.begin()
    s.run(s.insert(s.rng.randint(2, 20)))
    s.commit()
    yield s.soon()


def long(s: Session) -> Steps:
    """Takes its time early and commits late."""
    s.begin()
    s.run("select now()")
    yield s.later()
    s.write()
    yield s.later()
    s.commit()


def long_read_first(s: Session) -> Steps:
    """Only reads for a while, then writes."""
    s.begin()
    s.run(f"select count(*) from bronze.{s.table.name}")
    yield s.later()
    s.write(2)
    yield s.soon()
    s.commit()


def idle(s: Session) -> Steps:
    """Has asked for the time and then does nothing."""
    s.begin()
    s.run("select now()")
    yield s.later()
    s.run("rollback")


def rolled_back(s: Session) -> Steps:
    """Writes, thinks, and takes it all back."""
    s.begin()
    s.write(2)
    yield s.later()
    s.run("rollback")


def savepoints(s: Session) -> Steps:
    """Writes in subtransactions, of which some are rolled back and some released."""
    s.begin()
    s.run("savepoint a")
    s.write()
    yield s.soon()
    s.run("rollback to a")
    s.run("savepoint b")
    s.write()
    s.run("savepoint c")
    s.write()
    yield s.soon()
    s.run("release c")
    s.run("release b")
    s.write()
    yield s.later() / 3
    s.commit()


def exceptions(s: Session) -> Steps:
    """Writes in PL/pgSQL blocks, of which one fails."""
    kept, undone, last = s.statements(3)
    s.begin()
    s.run(
        f"do $do$ begin {kept}; begin {undone}; perform 1 / 0; exception when others then null; end;"
        f" begin {last}; exception when division_by_zero then null; end; end $do$"
    )
    yield s.soon()
    s.commit()


def two_phase(s: Session) -> Steps:
    """Prepares; another session decides later."""
    if not s.soak.has_two_phase:
        yield from long(s)
        return
    gid = f"{s.soak.db.name}_{next(s.soak.numbers)}"
    s.begin()
    s.write(2)
    yield s.soon()
    s.commit(f"prepare transaction '{gid}'")
    yield 4 * s.later()
    with s.soak.other() as other:
        if other.execute("select 1 from pg_prepared_xacts where gid = %s", [gid]).fetchone():
            verb = "commit" if s.rng.random() < 0.7 and not s.table.is_stamped else "rollback"
            other.execute(f"{verb} prepared '{gid}'".encode())
    yield 3 * s.later()


def message(s: Session) -> Steps:
    """Several transactions in one message: all of them take the time at which it arrived."""
    first, second, third = s.statements(3)
    s.run(
        f"begin; {first}; commit; begin; select pg_sleep({s.soon()}); {second}; commit;"
        f" select pg_sleep({s.soon()}); {third}; select pg_sleep({s.soon()})"
    )
    yield s.soon()


def chain(s: Session) -> Steps:
    """Goes from transaction to transaction without a break."""
    s.begin()
    s.write()
    yield s.soon()
    s.commit("commit and chain")
    yield s.soon()
    s.write()
    s.run("rollback and chain")
    yield s.soon()
    s.write()
    s.commit()


def update(s: Session) -> Steps:
    """Changes rows of others."""
    s.begin()
    s.run(s.update())
    yield s.later() / 2
    s.run(s.update())
    s.commit()


def drawn_early(s: Session) -> Steps:
    """Draws an id, and inserts it later in the same transaction."""
    sequence = {"parted_0": "parted", "parted_1": "parted"}.get(s.table.name, s.table.name)
    if s.table.is_mutable:
        yield from long(s)
        return
    s.begin()
    row = s.conn.execute(f"select nextval('bronze.{sequence}_id_seq')".encode()).fetchone()
    assert row is not None
    yield s.later()
    names, values = s.insert().split(" values ")
    s.run(f"{names.replace('(', '(id, ')} overriding system value values ({row[0]}, {values[1:]}")
    yield s.soon()
    s.commit()


def copied(s: Session) -> Steps:
    """COPY."""
    s.begin()
    with s.conn.cursor().copy(f"copy {s.target} from stdin".encode()) as copy:
        for row in s.rows(s.rng.randint(2, 20)):
            copy.write_row(row)
    yield s.later() / 2
    s.commit()


def selected(s: Session) -> Steps:
    """INSERT .. SELECT, with a pause between its rows."""
    kinds = ("bigint", "int", "text", "timestamptz")
    quoted = [", ".join(f"'{value}'" for value in column) for column in zip(*s.rows(5), strict=True)]
    arrays = ", ".join(f"array[{column}]::{kind}[]" for column, kind in zip(quoted, kinds, strict=False))
    s.begin()
    s.run(
        f"insert into {s.target} select q.* from unnest({arrays}) q"
        f" where pg_sleep({s.soon() / 5})::text is not null"
    )
    s.commit()
    yield s.soon()


def procedure(s: Session) -> Steps:
    """A procedure that commits in a loop."""
    s.conn.execute("call bronze.commit_each(%s)", [s.statements(5)])
    yield s.soon()


def deferred(s: Session) -> Steps:
    """Rows that a constraint trigger inserts while the transaction commits."""
    s.begin()
    for statement in s.statements(2):
        s.conn.execute("insert into bronze.at_commit values (%s)", [statement])
    yield s.later() / 2
    s.commit()


def repeatable_read(s: Session) -> Steps:
    s.begin("isolation level repeatable read")
    s.run(f"select max(at) from bronze.{s.table.name}")
    yield s.later() / 2
    s.write()
    yield s.soon()
    s.commit()


def serializable(s: Session) -> Steps:
    s.begin("isolation level serializable")
    s.run(f"select count(*) from bronze.{s.table.name} where rid < 1000")
    yield s.later() / 2
    s.write()
    yield s.soon()
    s.commit()


def pooled(s: Session) -> Steps:
    """One transaction after the other on backends that it shares."""
    mine, s.conn = s.conn, s.soak.pool.get()
    try:
        s.begin()
        s.write()
        yield s.soon()
        s.commit()
        s.run("discard all")
    finally:
        if s.conn.info.transaction_status != psycopg.pq.TransactionStatus.IDLE and not s.conn.closed:
            s.conn.execute("rollback")
        s.soak.pool.put(s.conn)
        s.conn = mine


def elsewhere(s: Session) -> Steps:
    """A session that counts time in another zone."""
    s.run(f"set timezone = '{s.rng.choice(('Pacific/Kiritimati', 'America/Los_Angeles', 'UTC'))}'")
    s.begin()
    s.run("set local timezone = 'Pacific/Pago_Pago'")
    s.write()
    yield s.soon()
    s.commit()


def pipelined(s: Session) -> Steps:
    """The extended protocol: several statements before the client waits for any."""
    with s.conn.pipeline():
        s.conn.execute("begin")
        for statement in s.statements(3):
            s.conn.execute(statement.encode())
        s.conn.execute("commit")
    yield s.soon()


KINDS: Final[dict[str, Callable[[Session], Steps]]] = {
    kind.__name__: kind
    for kind in (
        single, multi, long, long_read_first, idle, rolled_back, savepoints, exceptions, two_phase, message,
        chain, update, drawn_early, copied, selected, procedure, deferred, repeatable_read, serializable,
        pooled, elsewhere, pipelined,
    )
}  # fmt: skip

# -- the soak --


@dataclass(slots=True)
class Outcome:
    """What became of the rows of one reader."""

    name: str
    written: int
    lost: Counter[str]
    """Rows of Bronze that Silver lacks, by the kind of writer."""
    invented: Counter[str]
    """Rows of Silver that Bronze does not have (any more)."""
    twice: int
    gaps: int = 0
    """Windows that do not begin where the one before ended."""
    meanwhile: int = 0
    """Rows that were read while writers were at work."""
    lag_s: list[float] = field(default_factory=list)

    @property
    def is_exact(self) -> bool:
        return not self.lost and not self.invented and self.twice == 0 and self.gaps == 0


class Soak:
    """Bronze tables with their writers, and the readers of some subjects."""

    def __init__(
        self,
        db: Database,
        subjects: Sequence[Subject],
        naive: Sequence[Naive] = (),
        *,
        seed: int,
        longest: float = 1.0,
    ) -> None:
        self.db = db
        self.subjects = subjects
        self.naive = naive
        self.seed = seed
        self.longest = longest
        self.promise = min((s.delay_ms for s in subjects if s.delay_ms), default=1500) / 1000 - 1
        self.numbers = itertools.count(1)
        self.pool: queue.SimpleQueue[Connection] = queue.SimpleQueue()
        self.problems: list[str] = []
        self.ended: dict[str, Counter[str]] = {}
        """How the runs of each reader ended: a status, or the SQLSTATE of a refusal."""
        self.run_ms: dict[str, list[float]] = {}
        self._meanwhile: Counter[str] = Counter()
        self._stop = threading.Event()
        self._pipelines: dict[str, Pipeline] = {}
        names = [name for s in subjects for name in s.bronze] + [n.bronze for n in naive]
        self._bronze = dict.fromkeys(names)
        self.tables = [table for name in self._bronze for table in _BRONZE[name][1]]
        self._build()

    # -- building --

    def _build(self) -> None:
        first = Pipeline(self.db, "soak")
        self.control = first.conn
        first.sql("".join(_BRONZE[name][0] for name in self._bronze) + _MACHINERY)
        self.has_two_phase = int(first.value("select current_setting('max_prepared_transactions')::int")) > 0
        self.has_commit_times = first.value("select current_setting('track_commit_timestamp')") == "on"
        for naive in self.naive:
            first.sql(_NAIVE_FUNCTION.format(**naive._asdict()))
        for subject in self.subjects:
            self._configure(subject)
        for _ in range(2):
            self.pool.put(self.connect())

    def _configure(self, subject: Subject) -> None:
        pipeline = Pipeline(self.db, subject.name)
        silver = f"silver.{subject.name}"
        columns = "rid bigint not null, writer text not null, v int not null"
        key = ", primary key (rid)" if subject.is_mutable else ""
        pipeline.sql(
            f"create table {silver} ({columns}, read_at timestamptz not null default clock_timestamp(){key});"
            f" create table {silver}_log ({columns});"
            f" create trigger stumble after insert on {silver} for each statement"
            " execute function silver.stumble()"
        )
        rows = " union all ".join(
            f"select b.rid, b.writer, b.v from bronze.{name} b where {subject.window}"
            for name in subject.bronze
        )
        body = f"insert into {silver} (rid, writer, v) {rows}"
        if subject.is_mutable:
            body = (
                f"with fresh as materialized ({rows}),"
                f" logged as (insert into {silver}_log select * from fresh)"
                f" insert into {silver} (rid, writer, v) select * from fresh"
                " on conflict (rid) do update set writer = excluded.writer, v = excluded.v"
            )
        pipeline.add(
            f"read_{subject.name}",
            body,
            arguments=subject.arguments,
            watermark=subject.watermark,
            max_window=subject.max_window,
            isolation=subject.isolation,
        )
        pipeline.apply()
        self._pipelines[subject.name] = pipeline

    def connect(self) -> Connection:
        return self.db.connect(
            application_name="soak",
            options="-c lock_timeout=300ms -c statement_timeout=60s",
            prepare_threshold=None,  # the pool discards what a session has prepared
        )

    def other(self) -> Connection:
        """A new session, for what another session has to do; close it after use."""
        conn: Connection = psycopg.connect(self.db.dsn, autocommit=True)
        return conn

    # -- running --

    def run(self, seconds: float, faults: float = 0.07) -> None:
        """Let everybody loose; afterwards nobody writes any more, and every reader has read what there is."""
        self._stop.clear()
        self.control.execute("update silver.faults set rate = %s", [faults])
        work = [partial(self._write, Session(self, kind, n)) for n, kind in enumerate(KINDS, start=1)]
        work += [partial(self._read, subject) for subject in self.subjects for _ in range(subject.readers)]
        work += [partial(self._read_naively, naive) for naive in self.naive]
        work.append(partial(self._sabotage))
        everybody = [Background(one) for one in work]
        time.sleep(seconds)
        readers: list[Subject | Naive] = [*self.subjects, *self.naive]
        patience = time.monotonic() + 60  # a slow machine gets as long as it needs for anything to be read
        for reader in readers:
            while not (read := self._count(f"select count(*) from {self._reads_of(reader)}")):
                if time.monotonic() > patience:
                    break
                time.sleep(0.1)
            self._meanwhile[reader.name] += read
        self._stop.set()
        for one in everybody:
            one.result(60)
        self.control.execute("update silver.faults set rate = 0")
        self._resolve_prepared()
        self.settle()
        assert not self.problems, self.problems[:5]

    def _write(self, session: Session) -> None:
        while not self._stop.is_set():
            session.table = session.rng.choice(self.tables)
            try:
                for pause in KINDS[session.kind](session):
                    self._stop.wait(pause)
            except psycopg.Error as error:
                if error.sqlstate not in _CONTENTION:
                    self.problems.append(f"writer {session.kind}: {error.sqlstate} {error}")
                    return
                session.run("rollback")
            self._stop.wait(session.soon())

    def _read(self, subject: Subject) -> None:
        conn = self.db.connect()
        rng = random.Random(f"{self.seed}/{subject.name}")
        while not self._stop.is_set():
            if conn.closed:
                conn = self.db.connect()
            self._read_once(subject, conn)
            self._stop.wait(rng.uniform(0, 0.05))

    def _read_once(self, subject: Subject, conn: Connection) -> str:
        started = time.perf_counter()
        try:
            ended = self._pipelines[subject.name].start(conn, pipeline=subject.name).status
        except psycopg.Error as error:
            ended = error.sqlstate or "connection lost"
            if error.sqlstate not in _HARMLESS:
                self.problems.append(f"reader {subject.name}: {error.sqlstate} {error}")
        self.ended.setdefault(subject.name, Counter())[ended] += 1
        if ended == "succeeded":
            self.run_ms.setdefault(subject.name, []).append((time.perf_counter() - started) * 1000)
        return ended

    def _read_naively(self, naive: Naive) -> None:
        conn = self.db.connect()
        rng = random.Random(f"{self.seed}/{naive.name}")
        while not self._stop.is_set():
            started = time.perf_counter()
            self._read_naively_once(naive, conn)
            self.run_ms.setdefault(naive.name, []).append((time.perf_counter() - started) * 1000)
            self._stop.wait(rng.uniform(0, 0.05))

    def _read_naively_once(self, naive: Naive, conn: Connection | None = None) -> None:
        (conn or self.control).execute(f"select silver.read_{naive.name}()".encode())

    def read(self, name: str) -> None:
        """Let one reader read once."""
        for naive in self.naive:
            if naive.name == name:
                self._read_naively_once(naive)
        for subject in self.subjects:
            if subject.name == name:
                self._read_once(subject, self.control)

    def is_written(self, table: Table) -> bool:
        """Whether a transaction that is still open has written to a table."""
        return bool(
            self._count(
                "select count(*) from pg_locks where relation = %s::regclass and mode = 'RowExclusiveLock'",
                f"bronze.{table.name}",
            )
        )

    def _sabotage(self) -> None:
        """Kills or cancels a reader now and then."""
        rng = random.Random(f"{self.seed}/sabotage")
        with self.other() as conn:
            while not self._stop.wait(rng.uniform(0.5, 2)):
                conn.execute(
                    f"select pg_{rng.choice(('terminate', 'cancel'))}_backend(pid) from pg_stat_activity"
                    " where datname = current_database() and state = 'active' and query ~ '^call .?etl'"
                    " order by random() limit 1".encode()
                )

    def _resolve_prepared(self) -> None:
        for (gid,) in self.control.execute(
            "select gid from pg_prepared_xacts where database = current_database()"
        ).fetchall():
            self.control.execute(f"rollback prepared '{gid}'".encode())

    def settle(self) -> None:
        """Run until the watermark has passed every row and two runs on end read nothing."""
        for subject in self.subjects:
            self._settle_one(subject)
        for naive in self.naive:
            self._read_naively_once(naive)

    def _settle_one(self, subject: Subject, timeout: float = 30) -> None:
        conn = self.db.connect()
        end, idle_runs, before = time.monotonic() + timeout, 0, -1
        while idle_runs < 2:
            status = self._read_once(subject, conn)
            read = self._count(f"select count(*) from {self._reads_of(subject)}")
            is_idle = status == "succeeded" and read == before and self._has_passed(subject)
            idle_runs, before = (idle_runs + 1 if is_idle else 0), read
            if status == "failed" or self.problems or time.monotonic() > end:
                last = self._pipelines[subject.name].rows(
                    "select status, window_since, window_until, held_back_by, error_message"
                    " from etl.procedure_runs where state_key = %s order by run_id desc, attempt desc",
                    subject.name,
                )
                raise AssertionError(f"{subject.name} does not catch up: {last[:2]}, {self.problems[:3]}")
            time.sleep(0.05)

    def _has_passed(self, subject: Subject) -> bool:
        watermark = self._pipelines[subject.name].watermark(subject.name)
        if watermark is None:
            return False
        row = self.control.execute(
            f"select {subject.newest_is_read}".encode(), {"watermark": watermark}
        ).fetchone()
        return row is not None and bool(row[0])

    def _reads_of(self, reader: Subject | Naive) -> str:
        """The table that has a row for each time a row of Bronze was read."""
        return f"silver.{reader.name}_log" if reader.is_mutable else f"silver.{reader.name}"

    # -- comparing --

    def outcome(self, reader: Subject | Naive) -> Outcome:
        """Silver against Bronze, row by row, both ways."""
        silver = f"silver.{reader.name}"
        tables = (reader.bronze,) if isinstance(reader.bronze, str) else reader.bronze
        bronze = " union all ".join(f"select rid, writer, v from bronze.{name}" for name in tables)
        missing = "select writer, count(*)::int from ({} except {}) q group by 1"
        read = f"(select rid, writer, v from {silver})"
        found = Outcome(
            reader.name,
            self._count(f"select count(*) from ({bronze}) q"),
            Counter(dict(self._rows(missing.format(f"({bronze})", read)))),
            Counter(dict(self._rows(missing.format(read, f"({bronze})")))),
            self._count(
                f"select count(*) from (select from {self._reads_of(reader)} group by rid, v"
                " having count(*) > 1) q"
            ),
        )
        found.meanwhile = self._meanwhile[reader.name]
        if isinstance(reader, Subject):
            found.gaps = self._count(
                "select count(*) from (select window_since, lag(window_until) over w as before,"
                " row_number() over w as n from etl.procedure_runs"
                " where state_key = %s and status in ('succeeded', 'advanced')"
                " window w as (order by run_id, attempt)) q"
                " where n > 1 and window_since is distinct from before",
                reader.name,
            )
        if self.has_commit_times and not reader.is_mutable:
            found.lag_s = [
                float(lag)
                for name in tables
                for (lag,) in self._rows(
                    "select extract(epoch from s.read_at - pg_xact_commit_timestamp(b.xmin))"
                    f" from bronze.{name} b join {silver} s using (rid)"
                )
            ]
        return found

    def _rows(self, query: str, *parameters: Any) -> list[Any]:
        return self.control.execute(query.encode(), parameters or None).fetchall()

    def _count(self, query: str, *parameters: Any) -> int:
        return int(self._rows(query, *parameters)[0][0])
