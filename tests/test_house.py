"""The rules of the house: how the SQL is laid out, what each kind of file may hold, and who may use what."""

from __future__ import annotations

import hashlib
import re
import shutil
import subprocess
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

import b2s
from b2s.errors import UsageError
from b2s.sqlfiles import load_manifest
from tests.servers import Database

PROJECT = Path(__file__).resolve().parents[1]
PLPGSQL = PROJECT / "plpgsql"
MIGRATIONS = sorted((PROJECT / "migrations").glob("*.sql"))
CODE = sorted(
    path for path in PLPGSQL.rglob("*.sql") if path.name != "install.sql" and path.parent.name != "install"
)
API = [path for path in CODE if path.parent.name == "api"]
ENGINE = [path for path in CODE if path.parent.name in ("engine", "steps")]

PINNED = "search_path=pg_catalog, pg_temp"
# A procedure that commits can have no SET clause, and what one sets ends with the routine that has it.
UNPINNED = {"start_run", "work", "resume_run", "backfill", "purge", "run_due", "_walk", "_apply_settings"}
OF_THE_ENGINE = {
    "_announce", "_claimed_steps", "_count_changes", "_event_text", "_execute_step", "_is_ready",
    "_open_steps", "_record_success", "_release", "_routine_arguments", "_take_scope",
}  # fmt: skip
"""Called so often, by routines that pin their path and nobody else, that pinning it again costs too much."""
FOLDERS = {"docker", "docs", "migrations", "plpgsql", "python", "tests"}

CREATED = re.compile(r"^create or replace (?:function|procedure) etl\.(\w+)", re.MULTILINE)


def ids(path: Path) -> str:
    return str(path.relative_to(PROJECT))


def statements(path: Path) -> list[Any]:
    """The statements of a file as the server's own parser sees them."""
    pglast = pytest.importorskip("pglast", reason="the SQL parser is not installed: pip install 'b2s[lint]'")
    return [raw.stmt for raw in pglast.parse_sql(path.read_text(encoding="utf-8"))]


def nodes(stmts: list[Any], kind: str) -> list[Any]:
    """Every node of a kind, at any depth."""
    visitors = pytest.importorskip("pglast.visitors")
    found: list[Any] = []

    class Collect(visitors.Visitor):  # type: ignore[misc, name-defined]
        def visit(self, _ancestors: Any, node: Any) -> None:
            if type(node).__name__ == kind:
                found.append(node)

    for stmt in stmts:
        Collect()(stmt)
    return found


def name_of(parts: Any) -> str:
    return ".".join(part.sval for part in parts)


# -- layout --


