"""The column of the xid strategy: what stamps its rows, and how a table in use gets it."""

from __future__ import annotations

import threading
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

import psycopg
import pytest
from psycopg import conninfo, sql

from b2s.cli import main
from b2s.db import connect
from b2s.migrate import migrate
from b2s.watermarkcolumn import find_table, plan
from tests import servers, test_cli
from tests.servers import Connection, Database, Server, wait_until
from tests.test_cli import Cli

cli = test_cli.cli
clean_surroundings = test_cli.clean_surroundings

BRONZE: Final = """
create schema bronze;
create table bronze.orders (id int primary key, body text);
insert into bronze.orders select n, 'old' from generate_series(1, 500) n;
"""
PARTITIONED: Final = """
create schema bronze;
create table bronze.events (id int, body text) partition by range (id);
create table bronze.events_1 partition of bronze.events for values from (0) to (100);
create table bronze.events_2 partition of bronze.events for values from (100) to (300)
  partition by range (id);
create table bronze.events_2a partition of bronze.events_2 for values from (100) to (200);
insert into bronze.events select n, 'old' from generate_series(0, 199) n;
"""
IS_VALID: Final = "select indisvalid from pg_index where indexrelid = 'bronze.orders_etl_xid_idx'::regclass"
WAITING: Final = (
    "select from pg_locks where not granted and relation = 'bronze.orders'::regclass"
    " and database = (select oid from pg_database where datname = current_database())"
)
NOTHING_TO_DO: Final = "has all that the xid strategy needs: nothing to do\n"


@pytest.fixture
def conn(db: Database) -> Connection:
    """A session in a database with bronze.orders."""
    connection = db.connect()
    connection.execute(BRONZE)
    return connection


@pytest.fixture
def partitioned(db: Database) -> Connection:
    """A session in a database with bronze.events, partitioned twice."""
    connection = db.connect()
    connection.execute(PARTITIONED.encode())
    return connection


@pytest.fixture
def role(db: Database) -> Iterator[Callable[..., str]]:
    """New logins of nobody: their name, when asked for with the roles they are members of."""
    names: list[str] = []

    def create(*groups: str) -> str:
        name = f"b2s_test_{uuid.uuid4().hex[:12]}"
        names.append(name)
        with db.connect() as owner:
            owner.execute(sql.SQL("create role {} login password 'x'").format(sql.Identifier(name)))
            for group in groups:
                owner.execute(sql.SQL("grant {} to {}").format(sql.Identifier(group), sql.Identifier(name)))
        return name

    yield create
    with db.connect() as owner:
        for name in names:
            owner.execute(sql.SQL("drop owned by {0}; drop role {0}").format(sql.Identifier(name)))


def dsn_of(db: Database, user: str) -> str:
    return conninfo.make_conninfo(db.dsn, user=user, password="x")


def value(conn: Connection, query: str, *parameters: Any) -> Any:
    row = conn.execute(query.encode(), parameters).fetchone()
    assert row is not None
    return row[0]


def stamps(conn: Connection, table: str = "bronze.orders", where: str = "true") -> set[str]:
    """The transactions that the rows of a table carry."""
    return {stamp for (stamp,) in conn.execute(f"select etl_xid::text from {table} where {where}".encode())}


def file_nodes(conn: Connection) -> dict[str, int]:
    """Where the rows of each table of Bronze are stored: another number after a rewrite."""
    query = "select oid::regclass::text, pg_relation_filenode(oid) from pg_class where relkind = 'r'"
    return dict(conn.execute(f"{query} and relnamespace = 'bronze'::regnamespace".encode()).fetchall())


def explained(conn: Connection, query: str) -> str:
    return "\n".join(line for (line,) in conn.execute(f"explain {query}".encode()))


# -- what stamps the rows --


@pytest.fixture
def stamped(cli: Cli, conn: Connection) -> Connection:
    """bronze.orders with the column."""
    assert cli("watermark", "add-column", "bronze.orders").code == 0
    return conn


