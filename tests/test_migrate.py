"""Installing and upgrading: one end state by every way, all or nothing, refused where it would do harm."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from hashlib import sha256
from pathlib import Path
from typing import Any

import psycopg
import pytest

import b2s
from b2s import migrate as migrate_module
from b2s.db import connect
from b2s.errors import DatabaseError, UsageError, detail_of
from b2s.migrate import Migrated, Pending, migrate, pending, script
from b2s.sqlfiles import load_manifest, sql_root
from tests.servers import Connection, Database, Server, wait_until

PROJECT = Path(__file__).resolve().parents[1]
MIGRATIONS = tuple(sorted(path.stem for path in (PROJECT / "migrations").glob("*.sql")))

# Everything that an installation leaves behind in the catalog, one line a thing,
# whoever owns or may use it included.
FINGERPRINT = """
with ours as (
  select c.* from pg_class c where c.relnamespace = 'etl'::regnamespace and c.relkind in ('r', 'v', 'p',
    'm', 'S')
)
select 'schema ' || nspowner::regrole || ' ' || coalesce(nspacl::text, '') as line from pg_namespace
  where nspname = 'etl'
union all
select format('routine %s %s %s %s %s', oid::regprocedure, proowner::regrole, proacl, obj_description(oid,
  'pg_proc'),
              pg_get_functiondef(oid)) from pg_proc where pronamespace = 'etl'::regnamespace
union all
select format('relation %s %s %s %s %s %s', relkind, relname, relowner::regrole, relacl, reloptions,
  obj_description(oid, 'pg_class'))
  from ours
union all
select format('column %s.%s %s %s %s %s %s %s', c.relname, a.attname, a.attnum, format_type(a.atttypid,
  a.atttypmod), a.attnotnull,
              a.attidentity::text || a.attgenerated::text, pg_get_expr(d.adbin, d.adrelid),
                col_description(c.oid, a.attnum))
  from ours c join pg_attribute a on a.attrelid = c.oid and a.attnum > 0 and not a.attisdropped
  left join pg_attrdef d on d.adrelid = c.oid and d.adnum = a.attnum
 where c.relkind <> 'S'
union all
select format('constraint %s.%s %s', c.relname, k.conname, pg_get_constraintdef(k.oid))
  from pg_constraint k join ours c on c.oid = k.conrelid
union all
select 'index ' || pg_get_indexdef(i.indexrelid) from pg_index i join ours c on c.oid = i.indrelid
union all
select 'trigger ' || pg_get_triggerdef(t.oid) from pg_trigger t join ours c on c.oid = t.tgrelid
  where not t.tgisinternal
union all
select format('view %s %s', relname, pg_get_viewdef(oid)) from ours where relkind = 'v'
union all
select format('type %s %s %s %s %s', t.typname, t.typtype, t.typowner::regrole, obj_description(t.oid,
  'pg_type'),
              (select string_agg(e.enumlabel, ',' order by e.enumsortorder) from pg_enum e
                where e.enumtypid = t.oid))
  from pg_type t where t.typnamespace = 'etl'::regnamespace
union all
select format('domain %s %s %s %s', t.typname, format_type(t.typbasetype, t.typtypmod), k.conname,
              pg_get_constraintdef(k.oid))
  from pg_type t left join pg_constraint k on k.contypid = t.oid
 where t.typnamespace = 'etl'::regnamespace and t.typtype = 'd'
union all
select format('cast %s -> %s %s', castsource::regtype, casttarget::regtype, castcontext) from pg_cast
  where casttarget = 'etl.dry_run'::regtype
