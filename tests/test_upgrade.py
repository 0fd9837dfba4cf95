"""From every release before to this one: with data, equal to a fresh install, and nothing is disturbed.

tests/releases/ has what each release installed, as `b2s migrate --sql` printed it.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psycopg
import pytest

import b2s
from b2s.cli import main
from b2s.errors import DatabaseError
from b2s.migrate import migrate
from tests.pipelines import Background, Gate, Pipeline, Row
from tests.servers import Connection, Database, Server, wait_until
from tests.test_migrate import MIGRATIONS, fingerprint, run_psql

RELEASES = sorted(
    (Path(__file__).parent / "releases").glob("*.sql"), key=lambda path: tuple(map(int, path.stem.split(".")))
)
TABLES = (
    "pipelines",
    "config_versions",
    "procedures",
    "runs",
    "procedure_runs",
    "mv_refreshes",
    "state",
    "state_history",
    "schedules",
)
SCHEDULE = {
    "name": "nightly", "cron": "0 2 * * *", "timezone": "UTC", "mode": "incremental", "procedures": [],
    "groups": [], "tags": [], "params": {}, "on_conflict": "skip", "catch_up": False,
}  # fmt: skip


@pytest.fixture(params=RELEASES, ids=lambda path: path.stem)
def old(request: pytest.FixtureRequest, empty_db: Database, server: Server) -> Iterator[Pipeline]:
    """A database of an earlier release, in use: a watermark, runs of every kind of end, a schedule."""
    done = run_psql(server, empty_db.dsn, request.param)
    assert done.returncode == 0, done.stderr
    with Pipeline(empty_db) as pipeline:
        fill(pipeline)
        yield pipeline
        # The server is shared: other tests must not find what this release has granted.
        pipeline.conn.execute("revoke pg_read_all_stats from etl_owner")


def fill(pipeline: Pipeline) -> None:
    pipeline.sql("create table bronze.rows (id bigint primary key); insert into bronze.rows values (1), (2)")
    pipeline.sql("create materialized view silver.m as select 1 as n; create unique index on silver.m (n)")
    pipeline.add(
        "rows", arguments="p_since bigint, p_until bigint",
        watermark={"strategy": "id", "source": ["bronze.rows.id"], "state_key": "rows", "delay_ms": 0},
        mv_refresh=[{"name": "silver.m", "after": "run", "on": "success", "concurrently": "auto"}],
    )  # fmt: skip
    pipeline.add("orders")
    pipeline.add("gated", "perform 1")
    pipeline.apply(schedules=[SCHEDULE])
    pipeline.start()
    pipeline.routine("orders", "perform 1 / 0")
    failed = pipeline.start().run_id
    pipeline.routine("orders")
    pipeline.conn.execute("call etl.resume_run(%s, changed_steps => 'reuse')", [failed])
    pipeline.conn.execute(
        "select * from etl.submit_run(procedures => '{orders}', idempotency_key => 'waits')"
    )
    pipeline.conn.execute("select etl.freeze_full_refresh(true, reason => 'closing the books')")
    pipeline.conn.execute("select etl.set_watermark('rows', '1', reason => 'again')")


def contents(pipeline: Pipeline) -> dict[str, list[Row]]:
    """What the tables held that every release has, column by column."""
    return {
        table: pipeline.column(f"select to_jsonb(t) from etl.{table} t order by to_jsonb(t)::text")
        for table in TABLES
    }


def without_new_columns(now: list[Row], before: list[Row]) -> list[Row]:
    names = before[0].keys()
    return sorted(
        ({name: row[name] for name in names} for row in now), key=lambda row: sorted(map(str, row.items()))
    )


def test_there_is_a_file_for_every_release_before_this_one() -> None:
    assert [path.stem for path in RELEASES] == ["0.1.0"]
    assert b2s.__version__ not in [path.stem for path in RELEASES]


def test_an_upgrade_ends_where_a_fresh_install_ends_and_keeps_the_data(old: Pipeline, db: Database) -> None:
    before = contents(old)
    assert migrate(old.db.dsn).after == b2s.__version__
    ledger = dict(old.conn.execute("select name, version from etl.migrations").fetchall())
    assert ledger.keys() == set(MIGRATIONS)

    def versionless(conn: Connection) -> list[str]:
        return [line.rpartition(" ")[0] if line.startswith("ledger ") else line for line in fingerprint(conn)]

    assert versionless(old.conn) == versionless(db.connect())
    now = contents(old)
    for table in TABLES:
        assert without_new_columns(now[table], before[table]) == without_new_columns(
            before[table], before[table]
        ), table


def test_what_was_there_goes_on_after_an_upgrade(old: Pipeline) -> None:
    watermark = old.watermark("rows")
    migrate(old.db.dsn)
    assert old.watermark("rows") == watermark
    old.conn.execute("call etl.work()")
    assert old.value("select status from etl.runs where idempotency_key = 'waits'") == "succeeded"
    assert old.start().status == "succeeded"
    assert (
        old.rows("select * from etl.diagnose() where status = 'fail' and check_name not in ('clock')") == []
    )


def test_a_configuration_of_the_release_before_is_no_drift(old: Pipeline) -> None:
    migrate(old.db.dsn)
    plan = old.value("select etl.plan_config(%s)", psycopg.types.json.Jsonb(old.spec(schedules=[SCHEDULE])))
    assert (plan["changes"], plan["drift"]) == ([], [])


def test_a_schedule_of_the_release_before_begins_with_the_upgrade(old: Pipeline) -> None:
    """It was never executed: what was due before is not made up for."""
    migrate(old.db.dsn)
    assert old.column("select run_id from etl.fire_schedules()") == []
    assert old.value(
        "select next_at > clock_timestamp() and next_at < now() + interval '25 hours' from etl.schedules"
    )


def test_an_upgrade_takes_back_what_the_engine_needed_as_the_role_of_the_team_s_code(
    private_server: Server,
) -> None:
    """From the last database of a server that has the old release: roles are shared."""
    held = (
        "select array(select roleid::regrole::text from pg_auth_members where member = 'etl_owner'::regrole"
        " and roleid::regrole::text ~ '^pg_' order by 1)"
    )
    warned = "select remedy from etl.diagnose() where check_name = 'engine' and status = 'warn'"
    one, other = private_server.create_database(), private_server.create_database()
    for database in (one, other):
        assert run_psql(private_server, database.dsn, RELEASES[0]).returncode == 0
    conn = one.connect()
    conn.execute("grant pg_signal_backend to etl_owner")
    both = ["pg_read_all_stats", "pg_signal_backend"]
    migrate(one.dsn)
    assert conn.execute(held).fetchone() == (both,)
    assert conn.execute(warned).fetchall() == []
    migrate(other.dsn)
    assert conn.execute(held).fetchone() == ([],)
    for role in both:
        assert conn.execute("select pg_has_role('etl_engine', %s, 'usage')", [role]).fetchone() == (True,)
    conn.execute("grant pg_read_all_stats to etl_owner")
    migrate(one.dsn)
    assert conn.execute(held).fetchone() == (both[:1],)
    assert conn.execute(warned).fetchall() == [
        ("as long as no routine needs it: revoke pg_read_all_stats from etl_owner",)
    ]
    for database in (one, other):
        database.drop()


# -- under a busy database --


@pytest.fixture
def active(old: Pipeline) -> Iterator[tuple[Pipeline, Gate, Background]]:
    """A CALL of the release before, in the middle of a step."""
    old.routine("gated", Gate.WAIT)
    with old.gate() as gate:
        running = old.start_in_background()
        gate.wait_for_arrivals()
        yield old, gate, running


Active = tuple[Pipeline, Gate, Background]


def test_an_upgrade_is_refused_under_an_active_run_which_goes_on(active: Active) -> None:
    pipeline, gate, running = active
    with pytest.raises(DatabaseError, match="is active: its routines cannot be replaced under it") as caught:
        migrate(pipeline.db.dsn)
    assert caught.value.sqlstate == "PT409"
    gate.open()
    run = running.result()
    assert run.status == "succeeded"
    assert set(pipeline.outcomes(run.run_id).values()) == {"succeeded"}
    assert migrate(pipeline.db.dsn).after == b2s.__version__


def test_an_upgrade_that_waits_lets_the_active_run_end_and_none_begin(
    active: Active, capsys: pytest.CaptureFixture[str]
) -> None:
    pipeline, gate, running = active
    upgrading = Background(lambda: main(["migrate", "--dsn", pipeline.db.dsn, "--wait", "60s"]))
    wait_until(
        pipeline.conn,
        "select exists (select from pg_locks where locktype = 'advisory' and classid = 6435443 and objid = 0"
        " and mode = 'ExclusiveLock' and granted"
        " and database = (select oid from pg_database where datname = current_database()))",
    )
    with pytest.raises(psycopg.Error, match="b2s is being upgraded in this database"):
        pipeline.start(procedures=["orders"])
    assert pipeline.conn.execute("call etl.work()").fetchone() == (0,)
    gate.open()
    assert running.result().status == "succeeded"
    assert upgrading.result() == 0
    said = capsys.readouterr()
    assert "to end; no other run starts meanwhile" in said.err
    assert f"b2s {b2s.__version__} is installed, 0.1.0 before" in said.out
    assert pipeline.start(procedures=["orders"]).status == "succeeded"


def test_an_upgrade_does_not_wait_for_ever(active: Active, capsys: pytest.CaptureFixture[str]) -> None:
    pipeline, gate, running = active
    assert main(["migrate", "--dsn", pipeline.db.dsn, "--wait", "300ms"]) == 3
    said = capsys.readouterr().err
    assert "has not ended within 0.3 s; nothing was changed" in said
    assert "hint: wait for longer" in said
    with pytest.raises(psycopg.Error, match=r"run \d of this pipeline is active"):
        pipeline.start(procedures=["orders"])
    gate.open()
    assert running.result().status == "succeeded"
    assert pipeline.value("select version from etl.installation") == "0.1.0"


def test_a_worker_of_the_release_before_that_is_between_two_runs_goes_on(old: Pipeline) -> None:
    """Its CALL began with routines that are replaced while it waits, and with the rights of another owner."""
    holder = old.db.connect(autocommit=False)
    holder.execute("lock table etl.pipelines")
    conn = old.db.connect()
    working = Background(lambda: conn.execute("call etl.work()").fetchone())
    wait_until(
        old.conn,
        "select exists (select from pg_stat_activity where pid = %s and wait_event_type = 'Lock')",
        [conn.info.backend_pid],
    )
    with ThreadPoolExecutor(1) as pool:
        upgrading = pool.submit(migrate, old.db.dsn)
        wait_until(
            old.conn,
            "select count(*) >= 2 from pg_locks where not granted and relation = 'etl.pipelines'::regclass",
        )
        holder.rollback()
        assert upgrading.result(60).after == b2s.__version__
    with pytest.raises(psycopg.ProgrammingError):
        working.result()
    assert old.conn.execute("call etl.work()").fetchone() in [(0,), (1,)]
    assert old.value("select status from etl.runs where idempotency_key = 'waits'") == "succeeded"


def test_waiting_where_nothing_is_installed_is_not_waiting(empty_db: Database) -> None:
    assert migrate(empty_db.dsn, wait=10).applied == MIGRATIONS


def test_two_that_wait_take_turns(db: Database, capsys: pytest.CaptureFixture[str]) -> None:
    other = db.connect()
    other.execute("select pg_advisory_lock(6435443, 0)")
    with pytest.raises(DatabaseError, match=r"another install has been going on for 0\.1 s"):
        migrate(db.dsn, wait=0.1)
    other.execute("select pg_advisory_unlock_all()")
    assert migrate(db.dsn, wait=0.1).after == b2s.__version__