def test_an_insert_an_update_and_an_insert_that_names_the_column_carry_their_transaction(
    stamped: Connection,
) -> None:
    with stamped.transaction():
        xid = value(stamped, "select pg_current_xact_id()::text")
        stamped.execute("insert into bronze.orders values (1001, 'new')")
        stamped.execute("insert into bronze.orders values (1002, 'from an archive', '3')")
        stamped.execute("insert into bronze.orders values (1003, 'null', null)")
        stamped.execute("update bronze.orders set body = 'changed' where id = 1")
        stamped.execute("update bronze.orders set etl_xid = '3' where id = 2")
        with stamped.cursor() as cursor, cursor.copy("copy bronze.orders from stdin") as copy:
            copy.write_row((1004, "copied", "3"))
    assert stamps(stamped, where="id > 1000 or id in (1, 2)") == {xid}
    assert len(stamps(stamped)) == 2, "all others carry the transaction that added the column"


def test_a_write_inside_savepoints_carries_the_top_transaction(stamped: Connection) -> None:
    with stamped.transaction():
        xid = value(stamped, "select pg_current_xact_id()::text")
        with stamped.transaction(), stamped.transaction():
            stamped.execute("insert into bronze.orders values (1001, 'nested')")
            stamped.execute("update bronze.orders set body = 'nested' where id = 1")
            row = "select xmin::text from bronze.orders where id = 1"
            assert value(stamped, row) != str(int(xid) % 2**32), "the row itself has a subtransaction's id"
    assert stamps(stamped, where="id in (1, 1001)") == {xid}


def test_the_trigger_works_for_rows_that_arrive_by_replication(stamped: Connection) -> None:
    stamped.execute("set session_replication_role = replica")
    stamped.execute("insert into bronze.orders values (1001, 'x', '3')")
    stamped.execute("update bronze.orders set body = 'y' where id = 1")
    assert "3" not in stamps(stamped)
    assert len(stamps(stamped, where="id in (1, 2)")) == 2


@pytest.fixture
def publishing(server: Server) -> Iterator[Server]:
    """A server that can replicate."""
    started = servers.start(server.label, {"wal_level": "logical"})
    yield started
    started.close()


def test_rows_of_a_subscription_carry_the_transaction_that_applied_them_whatever_they_bring(
    publishing: Server,
) -> None:
    publisher, subscriber = publishing.create_database(), publishing.create_database()
    migrate(subscriber.dsn)
    out, arriving = publisher.connect(), subscriber.connect()
    out.execute(BRONZE)
    out.execute("alter table bronze.orders add etl_xid xid8 not null default '3'")
    out.execute("create publication orders for table bronze.orders")
    out.execute("select pg_create_logical_replication_slot('orders', 'pgoutput')")
    arriving.execute("create schema bronze; create table bronze.orders (id int primary key, body text)")
    assert main(["watermark", "add-column", "bronze.orders", "--dsn", subscriber.dsn]) == 0
    began = value(arriving, "select pg_current_snapshot()::text")
    arriving.execute(
        sql.SQL(
            "create subscription orders connection {} publication orders with (create_slot = false)"
        ).format(sql.Literal(publisher.dsn))
    )
    wait_until(arriving, "select bool_and(srsubstate = 'r') from pg_subscription_rel", timeout=60)
    copied = value(arriving, "select pg_current_snapshot()::text")
    out.execute("insert into bronze.orders values (1001, 'new')")
    out.execute("update bronze.orders set body = 'changed' where id = 1")
    wait_until(
        arriving, "select count(*) = 2 from bronze.orders where body in ('new', 'changed')", timeout=60
    )
    applied = value(arriving, "select pg_current_snapshot()::text")
    window = "select array_agg(id order by id) from bronze.orders where etl.arrived(etl_xid, %s, %s)"
    assert len(value(arriving, window, began, copied)) == 499, "one of 500 was written again since"
    assert value(arriving, window, copied, applied) == [1, 1001]
    arriving.execute("drop subscription orders")
    for database in (subscriber, publisher):
        database.drop()