def test_no_other_folder_stands_beside_the_fixed_ones() -> None:
    git = shutil.which("git")
    if git is None or not (PROJECT / ".git").exists():
        pytest.skip("the layout is read from git, and this is no clone")
    listed = subprocess.run(
        [git, "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=PROJECT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.splitlines()
    folders = {line.split("/")[0] for line in listed if "/" in line}
    assert {folder for folder in folders if not folder.startswith(".")} <= FOLDERS


def test_the_manifest_lists_every_file_exactly_once_and_none_that_is_missing() -> None:
    lines = (PLPGSQL / "install.sql").read_text(encoding="utf-8").splitlines()
    included = Counter(line.removeprefix("\\ir ") for line in lines if line.startswith("\\ir "))
    migrations = [
        line.removeprefix("\\set migration ") for line in lines if line.startswith("\\set migration ")
    ]
    assert included.pop("install/migration.sql") == len(migrations)
    expected = [str(path.relative_to(PLPGSQL)) for path in PLPGSQL.rglob("*.sql")]
    expected.remove("install.sql")
    expected.remove("install/migration.sql")
    assert included == Counter(expected)
    assert migrations == [path.stem for path in MIGRATIONS]


def test_the_manifest_has_the_version_of_the_package() -> None:
    assert f"\n\\set version {b2s.__version__}\n" in (PLPGSQL / "install.sql").read_text(encoding="utf-8")


def test_the_manifest_explains_the_model_before_it_does_anything() -> None:
    prose = (PLPGSQL / "install.sql").read_text(encoding="utf-8").partition("\\set")[0]
    assert all(line.startswith("--") for line in prose.strip().splitlines())
    assert [word for word in ("PIPELINE", "PROCEDURES", "RUN", "STEP", "SCOPES") if word not in prose] == []


def test_migrations_are_numbered_without_a_gap() -> None:
    assert [path.name.split("_")[0] for path in MIGRATIONS] == [
        f"{number:04}" for number in range(1, len(MIGRATIONS) + 1)
    ]


@pytest.mark.parametrize("path", MIGRATIONS, ids=ids)
def test_a_migration_is_frozen_by_its_hash_in_the_manifest(path: Path, tmp_path: Path) -> None:
    (listed,) = (migration for migration in load_manifest().migrations if migration.name == path.stem)
    assert listed.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    for folder in ("migrations", "plpgsql"):
        shutil.copytree(PROJECT / folder, tmp_path / folder)
    copy = tmp_path / "migrations" / path.name
    copy.write_bytes(copy.read_bytes() + b" ")
    with pytest.raises(UsageError, match=path.stem):
        load_manifest(tmp_path)


@pytest.mark.parametrize("path", sorted(PLPGSQL.rglob("*.sql")), ids=ids)
def test_a_code_file_is_short_enough_to_be_read(path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 400


@pytest.mark.parametrize("path", API, ids=ids)
def test_an_api_file_is_named_after_its_verb_and_everything_else_in_it_is_private(path: Path) -> None:
    names = set(CREATED.findall(path.read_text(encoding="utf-8")))
    assert {name for name in names if not name.startswith("_")} == {path.stem}


@pytest.mark.parametrize("path", ENGINE, ids=ids)
def test_an_engine_file_holds_private_routines_only(path: Path) -> None:
    names = CREATED.findall(path.read_text(encoding="utf-8"))
    assert [name for name in names if not name.startswith("_")] == []
    assert path.stem.startswith("_")


@pytest.mark.parametrize("path", [*API, *ENGINE], ids=ids)
def test_a_code_file_begins_by_saying_why_it_is_there(path: Path) -> None:
    first = path.read_text(encoding="utf-8").splitlines()[0]
    assert first.startswith("-- ") or path.stem == "list_procedures"


# -- what a file may hold --


@pytest.mark.parametrize("path", MIGRATIONS, ids=ids)
def test_a_migration_holds_no_routine_and_no_view_and_calls_none_of_ours(path: Path) -> None:
    stmts = statements(path)
    kinds = {type(stmt).__name__ for stmt in stmts}
    assert (
        kinds
        & {
            "CreateFunctionStmt",
            "ViewStmt",
            "CreateTableAsStmt",
            "CreateTrigStmt",
            "DoStmt",
            "TransactionStmt",
        }
        == set()
    )
    assert [
        name_of(call.funcname) for call in nodes(stmts, "FuncCall") if call.funcname[0].sval == "etl"
    ] == []


@pytest.mark.parametrize("path", CODE, ids=ids)
def test_a_code_file_holds_only_statements_that_can_be_run_again(path: Path) -> None:
    again = {"CommentStmt", "GrantStmt"}
    replacing = {"CreateFunctionStmt", "ViewStmt", "CreateTrigStmt"}
    stmts = statements(path)
    assert [type(stmt).__name__ for stmt in stmts if type(stmt).__name__ not in again | replacing] == []
    assert [stmt for stmt in stmts if type(stmt).__name__ in replacing and not stmt.replace] == []


@pytest.mark.parametrize("path", CODE, ids=ids)
def test_a_code_file_is_complete_each_routine_with_its_comment_and_its_revoke(path: Path) -> None:
    def signatures(objects: Any) -> list[tuple[str, int]]:
        return [(name_of(one.objname), len(one.objargs or ())) for one in objects]

    stmts = statements(path)
    created = [
        (name_of(stmt.funcname), sum(argument.mode.value not in "ot" for argument in stmt.parameters or ()))
        for stmt in stmts
        if type(stmt).__name__ == "CreateFunctionStmt"
    ]
    commented = signatures(
        s.object for s in stmts if type(s).__name__ == "CommentStmt" and hasattr(s.object, "objname")
    )
    revoked = [
        signature
        for stmt in stmts
        if type(stmt).__name__ == "GrantStmt"
        and not stmt.is_grant
        and stmt.grantees[0].roletype.name == "ROLESPEC_PUBLIC"
        for signature in signatures(stmt.objects)
    ]
    assert Counter(commented) == Counter(created)
    assert Counter(revoked) == Counter(created)


# -- what an installation holds --

ROUTINES = """
select p.proname, p.oid::regprocedure::text as signature, obj_description(p.oid, 'pg_proc') as comment,
  p.proconfig, p.prosecdef,
       case when p.prosqlbody is null then p.prosrc else '' end as source, l.lanname
  from pg_proc p join pg_language l on l.oid = p.prolang where p.pronamespace = 'etl'::regnamespace order by 2
"""


def test_every_routine_has_a_comment_that_says_what_it_does(db: Database) -> None:
    lacking = [
        signature
        for _, signature, comment, *_ in db.connect().execute(ROUTINES)
        if not comment or not comment.rstrip(")").endswith(".")
    ]
    assert lacking == []


def test_every_routine_pins_its_search_path_but_those_that_cannot(db: Database) -> None:
    """A body parsed when it was created (`return ...`) means the same everywhere and can be inlined."""
    unpinned = {
        name: source
        for name, _, _, settings, _, source, _ in db.connect().execute(ROUTINES)
        if PINNED not in (settings or [])
    }
    assert {name for name, source in unpinned.items() if source} == UNPINNED | OF_THE_ENGINE
    assert "arrived" in unpinned


def test_what_has_the_path_of_its_caller_can_be_called_by_the_engine_and_its_steps_only(db: Database) -> None:
    callers = db.connect().execute(
        "select distinct r.rolname::text from pg_proc p, pg_roles r"
        " where p.pronamespace = 'etl'::regnamespace and p.proname = any (%s) and not r.rolsuper"
        " and has_function_privilege(r.oid, p.oid, 'execute')",
        [sorted(OF_THE_ENGINE)],
    )
    assert {name for (name,) in callers} <= {"etl_engine", "etl_owner"}


def test_no_unpinned_routine_runs_with_the_rights_of_its_owner(db: Database) -> None:
    assert {
        name
        for name, _, _, settings, definer, *_ in db.connect().execute(ROUTINES)
        if definer and not settings
    } == set()


def test_a_routine_without_a_search_path_of_its_own_qualifies_every_function_it_calls(db: Database) -> None:
    sources = {
        name: source for name, _, _, _, _, source, _ in db.connect().execute(ROUTINES) if name in UNPINNED
    }
    bare = {
        name: re.findall(
            r"(?<![\w.])(?!coalesce|least|greatest|in|and|or|not|if|row)([a-z_]+)\(",
            re.sub(r"--[^\n]*", "", source),
        )
        for name, source in sources.items()
    }
    assert {name: calls for name, calls in bare.items() if calls} == {}
    assert bare.keys() == UNPINNED


def test_every_routine_is_written_in_sql_or_plpgsql(db: Database) -> None:
    assert {language for *_, language in db.connect().execute(ROUTINES)} == {"sql", "plpgsql"}


def test_no_routine_is_longer_than_eighty_lines(db: Database) -> None:
    assert [
        signature
        for _, signature, _, _, _, source, _ in db.connect().execute(ROUTINES)
        if source.count("\n") > 80
    ] == []


@pytest.mark.parametrize("path", CODE, ids=ids)
def test_every_routine_states_its_language_and_its_volatility(path: Path) -> None:
    lacking = []
    for stmt in statements(path):
        if type(stmt).__name__ != "CreateFunctionStmt":
            continue
        options = {option.defname for option in stmt.options}
        if "language" not in options or not (stmt.is_procedure or "volatility" in options):
            lacking.append(name_of(stmt.funcname))
    assert lacking == []


def test_every_table_view_and_type_has_a_comment(db: Database) -> None:
    lacking = (
        db.connect()
        .execute(
            """select relname from pg_class where relnamespace = 'etl'::regnamespace and relkind in ('r',
              'p', 'v') and not relispartition
              and obj_description(oid, 'pg_class') is null
           union all
           select typname from pg_type t where typnamespace = 'etl'::regnamespace and obj_description(oid,
             'pg_type') is null
              and (typtype in ('d', 'e') or exists (select from pg_class c where c.oid = t.typrelid
                and c.relkind = 'c'))"""
        )
        .fetchall()
    )
    assert lacking == []


def test_names_of_columns_tell_their_types(db: Database) -> None:
    kinds = {
        r"_at$": {"timestamp with time zone"},
        r"_id$": {"integer", "bigint"},
        r"_ms$": {"integer", "bigint", "numeric(16,3)"},
        r"^is_": {"boolean"},
        r"^status$": {"text", "etl.run_status", "etl.attempt_status"},
    }
    columns = db.connect().execute(
        """select c.relname, a.attname, format_type(a.atttypid, a.atttypmod)
             from pg_class c join pg_attribute a on a.attrelid = c.oid and a.attnum > 0 and not a.attisdropped
            where c.relnamespace = 'etl'::regnamespace and c.relkind in ('r', 'p')"""
    )
    wrong = [
        (table, column, kind)
        for table, column, kind in columns
        for name, types in kinds.items()
        if re.search(name, column) and kind not in types
    ]
    assert wrong == []


def test_check_constraints_are_named_as_sentences(db: Database) -> None:
    names = (
        db.connect()
        .execute(
            """select k.conname from pg_constraint k join pg_class c on c.oid = k.conrelid
            where c.relnamespace = 'etl'::regnamespace and k.contype = 'c'
              and k.conname not like '%\\_is\\_only\\_row\\_check'"""
        )
        .fetchall()
    )
    assert [name for (name,) in names if name.count("_") < 2 or name.endswith("_check")] == []
    assert len(names) > 20


def test_nothing_in_schema_etl_is_open_to_public(db: Database) -> None:
    open_to_public = (
        db.connect()
        .execute(
            """select 'routine', oid::regprocedure::text from pg_proc, aclexplode(coalesce(proacl,
              acldefault('f', proowner))) a
            where pronamespace = 'etl'::regnamespace and a.grantee = 0
           union all
           select 'relation', relname from pg_class,
                  aclexplode(coalesce(relacl,
                    acldefault(case relkind when 'S' then 's'::"char" else 'r'::"char" end, relowner))) a
            where relnamespace = 'etl'::regnamespace and relkind in ('r', 'p', 'v', 'm', 'S')
              and a.grantee = 0
           union all
           select 'schema', nspname from pg_namespace, aclexplode(coalesce(nspacl, acldefault('n',
             nspowner))) a
            where nspname = 'etl' and a.grantee = 0"""
        )
        .fetchall()
    )
    assert open_to_public == []


def test_no_role_but_the_owner_may_write_a_table_and_none_but_retention_may_delete(db: Database) -> None:
    writers = (
        db.connect()
        .execute(
            """select relname, a.grantee::regrole::text, a.privilege_type from pg_class, aclexplode(relacl) a
            where relnamespace = 'etl'::regnamespace and relkind in ('r', 'p', 'v')
              and a.grantee <> relowner and a.privilege_type <> 'SELECT' order by 1"""
        )
        .fetchall()
    )
    may_be_purged = ("mv_refreshes", "procedure_runs", "run_scopes", "run_workers", "runs", "state_history")
    assert writers == [(table, "etl_retention", "DELETE") for table in may_be_purged]


def test_each_role_may_call_the_verbs_that_are_its_own(db: Database) -> None:
    granted: dict[str, set[str]] = {}
    for name, role in db.connect().execute(
        """select p.proname, a.grantee::regrole::text from pg_proc p, aclexplode(p.proacl) a
            where p.pronamespace = 'etl'::regnamespace and a.grantee <> p.proowner
              and p.proname not like '\\_%'"""
    ):
        granted.setdefault(role, set()).add(name)
    assert set(granted) == {"etl_admin", "etl_operator", "etl_reader"}
    assert {"apply_config", "freeze_full_refresh"} <= granted["etl_admin"]
    assert {"start_run", "cancel_run"} <= granted["etl_operator"]
    assert {"plan_run", "plan_config", "get_run", "list_procedures", "arrived"} <= granted["etl_reader"]
    assert sum(map(len, granted.values())) == len(set.union(*granted.values()))
    assert set.union(*granted.values()) == {path.stem for path in API}


def test_the_planner_inlines_arrived_so_that_an_index_serves_the_window(db: Database) -> None:
    conn = db.connect()
    conn.execute("create table rows_of_bronze (n int, etl_xid xid8 default pg_current_xact_id())")
    conn.execute("create index on rows_of_bronze (etl_xid)")
    conn.execute("set enable_seqscan = off")
    plan = "\n".join(
        line
        for (line,) in conn.execute(
            "explain select * from rows_of_bronze r where etl.arrived(r.etl_xid, '10:20:'::pg_snapshot, "
            "'30:40:'::pg_snapshot)"
        )
    )
    assert "Index Cond: ((etl_xid >= " in plan
    assert "arrived" not in plan
