"""Windows: one known trap each, laid by hand between a few sessions. All of them at once: test_soak.py."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from contextlib import closing
from datetime import UTC, datetime, timedelta
from typing import Any, Final

import psycopg
import pytest

from b2s.embedded import StopMode
from tests.pipelines import Background, Gate, Pipeline, Row, Run, refused
from tests.servers import Connection, Database, Server, wait_until

STRATEGIES: Final = ("timestamp", "id", "xid")
COLUMNS: Final = {"timestamp": "at", "id": "id", "xid": "etl_xid"}
TYPES: Final = {"timestamp": "timestamptz", "id": "bigint", "xid": "pg_snapshot"}
WINDOWS: Final = {
    "timestamp": "at < p_until and (p_since is null or at >= p_since)",
    "id": "id < p_until and (p_since is null or id >= p_since)",
    "xid": "etl.arrived(etl_xid, p_since, p_until)",
}
SOURCE: Final = (
    "create table bronze.{0} (id bigint generated always as identity, at timestamptz not null default now(),"
    " etl_xid xid8 not null default pg_current_xact_id(), note text not null);"
    " create index on bronze.{0} (id); create index on bronze.{0} (at); create index on bronze.{0} (etl_xid);"
)
EARLIER: Final = "now() - interval '1 hour'"


class Watch:
    """A procedure that copies what is new in bronze.src to silver.copy, and the sessions around it."""

    def __init__(self, db: Database, strategy: str) -> None:
        self.pipeline = Pipeline(db)
        self.conn = self.pipeline.conn
        self.strategy = strategy
        self.pipeline.sql(SOURCE.format("src") + "create table silver.copy (note text not null)")

    def __enter__(self) -> Watch:
        return self

    def __exit__(self, *_: object) -> None:
        for (gid,) in self.conn.execute(
            "select gid from pg_prepared_xacts where database = current_database()"
        ).fetchall():
            self.conn.execute(f"rollback prepared '{gid}'".encode())

    def configure(self, *tables: str, before: str = "", source: str | None = None, **settings: Any) -> Watch:
        """Apply the configuration; `before` is run by the step before it reads."""
        tables = tables or ("src",)
        changes = {key: settings.pop(key) for key in ("delay_ms", "on_empty") if key in settings}
        rows = " union all ".join(
            f"select note from bronze.{table} where {WINDOWS[self.strategy]}" for table in tables
        )
        self.pipeline.procedures.clear()
        self.pipeline.add(
            "load",
            f"{before}; insert into silver.copy {rows}".removeprefix("; "),
            arguments=f"p_since {TYPES[self.strategy]}, p_until {TYPES[self.strategy]}",
            watermark={
                "strategy": self.strategy,
                "source": [source] if source else [f"bronze.{t}.{COLUMNS[self.strategy]}" for t in tables],
                "state_key": "load",
                "delay_ms": 0,
                **changes,
            },
            **settings,
        )
        self.pipeline.apply()
        return self

    def session(self, **options: Any) -> Connection:
        return self.pipeline.db.connect(**options)

    def insert(
        self, note: str, conn: Connection | None = None, *, at: str = "now()", table: str = "src"
    ) -> None:
        """Write a row. One to be read at once needs an earlier time: the newest second is not read."""
        (conn or self.conn).execute(f"insert into bronze.{table} (note, at) values ('{note}', {at})".encode())

    def run(self, **arguments: Any) -> Row:
        """One run; its step."""
        run = self.pipeline.start(**arguments)
        return self.pipeline.step(run.run_id, "load")

    def run_in_background(self) -> Background:
        return self.pipeline.start_in_background()

    def step_of(self, background: Background) -> Row:
        run: Run = background.result()
        return self.pipeline.step(run.run_id, "load")

    def let_a_second_pass(self) -> None:
        """Until the newest timestamps could be read, if nothing else stood in the way."""
        if self.strategy != "timestamp":
            return
        now = self.pipeline.value("select clock_timestamp()")
        wait_until(self.conn, "select clock_timestamp() > %s + interval '1.05 seconds'", [now])

    def reconnect(self) -> None:
        self.conn = self.pipeline.conn = self.session()

    def catch_up(self) -> list[str]:
        """What Silver holds in the end."""
        self.let_a_second_pass()
        for _ in range(2):
            step = self.run()
            assert step["status"] == "succeeded", step["error_message"]
        return self.copied()

    def copied(self) -> list[str]:
        return self.pipeline.column("select note from silver.copy order by note")

    def wait_for_a_waiting_run(self) -> None:
        """Until a run waits for others before it fixes its window."""
        wait_until(
            self.conn,
            "select count(*) from pg_stat_activity where datname = current_database()"
            " and wait_event = 'PgSleep' and query ~ 'etl.start_run'",
        )


@pytest.fixture(params=STRATEGIES)
def watch(request: pytest.FixtureRequest, db: Database) -> Iterator[Watch]:
    """A watch by each strategy."""
    with Watch(db, request.param) as watch:
        yield watch


@pytest.fixture
def by_time(db: Database) -> Iterator[Watch]:
    with Watch(db, "timestamp") as watch:
        yield watch


@pytest.fixture
def by_id(db: Database) -> Iterator[Watch]:
    with Watch(db, "id") as watch:
        yield watch


@pytest.fixture
def by_xid(db: Database) -> Iterator[Watch]:
    with Watch(db, "xid") as watch:
        yield watch


@pytest.fixture
def gid(db: Database) -> str:
    """A name for a prepared transaction."""
    with db.connect() as conn:
        row = conn.execute("show max_prepared_transactions").fetchone()
    if row == ("0",):
        pytest.skip("this server has max_prepared_transactions = 0")
    return f"b2s_{uuid.uuid4().hex}"


# -- writers that commit late --


def test_a_row_that_is_committed_late_is_read_by_a_later_run(watch: Watch) -> None:
    watch.configure()
    writer = watch.session()
    writer.execute("begin")
    watch.insert("late", writer)
    watch.insert("early")
    watch.let_a_second_pass()
    watch.run()
    writer.execute("commit")
    assert watch.catch_up() == ["early", "late"]


def test_a_writer_that_asked_for_the_time_before_it_touched_the_table_loses_nothing(watch: Watch) -> None:
    watch.configure()
    writer = watch.session()
    writer.execute("begin")
    writer.execute("select now()")
    watch.insert("early")
    watch.let_a_second_pass()
    watch.run()
    watch.insert("late", writer)
    writer.execute("commit")
    assert watch.catch_up() == ["early", "late"]


def test_a_long_writer_of_another_table_holds_back_neither_ids_nor_snapshots(watch: Watch) -> None:
    watch.pipeline.sql("create table bronze.elsewhere (n int)")
    watch.configure()
    writer = watch.session()
    writer.execute("begin")
    writer.execute("insert into bronze.elsewhere values (1)")
    watch.insert("now")
    watch.let_a_second_pass()
    watch.run()
    assert watch.copied() == ([] if watch.strategy == "timestamp" else ["now"])
    writer.execute("rollback")
    assert watch.catch_up() == ["now"]


def test_a_snapshot_is_not_held_back_by_a_writer_of_the_same_table(by_xid: Watch) -> None:
    by_xid.configure()
    writer = by_xid.session()
    writer.execute("begin")
    by_xid.insert("late", writer)
    by_xid.insert("early")
    by_xid.run()
    assert by_xid.copied() == ["early"]
    by_xid.insert("later")
    by_xid.run()
    assert by_xid.copied() == ["early", "later"]
    writer.execute("commit")
    by_xid.run()
    assert by_xid.copied() == ["early", "late", "later"]


def test_what_was_rolled_back_is_neither_read_nor_waited_for_ever(watch: Watch) -> None:
    watch.configure()
    writer = watch.session()
    writer.execute("begin")
    watch.insert("undone", writer)
    watch.insert("kept")
    watch.let_a_second_pass()
    watch.run()
    writer.execute("rollback")
    assert watch.catch_up() == ["kept"]


def test_rows_of_savepoints_are_read_when_their_transaction_commits(watch: Watch) -> None:
    watch.configure()
    writer = watch.session()
    writer.execute("begin")
    writer.execute("savepoint a")
    watch.insert("undone", writer)
    writer.execute("rollback to a")
    writer.execute("savepoint b")
    watch.insert("released", writer)
    writer.execute("release b")
    watch.insert("early")
    watch.let_a_second_pass()
    watch.run()
    watch.insert("last", writer)
    writer.execute("commit")
    assert watch.catch_up() == ["early", "last", "released"]


@pytest.mark.parametrize("level", ["repeatable read", "serializable"])
def test_a_writer_with_an_old_snapshot_loses_nothing(watch: Watch, level: str) -> None:
    watch.configure()
    writer = watch.session()
    writer.execute(f"begin isolation level {level}".encode())
    writer.execute("select count(*) from bronze.src")
    watch.insert("early")
    watch.let_a_second_pass()
    watch.run()
    watch.insert("late", writer)
    writer.execute("commit")
    assert watch.catch_up() == ["early", "late"]


def test_the_second_transaction_of_one_message_has_the_time_of_the_message(watch: Watch) -> None:
    watch.configure()
    writer = watch.session()
    with watch.pipeline.gate() as gate:
        message = Background(
            lambda: writer.execute(
                f"begin; insert into bronze.src (note) values ('first'); commit;"
                f" begin; {Gate.WAIT.replace('perform', 'select')};"
                f" insert into bronze.src (note) values ('second'); commit".encode()
            )
        )
        gate.wait_for_arrivals()
        watch.insert("early")
        watch.let_a_second_pass()
        watch.run()
        gate.open()
        message.result()
    assert watch.catch_up() == ["early", "first", "second"]


def test_a_chained_transaction_loses_nothing(watch: Watch) -> None:
    watch.configure()
    writer = watch.session()
    writer.execute("begin")
    watch.insert("first", writer)
    writer.execute("commit and chain")
    watch.insert("early")
    watch.let_a_second_pass()
    watch.run()
    watch.insert("second", writer)
    writer.execute("commit")
    assert watch.catch_up() == ["early", "first", "second"]


def test_a_row_that_a_deferred_trigger_writes_during_commit_is_not_lost(watch: Watch) -> None:
    watch.pipeline.sql(
        "create table bronze.orders (note text);"
        " create function bronze.at_commit() returns trigger language plpgsql as $$ begin"
        f" {Gate.WAIT}; insert into bronze.src (note) values (new.note); return null; end $$;"
        " create constraint trigger at_commit after insert on bronze.orders deferrable initially deferred"
        " for each row execute function bronze.at_commit()"
    )
    watch.configure()
    writer = watch.session()
    with watch.pipeline.gate() as gate:
        writer.execute("begin")
        writer.execute("insert into bronze.orders values ('late')")
        commit = Background(lambda: writer.execute("commit"))
        gate.wait_for_arrivals()
        watch.insert("early")
        watch.let_a_second_pass()
        watch.run()
        gate.open()
        commit.result()
    assert watch.catch_up() == ["early", "late"]


def test_a_procedure_that_commits_in_a_loop_loses_nothing(watch: Watch) -> None:
    watch.pipeline.sql(
        "create procedure bronze.fill() language plpgsql as $$ begin"
        " insert into bronze.src (note) values ('first'); commit;"
        f" {Gate.WAIT}; insert into bronze.src (note) values ('second'); commit; end $$"
    )
    watch.configure()
    writer = watch.session()
    with watch.pipeline.gate() as gate:
        filling = Background(lambda: writer.execute("call bronze.fill()"))
        gate.wait_for_arrivals()
        watch.insert("early")
        watch.let_a_second_pass()
        watch.run()
        gate.open()
        filling.result()
    assert watch.catch_up() == ["early", "first", "second"]


def test_a_writer_on_a_replication_connection_is_a_writer(watch: Watch) -> None:
    watch.configure()
    writer = watch.session(replication="database")
    writer.execute("begin")
    watch.insert("late", writer)
    watch.insert("early")
    watch.let_a_second_pass()
    watch.run()
    writer.execute("commit")
    assert watch.catch_up() == ["early", "late"]


def test_a_session_that_streams_changes_holds_nothing_back(private_server: Server) -> None:
    """A server of its own: a logical slot waits for every transaction of the server that is open."""
    database = private_server.create_database(template=private_server.migrated_template())
    with Watch(database, "timestamp") as watch:
        watch.conn.execute("create publication p for table bronze.src")
        watch.configure()
        with closing(watch.session(replication="database")) as streaming:
            streaming.execute("CREATE_REPLICATION_SLOT b2s TEMPORARY LOGICAL pgoutput")
            streaming.pgconn.send_query(
                b"START_REPLICATION SLOT b2s LOGICAL 0/0 (proto_version '1', publication_names 'p')"
            )
            wait_until(watch.conn, "select count(*) from pg_stat_replication where state = 'streaming'")
            watch.let_a_second_pass()
            watch.insert("row")
            assert watch.catch_up() == ["row"]
    database.drop()


def test_a_column_without_a_time_zone_is_read_alike_by_readers_of_any_zone(by_time: Watch) -> None:
    by_time.pipeline.sql(
        "alter table bronze.src alter at type timestamp, alter at set default localtimestamp"
    )
    by_time.configure()
    zones = ("Pacific/Kiritimati", "Pacific/Pago_Pago", "UTC")
    for zone in zones:
        by_time.insert(zone)
        by_time.let_a_second_pass()
        by_time.pipeline.start(by_time.session(options=f"-c timezone={zone}"))
    assert by_time.catch_up() == sorted(zones)


def test_a_writer_that_counts_time_in_another_zone_loses_nothing(watch: Watch) -> None:
    watch.configure()
    writer = watch.session(options="-c timezone=Pacific/Kiritimati")
    reader = watch.session(options="-c timezone=Pacific/Pago_Pago")
    writer.execute("begin")
    watch.insert("late", writer)
    watch.insert("early")
    watch.let_a_second_pass()
    watch.pipeline.start(reader)
    writer.execute("commit")
    assert watch.catch_up() == ["early", "late"]


# -- two-phase commit --


def test_a_prepared_transaction_is_not_passed_by(watch: Watch, gid: str) -> None:
    watch.configure()
    writer = watch.session()
    writer.execute("begin")
    watch.insert("late", writer)
    writer.execute(f"prepare transaction '{gid}'".encode())
    watch.insert("early")
    watch.let_a_second_pass()
    step = watch.run()
    assert step["status"] == "succeeded"
    assert watch.copied() == (["early"] if watch.strategy == "xid" else [])
    assert ("prepared transaction" in (step["held_back_by"] or "")) is (watch.strategy != "xid")
    watch.conn.execute(f"commit prepared '{gid}'".encode())
    assert watch.catch_up() == ["early", "late"]


def test_a_prepared_transaction_that_is_rolled_back_holds_nothing_back_any_more(
    watch: Watch, gid: str
) -> None:
    watch.configure()
    writer = watch.session()
    writer.execute("begin")
    watch.insert("undone", writer)
    writer.execute(f"prepare transaction '{gid}'".encode())
    watch.insert("kept")
    watch.run()
    watch.conn.execute(f"rollback prepared '{gid}'".encode())
    assert watch.catch_up() == ["kept"]


def test_a_prepared_transaction_that_wrote_elsewhere_holds_nothing_back(watch: Watch, gid: str) -> None:
    watch.pipeline.sql("create table bronze.elsewhere (n int)")
    watch.configure()
    writer = watch.session()
    writer.execute("begin")
    writer.execute("insert into bronze.elsewhere values (1)")
    writer.execute(f"prepare transaction '{gid}'".encode())
    watch.insert("now", at=EARLIER)
    step = watch.run()
    assert (watch.copied(), step["held_back_by"]) == (["now"], None)


def test_a_prepared_transaction_is_waited_for_briefly(by_time: Watch, gid: str) -> None:
    by_time.configure()
    writer = by_time.session()
    writer.execute("begin")
    by_time.insert("prepared", writer, at=EARLIER)
    writer.execute(f"prepare transaction '{gid}'".encode())
    started = by_time.run_in_background()
    by_time.wait_for_a_waiting_run()
    by_time.conn.execute(f"commit prepared '{gid}'".encode())
    assert by_time.step_of(started)["held_back_by"] is None
    assert by_time.copied() == ["prepared"]


def test_a_writer_that_prepares_while_a_run_waits_for_it_is_still_waited_for(by_id: Watch, gid: str) -> None:
    by_id.configure()
    writer = by_id.session()
    writer.execute("begin")
    by_id.insert("late", writer)
    by_id.insert("early")
    started = by_id.run_in_background()
    by_id.wait_for_a_waiting_run()
    writer.execute(f"prepare transaction '{gid}'".encode())
    assert by_id.step_of(started)["status"] == "succeeded"
    by_id.run()
    assert by_id.copied() == []
    by_id.conn.execute(f"commit prepared '{gid}'".encode())
    assert by_id.catch_up() == ["early", "late"]


@pytest.mark.parametrize("mode", ["fast", "immediate"])
def test_a_prepared_writer_that_holds_ids_back_does_so_after_a_restart(
    private_server: Server, mode: StopMode
) -> None:
    """It has another name in pg_locks then than the one that was remembered."""
    database = private_server.create_database(template=private_server.migrated_template())
    watch = Watch(database, "id").configure()
    writer = watch.session()
    writer.execute("begin")
    watch.insert("late", writer)
    writer.execute("prepare transaction 'before the restart'")
    watch.insert("early")
    watch.run()
    private_server.restart(mode)
    watch.reconnect()
    watch.run()
    assert watch.copied() == []
    watch.conn.execute("commit prepared 'before the restart'")
    assert watch.catch_up() == ["early", "late"]
    database.drop()


def test_a_writer_of_a_query_source_that_is_prepared_holds_it_back(by_time: Watch, gid: str) -> None:
    by_time.configure(source="select max(at) from bronze.src")
    writer = by_time.session()
    writer.execute("begin")
    by_time.insert("late", writer)
    writer.execute(f"prepare transaction '{gid}'".encode())
    by_time.insert("early")
    by_time.let_a_second_pass()
    by_time.run()
    by_time.conn.execute(f"commit prepared '{gid}'".encode())
    assert by_time.catch_up() == ["early", "late"]


# -- what holds a window back --


def test_a_session_that_holds_the_window_back_is_named(by_time: Watch) -> None:
    by_time.configure()
    writer = by_time.session(application_name="the long one")
    writer.execute("begin")
    row = writer.execute("select now()").fetchone()
    wait_until(by_time.conn, "select clock_timestamp() > %s + interval '5.1 seconds'", row)
    step = by_time.run()
    assert f"backend {writer.info.backend_pid} " in step["held_back_by"]
    assert "the long one" in step["held_back_by"]
    writer.execute("commit")
    assert by_time.run()["held_back_by"] is None


def test_a_writer_that_holds_ids_back_is_named(by_id: Watch) -> None:
    by_id.configure()
    writer = by_id.session(application_name="the long one")
    writer.execute("begin")
    by_id.insert("late", writer)
    by_id.insert("early")
    assert "the long one" in by_id.run()["held_back_by"]
    writer.execute("commit")
    assert by_id.run()["held_back_by"] is None


def test_ids_that_could_not_be_settled_in_time_are_settled_by_a_later_run(by_id: Watch) -> None:
    """Writers without a break: at no moment is there none, and yet the window moves."""
    by_id.configure()
    first, second = by_id.session(), by_id.session()
    first.execute("begin")
    by_id.insert("a", first)
    by_id.run()
    second.execute("begin")
    by_id.insert("b", second)
    first.execute("commit")
    by_id.run()
    first.execute("begin")
    by_id.insert("c", first)
    second.execute("commit")
    by_id.run()
    by_id.insert("d", second)
    by_id.run()
    assert by_id.copied() >= ["a"]
    first.execute("commit")
    assert by_id.catch_up() == ["a", "b", "c", "d"]


def test_a_session_that_hides_its_transaction_is_waited_for_and_then_refused(watch: Watch) -> None:
    watch.configure()
    writer = watch.session()
    writer.execute("set track_activities = off")
    writer.execute("begin")
    watch.insert("late", writer)
    watch.insert("early")
    step = watch.run()
    if watch.strategy == "timestamp":
        assert (step["status"], step["error_code"]) == ("failed", "watermark.hidden_session")
        assert "grant pg_read_all_stats to etl_engine" in step["error_hint"]
        assert watch.pipeline.watermark("load") is None
    else:
        assert step["status"] == "succeeded"
    writer.execute("commit")
    assert watch.catch_up() == ["early", "late"]


def test_a_session_that_hides_a_transaction_that_ends_soon_is_only_waited_for(by_time: Watch) -> None:
    by_time.configure()
    writer = by_time.session()
    writer.execute("set track_activities = off")
    writer.execute("begin")
    by_time.insert("soon", writer, at=EARLIER)
    started = by_time.run_in_background()
    by_time.wait_for_a_waiting_run()
    writer.execute("commit")
    assert by_time.step_of(started)["status"] == "succeeded"
    assert by_time.copied() == ["soon"]


def test_a_session_that_shows_itself_too_late_is_still_hidden(by_time: Watch) -> None:
    """Turned on inside the transaction, the session shows what it does, but not since when."""
    by_time.configure()
    writer = by_time.session()
    writer.execute("set track_activities = off")
    writer.execute("begin")
    writer.execute("set track_activities = on")
    writer.execute("select 1")
    assert by_time.run()["error_code"] == "watermark.hidden_session"
    writer.execute("rollback")


def test_without_the_right_to_see_sessions_a_window_of_timestamps_is_refused(private_server: Server) -> None:
    with private_server.connect() as conn:
        database = private_server.create_database(template=private_server.migrated_template())
        conn.execute("revoke pg_read_all_stats from etl_engine")
        with Watch(database, "timestamp") as watch:
            watch.configure()
            writer = watch.session()
            writer.execute("begin")
            watch.insert("late", writer)
            assert watch.run()["error_code"] == "watermark.hidden_session"
            writer.execute("commit")
            assert watch.catch_up() == ["late"]
            writer.execute("begin")
            watch.insert("later", writer)
            conn.execute("grant pg_read_all_stats to etl_engine")
            assert watch.run()["status"] == "succeeded"
            writer.execute("commit")
            assert watch.catch_up() == ["late", "later"]
        database.drop()


def test_a_long_writer_of_one_source_holds_back_all_of_them(by_time: Watch) -> None:
    by_time.pipeline.sql(SOURCE.format("other"))
    by_time.configure("src", "other")
    writer = by_time.session()
    writer.execute("begin")
    by_time.insert("late", writer, table="other")
    by_time.insert("early")
    by_time.let_a_second_pass()
    by_time.run()
    assert by_time.copied() == []
    writer.execute("commit")
    assert by_time.catch_up() == ["early", "late"]


def two_readers(by_time: Watch, body: str) -> Pipeline:
    """A pipeline whose second step begins right after the first one has executed `body`."""
    pipeline = by_time.pipeline
    pipeline.conn.execute("grant update on etl.recent_horizons to etl_owner")
    for name, statement, needs in (("first", body, []), ("second", "perform 1", ["first"])):
        pipeline.add(
            name,
            statement,
            arguments="p_until timestamptz",
            dependencies=needs,
            watermark={
                "strategy": "timestamp",
                "source": ["bronze.src.at"],
                "state_key": name,
                "delay_ms": 0,
            },
        )
    pipeline.apply()
    return pipeline


PLANTED: Final = "2001-01-01 00:00:00+00:00"


def plant(run_id: str, age: str = "0 ms") -> str:
    """Put another bound in the place of the one that the first step noted; `two_readers` lets it."""
    return (
        f"update etl.recent_horizons set bound = '{PLANTED}', run_id = {run_id},"
        f" noted_at = clock_timestamp() - interval '{age}'"
    )


def test_the_steps_of_a_run_share_a_bound_that_is_a_moment_old(by_time: Watch) -> None:
    pipeline = two_readers(by_time, plant("run_id"))

    def is_shared() -> bool:
        step = pipeline.step(pipeline.start().run_id, "second")
        pipeline.sql("delete from etl.state", role="etl_engine")
        return str(datetime.fromisoformat(step["window_until"])) == PLANTED

    assert any(is_shared() for _ in range(20)), "never within 250 ms"


@pytest.mark.parametrize(
    "body",
    [
        pytest.param(plant("run_id", "251 ms"), id="too_old"),
        pytest.param(plant("run_id", "-1 hour"), id="of_the_future"),
        pytest.param(plant("run_id - 1"), id="of_another_run"),
        pytest.param(
            plant("run_id") + "; insert into bronze.src (note) values ('fed')", id="of_before_it_was_fed"
        ),
    ],
)
def test_a_bound_that_will_not_do_for_a_step_is_not_shared(by_time: Watch, body: str) -> None:
    pipeline = two_readers(by_time, body)
    for _ in range(3):
        step = pipeline.step(pipeline.start().run_id, "second")
        assert step["status"] == "succeeded", step["error_message"]
        assert str(datetime.fromisoformat(step["window_until"])) > PLANTED


def test_a_bound_that_holds_for_some_sources_only_is_not_shared(by_time: Watch, gid: str) -> None:
    other = by_time.session()
    other.execute("create table public.other (n int)")
    other.execute("begin")
    other.execute("insert into public.other values (1)")
    other.execute(f"prepare transaction '{gid}'".encode())
    pipeline = two_readers(by_time, "perform 1")
    assert pipeline.start().status == "succeeded"
    assert pipeline.rows("select * from etl.recent_horizons") == []
    other.execute(f"rollback prepared '{gid}'".encode())
    pipeline.start()
    assert len(pipeline.rows("select * from etl.recent_horizons")) == 1


def test_snapshots_of_two_sources_lose_nothing(by_xid: Watch) -> None:
    by_xid.pipeline.sql(SOURCE.format("other"))
    by_xid.configure("src", "other")
    writer = by_xid.session()
    writer.execute("begin")
    by_xid.insert("late", writer, table="other")
    by_xid.insert("early")
    by_xid.run()
    assert by_xid.copied() == ["early"]
    writer.execute("commit")
    assert by_xid.catch_up() == ["early", "late"]


# -- ids --


def test_an_id_drawn_early_in_the_writing_transaction_is_not_lost(by_id: Watch) -> None:
    by_id.configure()
    writer = by_id.session()
    writer.execute("begin")
    row = writer.execute("select nextval('bronze.src_id_seq')").fetchone()
    assert row is not None
    by_id.insert("early")
    by_id.run()
    writer.execute("insert into bronze.src (id, note) overriding system value values (%s, 'late')", row)
    writer.execute("commit")
    assert by_id.catch_up() == ["early", "late"]


def test_an_id_drawn_in_a_savepoint_that_is_rolled_back_is_not_lost(by_id: Watch) -> None:
    by_id.configure()
    writer = by_id.session()
    writer.execute("begin")
    writer.execute("savepoint a")
    row = writer.execute("select nextval('bronze.src_id_seq')").fetchone()
    assert row is not None
    writer.execute("rollback to a")
    by_id.insert("early")
    by_id.run()
    writer.execute("insert into bronze.src (id, note) overriding system value values (%s, 'late')", row)
    writer.execute("commit")
    assert by_id.catch_up() == ["early", "late"]


def test_a_sequence_that_hands_out_ids_in_advance_is_refused(by_id: Watch) -> None:
    by_id.pipeline.sql("alter sequence bronze.src_id_seq cache 20")
    with refused("PT422", "config.invalid") as refusal:
        by_id.configure()
    assert "bronze.src_id_seq" in refusal.message


def test_a_sequence_that_is_given_a_cache_later_fails_the_step(by_id: Watch) -> None:
    by_id.configure()
    by_id.pipeline.sql("alter sequence bronze.src_id_seq cache 20")
    by_id.insert("row")
    step = by_id.run()
    assert (step["status"], step["error_code"]) == ("failed", "watermark.unordered_sequence")
    by_id.pipeline.sql("alter sequence bronze.src_id_seq cache 1")
    assert by_id.catch_up() == ["row"]


def test_a_sequence_that_counts_down_is_refused(by_id: Watch) -> None:
    by_id.pipeline.sql("alter sequence bronze.src_id_seq increment -1 minvalue -100 start -1 restart")
    with refused("PT422", "config.invalid"):
        by_id.configure()


PARTS: Final = (
    "create sequence bronze.parts_id_seq;"
    " create table bronze.parts (id bigint not null default nextval('bronze.parts_id_seq'),"
    " at timestamptz not null default now(), etl_xid xid8 not null default pg_current_xact_id(),"
    " note text not null, part int not null default 0) partition by list (part);"
    " create table bronze.parts_0 partition of bronze.parts for values in (0);"
    " create table bronze.parts_1 partition of bronze.parts for values in (1);"
    " create table bronze.parts_2 (like bronze.parts including defaults);"
)


def test_a_writer_of_one_partition_is_a_writer_of_the_table(watch: Watch) -> None:
    watch.pipeline.sql(PARTS)
    watch.configure("parts")
    writer = watch.session()
    writer.execute("begin")
    watch.insert("late", writer, table="parts_0")
    watch.insert("early", table="parts")
    watch.let_a_second_pass()
    watch.run()
    writer.execute("commit")
    assert watch.catch_up() == ["early", "late"]


@pytest.mark.parametrize("source", [None, "select max(id) from bronze.parts"], ids=["column", "query"])
def test_a_partition_that_is_attached_while_the_bound_is_being_read_has_its_writers_waited_for(
    by_id: Watch, source: str | None
) -> None:
    by_id.pipeline.sql(PARTS)
    by_id.configure("parts", source=source)
    locker, writer = by_id.session(), by_id.session()
    locker.execute("begin")
    locker.execute("lock table only bronze.parts_1 in access exclusive mode")
    started = by_id.run_in_background()
    wait_until(
        by_id.conn,
        "select count(*) from pg_locks where relation = 'bronze.parts_1'::regclass and not granted",
    )
    by_id.pipeline.sql("alter table bronze.parts attach partition bronze.parts_2 for values in (2)")
    writer.execute("begin")
    writer.execute("insert into bronze.parts_2 (note, part) values ('late', 2)")
    by_id.insert("early", table="parts_0")
    locker.execute("rollback")
    assert by_id.step_of(started)["status"] == "succeeded"
    writer.execute("commit")
    assert by_id.catch_up() == ["early", "late"]


def test_a_truncated_source_does_not_move_the_watermark_back(watch: Watch) -> None:
    watch.configure()
    watch.insert("before", at=EARLIER)
    assert watch.catch_up() == ["before"]
    before = watch.pipeline.watermark("load")
    watch.conn.execute("truncate bronze.src")
    step = watch.run()
    assert step["status"] == "succeeded"
    if watch.strategy == "id":
        assert watch.pipeline.watermark("load") == before
    watch.insert("after")
    assert watch.catch_up() == ["after", "before"]


def test_ids_of_a_query_are_not_held_back_by_another_pipeline_that_runs(by_id: Watch) -> None:
    other = Pipeline(by_id.pipeline.db, "other")
    other.add("waits", Gate.WAIT)
    other.apply()
    by_id.configure(source="select max(id) from bronze.src")
    by_id.insert("row")
    with other.gate() as gate:
        started = other.start_in_background(pipeline="other")
        gate.wait_for_arrivals()
        by_id.run(pipeline="bronze_to_silver")
        assert by_id.copied() == ["row"]
        gate.open()
        started.result()


def test_ids_of_a_query_are_not_held_back_by_who_writes_what_the_engine_reads(by_id: Watch) -> None:
    by_id.configure(source="select max(id) from bronze.src")
    by_id.insert("row")
    with by_id.pipeline.db.connect(autocommit=False) as other:
        for table in ("state", "procedures", "procedure_runs", "run_scopes", "runs"):
            other.execute(f"lock table etl.{table} in row exclusive mode".encode())
        step = by_id.run()
        assert (step["held_back_by"], by_id.copied()) == (None, ["row"])
        other.rollback()


def test_a_prepared_writer_of_one_partition_is_a_writer_of_the_table(watch: Watch, gid: str) -> None:
    watch.pipeline.sql(PARTS)
    watch.configure("parts")
    writer = watch.session()
    writer.execute("begin")
    watch.insert("late", writer, table="parts_0")
    writer.execute(f"prepare transaction '{gid}'".encode())
    watch.insert("early", table="parts")
    watch.let_a_second_pass()
    watch.run()
    watch.conn.execute(f"commit prepared '{gid}'".encode())
    assert watch.catch_up() == ["early", "late"]


# -- as_of and first runs --


def test_the_first_run_reads_from_the_beginning(watch: Watch) -> None:
    watch.insert("old", at="'-infinity'")
    watch.insert("older than the configuration", at=EARLIER)
    watch.configure()
    step = watch.run()
    assert step["window_since"] is None
    assert watch.copied() == ["old", "older than the configuration"]
    assert watch.pipeline.watermark("load") == step["window_until"]


def test_an_as_of_of_the_past_leaves_out_what_came_later(watch: Watch) -> None:
    watch.configure()
    watch.insert("a", at="now() - interval '3 hours'")
    assert watch.pipeline.value("select etl.tick_watermarks()") == (watch.strategy != "timestamp")
    as_of = watch.pipeline.value("select clock_timestamp()")
    if watch.strategy == "timestamp":
        as_of -= timedelta(hours=2)
    watch.insert("b", at=EARLIER)
    watch.run(as_of=as_of)
    assert watch.copied() == ["a"]
    watch.run()
    assert watch.copied() == ["a", "b"]


def test_an_as_of_of_the_future_does_not_reach_beyond_what_is_safe(watch: Watch) -> None:
    watch.configure()
    writer = watch.session()
    writer.execute("begin")
    watch.insert("late", writer)
    watch.insert("early")
    watch.run(as_of=datetime.now(UTC) + timedelta(days=1))
    writer.execute("commit")
    assert watch.catch_up() == ["early", "late"]


def test_an_as_of_before_the_watermark_is_an_empty_window(watch: Watch) -> None:
    watch.configure()
    watch.insert("a", at="now() - interval '3 hours'")
    watch.pipeline.value("select etl.tick_watermarks()")
    early = watch.pipeline.value(
        "select clock_timestamp() - interval '2 hours' * %s", int(watch.strategy == "timestamp")
    )
    watch.insert("b", at=EARLIER)
    watch.run()
    before = watch.pipeline.watermark("load")
    step = watch.run(as_of=early)
    assert (step["status"], step["window_since"], step["window_until"]) == ("succeeded", before, before)
    assert watch.pipeline.watermark("load") == before
    assert watch.copied() == ["a", "b"]


@pytest.mark.parametrize("strategy", ["id", "xid"])
def test_an_as_of_before_anything_was_noted_is_refused(db: Database, strategy: str) -> None:
    with Watch(db, strategy) as watch:
        watch.configure()
        watch.insert("a")
        step = watch.run(as_of=datetime.now(UTC) - timedelta(days=1))
        assert (step["status"], step["error_code"]) == ("failed", "watermark.no_tick")
        assert watch.catch_up() == ["a"]


def test_a_window_is_half_open(by_time: Watch) -> None:
    by_time.configure()
    bound = datetime.now(UTC) - timedelta(hours=1)
    for note, shift in (("before", -1), ("on", 0), ("on too", 0), ("after", 1)):
        by_time.insert(note, at=f"'{bound.isoformat()}'::timestamptz + interval '{shift} microsecond'")
    by_time.run(as_of=bound)
    assert by_time.copied() == ["before"]
    by_time.run()
    assert by_time.copied() == ["after", "before", "on", "on too"]


def test_timestamps_of_the_application_may_be_late_by_the_delay(by_time: Watch) -> None:
    by_time.configure(delay_ms=600_000)
    by_time.insert("early", at="now() - interval '9 minutes'")
    by_time.insert("old", at=EARLIER)
    by_time.run()
    assert by_time.copied() == ["old"]
    by_time.insert("late", at="now() - interval '9 minutes 30 seconds'")
    by_time.configure(delay_ms=0)
    by_time.run()
    assert by_time.copied() == ["early", "late", "old"]


# -- while a step reads --


def test_what_is_written_while_a_step_reads_is_read_once_by_the_next(watch: Watch) -> None:
    watch.configure(before=Gate.WAIT)
    watch.insert("before", at=EARLIER)
    with watch.pipeline.gate() as gate:
        started = watch.run_in_background()
        gate.wait_for_arrivals()
        watch.insert("during")
        gate.open()
        watch.step_of(started)
    assert watch.copied() == ["before"]
    assert watch.catch_up() == ["before", "during"]


@pytest.mark.parametrize("strategy", ["timestamp", "xid"])
def test_a_row_that_is_updated_while_a_step_reads_is_read_as_it_is_now(db: Database, strategy: str) -> None:
    with Watch(db, strategy) as watch:
        watch.pipeline.sql(
            "create function bronze.touch() returns trigger language plpgsql as $$ begin"
            " new.at := now(); new.etl_xid := pg_current_xact_id(); return new; end $$;"
            " create trigger touch before update on bronze.src for each row execute function bronze.touch()"
        )
        watch.configure(before=Gate.WAIT)
        watch.insert("old", at=EARLIER)
        with watch.pipeline.gate() as gate:
            started = watch.run_in_background()
            gate.wait_for_arrivals()
            watch.conn.execute("update bronze.src set note = 'new'")
            gate.open()
            watch.step_of(started)
        assert watch.copied() == []
        assert watch.catch_up() == ["new"]


def test_a_retry_reads_the_window_of_the_first_attempt(watch: Watch) -> None:
    watch.pipeline.sql("create sequence silver.tries")
    watch.configure(
        before=f"{Gate.WAIT}; if nextval('silver.tries') = 1 then"
        " raise exception 'x' using errcode = '40001'; end if"
    )
    watch.insert("before", at=EARLIER)
    with watch.pipeline.gate() as gate:
        started = watch.run_in_background()
        gate.wait_for_arrivals()
        watch.insert("during")
        gate.open()
        run: Run = started.result()
    attempts = watch.pipeline.steps(run.run_id)
    assert [attempt["status"] for attempt in attempts] == ["retrying", "succeeded"]
    assert len({(attempt["window_since"], attempt["window_until"]) for attempt in attempts}) == 1
    assert watch.copied() == ["before"]
    assert watch.catch_up() == ["before", "during"]


@pytest.mark.parametrize("isolation", ["repeatable read", "serializable"])
def test_a_step_with_a_snapshot_of_its_own_sees_all_of_its_window(watch: Watch, isolation: str) -> None:
    watch.configure(isolation=isolation)
    writer = watch.session()
    writer.execute("begin")
    watch.insert("late", writer)
    watch.insert("early")
    watch.let_a_second_pass()
    watch.run()
    writer.execute("commit")
    assert watch.catch_up() == ["early", "late"]


def test_a_watermark_that_somebody_moves_while_a_step_reads_undoes_the_step(watch: Watch) -> None:
    watch.configure(before=Gate.WAIT)
    watch.insert("a", at=EARLIER)
    watch.run()
    with watch.pipeline.gate() as gate:
        started = watch.run_in_background()
        gate.wait_for_arrivals()
        watch.conn.execute("select etl.set_watermark('load', null, 'read again')")
        gate.open()
        step = watch.step_of(started)
    assert (step["status"], step["error_code"]) == ("failed", "watermark.moved")
    assert watch.pipeline.watermark("load") is None
    assert watch.copied() == ["a"]
    watch.run()
    assert watch.copied() == ["a", "a"]


# -- windows without rows --


def test_an_empty_window_is_run_or_skipped_as_configured(watch: Watch) -> None:
    watch.configure(on_empty="skip")
    step = watch.run()
    assert (step["status"], step["skip_reason"]) == ("skipped", "no_data")
    assert watch.pipeline.watermark("load") is None
    watch.insert("a", at=EARLIER)
    assert watch.run()["status"] == "succeeded"
    assert watch.run()["skip_reason"] == "no_data"
    watch.configure(on_empty="run")
    assert watch.run()["status"] == "succeeded"
    assert watch.copied() == ["a"]


def test_a_skipped_window_loses_nothing(watch: Watch) -> None:
    watch.configure(on_empty="skip")
    writer = watch.session()
    writer.execute("begin")
    watch.insert("late", writer)
    watch.run()
    watch.run()
    writer.execute("commit")
    watch.let_a_second_pass()
    watch.run()
    assert watch.copied() == ["late"]


# -- other clusters --


@pytest.mark.parametrize(
    "change",
    ["last_success_watermark = '9000000000:9000000000:'", "server_id = server_id + 1"],
    ids=["ahead", "other cluster"],
)
def test_a_watermark_that_counts_the_transactions_of_another_cluster_is_refused(
    by_xid: Watch, change: str
) -> None:
    by_xid.configure()
    by_xid.insert("a")
    by_xid.run()
    by_xid.conn.execute(f"update etl.state set {change}".encode())
    by_xid.insert("b")
    step = by_xid.run()
    assert (step["status"], step["error_code"]) == ("failed", "watermark.foreign")
    assert "etl.rebase_watermark('load'" in step["error_hint"]
    assert by_xid.copied() == ["a"]


def test_a_reader_that_is_killed_reads_the_same_window_again(watch: Watch) -> None:
    watch.configure(before=Gate.WAIT)
    watch.insert("a", at=EARLIER)
    with watch.pipeline.gate() as gate:
        started = watch.run_in_background()
        (pid,) = gate.wait_for_arrivals()
        watch.conn.execute("select pg_terminate_backend(%s)", [pid])
        with pytest.raises(psycopg.OperationalError):
            started.result()
        gate.open()
    assert watch.copied() == []
    assert watch.catch_up() == ["a"]