def test_whoever_stamps_rows_anew_is_not_overruled(stamped: Connection) -> None:
    with stamped.transaction():
        stamped.execute("set local b2s.rebase = on")
        stamped.execute("update bronze.orders set etl_xid = '3'")
    assert stamps(stamped) == {"3"}
    stamped.execute("update bronze.orders set body = 'x' where id = 1")
    assert len(stamps(stamped)) == 2


def test_a_writer_needs_no_right_on_schema_etl(
    db: Database, stamped: Connection, role: Callable[..., str]
) -> None:
    writer = role()
    stamped.execute(f"grant usage on schema bronze to {writer}".encode())
    stamped.execute(f"grant select, insert, update on bronze.orders to {writer}".encode())
    with psycopg.connect(dsn_of(db, writer), autocommit=True) as session:
        session.execute("insert into bronze.orders values (1001, 'x', '3')")
        session.execute("update bronze.orders set body = 'y' where id = 1")
    assert "3" not in stamps(stamped)


def test_the_window_between_two_snapshots_is_read_by_the_index(stamped: Connection) -> None:
    stamped.execute("insert into bronze.orders select n, 'new' from generate_series(1001, 20000) n")
    since = value(stamped, "select pg_current_snapshot()::text")
    stamped.execute("update bronze.orders set body = 'late' where id in (7, 8)")
    until = value(stamped, "select pg_current_snapshot()::text")
    stamped.execute("update bronze.orders set body = 'later' where id = 9")
    stamped.execute("analyze bronze.orders")
    window = f"etl.arrived(r.etl_xid, '{since}'::pg_snapshot, '{until}'::pg_snapshot)"
    assert "orders_etl_xid_idx" in explained(stamped, f"select * from bronze.orders r where {window}")
    found = stamped.execute(f"select id from bronze.orders r where {window} order by id".encode())
    assert [id_ for (id_,) in found] == [7, 8]


# -- adding it --


def test_the_column_is_added_without_a_rewrite_and_a_second_time_there_is_nothing_to_do(
    cli: Cli,
    conn: Connection,
) -> None:
    before = file_nodes(conn)
    done = cli("watermark", "add-column", "bronze.orders")
    assert done.code == 0
    assert file_nodes(conn) == before
    assert "watermark: {strategy: xid, source: bronze.orders.etl_xid, state_key: ...}" in done.out
    assert "etl.arrived(r.etl_xid, p_since, p_until)" in done.out
    assert "grant usage on schema bronze to etl_owner" in done.out
    assert "index on bronze.orders: done in" in done.err
    again = cli("watermark", "add-column", "bronze.orders")
    assert (again.code, again.out, again.err) == (0, f"bronze.orders {NOTHING_TO_DO}", "")
    assert cli("watermark", "add-column", "bronze.orders", "--json").document["steps"] == []


def test_a_table_that_is_only_inserted_into_needs_no_trigger_and_can_get_it_later(
    cli: Cli,
    conn: Connection,
) -> None:
    triggers = "select count(*) from pg_trigger where tgrelid = 'bronze.orders'::regclass"
    assert cli("watermark", "add-column", "bronze.orders", "--insert-only").code == 0
    assert value(conn, triggers) == 0
    assert cli("watermark", "add-column", "bronze.orders", "--insert-only").out.endswith(NOTHING_TO_DO)
    assert cli("watermark", "add-column", "bronze.orders").err.startswith("trigger: done in")
    assert value(conn, triggers) == 1
    conn.execute("alter table bronze.orders enable trigger etl_touch_xid")
    assert cli("watermark", "add-column", "bronze.orders").err.startswith("trigger: done in")
    assert cli("watermark", "add-column", "bronze.orders").out.endswith(NOTHING_TO_DO)


def test_what_a_dry_run_prints_does_the_same_and_changes_nothing_itself(
    cli: Cli,
    conn: Connection,
) -> None:
    planned = cli("watermark", "add-column", "bronze.orders", "--dry-run")
    assert planned.code == 0
    assert value(conn, "select count(*) from pg_attribute where attname = 'etl_xid'") == 0
    assert "create index concurrently orders_etl_xid_idx on bronze.orders (etl_xid);" in planned.out
    statements = [line for line in planned.out.splitlines() if not line.startswith("--")]
    for statement in statements:
        conn.execute(statement.encode())
    assert cli("watermark", "add-column", "bronze.orders").out.endswith(NOTHING_TO_DO)