union all
select format('ledger %s %s %s', name, sha256, version) from etl.migrations
union all
select 'installation ' || version from etl.installation
order by line
"""


def fingerprint(conn: Connection) -> list[str]:
    """The catalog of schema etl as lines of text that do not depend on oids."""
    return [line for (line,) in conn.execute(FINGERPRINT.encode())]


def raised(call: Callable[[], object]) -> DatabaseError:
    with pytest.raises(DatabaseError) as caught:
        call()
    return caught.value


@pytest.fixture
def sql_copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the SQL files that a test may edit, and that migrate() then installs."""
    root = tmp_path / "release"
    for name in ("migrations", "plpgsql"):
        shutil.copytree(sql_root() / name, root / name)
    monkeypatch.setattr(migrate_module, "load_manifest", lambda: load_manifest(root))
    return root


def append(file: Path, text: str) -> None:
    file.write_text(file.read_text(encoding="utf-8") + text, encoding="utf-8")


def add_to_manifest(root: Path, marker: str, lines: str) -> None:
    manifest = root / "plpgsql" / "install.sql"
    text = manifest.read_text(encoding="utf-8")
    assert marker in text
    manifest.write_text(text.replace(marker, lines + marker, 1), encoding="utf-8")


def add_migration(root: Path, name: str, sql: str) -> None:
    """One more migration in a copy of the files, listed with its sha256."""
    (root / "migrations" / f"{name}.sql").write_text(sql, encoding="utf-8")
    digest = sha256(sql.encode()).hexdigest()
    add_to_manifest(
        root, "\n-- Engine\n", f"\\set migration {name}\n\\set sha256 {digest}\n\\ir install/migration.sql\n"
    )


def psql(server: Server) -> str:
    """The psql of the server's own version, else the one on PATH."""
    own = server.bindir / "psql" if server.bindir else None
    found = str(own) if own and own.exists() else shutil.which("psql")
    if found is None:
        pytest.skip("there is no psql: neither beside the server's programs nor on PATH")
    return found


def run_psql(server: Server, dsn: str, file: Path) -> subprocess.CompletedProcess[str]:
    command = [psql(server), "-X", "-v", "ON_ERROR_STOP=1", "-d", dsn, "-f", str(file)]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)


# -- one end state --


def test_a_fresh_database_gets_every_migration_and_says_so(empty_db: Database) -> None:
    assert migrate(empty_db.dsn) == Migrated(None, b2s.__version__, MIGRATIONS)
    conn = empty_db.connect()
    ledger = conn.execute("select name, version, applied_by from etl.migrations order by name").fetchall()
    assert [row[:2] for row in ledger] == [(name, b2s.__version__) for name in MIGRATIONS]
    assert {row[2] for row in ledger} == {conn.info.user}
    assert conn.execute("select version from etl.installation").fetchall() == [(b2s.__version__,)]


def test_migrating_twice_is_the_same_as_once(empty_db: Database) -> None:
    migrate(empty_db.dsn)
    conn = empty_db.connect()
    once = fingerprint(conn)
    assert migrate(empty_db.dsn) == Migrated(b2s.__version__, b2s.__version__, ())
    assert fingerprint(conn) == once
    assert len(once) > 300


def test_psql_alone_installs_the_same_as_b2s_migrate(
    empty_db: Database, db: Database, server: Server
) -> None:
    done = run_psql(server, empty_db.dsn, sql_root() / "plpgsql" / "install.sql")
    assert done.returncode == 0, done.stderr
    assert fingerprint(empty_db.connect()) == fingerprint(db.connect())
    assert done.stdout.splitlines()[-1] == f"b2s {b2s.__version__} is installed"
    again = run_psql(server, empty_db.dsn, sql_root() / "plpgsql" / "install.sql")
    assert again.returncode == 0, again.stderr
    assert "applying migration" not in again.stdout
    assert fingerprint(empty_db.connect()) == fingerprint(db.connect())


def test_the_script_fed_to_psql_installs_the_same_as_b2s_migrate(
    empty_db: Database, db: Database, server: Server, tmp_path: Path
) -> None:
    file = tmp_path / "install.sql"
    file.write_text(script(), encoding="utf-8")
    for _ in range(2):
        done = run_psql(server, empty_db.dsn, file)
        assert done.returncode == 0, done.stderr
        assert fingerprint(empty_db.connect()) == fingerprint(db.connect())


