"""History that has been kept for long enough leaves, by one door; everything else stays."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import psycopg
import pytest

from tests.pipelines import Background, Gate, Pipeline, Row, call, messages_of, refused
from tests.servers import Connection, Database, wait_until

HISTORY = (
    "runs",
    "procedure_runs",
    "mv_refreshes",
    "state_history",
    "config_versions",
    "full_refresh_freezes",
)
STEP_LOGS = """
select etl._make_log_partition(m::timestamptz, true)
  from unnest('{2020-01-05Z, 2020-02-05Z, 2030-12-24Z, now}'::text[]) m;
insert into etl.step_logs
  (logged_at, run_id, order_index, attempt, procedure_name, level, message, is_rolled_back)
select m::timestamptz, 1, 1, 1, 'silver.orders', 'info', 'x', false
  from unnest('{2020-01-05Z, 2020-02-05Z, 2030-12-24Z, now}'::text[]) m"""
ANOTHER_LINE = """
insert into etl.step_logs (run_id, order_index, attempt, procedure_name, level, message, is_rolled_back)
values (3, 1, 1, 'silver.orders', 'info', 'x', false)"""


@pytest.fixture
def pipeline(db: Database) -> Iterator[Pipeline]:
    with Pipeline(db) as pipeline:
        pipeline.add("orders")
        pipeline.apply(retention={"runs": 30, "logs": 30, "ticks": 5})
        yield pipeline


def purge(pipeline: Pipeline, conn: Connection | None = None, **arguments: Any) -> Row:
    row = (conn or pipeline.conn).execute(*call("etl.purge", arguments)).fetchone()
    assert row is not None
    counts: Row = row[0]
    return counts


def age(pipeline: Pipeline, *runs: int, days: int = 31) -> None:
    """Make it so long ago that these runs ended: nobody but a superuser without triggers can."""
    with pipeline.conn.transaction():
        pipeline.conn.execute("set local session_replication_role = replica")
        for table, column in (
            ("runs", "ended_at"),
            ("runs", "started_at"),
            ("runs", "submitted_at"),
            ("state_history", "changed_at"),
        ):
            pipeline.conn.execute(
                f"update etl.{table} set {column} = {column} - %s where run_id = any (%s)",
                [timedelta(days), list(runs)],
            )


def run_ids(pipeline: Pipeline) -> list[int]:
    return pipeline.column("select run_id from etl.runs order by run_id")


# -- what leaves --


def test_runs_that_were_kept_for_long_enough_leave_whole(pipeline: Pipeline) -> None:
    first, second, third = (pipeline.start().run_id for _ in range(3))
    age(pipeline, first, second)
    assert purge(pipeline) == {
        "runs": 2, "attempts": 2, "watermark moves": 0, "ticks": 0, "slots": 0, "months of logs": 0,
    }  # fmt: skip
    assert run_ids(pipeline) == [third]
    for table in ("procedure_runs", "run_scopes"):
        assert pipeline.column(f"select distinct run_id from etl.{table}") == [third]
    assert purge(pipeline)["runs"] == 0


def test_refreshes_and_helpers_of_a_run_leave_with_it(pipeline: Pipeline) -> None:
    pipeline.sql("create materialized view silver.m as select 1 as n; create unique index on silver.m (n)")
    refresh = {"name": "silver.m", "after": "run", "on": "success", "concurrently": "auto"}
    pipeline.change("orders", mv_refresh=[refresh])
    run_id = pipeline.start().run_id
    pipeline.sql(f"insert into etl.run_workers values ({run_id}, 1)", role="etl_engine")
    pipeline.start()
    age(pipeline, run_id)
    pipeline.apply(retention={"runs": 30})
    assert purge(pipeline)["runs"] == 1
    assert pipeline.column("select run_id from etl.mv_refreshes") == [run_id + 1]


def test_batches_are_small_and_none_is_left_out(pipeline: Pipeline) -> None:
    for _ in range(7):
        pipeline.start()
    age(pipeline, *range(1, 7))
    assert purge(pipeline, batch_rows=2)["runs"] == 6
    assert run_ids(pipeline) == [7]


def test_a_purge_ends_when_its_time_is_over(pipeline: Pipeline) -> None:
    for _ in range(4):
        pipeline.start()
    age(pipeline, 1, 2, 3)
    assert purge(pipeline, batch_rows=1, max_duration="0 seconds")["runs"] == 1
    assert purge(pipeline)["runs"] == 2


def test_moves_of_watermarks_leave_but_the_last_and_those_made_by_hand(pipeline: Pipeline) -> None:
    add_watermark(pipeline)
    pipeline.apply(retention={"runs": 30})
    for number in range(4):
        pipeline.sql(f"insert into bronze.rows values ({number})")
        pipeline.start()
        if number == 1:
            pipeline.conn.execute("select etl.set_watermark('rows', '0', reason => 'again')")
    with pipeline.conn.transaction():
        pipeline.conn.execute("set local session_replication_role = replica")
        pipeline.conn.execute("update etl.state_history set changed_at = changed_at - interval '31 days'")
    watermark = pipeline.watermark("rows")
    assert purge(pipeline)["watermark moves"] == 3
    assert pipeline.column("select cause from etl.state_history order by 1") == ["incremental", "set"]
    assert pipeline.watermark("rows") == watermark


def add_watermark(pipeline: Pipeline) -> None:
    pipeline.sql("create table bronze.rows (id bigint primary key)")
    pipeline.add(
        "rows", arguments="p_since bigint, p_until bigint",
        watermark={"strategy": "id", "source": ["bronze.rows.id"], "state_key": "rows", "delay_ms": 0},
    )  # fmt: skip


def test_ticks_leave_but_the_newest_of_each_key(pipeline: Pipeline) -> None:
    pipeline.sql(
        "insert into etl.watermark_ticks select key, now() - days * interval '1 day', '1'"
        " from unnest('{a,b}'::text[]) key, unnest('{9,8,7,1}'::int[]) days where key = 'a' or days > 5",
        role="etl_engine",
    )
    assert purge(pipeline)["ticks"] == 5
    left = pipeline.rows(
        "select state_key, round(extract(epoch from now() - ticked_at) / 86400)::int as days"
        " from etl.watermark_ticks"
    )
    assert sorted((row["state_key"], row["days"]) for row in left) == [("a", 1), ("b", 7)]


def test_slots_leave_with_their_runs_but_the_last(pipeline: Pipeline) -> None:
    pipeline.apply(retention={"runs": 30}, schedules=[{"name": "s", "cron": "0 2 * * *", "timezone": "UTC"}])
    run_id = pipeline.start().run_id
    pipeline.sql(
        "insert into etl.schedule_slots select schedule_id, now() - n * interval '1 day',"
        f" now() - n * interval '1 day', 'submitted', case when n = 40 then {run_id} else 99 end, 0, null"
        " from etl.schedules, unnest('{40,39,38}'::int[]) n",
        role="etl_engine",
    )
    assert purge(pipeline)["slots"] == 1
    assert pipeline.value("select count(*) from etl.schedule_slots") == 2


def test_logs_leave_by_whole_months(pipeline: Pipeline) -> None:
    pipeline.conn.execute(STEP_LOGS)
    assert purge(pipeline)["months of logs"] == 2
    left = pipeline.column(
        "select inhrelid::regclass::text from pg_inherits where inhparent = 'etl.step_logs'::regclass"
        " and inhrelid::regclass::text ~ '20[23]0' order by 1"
    )
    assert left == ["etl.step_logs_p203012"]
    assert pipeline.value("select count(*) from etl.step_logs") == 2


def test_a_month_of_logs_in_use_is_left_for_the_next_purge_and_blocks_nobody(pipeline: Pipeline) -> None:
    pipeline.conn.execute(STEP_LOGS)
    writer = pipeline.db.connect(autocommit=False)
    writer.execute(ANOTHER_LINE)
    messages = messages_of(pipeline.conn)
    assert purge(pipeline, busy_tries=0)["months of logs"] == 0
    assert [m.text for m in messages if m.severity == "WARNING"] == [
        "etl.step_logs_p202001 is no longer kept but in use: it stays until the next purge"
    ]
    other = pipeline.db.connect(options="-c lock_timeout=1s")
    other.execute(ANOTHER_LINE)
    writer.rollback()
    assert purge(pipeline)["months of logs"] == 2
    settings = pipeline.value("select proconfig from pg_proc where proname = '_drop_logs'")
    assert "lock_timeout=20ms" in settings, "whoever writes logs waits for that long behind it"


def test_the_longest_retention_holds_for_what_pipelines_share(pipeline: Pipeline) -> None:
    pipeline.conn.execute(STEP_LOGS)
    with Pipeline(pipeline.db, "other") as other:
        other.add("others")
        other.apply(retention={"logs": "forever"})
        assert purge(pipeline)["months of logs"] == 0
        other.apply(retention={"logs": 36500})
        assert purge(pipeline)["months of logs"] == 0
        other.apply(retention={"logs": 40})
        assert purge(pipeline)["months of logs"] == 2


# -- what stays --


def test_what_is_kept_for_ever_stays(pipeline: Pipeline) -> None:
    pipeline.start()
    pipeline.start()
    pipeline.apply(retention={"runs": "forever"})
    age(pipeline, 1, days=5000)
    assert purge(pipeline)["runs"] == 0


def test_without_a_word_runs_are_kept_for_400_days(pipeline: Pipeline) -> None:
    pipeline.apply()
    for _ in range(3):
        pipeline.start()
    age(pipeline, 1, days=401)
    age(pipeline, 2, days=399)
    assert purge(pipeline)["runs"] == 1


def test_each_pipeline_keeps_its_own_runs(pipeline: Pipeline) -> None:
    with Pipeline(pipeline.db, "other") as other:
        other.add("others")
        other.apply(retention={"runs": 100})
        for _ in range(2):
            pipeline.start(pipeline="bronze_to_silver")
            other.start(pipeline="other")
        age(pipeline, 1, 2, days=50)
        assert purge(pipeline)["runs"] == 1
        assert run_ids(pipeline) == [2, 3, 4]


def test_runs_that_something_refers_to_stay(pipeline: Pipeline) -> None:
    """The run that another one resumes, and those that a table of somebody else names."""
    pipeline.routine("orders", "perform 1 / 0")
    failed = pipeline.start().run_id
    pipeline.routine("orders")
    pipeline.conn.execute("call etl.resume_run(%s)", [failed])
    named = pipeline.start().run_id
    pipeline.conn.execute("grant references on etl.runs to etl_owner")
    pipeline.sql(
        "create table silver.notes (run_id bigint references etl.runs);"
        f" insert into silver.notes values ({named})"
    )
    pipeline.start()
    age(pipeline, failed, named)
    with refused("PT403", "purge.not_readable") as refusal:
        purge(pipeline)
    for statement in (refusal.hint or "").split("; "):
        pipeline.conn.execute(statement.encode())
    assert purge(pipeline)["runs"] == 0
    age(pipeline, failed + 1)
    assert purge(pipeline)["runs"] == 2
    pipeline.sql("drop table silver.notes")
    assert purge(pipeline)["runs"] == 1


def test_the_run_a_watermark_comes_from_stays(pipeline: Pipeline) -> None:
    add_watermark(pipeline)
    pipeline.apply(retention={"runs": 30})
    pipeline.sql("insert into bronze.rows values (1)")
    pipeline.start(procedures=["rows"])
    with Pipeline(pipeline.db, "other") as other:
        other.add("others")
        other.apply()
    pipeline.procedures.pop()
    pipeline.apply(retention={"runs": 30})
    age(pipeline, 1)
    assert purge(pipeline)["runs"] == 0
    assert run_ids(pipeline) == [1]


def test_how_each_procedure_last_ended_and_last_succeeded_stays(pipeline: Pipeline) -> None:
    for body in (None, None, "perform 1 / 0", "perform 1 / 0"):
        pipeline.routine("orders", body)
        pipeline.start()
    before = pipeline.rows("select * from etl.procedure_health")
    age(pipeline, 1, 2, 3, 4)
    assert purge(pipeline)["runs"] == 2
    assert run_ids(pipeline) == [2, 4]
    after = pipeline.rows("select * from etl.procedure_health")
    assert [(row["last_run_id"], row["last_status"]) for row in after] == [(4, "failed")]
    assert after[0]["last_success_at"] == before[0]["last_success_at"]


def test_how_each_schedule_last_fared_stays(pipeline: Pipeline) -> None:
    """The scheduled run failed and was resumed: that success is long ago, and there were runs since."""
    pipeline.apply(
        retention={"runs": 30}, schedules=[{"name": "yearly", "cron": "0 0 1 1 *", "timezone": "UTC"}]
    )
    pipeline.routine("orders", "perform 1 / 0")
    pipeline.conn.execute("update etl.schedules set next_at = clock_timestamp()")
    pipeline.conn.execute("call etl.run_due()")
    pipeline.routine("orders")
    pipeline.conn.execute("call etl.resume_run(1)")
    pipeline.sql(
        "update etl.schedule_slots"
        " set slot_at = slot_at - interval '99 days', decided_at = now() - interval '99 days'",
        role="etl_engine",
    )
    for _ in range(3):
        pipeline.start()
    age(pipeline, 1, 2, 3, days=99)
    before = pipeline.rows("select * from etl.schedule_health")
    assert purge(pipeline)["runs"] == 1
    assert run_ids(pipeline) == [1, 2, 4, 5]
    assert pipeline.rows("select * from etl.schedule_health") == before
    assert before[0]["last_success_at"] is not None
    assert not before[0]["is_late"]


def test_what_schedules_remember_is_looked_up_once_and_not_for_each_procedure(pipeline: Pipeline) -> None:
    for name in ("a", "b", "c"):
        pipeline.add(name)
    pipeline.apply(schedules=[{"name": "s", "cron": "0 2 * * *", "timezone": "UTC"}])
    pipeline.sql(
        "insert into etl.schedule_slots select schedule_id, now() - n * interval '1 day',"
        " now() - n * interval '1 day', 'submitted', 1000 + n, 0, null"
        " from etl.schedules, generate_series(1, 5) n",
        role="etl_engine",
    )
    pipeline.conn.execute("set track_functions = 'all'")
    with pipeline.conn.transaction():
        pipeline.conn.execute("select etl._remembered_runs(pipeline_id) from etl.pipelines")
        calls = pipeline.value(
            "select pg_stat_get_xact_function_calls('etl._succeeded_at(bigint)'::regprocedure)"
        )
    assert calls == 5


@pytest.fixture
def resumable(pipeline: Pipeline) -> int:
    """Of three runs two are no longer kept, and the first of them failed."""
    pipeline.routine("orders", "perform 1 / 0")
    failed = pipeline.start().run_id
    pipeline.routine("orders")
    others = [pipeline.start().run_id for _ in range(2)]
    age(pipeline, failed, others[0])
    return failed


def test_a_run_that_is_being_resumed_stays_and_is_not_waited_for(pipeline: Pipeline, resumable: int) -> None:
    resuming = pipeline.db.connect(autocommit=False)
    resuming.execute("select * from etl._begin_resume(%s, 'reuse')", [resumable])
    assert purge(pipeline, pipeline.db.connect(options="-c lock_timeout=2s"))["runs"] == 1
    resuming.commit()
    assert purge(pipeline)["runs"] == 0
    assert resumable in run_ids(pipeline)


def test_a_run_that_is_purged_while_it_is_to_be_resumed_is_unknown(
    pipeline: Pipeline, resumable: int
) -> None:
    holder = pipeline.db.connect(autocommit=False)
    holder.execute("lock table etl.watermark_ticks in share mode")
    purging = Background(lambda: purge(pipeline, pipeline.db.connect()))
    wait_until(
        pipeline.conn,
        "select exists (select from pg_locks"
        " where not granted and relation = 'etl.watermark_ticks'::regclass)",
    )
    conn = pipeline.db.connect()
    resuming = Background(lambda: conn.execute("call etl.resume_run(%s)", [resumable]))
    wait_until(
        pipeline.conn,
        "select exists (select from pg_stat_activity where pid = %s and wait_event_type = 'Lock')",
        [conn.info.backend_pid],
    )
    holder.rollback()
    assert purging.result()["runs"] == 2
    with refused("PT404", "run.unknown"):
        resuming.result()


def test_active_and_queued_runs_stay_and_are_not_waited_for(pipeline: Pipeline) -> None:
    pipeline.start()
    pipeline.routine("orders", Gate.WAIT)
    with pipeline.gate() as gate:
        running = pipeline.start_in_background()
        gate.wait_for_arrivals()
        pipeline.conn.execute("select * from etl.submit_run()")
        age(pipeline, 1, 2, 3, days=999)
        conn = pipeline.db.connect(options="-c lock_timeout=2s")
        assert purge(pipeline, conn)["runs"] == 0
        gate.open()
        assert running.result().status == "succeeded"
    assert run_ids(pipeline) == [1, 2, 3]


def test_configurations_freezes_and_the_rest_are_untouched(pipeline: Pipeline) -> None:
    pipeline.conn.execute("select etl.freeze_full_refresh(true, reason => 'x')")
    pipeline.start()
    pipeline.start()
    age(pipeline, 1, days=9999)
    count = (
        "select (select count(*) from etl.config_versions), (select count(*) from etl.full_refresh_freezes)"
    )
    before = pipeline.conn.execute(count).fetchone()
    assert purge(pipeline)["runs"] == 1
    assert pipeline.conn.execute(count).fetchone() == before


# -- who, and how --


def test_a_purge_leaves_its_heartbeat(pipeline: Pipeline) -> None:
    pipeline.start()
    pipeline.start()
    age(pipeline, 1)
    purge(pipeline)
    (beat,) = pipeline.rows("select * from etl.heartbeats where name = 'purge'")
    assert "1 runs" in beat["detail"]


def test_only_who_purges_leaves_the_heartbeat_of_a_purge(pipeline: Pipeline) -> None:
    operator = pipeline.login("etl_operator")
    beat = "select beat_at, detail from etl.heartbeats where name = 'purge'"
    operator.execute("""select etl._note_purge('{"runs": 5}')""")
    assert pipeline.rows(beat) == []
    purge(pipeline, operator)
    before = pipeline.rows(beat)
    operator.execute("""select etl._note_purge('{"runs": 5}')""")
    assert pipeline.rows(beat) == before


def test_one_purge_at_a_time(pipeline: Pipeline) -> None:
    other = pipeline.db.connect()
    other.execute("select pg_advisory_lock(hashtextextended('b2s purge', 0))")
    with refused("PT409", "purge.active"):
        purge(pipeline)


def test_a_purge_in_a_transaction_says_so(pipeline: Pipeline) -> None:
    conn = pipeline.db.connect(autocommit=False)
    with refused("25001", "call.in_transaction"):
        purge(pipeline, conn)


def test_an_operator_may_purge_and_a_reader_may_not(pipeline: Pipeline) -> None:
    pipeline.start()
    pipeline.start()
    age(pipeline, 1)
    with pytest.raises(psycopg.errors.InsufficientPrivilege):
        purge(pipeline, pipeline.login("etl_reader"))
    assert purge(pipeline, pipeline.login("etl_operator"))["runs"] == 1


def test_a_run_starts_and_ends_while_history_is_purged(pipeline: Pipeline) -> None:
    """The purge is stopped in the middle of a batch, holding all its locks."""
    for _ in range(3):
        pipeline.start()
    age(pipeline, 1, 2)
    holder = pipeline.db.connect(autocommit=False)
    holder.execute("select * from etl.schedules; lock table etl.schedule_slots")
    purging = Background(lambda: purge(pipeline, pipeline.db.connect()))
    wait_until(
        pipeline.conn,
        "select exists (select from pg_locks"
        " where not granted and relation = 'etl.schedule_slots'::regclass)",
    )
    assert pipeline.value("select count(*) from pg_locks where relation = 'etl.procedure_runs'::regclass") > 0
    conn = pipeline.db.connect(options="-c lock_timeout=1s")
    assert pipeline.start(conn).status == "succeeded"
    assert pipeline.start(conn, procedures=["orders"]).status == "succeeded"
    holder.rollback()
    assert purging.result()["runs"] == 2


# -- the door --

ATTACKS = [
    "delete from etl.{table}",
    "truncate etl.{table} cascade",
    "set role etl_retention; delete from etl.{table}",
    "set local session_replication_role = replica; delete from etl.{table}",
    "select set_config('role', 'etl_retention', false); delete from etl.{table}",
    "set session authorization etl_retention; delete from etl.{table}",
    "alter role etl_retention login",
    "grant etl_retention to etl_owner",
    "create function etl._mine() returns void language sql security definer as 'delete from etl.{table}';"
    " alter function etl._mine() owner to etl_retention; select etl._mine()",
    "create or replace function etl._delete_runs(max_rows int, out runs int, out attempts int)"
    " language plpgsql security definer as 'begin delete from etl.{table}; end'",
    "create or replace function etl._delete_moves(max_rows int) returns int language sql"
    " security definer as 'delete from etl.{table}; select 1'",
]


@pytest.mark.parametrize("attack", ATTACKS)
@pytest.mark.parametrize("role", ["etl_engine", "etl_owner", "etl_admin", "etl_operator"])
def test_no_role_opens_the_door_to_history(pipeline: Pipeline, role: str, attack: str) -> None:
    """Ended runs and what was moved cannot be deleted, whatever somebody sets, creates or calls."""
    fill(pipeline)
    before = counts(pipeline)
    for table in HISTORY:
        conn = pipeline.login(role)
        try:
            conn.execute(f"begin; set local role {role}".encode())
            conn.execute(attack.format(table=table).encode())
            conn.execute("commit")
        except psycopg.Error:
            conn.close()
    assert counts(pipeline) == before
    assert pipeline.value("select count(*) from pg_auth_members where member = 'etl_retention'::regrole") == 0


def fill(pipeline: Pipeline) -> None:
    """Something in each table of history."""
    pipeline.sql("create materialized view silver.m as select 1 as n; create unique index on silver.m (n)")
    add_watermark(pipeline)
    refresh = {"name": "silver.m", "after": "run", "on": "success", "concurrently": "auto"}
    pipeline.change("orders", mv_refresh=[refresh])
    pipeline.sql("insert into bronze.rows values (1)")
    pipeline.start()
    pipeline.conn.execute("select etl.freeze_full_refresh(true, reason => 'x')")


def counts(pipeline: Pipeline) -> list[int]:
    return [pipeline.value(f"select count(*) from etl.{table}") for table in HISTORY]


def test_a_step_does_not_open_the_door(pipeline: Pipeline) -> None:
    fill(pipeline)
    pipeline.add("thief", "set local b2s.purge = 'on'; delete from etl.runs where ended_at is not null")
    pipeline.apply()
    run_id = pipeline.start(procedures=["thief"]).run_id
    assert pipeline.step(run_id, "thief")["error_code"] == "42501"
    pipeline.conn.execute("grant select, delete on etl.runs to etl_owner")
    run_id = pipeline.start(procedures=["thief"]).run_id
    assert pipeline.step(run_id, "thief")["error_code"] == "history.immutable", "nor does a grant"


def test_what_is_still_kept_cannot_be_purged_by_whoever_calls_the_helpers(pipeline: Pipeline) -> None:
    fill(pipeline)
    before = counts(pipeline)
    pipeline.sql(
        "select etl._delete_runs(2147483647); select etl._delete_moves(2147483647)", role="etl_engine"
    )
    assert counts(pipeline) == before


def test_nobody_is_a_member_of_the_role_that_purges(pipeline: Pipeline) -> None:
    members = pipeline.column(
        "select member::regrole::text from pg_auth_members where roleid = 'etl_retention'::regrole"
    )
    assert [member for member in members if member.startswith("etl_")] == []
    owned = pipeline.column(
        "select proname from pg_proc where proowner = 'etl_retention'::regrole order by 1"
    )
    assert owned == ["_delete_moves", "_delete_runs"]
    assert pipeline.value("select not has_schema_privilege('etl_retention', 'etl', 'create')")


def test_the_door_opens_to_the_functions_of_the_role_and_not_to_the_role(pipeline: Pipeline) -> None:
    """Who administers the role, as who installs without CREATEROLE does, can become it on PostgreSQL 15."""
    fill(pipeline)
    before = counts(pipeline)
    member = pipeline.login("etl_retention")
    for become in ("set role etl_retention", "set session authorization etl_retention"):
        conn = member if become.startswith("set role") else pipeline.db.connect()
        conn.execute(become.encode())
        for table in ("runs", "procedure_runs", "mv_refreshes", "state_history"):
            with refused("PT409", "history.immutable"):
                conn.execute(f"delete from etl.{table}".encode())
    assert counts(pipeline) == before


def test_even_the_door_lets_nothing_through_that_has_not_ended_or_is_changed(pipeline: Pipeline) -> None:
    fill(pipeline)
    with pipeline.conn.transaction(force_rollback=True), refused("42501"):
        pipeline.conn.execute("set local role etl_retention")
        pipeline.conn.execute("update etl.runs set status = 'failed'")