def test_the_sql_of_the_page_about_watermarks_is_what_a_dry_run_prints(cli: Cli, conn: Connection) -> None:
    page = (Path(__file__).resolve().parents[1] / "docs" / "watermarks.md").read_text(encoding="utf-8")
    printed = cli("watermark", "add-column", "bronze.orders", "--dry-run").out
    assert f"```sql\n{printed}```\n" in page


def test_the_steps_are_json_where_json_is_asked_for(cli: Cli, conn: Connection) -> None:
    planned = cli("watermark", "add-column", "bronze.orders", "--dry-run", "--json").document
    assert (planned["table"], planned["is_dry_run"]) == ("bronze.orders", True)
    assert [step["duration_ms"] for step in planned["steps"]] == [None, None]
    done = cli("watermark", "add-column", "bronze.orders", "--json").document
    purposes = [step["purpose"] for step in done["steps"]]
    assert purposes == ["column etl_xid and trigger", "index on bronze.orders"]
    assert all(step["duration_ms"] > 0 and step["attempts"] == 1 for step in done["steps"])


def test_partitions_those_of_tomorrow_too_have_column_trigger_and_index(
    cli: Cli,
    partitioned: Connection,
) -> None:
    before = file_nodes(partitioned)
    assert cli("watermark", "add-column", "bronze.events").code == 0
    assert file_nodes(partitioned) == before
    valid = value(
        partitioned,
        'select array_agg(indexrelid::regclass::text order by indexrelid::regclass::text collate "C")'
        " from pg_index where indrelid::regclass::text ~ '^bronze.events' and indisvalid",
    )
    names = ("events_1", "events_2", "events_2a", "events")
    assert valid == [f"bronze.{name}_etl_xid_idx" for name in names]
    tomorrow = "partition of bronze.events_2 for values from (200) to (300)"
    partitioned.execute(f"create table bronze.events_2b {tomorrow}".encode())
    partitioned.execute("set session_replication_role = replica")
    partitioned.execute("insert into bronze.events values (250, 'new', '3')")
    partitioned.execute("update bronze.events set body = 'x' where id in (5, 150)")
    assert "3" not in stamps(partitioned, "bronze.events")
    assert len(stamps(partitioned, "bronze.events", "id in (5, 150, 250)")) == 2
    partitioned.execute("set enable_seqscan = off")
    window = "etl.arrived(etl_xid, '10:20:', '30:40:')"
    assert explained(partitioned, f"select * from bronze.events where {window}").count("Index Cond") == 3
    assert cli("watermark", "add-column", "bronze.events").out == f"bronze.events {NOTHING_TO_DO}"


def test_what_a_partitioned_table_has_already_is_not_done_again(
    cli: Cli,
    partitioned: Connection,
) -> None:
    assert cli("watermark", "add-column", "bronze.events").code == 0
    partitioned.execute("drop index bronze.events_etl_xid_idx")
    partitioned.execute("create index events_1_etl_xid_idx on bronze.events_1 (etl_xid)")
    done = cli("watermark", "add-column", "bronze.events", "--json").document
    assert [step["purpose"] for step in done["steps"]] == [
        "index of bronze.events",
        "index of bronze.events_2",
        "index on bronze.events_2a",
        "index of bronze.events_2a into that of bronze.events_2",
        "index of bronze.events_1 into that of bronze.events",
        "index of bronze.events_2 into that of bronze.events",
    ]
    assert cli("watermark", "add-column", "bronze.events").out.endswith(NOTHING_TO_DO)