def test_the_script_says_what_it_installs_and_needs_no_other_file() -> None:
    text = script()
    assert f"set_config('b2s.version', '{b2s.__version__}', true)" in text
    assert "\\ir" not in text
    assert text.index("begin;") < text.index("create table etl.pipelines") < text.rindex("commit;")


GIVE_BACK = """
do $$
declare v_object text;
begin
  for v_object in
    select 'routine ' || oid::regprocedure from pg_proc where pronamespace = 'etl'::regnamespace
    union all
    select 'type ' || oid::regtype from pg_type t where typnamespace = 'etl'::regnamespace
       and (typtype in ('d', 'e') or typrelid in (select oid from pg_class where relkind = 'c'))
    union all
    select case relkind when 'v' then 'view ' else 'table ' end || oid::regclass from pg_class
     where relnamespace = 'etl'::regnamespace and relkind in ('r', 'v')
  loop
    execute format('alter %s owner to etl_owner', v_object);
  end loop;
end $$;
alter schema etl owner to etl_owner;
drop function etl._call_routine(etl.procedure_runs, boolean), etl._read_source(text, text, text),
  etl._find_routine(text), etl._refresh_view(text, text), etl._restamp_source(text, text[], xid8),
  etl._test_contract(jsonb, text, text), etl._check_source(text);
create function etl._refresh(mv_name text, concurrency text, out is_concurrent boolean, out warning text)
  language sql as 'select true, null::text';
alter function etl._refresh owner to etl_owner;
"""
"""Makes of an installation one of release 0.1.0, where everything belonged to etl_owner."""


def test_an_installation_in_which_everything_belongs_to_etl_owner_is_taken_over(
    private_server: Server,
) -> None:
    database, reference = private_server.create_database(), private_server.create_database()
    conn = database.connect()
    conn.execute("create role deployer login createrole")
    for one in (database, reference):
        conn.execute(f"grant create on database {one.name} to deployer")
        migrate(f"{one.dsn} user=deployer")
    conn.execute("insert into etl.pipelines (name) values ('kept')")
    conn.execute(GIVE_BACK)
    conn.execute("revoke etl_engine from deployer cascade")
    conn.execute("grant pg_read_all_stats to etl_owner")
    conn.execute("revoke pg_read_all_stats from etl_engine cascade")
    if private_server.major >= 16:
        error = raised(lambda: migrate(f"{database.dsn} user=deployer"))
        assert "etl_owner is a member of pg_read_all_stats, etl_engine is not" in str(error)
        assert "grant pg_read_all_stats to etl_engine; grant etl_engine to deployer;" in str(error.hint)
        for statement in str(error.hint).partition(": ")[2].split("; "):
            conn.execute(statement.encode())
    migrate(f"{database.dsn} user=deployer")
    assert fingerprint(conn) == fingerprint(reference.connect())
    assert conn.execute("select name from etl.pipelines").fetchall() == [("kept",)]
    for one in (database, reference):
        one.drop()


def test_a_new_migration_of_a_later_release_is_applied_once(db: Database, sql_copy: Path) -> None:
    add_migration(
        sql_copy,
        "9001_notes",
        "create table etl.notes (note text);\ncomment on table etl.notes is 'Notes.';\n",
    )
    assert migrate(db.dsn).applied == ("9001_notes",)
    assert migrate(db.dsn).applied == ()
    conn = db.connect()
    assert conn.execute("select count(*) from etl.migrations where name = '9001_notes'").fetchone() == (1,)
    assert conn.execute(
        "select pg_get_userbyid(relowner) from pg_class where oid = 'etl.notes'::regclass"
    ).fetchone() == ("etl_engine",)


