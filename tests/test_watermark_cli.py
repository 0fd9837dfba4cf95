"""b2s watermark, the view behind it, what the doctor says about horizons, and the grant an install makes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import psycopg
import pytest
from psycopg import sql

from b2s.cli import main
from b2s.migrate import migrate
from tests import test_cli
from tests.pipelines import Pipeline, refused
from tests.servers import Connection, Database, Server
from tests.test_cli import Cli

cli = test_cli.cli
clean_surroundings = test_cli.clean_surroundings

BRONZE = """
create table bronze.orders (
  id bigint generated always as identity, ingested_at timestamptz not null default clock_timestamp(),
  etl_xid xid8 not null default pg_current_xact_id());
create index on bronze.orders (id);
create index on bronze.orders (ingested_at);
create index on bronze.orders (etl_xid);
insert into bronze.orders (ingested_at) select now() - interval '1 hour' from generate_series(1, 5);
"""
HORIZON = "select horizon::timestamptz from etl.watermarks where state_key = 'by_timestamp'"
TYPES = {"timestamp": "timestamptz", "id": "bigint", "xid": "pg_snapshot"}
COLUMNS = {"timestamp": "ingested_at", "id": "id", "xid": "etl_xid"}
READS = {
    "timestamp": "(p_since is null or o.ingested_at >= p_since) and o.ingested_at < p_until",
    "id": "(p_since is null or o.id >= p_since) and o.id < p_until",
    "xid": "etl.arrived(o.etl_xid, p_since, p_until)",
}


@pytest.fixture
def pipeline(db: Database) -> Iterator[Pipeline]:
    with Pipeline(db) as pipeline:
        pipeline.sql(BRONZE)
        yield pipeline


def add(
    pipeline: Pipeline, strategy: str, source: str | None = None, name: str = "", state_key: str = ""
) -> None:
    """A procedure that notes in silver.trace what its window of bronze.orders holds, whatever its source."""
    kind = TYPES[strategy]
    pipeline.add(
        name or f"by_{strategy}",
        f"insert into silver.trace (step) select 'read' from bronze.orders o where {READS[strategy]}",
        arguments=f"p_since {kind}, p_until {kind}",
        watermark={
            "strategy": strategy,
            "source": [source or f"bronze.orders.{COLUMNS[strategy]}"],
            "state_key": state_key or f"by_{strategy}",
            "delay_ms": 0,
            "on_empty": "run",
        },
    )


@pytest.fixture
def watched(pipeline: Pipeline) -> Pipeline:
    """Three procedures that read bronze.orders, one by each strategy."""
    for strategy in TYPES:
        add(pipeline, strategy)
    pipeline.apply()
    return pipeline


def row(pipeline: Pipeline, state_key: str) -> dict[str, Any]:
    (found,) = pipeline.rows("select * from etl.watermarks where state_key = %s", state_key)
    return found


# -- list --


def test_watermarks_that_have_not_moved_are_listed_with_what_is_safe_to_read(
    cli: Cli, watched: Pipeline
) -> None:
    done = cli("watermark", "list")
    assert done.code == 0
    lines = done.out.splitlines()
    assert [line.split()[0] for line in lines[1:4]] == ["by_id", "by_timestamp", "by_xid"]
    assert all("the beginning" in line for line in lines[1:4])
    found = {one["state_key"]: one for one in cli("watermark", "list", "--json").document}
    assert found["by_id"]["horizon"] == "6"
    assert found["by_id"]["sources"] == ["bronze.orders.id"]
    assert found["by_xid"]["procedures"] == ["by_xid"]
    assert [one["watermark"] or one["lag"] or one["problem"] for one in found.values()] == [None] * 3


def test_a_run_moves_the_watermarks_and_their_lag_counts_from_there(watched: Pipeline) -> None:
    run = watched.start()
    assert run.status == "succeeded"
    for strategy in TYPES:
        found = row(watched, f"by_{strategy}")
        assert (found["last_run_id"], found["last_rowcount"], found["problem"]) == (run.run_id, 5, None)
        assert 0 <= found["lag"].total_seconds() < 60
        assert found["pipeline"] == "bronze_to_silver"
    ages = "update etl.watermark_ticks set ticked_at = ticked_at - interval '1 hour'"
    watched.conn.execute(ages)
    assert row(watched, "by_id")["lag"].total_seconds() > 3500
    watched.conn.execute("insert into etl.watermark_ticks (state_key, bound) values ('by_id', '99')")
    assert row(watched, "by_id")["lag"].total_seconds() > 3500, "a later tick says nothing of it"


def test_an_open_writer_holds_back_timestamps_and_ids_and_is_named_but_not_the_snapshot(
    cli: Cli,
    watched: Pipeline,
) -> None:
    watched.start()
    writer = watched.db.connect(autocommit=False, application_name="slow load")
    began = writer.execute("insert into bronze.orders default values returning now()").fetchone()
    assert began is not None
    watched.conn.execute("insert into bronze.orders default values")
    held = row(watched, "by_id")
    assert held["horizon"] == "-9223372036854775808" or int(held["horizon"]) <= 6
    assert f"backend {writer.info.backend_pid} (postgres, slow load)" in held["held_back_by"]
    assert row(watched, "by_xid")["held_back_by"] is None
    assert f"held back by: by_id: backend {writer.info.backend_pid}" in cli("watermark", "list").out
    horizon = watched.value(
        "select horizon::timestamptz from etl.watermarks where state_key = 'by_timestamp'"
    )
    assert horizon < began[0]
    writer.rollback()
    assert row(watched, "by_id")["held_back_by"] is None
    assert watched.value(HORIZON) > horizon


def test_a_source_that_is_gone_is_told_in_its_row_and_hides_no_other(cli: Cli, watched: Pipeline) -> None:
    watched.sql("alter table bronze.orders rename column id to number")
    found = {one["state_key"]: one for one in cli("watermark", "list", "--json").document}
    assert 'column "id" does not exist' in found["by_id"]["problem"]
    assert found["by_id"]["horizon"] is None
    assert found["by_timestamp"]["horizon"] is not None
    assert 'problem: by_id: column "id" does not exist' in cli("watermark", "list").out


def test_a_reader_sees_the_watermarks_without_any_right_on_the_sources(watched: Pipeline) -> None:
    reader = watched.login("etl_reader")
    found = reader.execute(
        "select state_key, horizon is not null, problem from etl.watermarks order by state_key"
    ).fetchall()
    assert found == [(f"by_{strategy}", True, None) for strategy in ("id", "timestamp", "xid")]


def test_a_watermark_that_no_procedure_keeps_any_more_is_still_listed(watched: Pipeline) -> None:
    watched.start()
    watched.procedures = [one for one in watched.procedures if one["name"] != "by_id"]
    watched.apply()
    left = row(watched, "by_id")
    assert (left["procedures"], left["horizon"], left["strategy"]) == (None, None, "id")
    assert left["watermark"] == "6"


def test_a_key_that_is_shared_is_one_row(pipeline: Pipeline) -> None:
    for name in ("a", "b"):
        add(pipeline, "id", name=name)
    for procedure in pipeline.procedures:
        procedure.update(group="together", transaction_scope="per_group")
    pipeline.apply()
    assert row(pipeline, "by_id")["procedures"] == ["a", "b"]


def test_an_empty_installation_says_that_there_is_none(cli: Cli) -> None:
    done = cli("watermark", "list")
    assert (done.code, done.out) == (0, "no procedure has a watermark\n")


# -- history, set, rebase --


def test_the_history_of_a_watermark_names_each_move_newest_first(cli: Cli, watched: Pipeline) -> None:
    assert cli("watermark", "history", "by_id").out == "by_id has not moved yet\n"
    run = watched.start()
    done = cli("watermark", "set", "by_id", "3", "--reason", "read two orders again")
    assert (done.code, done.out) == (0, "by_id: 6 -> 3\n")
    moves = cli("watermark", "history", "by_id", "--json").document
    assert [(one["cause"], one["old_watermark"], one["new_watermark"]) for one in moves] == [
        ("set", "6", "3"),
        ("incremental", None, "6"),
    ]
    assert moves[1]["run_id"] == run.run_id
    text = cli("watermark", "history", "by_id").out.splitlines()
    assert len(text) == 3
    assert text[1].endswith("read two orders again")
    assert "the beginning" in text[2]
    assert len(cli("watermark", "history", "by_id", "--limit", "1").out.splitlines()) == 2


def test_a_watermark_that_was_set_back_is_read_from_there(cli: Cli, watched: Pipeline) -> None:
    watched.start()
    assert cli("watermark", "set", "by_id", "null", "--reason", "again", "--json").document == {
        "state_key": "by_id",
        "old_watermark": "6",
        "new_watermark": None,
    }
    run = watched.start()
    assert watched.step(run.run_id, "by_id")["rows_affected"] == 5


def test_what_the_database_refuses_is_explained(cli: Cli, watched: Pipeline) -> None:
    watched.start()
    for words, code in {
        ("set", "nobodys", "3"): "watermark.unknown",
        ("set", "by_id", "soon"): "watermark.invalid",
        ("set", "by_id", "99"): "watermark.ahead",
        ("rebase", "by_id"): "watermark.unknown",
    }.items():
        done = cli("watermark", *words, "--reason", "x", "--json")
        assert (done.code, done.document["error"]["code"]) == (3, code)
        assert done.document["error"]["hint"]
    operator = watched.login("etl_operator")
    with pytest.raises(psycopg.errors.InsufficientPrivilege):
        operator.execute("select etl.set_watermark('by_id', '1', 'x')")


@pytest.mark.parametrize(
    ("words", "message", "hint"),
    [
        (["watermark"], "the following arguments are required: ACTION", "b2s watermark --help"),
        (["watermark", "lst"], "invalid choice: 'lst'", "b2s watermark --help"),
        (["watermark", "set", "x", "1"], "required: --reason", "b2s watermark set --help"),
        (["watermark", "history", "nobodys"], "there is no watermark nobodys", "b2s watermark list"),
        (["watermark", "history", "x", "--limit", "0"], "--limit must be at least 1", "leave it out"),
    ],
)
def test_wrong_words_are_explained_with_exit_code_2(
    cli: Cli, words: list[str], message: str, hint: str
) -> None:
    done = cli(*words)
    assert done.code == 2
    assert message in done.err
    assert hint in done.err.partition("\nhint: ")[2]


def test_rebase_stamps_the_rows_and_loses_none(cli: Cli, watched: Pipeline) -> None:
    assert cli("watermark", "add-column", "bronze.orders").code == 0
    watched.start()
    watched.conn.execute("insert into bronze.orders default values")
    done = cli("watermark", "rebase", "by_xid", "--reason", "restored")
    assert done.code == 0
    assert done.out.startswith("by_xid counts this server's transactions now; ")
    run = watched.start()
    assert watched.step(run.run_id, "by_xid")["rows_affected"] >= 1
    moves = cli("watermark", "history", "by_xid", "--json").document
    assert (moves[1]["cause"], moves[1]["reason"]) == ("set", "restored")


@pytest.mark.parametrize("action", ["list", "history", "set", "rebase", "add-column"])
def test_every_action_has_its_help_with_the_shared_options(
    action: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["watermark", action, "--help"]) == 0
    out = capsys.readouterr().out
    assert out.startswith(f"usage: b2s watermark {action}")
    assert "--dsn" in out
    assert "--json" in out


# -- doctor, plan --


def findings(cli: Cli, *names: str) -> list[tuple[str, str, str, str | None]]:
    """What the doctor found that is not ok, of the checks named."""
    return [
        (one["check_name"], one["status"], one["detail"], one["remedy"])
        for one in cli("doctor", "--json").document
        if one["check_name"] in names and one["status"] != "ok"
    ]


def test_the_doctor_says_which_procedures_could_upgrade_and_how(cli: Cli, watched: Pipeline) -> None:
    found = findings(cli, "upgrade", "watermark", "horizon")
    assert [(check, status) for check, status, *_ in found] == [("upgrade", "hint")] * 2
    assert found[0][3] == "could use xid: strategy: xid, source: bronze.orders.etl_xid"
    watched.sql("alter table bronze.orders drop column etl_xid")
    hints = [remedy for *_, remedy in findings(cli, "upgrade")]
    assert hints == ["could use xid: b2s watermark add-column bronze.orders"] * 2
    done = cli("doctor")
    assert "hint  upgrade: by_id reads by id" in done.out
    assert row(watched, "by_id")["hint"] == hints[0]
    planned = {one["name"]: one["notes"] for one in watched.plan()}
    assert hints[0] in planned["by_id"]


def test_the_doctor_names_columns_that_are_not_as_their_strategy_needs_them(
    cli: Cli, pipeline: Pipeline
) -> None:
    pipeline.sql(
        "create table bronze.local (at timestamp); create view bronze.v as select * from bronze.orders;"
        "create table bronze.drawn (id bigserial)"
    )
    add(pipeline, "timestamp", "bronze.local.at", name="a", state_key="key_a")
    add(pipeline, "timestamp", "bronze.v.ingested_at", name="b", state_key="key_b")
    add(pipeline, "id", "bronze.drawn.id", name="c", state_key="key_c")
    pipeline.apply()
    found = [(status, detail, remedy) for _, status, detail, remedy in findings(cli, "watermark")]
    assert {status for status, *_ in found} == {"warn"}
    assert [(detail[0], detail, remedy) for _, detail, remedy in found] == [
        (
            "a",
            "a: bronze.local.at is a timestamp without time zone: "
            "it means another moment in each session's TimeZone",
            "alter table bronze.local alter column at type timestamptz (rewrites the table); "
            "or let everybody use one TimeZone",
        ),
        (
            "a",
            "a: bronze.local.at leads no index: each run reads the whole table",
            "create index concurrently on bronze.local (at)",
        ),
        (
            "a",
            "a: bronze.local.at may be null, and a row where it is would never be read",
            "alter table bronze.local alter column at set not null",
        ),
        (
            "b",
            "b: bronze.v is a view: whoever writes to any table counts as its writer",
            "name the column of the table that the rows are first written to; or set a delay that covers it",
        ),
        (
            "c",
            "c: bronze.drawn.id leads no index: each run reads the whole table",
            "create index concurrently on bronze.drawn (id)",
        ),
    ]
    assert cli("doctor").code == 0
    pipeline.sql("alter sequence bronze.drawn_id_seq cache 20")
    ((_, status, detail, remedy),) = findings(cli, "source")
    assert status == "fail"
    assert "sequence bronze.drawn_id_seq" in detail
    assert str(remedy).startswith("alter sequence bronze.drawn_id_seq")


def test_a_watermark_of_another_cluster_is_named_with_the_way_out(cli: Cli, watched: Pipeline) -> None:
    watched.start()
    watched.conn.execute("update etl.state set server_id = 1 where state_key = 'by_xid'")
    assert "counts the transactions of another cluster" in row(watched, "by_xid")["problem"]
    ((_, status, _, remedy),) = findings(cli, "watermark")
    assert (status, remedy) == ("fail", "b2s watermark rebase by_xid --reason '...'")
    assert cli("watermark", "rebase", "by_xid", "--reason", "restored").code == 0
    assert row(watched, "by_xid")["problem"] is None
    assert "fail" not in [status for _, status, _, _ in findings(cli, "watermark")]


def test_an_index_of_every_partition_is_as_good_as_one_of_the_whole(cli: Cli, pipeline: Pipeline) -> None:
    pipeline.sql(
        "create table bronze.parts (at timestamptz not null) partition by range (at);"
        "create table bronze.parts_1 partition of bronze.parts for values from ('2020-1-1') to ('2021-1-1');"
        "create table bronze.parts_2 partition of bronze.parts for values from ('2021-1-1') to ('2022-1-1');"
        "create index on bronze.parts_1 (at)"
    )
    add(pipeline, "timestamp", "bronze.parts.at")
    pipeline.apply()
    ((_, _, detail, remedy),) = findings(cli, "watermark")
    assert "leads no index" in detail
    assert remedy == "create index on bronze.parts (at), at a time when writers may wait"
    pipeline.sql("create index on bronze.parts_2 (at)")
    assert findings(cli, "watermark") == []


def test_the_doctor_names_an_xid_column_that_nothing_keeps_true(cli: Cli, pipeline: Pipeline) -> None:
    add(pipeline, "xid")
    pipeline.apply()
    assert findings(cli, "watermark") == [], "a table that was never updated needs no trigger"
    pipeline.conn.execute("update bronze.orders set ingested_at = now()")
    pipeline.conn.execute("alter table bronze.orders alter column etl_xid drop default")
    pipeline.conn.execute("select pg_stat_force_next_flush()")
    found = findings(cli, "watermark")
    assert [detail for _, _, detail, _ in found] == [
        "etl_xid of bronze.orders has no default pg_current_xact_id()",
        "rows of bronze.orders are updated, but no trigger sets etl_xid: updates are not seen",
    ]
    assert {remedy for *_, remedy in found} == {"b2s watermark add-column bronze.orders"}
    assert cli("watermark", "add-column", "bronze.orders").code == 0
    assert findings(cli, "watermark") == []


def test_the_doctor_wants_the_trigger_always_where_rows_arrive_by_replication(
    cli: Cli,
    pipeline: Pipeline,
) -> None:
    add(pipeline, "xid")
    pipeline.apply()
    assert cli("watermark", "add-column", "bronze.orders").code == 0
    pipeline.conn.execute(
        "create subscription arrivals connection 'dbname=nowhere' publication p"
        " with (connect = false, slot_name = none)"
    )
    try:
        pipeline.conn.execute(
            "insert into pg_subscription_rel select oid, 'bronze.orders'::regclass, 'r' from pg_subscription"
            " where subname = 'arrivals'"
        )
        assert findings(cli, "watermark") == []
        pipeline.conn.execute("alter table bronze.orders enable trigger etl_touch_xid")
        ((_, status, detail, remedy),) = findings(cli, "watermark")
        assert (status, remedy) == ("warn", "b2s watermark add-column bronze.orders")
        assert "is not enabled always" in detail
    finally:
        pipeline.conn.execute("drop subscription arrivals")


def held(pipeline: Pipeline) -> list[dict[str, Any]]:
    """What holds windows back, however young it is."""
    return pipeline.rows(
        "select * from etl._diagnose_horizons('0') where check_name = 'horizon' order by detail"
    )


def test_sessions_and_prepared_transactions_that_hold_windows_back_are_named(
    cli: Cli,
    watched: Pipeline,
) -> None:
    writer = watched.db.connect(autocommit=False, application_name="slow load")
    writer.execute("insert into bronze.orders default values")
    pid = writer.info.backend_pid
    (found,) = held(watched)
    assert found["detail"].startswith(f"backend {pid} (postgres, slow load), in a transaction since ")
    assert found["detail"].endswith("holds back the windows of timestamps")
    assert f"pg_terminate_backend({pid})" in found["remedy"]
    assert findings(cli, "horizon") == [], "for less than a minute that is nothing to speak of"
    gid = f"b2s {watched.db.name}"
    writer.execute(sql.SQL("prepare transaction {}").format(sql.Literal(gid)))
    (found,) = held(watched)
    assert f"transaction {gid} was prepared by postgres at" in found["detail"]
    assert found["remedy"] == f"commit prepared '{gid}', or rollback prepared '{gid}'"
    watched.conn.execute(sql.SQL("rollback prepared {}").format(sql.Literal(gid)))


def test_ids_are_held_back_by_writers_of_their_table_only_and_snapshots_by_nobody(pipeline: Pipeline) -> None:
    add(pipeline, "xid")
    pipeline.apply()
    writer = pipeline.db.connect(autocommit=False)
    writer.execute("insert into bronze.orders default values")
    assert held(pipeline) == []
    add(pipeline, "id")
    pipeline.apply()
    assert [one["detail"].rpartition(" ")[2] for one in held(pipeline)] == ["ids"]
    writer.rollback()
    writer.execute("insert into silver.trace (step) values ('x')")
    assert held(pipeline) == []


def test_a_role_whose_activities_are_not_tracked_is_named(cli: Cli, watched: Pipeline) -> None:
    watched.login("etl_operator")
    (role,) = watched._roles
    name = sql.Identifier(role)
    database = sql.Identifier(watched.db.name)
    alter = sql.SQL("alter role {} in database {} set track_activities = off")
    watched.conn.execute(alter.format(name, database))
    ((_, status, detail, remedy),) = findings(cli, "track_activities")
    assert (status, remedy) == (
        "warn",
        f"alter role {role} in database {watched.db.name} reset track_activities",
    )
    assert detail.startswith(f"off for role {role} in database {watched.db.name}: ")
    assert remedy is not None
    watched.conn.execute(remedy.encode())
    assert findings(cli, "track_activities") == []


# -- what an install grants --


@pytest.fixture
def alone(private_server: Server) -> Iterator[Database]:
    """An empty database on a server of its own: what a role may read is the same in all databases."""
    database = private_server.create_database()
    yield database
    database.drop()


def may_see(conn: Connection) -> bool:
    found = conn.execute("select pg_has_role('etl_engine', 'pg_read_all_stats', 'usage')").fetchone()
    return found == (True,)


def test_an_install_lets_the_owner_see_when_others_began_and_the_doctor_says_when_it_cannot(
    alone: Database, capsys: pytest.CaptureFixture[str]
) -> None:
    migrate(alone.dsn)
    conn = alone.connect()
    assert may_see(conn)
    with Pipeline(alone) as pipeline:
        pipeline.sql(BRONZE)
        add(pipeline, "timestamp")
        pipeline.apply()
        conn.execute("revoke pg_read_all_stats from etl_engine")
        query = "select status, remedy from etl.diagnose() where check_name = 'pg_read_all_stats'"
        (found,) = pipeline.rows(query)
        assert found == {"status": "fail", "remedy": "grant pg_read_all_stats to etl_engine"}
        conn.execute(found["remedy"].encode())
        assert pipeline.rows(query) == []
    assert capsys.readouterr().err == ""


def test_who_may_not_grant_it_installs_all_the_same_and_is_told(
    alone: Database, capsys: pytest.CaptureFixture[str]
) -> None:
    conn = alone.connect()
    conn.execute("create role deployer login createrole")
    conn.execute(f"grant create on database {alone.name} to deployer".encode())
    migrate(f"{alone.dsn} user=deployer")
    told = capsys.readouterr().err
    if alone.server.major < 16:
        assert may_see(conn), "until 15 whoever may create roles may grant this one"
        assert told == ""
        return
    assert not may_see(conn)
    assert told == (
        "warning: deployer may not grant pg_read_all_stats to etl_engine: "
        "windows of timestamps are refused while somebody else is in a transaction\n"
        "hint: let an administrator run: grant pg_read_all_stats to etl_engine\n"
    )
    conn.execute("grant pg_read_all_stats to deployer with admin option")
    migrate(f"{alone.dsn} user=deployer")
    assert may_see(conn)
    assert capsys.readouterr().err == ""


def test_the_owner_that_may_not_see_refuses_windows_of_timestamps_and_names_the_grant(
    alone: Database,
) -> None:
    migrate(alone.dsn)
    with Pipeline(alone) as pipeline:
        pipeline.sql(BRONZE)
        add(pipeline, "timestamp")
        pipeline.apply()
        pipeline.conn.execute("revoke pg_read_all_stats from etl_engine")
        stranger = pipeline.login("etl_reader")
        stranger.autocommit = False
        stranger.execute("select 1")
        assert "does not show since when" in row(pipeline, "by_timestamp")["problem"]
        with refused("PT403", "watermark.hidden_session") as refusal:
            pipeline.conn.execute(
                "set role etl_engine;"
                " select etl._upper_bound('timestamp', 'k', '{bronze.orders.ingested_at}', 0, 0)"
            )
        assert refusal.hint.startswith("grant pg_read_all_stats to etl_engine")
        stranger.close()