def test_tables_that_inherit_have_a_trigger_and_an_index_of_their_own(
    cli: Cli,
    conn: Connection,
) -> None:
    conn.execute("create table bronze.special (more int) inherits (bronze.orders)")
    assert cli("watermark", "add-column", "bronze.orders").code == 0
    conn.execute("insert into bronze.special (id, body, etl_xid) values (1001, 'x', '3')")
    assert "3" not in stamps(conn)
    assert value(conn, "select to_regclass('bronze.special_etl_xid_idx') is not null")
    assert cli("watermark", "add-column", "bronze.orders").out.endswith(NOTHING_TO_DO)


def test_a_name_that_needs_quotes_and_one_too_long_for_an_index_are_no_obstacle(
    cli: Cli,
    conn: Connection,
) -> None:
    long_names = [f"{'x' * 62}{end}" for end in "ab"]
    conn.execute('create table bronze."Order\'s Lines %s" (id int)')
    for name in long_names:
        conn.execute(f"create table bronze.{name} (id int)".encode())
    for name in ['"Order\'s Lines %s"', *long_names]:
        assert cli("watermark", "add-column", f"bronze.{name}").code == 0
        assert cli("watermark", "add-column", f"bronze.{name}").out.endswith(NOTHING_TO_DO)


# -- while the table is in use --


def test_a_table_that_is_written_to_all_the_time_gets_the_column_and_no_writer_waits_long(
    cli: Cli,
    db: Database,
    conn: Connection,
) -> None:
    longest = [0.0]
    written: list[int] = []
    is_over = threading.Event()
    errors: list[BaseException] = []

    def write(first: int) -> None:
        try:
            with db.connect() as writer:
                for id_ in range(first, first + 1_000_000):
                    if is_over.is_set():
                        return
                    started = time.monotonic()
                    writer.execute("insert into bronze.orders (id, body) values (%s, 'new')", [id_])
                    writer.execute("update bronze.orders set body = 'changed' where id = %s", [id_])
                    longest[0] = max(longest[0], time.monotonic() - started)
                    written.append(id_)
        except BaseException as error:  # noqa: BLE001 - told by the test
            errors.append(error)

    writers = [threading.Thread(target=write, args=[10_000_000 * n]) for n in (1, 2, 3)]
    for writer in writers:
        writer.start()
    try:
        wait_until(conn, "select count(*) > 600 from bronze.orders")
        done = cli("watermark", "add-column", "bronze.orders", "--lock-timeout", "30s")
        count = len(written)
        wait_until(conn, "select count(*) > %s from bronze.orders", [500 + count + 100])
    finally:
        is_over.set()
        for writer in writers:
            writer.join()
    assert (done.code, errors) == (0, [])
    assert value(conn, "select count(*) from bronze.orders") == 500 + len(written)
    assert longest[0] < 2, "in truth some 10 ms; the limit allows for a machine that is busy with other tests"
    assert value(conn, IS_VALID) is True


def test_a_long_reader_is_named_when_there_is_no_lock_and_nobody_waits_behind_the_attempts(
    cli: Cli,
    db: Database,
    conn: Connection,
) -> None:
    reader = db.connect(autocommit=False, application_name="the report")
    reader.execute("select count(*) from bronze.orders")
    other = db.connect()
    other.execute("set lock_timeout = '2s'")
    refused: list[Any] = []
    attempts = threading.Thread(
        target=lambda: refused.append(cli("watermark", "add-column", "bronze.orders", "--lock-timeout", "1s"))
    )
    attempts.start()
    wait_until(conn, f"select exists ({WAITING})")
    other.execute("insert into bronze.orders values (1001, 'not kept waiting')")
    attempts.join()
    (done,) = refused
    assert done.code == 3
    assert done.err.startswith("error: bronze.orders is in use, there was no lock on it within 1 s: ")
    pid = reader.info.backend_pid
    assert f"backend {pid} (postgres, the report, idle in transaction) has one" in done.err
    assert f"select pg_terminate_backend({pid})" in done.err
    assert value(conn, "select count(*) from pg_attribute where attname = 'etl_xid'") == 0
    reader.rollback()
    assert cli("watermark", "add-column", "bronze.orders").code == 0