def test_twenty_migrates_at_once_on_an_empty_database_all_succeed_and_install_once(
    empty_db: Database, db: Database
) -> None:
    with ThreadPoolExecutor(20) as pool:
        done = list(pool.map(lambda _: migrate(empty_db.dsn), range(20)))
    assert sorted(len(one.applied) for one in done) == [0] * 19 + [len(MIGRATIONS)]
    conn = empty_db.connect()
    assert conn.execute("select name from etl.migrations order by name").fetchall() == [
        (name,) for name in MIGRATIONS
    ]
    assert fingerprint(conn) == fingerprint(db.connect())


def test_databases_of_one_new_server_can_be_migrated_at_the_same_moment(private_server: Server) -> None:
    """Roles belong to the server, so these installs meet although their advisory locks do not."""
    for attempt in range(3):
        databases = [private_server.create_database() for _ in range(8)]
        with ThreadPoolExecutor(8) as pool:
            done = list(pool.map(lambda database: migrate(database.dsn), databases))
        assert {one.applied for one in done} == {MIGRATIONS}
        for database in databases:
            database.drop()
        if attempt < 2:
            with private_server.connect() as conn:
                conn.execute(
                    "drop role etl_engine, etl_frontend, etl_owner, etl_admin, etl_operator, etl_reader,"
                    " etl_retention"
                )


def test_everything_in_schema_etl_belongs_to_the_engine_but_what_runs_the_team_s_code(db: Database) -> None:
    owners = (
        db.connect()
        .execute(
            """select 'schema', nspowner::regrole::text from pg_namespace where nspname = 'etl'
           union select 'relation', relowner::regrole::text from pg_class
             where relnamespace = 'etl'::regnamespace
           union select case proowner::regrole::text when 'etl_engine' then 'routine' else proname end,
             proowner::regrole::text from pg_proc where pronamespace = 'etl'::regnamespace
           union select 'type', typowner::regrole::text from pg_type
             where typnamespace = 'etl'::regnamespace"""
        )
        .fetchall()
    )
    steps = (
        "_call_routine",
        "_check_source",
        "_find_routine",
        "_read_source",
        "_refresh_view",
        "_restamp_source",
        "_test_contract",
    )
    assert set(owners) == {
        *((name, "etl_owner") for name in steps),
        *((name, "etl_retention") for name in ("_delete_moves", "_delete_runs")),
        *((kind, "etl_engine") for kind in ("relation", "routine", "schema", "type")),
    }


ROLES = (
    "etl_admin", "etl_engine", "etl_frontend", "etl_operator", "etl_owner", "etl_reader", "etl_retention",
)  # fmt: skip


def test_the_roles_cannot_log_in_and_each_includes_the_one_below(db: Database) -> None:
    conn = db.connect()
    logins = conn.execute(
        "select rolname, rolcanlogin, rolsuper from pg_roles where rolname like 'etl\\_%' order by 1"
    ).fetchall()
    assert [row for row in logins if row[0] in ROLES] == [(role, False, False) for role in ROLES]
    member = "select pg_has_role(%s, %s, 'usage')"
    ladder = [
        ("etl_admin", "etl_operator"),
        ("etl_operator", "etl_reader"),
        ("etl_reader", "etl_operator"),
        ("etl_admin", "etl_owner"),
        ("etl_owner", "etl_reader"),
        ("etl_owner", "etl_engine"),
        ("etl_engine", "etl_owner"),
        ("etl_frontend", "etl_reader"),
    ]
    assert [conn.execute(member, pair).fetchone() for pair in ladder] == [
        (True,),
        (True,),
        (False,),
        (False,),
        (True,),
        (False,),
        (False,),
        (False,),
    ]


# -- what it drops, what it refuses --