def test_a_prepared_transaction_in_the_way_is_named(cli: Cli, db: Database, conn: Connection) -> None:
    gid = f"b2s {db.name}"
    conn.execute("begin; insert into bronze.orders values (1001, 'x')")
    conn.execute(f"prepare transaction '{gid}'".encode())
    try:
        done = cli("watermark", "add-column", "bronze.orders", "--lock-timeout", "100ms", "--json")
    finally:
        conn.execute(f"rollback prepared '{gid}'".encode())
    assert done.code == 3
    assert done.document["error"]["code"] == "55P03"
    assert f"prepared transaction {gid} has one" in done.document["error"]["message"]
    assert f"rollback prepared '{gid}'" in done.document["error"]["hint"]


def test_a_lock_that_is_free_after_some_attempts_is_taken(
    cli: Cli,
    db: Database,
    conn: Connection,
) -> None:
    reader = db.connect(autocommit=False)
    reader.execute("select count(*) from bronze.orders")
    done: list[Any] = []
    adding = threading.Thread(
        target=lambda: done.append(cli("watermark", "add-column", "bronze.orders", "--lock-timeout", "30s"))
    )
    adding.start()
    wait_until(conn, f"select exists ({WAITING})")
    wait_until(conn, f"select not exists ({WAITING})")
    wait_until(conn, f"select exists ({WAITING})")
    reader.rollback()
    adding.join()
    assert done[0].code == 0
    assert "column etl_xid and trigger: done in" in done[0].err
    assert ", at attempt " in done[0].err


def test_an_index_that_was_left_unfinished_is_built_again(
    cli: Cli,
    db: Database,
    conn: Connection,
) -> None:
    writer = db.connect(autocommit=False)
    assert cli("watermark", "add-column", "bronze.orders").code == 0
    conn.execute("drop index bronze.orders_etl_xid_idx")
    writer.execute("insert into bronze.orders values (1001, 'open')")
    done: list[Any] = []
    building = threading.Thread(target=lambda: done.append(cli("watermark", "add-column", "bronze.orders")))
    building.start()
    pid = wait_until(
        conn,
        "select l.pid from pg_locks l join pg_stat_activity a using (pid)"
        " where not l.granted and a.query ~ '^create index concurrently' and a.datname = current_database()",
    )
    meanwhile = cli("watermark", "add-column", "bronze.orders")
    assert meanwhile.code == 3
    assert f"backend {pid} is building index orders_etl_xid_idx on bronze.orders now" in meanwhile.err
    conn.execute("select pg_cancel_backend(%s)", [pid])
    building.join()
    assert done[0].code == 3
    assert "run the same command again" in done[0].err
    writer.rollback()
    assert value(conn, IS_VALID) is False
    again = cli("watermark", "add-column", "bronze.orders", "--json").document
    assert again["steps"][0]["statements"][0] == "drop index concurrently bronze.orders_etl_xid_idx"
    assert value(conn, IS_VALID) is True


# -- what cannot have it --


@pytest.mark.parametrize(
    ("create", "name", "message"),
    [
        ("select", "bronze.nowhere", "there is no table bronze.nowhere"),
        ("select", 'bronze."', 'there is no table bronze."'),
        ("create view bronze.v as select 1 as a", "bronze.v", "bronze.v is a view"),
        ("create materialized view bronze.m as select 1 as a", "bronze.m", "bronze.m is a materialized view"),
        ("create sequence bronze.s", "bronze.s", "bronze.s is a sequence"),
        (
            "create foreign data wrapper w; create server s foreign data wrapper w;"
            " create foreign table bronze.f (a int) server s",
            "bronze.f", "bronze.f is a foreign table",
        ),
        (
            "create table bronze.p (a int) partition by list (a);"
            " create table bronze.p1 partition of bronze.p for values in (1)",
            "bronze.p1", "bronze.p1 is a partition of bronze.p",
        ),
        (
            "create foreign data wrapper w; create server s foreign data wrapper w;"
            " create table bronze.p (a int) partition by list (a);"
            " create foreign table bronze.p1 partition of bronze.p for values in (1) server s",
            "bronze.p", "bronze.p1, a part of the table, is a foreign table",
        ),
        ("alter table bronze.orders add etl_xid bigint", "bronze.orders",
         "bronze.orders has a column etl_xid of type bigint"),
        ("alter table bronze.orders add etl_xid xid8", "bronze.orders",
         "column etl_xid of bronze.orders may be null"),
    ],
)  # fmt: skip
def test_what_is_no_table_that_can_have_it_is_refused_with_exit_code_2(
    cli: Cli,
    conn: Connection,
    create: str,
    name: str,
    message: str,
) -> None:
    conn.execute(create.encode())
    done = cli("watermark", "add-column", name)
    assert done.code == 2
    assert done.err.startswith(f"error: {message}")
    assert "\nhint: " in done.err
    assert done.out == ""


def test_a_column_without_its_default_gets_it(cli: Cli, conn: Connection) -> None:
    conn.execute("alter table bronze.orders add etl_xid xid8 not null default '3'")
    assert cli("watermark", "add-column", "bronze.orders", "--insert-only").code == 0
    conn.execute("insert into bronze.orders values (1001, 'new')")
    assert stamps(conn, where="id = 1001") != {"3"}


def test_an_index_of_ones_own_that_begins_with_the_column_is_enough(cli: Cli, conn: Connection) -> None:
    assert cli("watermark", "add-column", "bronze.orders").code == 0
    conn.execute("create index own on bronze.orders (etl_xid, id); drop index bronze.orders_etl_xid_idx")
    assert cli("watermark", "add-column", "bronze.orders").out.endswith(NOTHING_TO_DO)


def test_whoever_does_not_own_the_table_or_may_not_use_b2s_is_told_what_to_ask_for(
    cli: Cli,
    db: Database,
    conn: Connection,
    role: Callable[..., str],
) -> None:
    stranger = role("etl_reader")
    hidden = cli("watermark", "add-column", "bronze.orders", dsn=dsn_of(db, stranger))
    assert (hidden.code, hidden.err.splitlines()) == (
        3,
        ["error: permission denied for schema bronze", "hint: let the owner of bronze.orders do this"],
    )
    conn.execute(f"grant usage on schema bronze to {stranger}".encode())
    done = cli("watermark", "add-column", "bronze.orders", dsn=dsn_of(db, stranger))
    assert done.code == 3
    assert f"bronze.orders belongs to postgres, and {stranger} may not change it" in done.err
    owner = role()
    conn.execute(f"grant usage, create on schema bronze to {owner}".encode())
    conn.execute(f"alter table bronze.orders owner to {owner}".encode())
    done = cli("watermark", "add-column", "bronze.orders", dsn=dsn_of(db, owner))
    assert done.code == 3
    assert f"hint: let an administrator run: grant etl_reader to {owner}" in done.err
    conn.execute(f"grant etl_reader to {owner}".encode())
    assert cli("watermark", "add-column", "bronze.orders", dsn=dsn_of(db, owner)).code == 0


def test_a_database_without_b2s_says_so(cli: Cli, empty_db: Database) -> None:
    with empty_db.connect() as connection:
        connection.execute(BRONZE)
    done = cli("watermark", "add-column", "bronze.orders", dsn=empty_db.dsn)
    assert (done.code, done.err) == (3, "error: b2s is not installed in this database\nhint: b2s migrate\n")


@pytest.mark.parametrize("time_", ["5", "soon", ""])
def test_a_lock_timeout_that_is_no_duration_is_a_usage_error(cli: Cli, conn: Connection, time_: str) -> None:
    done = cli("watermark", "add-column", "bronze.orders", "--lock-timeout", time_)
    assert done.code == 2
    assert "for example --lock-timeout 30s" in done.err


def test_the_plan_of_a_table_is_made_without_changing_it(db: Database, conn: Connection) -> None:
    with connect(db.dsn) as connection:
        first = plan(find_table(connection, "bronze.orders"), is_insert_only=False)
        assert plan(find_table(connection, "bronze.orders"), is_insert_only=False) == first
    assert [step.is_brief for step in first] == [True, False]
    assert main(["watermark", "list", "--dsn", db.dsn]) == 0