def test_routines_that_an_older_release_left_are_dropped(db: Database) -> None:
    conn = db.connect()
    before = fingerprint(conn)
    conn.execute("create function etl._gone_in_this_release() returns int language sql as 'select 1'")
    conn.execute("create procedure etl.retired() language plpgsql as 'begin end'")
    conn.execute(
        "create function etl.cancel_run(run_id bigint) returns text language sql as 'select null::text'"
    )
    with pytest.raises(psycopg.errors.AmbiguousFunction):
        conn.execute("select etl.cancel_run(1)")
    migrate(db.dsn)
    assert fingerprint(conn) == before


def test_a_hand_edited_routine_is_put_right(db: Database) -> None:
    conn = db.connect()
    before = fingerprint(conn)
    conn.execute(
        "create or replace function etl._requester() returns text language sql as $$ select 'nobody' $$"
    )
    conn.execute("grant execute on function etl._requester() to public")
    migrate(db.dsn)
    assert fingerprint(conn) == before


def test_a_migration_that_was_edited_after_it_was_released_is_refused_before_anything_is_done(
    sql_copy: Path, empty_db: Database
) -> None:
    append(sql_copy / "migrations" / "0001_catalog.sql", "\nselect 1;\n")
    with pytest.raises(UsageError) as caught:
        migrate(empty_db.dsn)
    assert "migrations/0001_catalog.sql differs from the sha256" in str(caught.value)
    assert "new migration" in str(caught.value.hint)
    assert empty_db.connect().execute("select to_regnamespace('etl')").fetchone() == (None,)


def test_a_migration_that_differs_from_the_one_applied_is_refused(db: Database, sql_copy: Path) -> None:
    file = sql_copy / "migrations" / "0001_catalog.sql"
    released = sha256(file.read_bytes()).hexdigest()
    append(file, "\n-- a second thought\n")
    edited = sha256(file.read_bytes()).hexdigest()
    manifest = sql_copy / "plpgsql" / "install.sql"
    manifest.write_text(manifest.read_text(encoding="utf-8").replace(released, edited), encoding="utf-8")
    error = raised(lambda: migrate(db.dsn))
    assert error.sqlstate == "PT409"
    assert "migration 0001_catalog was changed after it had been applied" in str(error)
    assert "restore the file" in str(error.hint)


def test_a_migration_that_fails_leaves_an_installed_database_as_it_was(db: Database, sql_copy: Path) -> None:
    conn = db.connect()
    before = fingerprint(conn)
    add_migration(sql_copy, "9001_broken", "create table etl.half_done (n int);\nselect 1 / 0;\n")
    assert raised(lambda: migrate(db.dsn)).sqlstate == "22012"
    assert fingerprint(conn) == before


def test_a_code_file_that_fails_leaves_an_empty_database_empty(empty_db: Database, sql_copy: Path) -> None:
    append(
        sql_copy / "plpgsql" / "views.sql",
        "\ncreate or replace view etl.broken as select * from etl.nowhere;\n",
    )
    assert raised(lambda: migrate(empty_db.dsn)).sqlstate == "42P01"
    assert empty_db.connect().execute("select to_regnamespace('etl')").fetchone() == (None,)


@pytest.mark.parametrize("newer", ["0.2.1", "0.10.0", "1.0.0"])
def test_a_database_of_a_newer_release_is_not_downgraded(newer: str, db: Database) -> None:
    conn = db.connect()
    conn.execute("update etl.installation set version = %s", [newer])
    before = fingerprint(conn)
    error = raised(lambda: migrate(db.dsn))
    assert error.sqlstate == "PT409"
    assert f"this database has b2s {newer}, newer than the {b2s.__version__} being installed" in str(error)
    assert "pip install --upgrade b2s" in str(error.hint)
    assert fingerprint(conn) == before


def test_releases_are_compared_as_numbers_not_as_text(db: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    db.connect().execute("update etl.installation set version = '0.9.2'")
    monkeypatch.setattr(migrate_module, "__version__", "0.10.0")
    assert migrate(db.dsn).after == "0.10.0"


def test_a_schema_etl_of_somebody_else_is_refused_and_left_alone(empty_db: Database) -> None:
    conn = empty_db.connect()
    conn.execute("create schema etl")
    conn.execute("create table etl.mine (n int)")
    error = raised(lambda: migrate(empty_db.dsn))
    assert error.sqlstate == "PT409"
    assert "schema etl that is not b2s's" in str(error)
    assert "rename that schema" in str(error.hint)
    relations = conn.execute(
        "select relname from pg_class where relnamespace = 'etl'::regnamespace"
    ).fetchall()
    assert relations == [("mine",)]


# -- runs --


@pytest.fixture
def waiting_run(db: Database) -> Iterator[Connection]:
    """A run in another session, whose only step waits until this session's lock on silver.gate is gone."""
    holder = db.connect(autocommit=False)
    with db.connect() as conn:
        conn.execute("create schema silver authorization etl_owner")
        conn.execute("create table silver.gate (n int)")
        conn.execute("alter table silver.gate owner to etl_owner")
        conn.execute(
            "create function silver.load_slow() returns bigint language plpgsql as "
            "$$ begin lock table silver.gate; return 0; end $$"
        )
        conn.execute("select etl.apply_config(%s)", [SLOW])
    holder.execute("lock table silver.gate")
    worker = db.connect()
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(_swallow, worker)
        wait_until(
            db.connect(),
            "select exists (select from pg_locks where not granted and relation = 'silver.gate'::regclass)",
        )
        yield worker
        holder.rollback()
        running.result(timeout=30)


def _swallow(worker: Connection) -> None:
    """Run until the end, or until a test ends the session."""
    try:
        worker.execute("call etl.start_run()")
    except psycopg.OperationalError:
        worker.close()


SLOW = """
{"version": 1, "pipeline": "slow", "description": null, "max_concurrency": 2, "search_path": [],
  "groups": [], "schedules": [],
 "procedures": [{"name": "silver.slow", "routine": "silver.load_slow", "type": "dimension",
   "description": null, "dependencies": [],
   "allow_fact_dependency": false, "group": null, "tags": [], "default_mode": "incremental",
     "allow_full_refresh": false,
   "transaction_scope": "per_procedure", "isolation": "read committed", "params": [], "args": {},
     "watermark": null,
   "retries": {"attempts": 3, "backoff_ms": 1, "max_backoff_ms": 1}, "timeout_ms": null,
     "lock_timeout_ms": null,
   "on_failure": "continue", "max_window": null, "checks": [], "mv_refresh": []}]}
"""


def test_an_active_run_is_not_upgraded_under_and_goes_on(waiting_run: Connection, db: Database) -> None:
    conn = db.connect()
    error = raised(lambda: migrate(db.dsn))
    assert error.sqlstate == "PT409"
    assert f"run 1 (backend {waiting_run.info.backend_pid}) is active" in str(error)
    assert "etl.cancel_run" in str(error.hint)
    assert conn.execute("select status from etl.runs").fetchall() == [("running",)]


def test_a_dead_run_does_not_stand_in_the_way_of_an_upgrade(waiting_run: Connection, db: Database) -> None:
    conn = db.connect()
    conn.execute("select pg_terminate_backend(%s)", [waiting_run.info.backend_pid])
    wait_until(
        conn,
        "select not exists (select from pg_locks where locktype = 'advisory' and classid = 6435444)",
    )
    assert conn.execute("select status from etl.runs").fetchall() == [("running",)]
    assert migrate(db.dsn).after == b2s.__version__


def test_who_installs_and_inherits_nothing_waits_for_runs_as_well(
    waiting_run: Connection, db: Database
) -> None:
    conn = db.connect()
    role = f"installer_{db.name}"
    conn.execute(f"create role {role} login noinherit")
    try:
        conn.execute(f"grant etl_engine, etl_owner to {role}")
        conn.execute(f"grant etl_retention to {role} with admin option")
        conn.execute(f"grant create on database {db.name} to {role}")
        error = raised(lambda: migrate(f"{db.dsn} user={role}", wait=0.1))
        conn.execute("select pg_terminate_backend(%s)", [waiting_run.info.backend_pid])
        wait_until(
            conn, "select not exists (select from pg_locks where locktype = 'advisory' and classid = 6435444)"
        )
        migrated = migrate(f"{db.dsn} user={role}", wait=10)
    finally:
        conn.execute(f"drop owned by {role}; drop role {role}")
    assert "run 1 has not ended within 0.1 s; nothing was changed" in str(error)
    assert migrated.after == b2s.__version__


def test_a_run_cannot_start_while_an_install_is_going_on(db: Database) -> None:
    installer = db.connect(autocommit=False)
    installer.execute("select pg_advisory_xact_lock(6435443, 0)")
    conn = db.connect()
    conn.execute("create schema silver")
    conn.execute("create function silver.load_slow() returns bigint language sql as 'select 0::bigint'")
    conn.execute("grant usage on schema silver to etl_owner")
    conn.execute("select etl.apply_config(%s)", [SLOW])
    with pytest.raises(psycopg.DatabaseError) as caught:
        conn.execute("call etl.start_run()")
    assert (caught.value.sqlstate, detail_of(caught.value)["code"]) == ("PT409", "install.active")
    installer.rollback()
    assert conn.execute("call etl.start_run()").fetchone() == (1, "succeeded")


# -- who may install --


def test_a_role_that_may_create_roles_and_schemas_installs_without_being_superuser(
    private_server: Server,
) -> None:
    database = private_server.create_database()
    conn = database.connect()
    conn.execute("create role deployer login createrole")
    conn.execute(f"grant create on database {database.name} to deployer")
    assert migrate(f"{database.dsn} user=deployer").applied == MIGRATIONS
    assert migrate(f"{database.dsn} user=deployer").applied == ()
    reference = private_server.create_database()
    migrate(reference.dsn)
    assert fingerprint(conn) == fingerprint(reference.connect())
    for one in (database, reference):
        one.drop()


def test_a_role_without_createrole_is_told_which_grants_to_ask_for_and_installs_once_it_has_them(
    private_server: Server,
) -> None:
    database = private_server.create_database()
    conn = database.connect()
    conn.execute("create role plain login")
    as_plain = f"{database.dsn} user=plain"

    no_roles = raised(lambda: migrate(as_plain))
    assert no_roles.sqlstate == "PT403"
    assert "role etl_engine does not exist and plain may not create it" in str(no_roles)
    hint = str(no_roles.hint).partition(": ")[2]
    assert "grant etl_engine to plain; grant etl_owner to plain" in hint
    grants = [grant.strip() for grant in hint.split(";") if grant.strip()]

    for grant in grants:
        conn.execute(grant.encode())
    no_schema = raised(lambda: migrate(as_plain))
    assert no_schema.sqlstate == "PT403"
    assert f"plain may not create schema etl in database {database.name}" in str(no_schema)

    conn.execute(str(no_schema.hint).partition(": ")[2].encode())
    assert migrate(as_plain).applied == MIGRATIONS
    database.drop()


def test_a_role_that_is_not_in_the_roles_that_own_is_told_so(db: Database) -> None:
    conn = db.connect()
    role = f"stranger_{db.name}"
    conn.execute(f"create role {role} login")
    try:
        error = raised(lambda: migrate(f"{db.dsn} user={role}"))
    finally:
        conn.execute(f"drop role {role}")
    assert error.sqlstate == "PT403"
    assert f"{role} is not a member of role etl_engine" in str(error)
    assert f"grant etl_engine to {role}; grant etl_owner to {role};" in str(error.hint)


# -- dry run and pending --


def test_a_dry_run_finds_what_would_fail_and_changes_nothing(empty_db: Database, sql_copy: Path) -> None:
    conn = empty_db.connect()
    assert migrate(empty_db.dsn, dry_run=True) == Migrated(None, b2s.__version__, MIGRATIONS)
    assert conn.execute("select to_regnamespace('etl')").fetchone() == (None,)
    add_migration(sql_copy, "9001_broken", "select 1 / 0;\n")
    assert raised(lambda: migrate(empty_db.dsn, dry_run=True)).sqlstate == "22012"


def test_pending_names_what_an_install_would_apply(empty_db: Database, sql_copy: Path) -> None:
    with connect(empty_db.dsn) as conn:
        assert pending(conn) == Pending(None, b2s.__version__, MIGRATIONS)
        migrate(empty_db.dsn)
        assert pending(conn) == Pending(b2s.__version__, b2s.__version__, ())
        assert pending(conn).is_current
        add_migration(sql_copy, "9001_notes", "create table etl.notes (note text);\n")
        assert pending(conn) == Pending(b2s.__version__, b2s.__version__, ("9001_notes",))
        assert not pending(conn).is_current
        conn.execute("update etl.installation set version = '0.0.9'")
        assert pending(conn).installed == "0.0.9"


def test_a_server_that_does_not_answer_is_an_error_for_people(tmp_path: Path) -> None:
    error = raised(lambda: migrate(f"host={tmp_path} dbname=none"))
    assert error.exit_code == 3
    assert "B2S_DSN" in str(error.hint)


# -- the wheel --


def hatch(target: str, source: Path, into: Path) -> Path:
    """Builds a wheel or an sdist with the build backend, without isolation."""
    pytest.importorskip(
        "hatchling", reason="the build backend hatchling is not installed: pip install 'b2s[dev]'"
    )
    command = [sys.executable, "-m", "hatchling", "build", "-t", target, "-d", str(into)]
    done = subprocess.run(command, cwd=source, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    (built,) = into.iterdir()
    return built


def sql_files(root: Path) -> set[str]:
    return {
        str(path.relative_to(root))
        for folder in ("migrations", "plpgsql")
        for path in (root / folder).rglob("*.sql")
    }


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return hatch("wheel", PROJECT, tmp_path_factory.mktemp("wheel"))


def test_the_wheel_holds_every_sql_file_unchanged(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = {name.removeprefix("b2s/sql/") for name in archive.namelist() if name.startswith("b2s/sql/")}
        assert names == sql_files(PROJECT)
        assert all(archive.read(f"b2s/sql/{name}") == (PROJECT / name).read_bytes() for name in names)


SAFE_EXTRACTION: Any = {"filter": "data"} if hasattr(tarfile, "data_filter") else {}
"""Python 3.11 has the filter since 3.11.4; newer ones warn when it is not named."""


def test_a_wheel_built_from_the_sdist_holds_every_sql_file(tmp_path: Path) -> None:
    sdist = hatch("sdist", PROJECT, tmp_path / "sdist")
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp_path / "source", **SAFE_EXTRACTION)  # noqa: S202 - our own archive
    (source,) = (tmp_path / "source").iterdir()
    with zipfile.ZipFile(hatch("wheel", source, tmp_path / "wheel")) as archive:
        assert {
            name.removeprefix("b2s/sql/") for name in archive.namelist() if name.startswith("b2s/sql/")
        } == sql_files(PROJECT)


def test_b2s_from_the_wheel_installs_the_same_as_from_the_checkout(
    wheel: Path, empty_db: Database, db: Database, tmp_path: Path
) -> None:
    site = tmp_path / "site-packages"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)  # noqa: S202
    program = (
        "import b2s.migrate, b2s.sqlfiles, sys; print(b2s.sqlfiles.sql_root()); "
        "b2s.migrate.migrate(sys.argv[1])"
    )
    environment: dict[str, Any] = {**os.environ, "PYTHONPATH": str(site)}
    done = subprocess.run(
        [sys.executable, "-c", program, empty_db.dsn],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str(site / "b2s" / "sql")
    assert fingerprint(empty_db.connect()) == fingerprint(db.connect())
