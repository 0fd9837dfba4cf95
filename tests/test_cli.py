"""The command line: every command as a user or a program meets it, and everything that ends one early."""

from __future__ import annotations

import json
import os
import pty
import shutil
import signal
import subprocess
import sys
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import psycopg
import pytest
from psycopg import conninfo, sql

from b2s import __version__
from b2s.cli import COMMANDS, main
from b2s.render import Column, Style, duration, table
from b2s.runview import next_steps
from b2s.selection import request_of
from tests.servers import Connection, Database, wait_until, wheel

GATE: Final = 20261121
HERE: Final = "database = (select oid from pg_database where datname = current_database())"
WAITING: Final = (
    f"select from pg_locks where locktype = 'advisory' and objid = {GATE} and not granted and {HERE}"
)
B2S: Final = (sys.executable, "-m", "b2s.cli")
SECONDS: Final = 60
STARTED: Final[list[subprocess.Popen[str]]] = []

OBJECTS: Final = f"""
create schema bronze authorization etl_owner;
create schema silver authorization etl_owner;
create schema mart authorization etl_owner;
set role etl_owner;
create table silver.seen (step text not null, country text, size int);
create materialized view mart.seen_by_step as select step, count(*) as seen from silver.seen group by step;
create unique index on mart.seen_by_step (step);
create function silver.first(country text, size int) returns bigint language plpgsql as $$
begin insert into silver.seen values ('first', country, size); return 1; end $$;
create function silver.gate() returns bigint language plpgsql as $$
begin
  if exists (select from pg_locks where locktype = 'advisory' and objid = {GATE} and {HERE}) then
    perform pg_advisory_xact_lock({GATE});
  end if;
  insert into silver.seen values ('gate');
  return 1;
end $$;
create function silver.second() returns bigint language sql as $$
  with new as (insert into silver.seen values ('second'), ('second') returning 1) select count(*) from new $$;
create function silver.third() returns bigint language sql as $$
  with new as (insert into silver.seen values ('third') returning 1) select count(*) from new $$;
reset role;
"""

CONFIG: Final = """\
version: 1
procedures:
  - name: silver.first
    type: dimension
    tags: [daily]
    allow_full_refresh: true
    params:
      country: {type: string, enum: [DE, US], default: DE}
      size: {type: integer, minimum: 1, maximum: 10, default: 1}
  - name: silver.gate
    type: dimension
    dependencies: [silver.first]
  - name: silver.second
    type: fact
    dependencies: [silver.gate]
    mv_refresh: [mart.seen_by_step]
  - name: silver.third
    type: fact
    dependencies: [silver.second]
"""

BROKEN_SECOND: Final = """
create or replace function silver.second() returns bigint language plpgsql as $$
begin
  raise exception 'no \x1b[31mred\x1b[0m text' using hint = 'repair the text', detail = 'the whole story';
end $$
"""


@dataclass(frozen=True, slots=True)
class Result:
    """How a command ended, and what it printed."""

    code: int
    out: str
    err: str

    @property
    def document(self) -> Any:
        """stdout as JSON."""
        return json.loads(self.out)


Cli = Callable[..., Result]


@pytest.fixture(autouse=True)
def clean_surroundings(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """A test starts in an empty directory, without a terminal's variables, and leaves no process behind."""
    monkeypatch.chdir(tmp_path)
    for name in ("NO_COLOR", "TERM", "COLUMNS"):
        monkeypatch.delenv(name, raising=False)
    yield
    for process in STARTED:
        if process.poll() is None:
            process.kill()
            process.communicate()
    STARTED.clear()


@pytest.fixture
def pipeline(db: Database, tmp_path: Path) -> Database:
    """A configured pipeline of four procedures, and its file in the current directory."""
    with db.connect() as conn:
        conn.execute(OBJECTS)
    (tmp_path / "transformations.yaml").write_text(CONFIG)
    assert main(["sync-config", "--dsn", db.dsn]) == 0
    return db


@pytest.fixture
def cli(db: Database, capsys: pytest.CaptureFixture[str]) -> Cli:
    """A command, run in this process against the test's database."""

    def run(*words: str, dsn: str = db.dsn) -> Result:
        capsys.readouterr()
        code = main([*words, "--dsn", dsn])
        captured = capsys.readouterr()
        assert "Traceback" not in captured.err
        return Result(code, captured.out, captured.err)

    return run


@pytest.fixture
def gate(pipeline: Database) -> Iterator[Connection]:
    """While this session holds the gate, the step silver.gate waits."""
    conn = pipeline.connect()
    conn.execute("select pg_advisory_lock(%s)", [GATE])
    yield conn
    conn.close()


def start(database: Database, *words: str, **options: Any) -> subprocess.Popen[str]:
    """A command in a process of its own."""
    environment = {**os.environ, "B2S_DSN": database.dsn, **options.pop("env", {})}
    process = subprocess.Popen(
        [*B2S, *words],
        env=environment,
        text=True,
        stdout=options.pop("stdout", subprocess.PIPE),
        stderr=options.pop("stderr", subprocess.PIPE),
        **options,
    )
    STARTED.append(process)
    return process


def waits_at_the_gate(conn: Connection) -> None:
    """Wait until a step is in silver.gate."""
    wait_until(conn, f"select exists ({WAITING})", timeout=SECONDS)


def is_asked_to_stop(conn: Connection) -> None:
    """Wait until the cancel request has arrived."""
    wait_until(conn, "select bool_or(cancel_requested_at is not null) from etl.runs", timeout=SECONDS)


def open_gate(conn: Connection) -> None:
    conn.execute("select pg_advisory_unlock(%s)", [GATE])


def statuses(conn: Connection) -> dict[str, str]:
    """The outcome of each step of the newest run."""
    query = "select procedure, status from etl.step_history where run_id = (select max(run_id) from etl.runs)"
    return dict(conn.execute(query.encode()).fetchall())


# -- the command line itself --


@pytest.mark.parametrize("words", [["--help"], *([name, "--help"] for name in COMMANDS)], ids=" ".join)
def test_help_needs_no_heavy_library(words: list[str]) -> None:
    program = (
        "import sys; from b2s.cli import main; code = main(sys.argv[1:]);"
        "heavy = {'psycopg', 'pydantic', 'structlog', 'yaml', 'prometheus_client'};"
        "print(sorted(heavy & set(sys.modules)), file=sys.stderr);"
        "sys.exit(code)"
    )
    done = subprocess.run([sys.executable, "-c", program, *words], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("usage: b2s")
    assert done.stderr == "[]\n"


def test_the_bare_command_prints_its_help(cli: Cli) -> None:
    done = cli()
    assert (done.code, done.err) == (0, "")
    assert all(f"    {name} " in done.out for name in COMMANDS)


def test_the_version_is_printed(cli: Cli) -> None:
    assert cli("--version").out == f"b2s {__version__}\n"


@pytest.mark.parametrize(
    ("words", "message", "hint"),
    [
        (["rnu"], "invalid choice: 'rnu'", "did you mean: b2s run"),
        (["run", "--mode", "partial"], "invalid choice: 'partial'", "b2s run --help"),
        (["show"], "the following arguments are required: RUN", "b2s show --help"),
        (["runs", "--limit", "many"], "invalid int value: 'many'", "b2s runs --help"),
        (["runs", "--limit", "0"], "--limit must be at least 1", "leave it out"),
        (["runs", "--lim", "3"], "unrecognized arguments: --lim 3", "b2s --help"),
        (["run", "--param", "country=DE"], "--param country=DE is not PROCEDURE.NAME", "silver.fact"),
        (["run", "--params", "{"], "--params is not JSON", "for example"),
        (["run", "--params", "[1]"], "--params must be an object of objects", "for example"),
        (["migrate", "--check", "--sql"], "not allowed with argument", "b2s migrate --help"),
        (["demo", "--stop"], "--stop needs the --data-dir", "printed when"),
        (["demo", "--keep"], "--keep and --data-dir are for the private server", "leave out --dsn"),
    ],
)  # fmt: skip
def test_wrong_options_are_explained_with_exit_code_2(
    cli: Cli, words: list[str], message: str, hint: str
) -> None:
    done = cli(*words)
    assert done.code == 2
    assert message in done.err
    assert f"\nhint: {hint}" in done.err or hint in done.err.partition("\nhint: ")[2]
    assert done.out == ""


def test_a_wrong_option_is_json_where_json_is_asked_for(cli: Cli) -> None:
    done = cli("run", "--mode", "partial", "--json")
    assert done.code == 2
    assert done.document["error"]["code"] == "usage"
    assert done.err == ""


def test_shared_options_stand_before_or_after_the_command(
    db: Database, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--dsn", db.dsn, "--json", "runs"]) == 0
    before = capsys.readouterr().out
    assert main(["runs", "--json", "--dsn", db.dsn]) == 0
    assert before == capsys.readouterr().out == "[]\n"


def test_the_dsn_comes_from_the_environment(db: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("B2S_DSN", db.dsn)
    assert main(["migrate", "--check"]) == 0


@pytest.mark.parametrize("command", ["migrate", "runs", "status", "run", "plan"])
def test_an_unreachable_server_is_exit_code_3(cli: Cli, tmp_path: Path, command: str) -> None:
    done = cli(command, dsn=f"host={tmp_path}/nowhere dbname=x")
    assert done.code == 3
    assert done.err.startswith("error: connection to server")
    assert "hint: check --dsn" in done.err


def test_a_malformed_dsn_is_a_usage_error(cli: Cli) -> None:
    done = cli("runs", dsn="postgresql://[")
    assert done.code == 2
    assert done.err.startswith("error: the connection string is malformed\nhint: write a URI")


def test_an_unreachable_server_is_json_where_json_is_asked_for(cli: Cli, tmp_path: Path) -> None:
    done = cli("status", "--json", dsn=f"host={tmp_path}/nowhere")
    assert (done.code, done.err) == (3, "")
    assert done.document["error"]["code"] == "database.unreachable"


def test_a_database_without_b2s_says_how_to_install_it(cli: Cli, empty_db: Database) -> None:
    done = cli("status", dsn=empty_db.dsn)
    assert done.code == 3
    assert "b2s migrate" in done.err


def test_a_defect_is_one_line_and_no_traceback(
    cli: Cli, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def explode(*_: object) -> None:
        raise ZeroDivisionError("one by nought")

    monkeypatch.setattr("b2s.migrate.script", explode)
    done = cli("migrate", "--sql")
    assert done.code == 2
    assert done.err.startswith("error: b2s itself failed: ZeroDivisionError: one by nought (test_cli.py:")
    assert "please report it" in done.err
    monkeypatch.setenv("B2S_DEBUG", "1")
    main(["migrate", "--sql"])
    assert "Traceback" in capsys.readouterr().err


def test_a_reader_that_goes_away_is_no_error_message(pipeline: Database) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    process = start(pipeline, "schema", stdout=writing)
    os.close(writing)
    _, err = process.communicate(timeout=SECONDS)
    assert (process.returncode, err) == (141, "")


def test_a_full_disk_is_an_error(pipeline: Database) -> None:
    with Path("/dev/full").open("w") as full:
        process = start(pipeline, "schema", stdout=full)
        _, err = process.communicate(timeout=SECONDS)
    assert process.returncode == 2
    assert err == "error: No space left on device\n"


# -- migrate --


def test_migrate_checks_rehearses_installs_and_is_then_current(cli: Cli, empty_db: Database) -> None:
    checked = cli("migrate", "--check", dsn=empty_db.dsn)
    assert checked.code == 1
    assert "+ migration 0001_catalog" in checked.out
    rehearsed = cli("migrate", "--dry-run", dsn=empty_db.dsn)
    assert rehearsed.code == 0
    assert "rolled back, nothing changed" in rehearsed.out
    assert cli("migrate", "--check", dsn=empty_db.dsn).code == 1
    assert f"b2s {__version__} is installed\n" in cli("migrate", dsn=empty_db.dsn).out
    again = cli("migrate", dsn=empty_db.dsn)
    assert again.out == f"b2s {__version__} is installed; its routines were written anew\n"
    current = cli("migrate", "--check", "--json", dsn=empty_db.dsn)
    assert current.code == 0
    assert current.document == {
        "installed": __version__,
        "release": __version__,
        "pending": [],
        "is_current": True,
    }


def test_migrate_reports_what_it_applied_as_json(cli: Cli, empty_db: Database) -> None:
    document = cli("migrate", "--json", dsn=empty_db.dsn).document
    assert document["before"] is None
    assert document["applied"][0] == "0001_catalog"


def test_migrate_prints_a_script_for_psql_without_a_database(cli: Cli, tmp_path: Path) -> None:
    done = cli("migrate", "--sql", dsn=f"host={tmp_path}/nowhere")
    assert done.code == 0
    assert "\\set ON_ERROR_STOP on" in done.out
    assert done.out.count("create or replace procedure etl.start_run(") == 1


# -- schema and sync-config --


def test_the_schema_is_json_schema(cli: Cli) -> None:
    assert cli("schema").document["properties"].keys() >= {"version", "pipeline", "procedures"}


def test_sync_config_shows_what_it_would_do_and_then_does_it(cli: Cli, db: Database, tmp_path: Path) -> None:
    with db.connect() as conn:
        conn.execute(OBJECTS)
    (tmp_path / "transformations.yaml").write_text(CONFIG)
    assert cli("sync-config", "--check").code == 1
    shown = cli("sync-config", "--dry-run")
    assert shown.code == 0
    assert "+ procedure silver.first\n" in shown.out
    assert shown.out.endswith("not applied\n")
    assert cli("sync-config").out.endswith("applied as version 1\n")
    again = cli("sync-config", "--check")
    assert (again.code, again.out) == (0, "pipeline bronze_to_silver is up to date\n")


def test_sync_config_shows_old_and_new_values_and_removals(
    cli: Cli, pipeline: Database, tmp_path: Path
) -> None:
    changed = CONFIG.replace("maximum: 10", "maximum: 20").partition("  - name: silver.third")[0]
    (tmp_path / "transformations.yaml").write_text(changed)
    shown = cli("sync-config", "--dry-run").out.splitlines()
    assert "- procedure silver.third" in shown
    assert "~ procedure silver.first" in shown
    assert any(line.startswith("    params: ") and " -> " in line for line in shown)
    document = cli("sync-config", "--json").document
    assert document["is_applied"]
    assert {change["action"] for change in document["changes"]} == {"~", "-"}


def test_drift_is_shown_first_and_fails_the_check(cli: Cli, pipeline: Database) -> None:
    with pipeline.connect() as conn:
        conn.execute("update etl.procedures set default_mode = 'full' where name = 'silver.third'")
    done = cli("sync-config", "--check")
    assert done.code == 1
    assert done.out.startswith("! drift: ~ procedure silver.third\n    default_mode: incremental -> full\n")


def test_drift_that_the_file_agrees_with_is_recorded(cli: Cli, pipeline: Database, tmp_path: Path) -> None:
    with pipeline.connect() as conn:
        conn.execute("update etl.procedures set default_mode = 'full' where name = 'silver.third'")
    (tmp_path / "transformations.yaml").write_text(CONFIG + "    default_mode: full\n")
    checked = cli("sync-config", "--check")
    assert checked.code == 1
    assert checked.out.endswith("0 changes to pipeline bronze_to_silver, not applied\n")
    assert cli("sync-config").out.endswith("as it is now is recorded as version 2\n")
    assert cli("sync-config", "--check").code == 0


def test_a_wrong_file_is_reported_with_its_places(cli: Cli, pipeline: Database, tmp_path: Path) -> None:
    (tmp_path / "wrong.yaml").write_text(CONFIG.replace("dimension", "dimensoin", 1))
    done = cli("sync-config", "--config", "wrong.yaml")
    assert done.code == 2
    assert done.err.startswith("wrong.yaml:4:11: error: ")
    document = cli("sync-config", "--config", "wrong.yaml", "--json").document
    assert document["error"]["code"] == "config.invalid"
    assert document["error"]["errors"][0]["line"] == 4


def test_a_missing_routine_is_reported_at_its_place(cli: Cli, pipeline: Database, tmp_path: Path) -> None:
    (tmp_path / "transformations.yaml").write_text(CONFIG + "  - {name: silver.fourth, type: fact}\n")
    done = cli("sync-config")
    assert done.code == 2
    assert "transformations.yaml:20:5: error: " in done.err
    assert "routine silver.fourth does not exist" in done.err


def test_a_missing_file_is_a_usage_error(cli: Cli) -> None:
    done = cli("sync-config", "--config", "nowhere.yaml")
    assert done.code == 2
    assert "nowhere.yaml" in done.err


# -- run --


def test_run_shows_each_step_and_a_table(cli: Cli, pipeline: Database) -> None:
    done = cli("run")
    assert done.code == 0
    assert "[1] silver.first succeeded 1 row in " in done.err
    assert "mart.seen_by_step refresh succeeded in " in done.err
    lines = done.out.splitlines()
    assert lines[0].split() == ["step", "procedure", "mode", "status", "rows", "ins/upd/del", "took"]
    assert lines[3].split()[:6] == ["3", "silver.second", "incremental", "succeeded", "2", "2/0/0"]
    assert lines[-1].endswith(": 4 succeeded")


def test_run_with_json_prints_the_run_and_events_as_json(cli: Cli, pipeline: Database) -> None:
    done = cli("run", "--json")
    assert done.code == 0
    assert done.document["status"] == "succeeded"
    assert done.document["steps"][0]["procedure"] == "silver.first"
    events = [json.loads(line)["event"] for line in done.err.splitlines()]
    assert events[:2] == ["step_started", "step_succeeded"]
    assert events[-1] == "run_succeeded"


@pytest.mark.parametrize("log_format", ["json", "console"])
def test_run_logs_through_structlog(cli: Cli, pipeline: Database, log_format: str) -> None:
    done = cli("run", "silver.first", "--log-format", log_format)
    assert done.code == 0
    if log_format == "json":
        lines = [json.loads(line) for line in done.err.splitlines()]
        ended = next(line for line in lines if line["event"] == "step_succeeded")
        assert ended["level"] == "info"
        assert (ended["run_id"], ended["procedure"], ended["attempt"]) == (1, "silver.first", 1)
        assert (ended["mode"], ended["tx_scope"], ended["rows_affected"]) == (
            "incremental",
            "per_procedure",
            1,
        )
        assert ended["duration_ms"] >= 0
    else:
        assert "step_succeeded" in done.err
        assert "procedure=silver.first" in done.err


def test_the_log_format_comes_from_the_environment(
    cli: Cli, pipeline: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("B2S_LOG_FORMAT", "json")
    assert json.loads(cli("run", "silver.first").err.splitlines()[0])["event"] == "step_started"
    monkeypatch.setenv("B2S_LOG_FORMAT", "xml")
    assert cli("run", "silver.first").code == 2


def test_parameters_are_typed_by_their_declaration(cli: Cli, pipeline: Database) -> None:
    words = ("--param", "silver.first.country=US", "--param", "silver.first.size=7")
    assert cli("run", "silver.first", *words).code == 0
    assert cli("run", "silver.first", "--params", '{"silver.first": {"size": 8}}').code == 0
    with pipeline.connect() as conn:
        rows = conn.execute("select country, size from silver.seen order by size").fetchall()
    assert rows == [("US", 7), ("DE", 8)]


def test_every_wrong_parameter_is_named(cli: Cli, pipeline: Database) -> None:
    words = ("--param", "silver.first.country=FR", "--param", "silver.first.size=many")
    done = cli("run", "silver.first", *words)
    assert done.code == 3
    assert done.err.count("error: ") == 2
    assert 'must be one of ["DE", "US"]' in done.err
    assert 'must be an integer, not "many"' in done.err


@pytest.mark.parametrize(
    ("words", "selected"),
    [
        (["silver.first"], ["silver.first"]),
        (["--procedures", "silver.first,silver.third"], ["silver.first", "silver.third"]),
        (["--procedures", "silver.first", "--procedures", "silver.gate"], ["silver.first", "silver.gate"]),
        (["--tags", "daily"], ["silver.first"]),
        (["silver.gate", "--with-upstream"], ["silver.first", "silver.gate"]),
        (["silver.second", "--with-downstream", "--mv-refresh", "false"], ["silver.second", "silver.third"]),
        (["silver.second", "--mv-refresh", "mart.seen_by_step"], ["silver.second", "mart.seen_by_step"]),
    ],
)
def test_the_selection_is_what_was_asked_for(
    cli: Cli, pipeline: Database, words: list[str], selected: list[str]
) -> None:
    assert [item["name"] for item in cli("plan", "--json", *words).document] == selected


def test_an_unknown_procedure_is_refused_with_every_name(cli: Cli, pipeline: Database) -> None:
    done = cli("run", "silver.nope", "silver.nada", "--json")
    assert done.code == 3
    error = done.document["error"]
    assert error["code"] == "procedure.unknown"
    assert {problem["message"] for problem in error["errors"]} == {
        "there is no procedure silver.nope", "there is no procedure silver.nada",
    }  # fmt: skip


def test_a_failed_run_is_exit_code_1_and_names_cause_remedy_and_consequence(
    cli: Cli, pipeline: Database
) -> None:
    with pipeline.connect() as conn:
        conn.execute(BROKEN_SECOND)
    done = cli("run")
    assert done.code == 1
    assert "failed: [3] silver.second: no \ufffd[31mred\ufffd[0m text" in done.out
    assert "hint: repair the text" in done.out
    assert "skipped because of it: silver.third" in done.out
    assert "because of silver.second" in done.out
    assert "next: b2s resume 1    once the cause is repaired\n" in done.out
    assert "next: b2s run silver.second silver.third    the same, reading up to now\n" in done.out
    assert "\x1b" not in done.out + done.err


def test_a_full_refresh_says_which_options_it_needs(cli: Cli, pipeline: Database) -> None:
    refused = cli("run", "silver.first", "--mode", "full")
    assert refused.code == 3
    assert "hint: add --confirm-full-refresh\n" in refused.err
    assert "hint: add --reason '...'\n" in refused.err
    done = cli("run", "silver.first", "--mode", "full", "--confirm-full-refresh", "--reason", "a test")
    assert done.code == 0
    assert " full " in done.out


def test_a_known_idempotency_key_runs_nothing(cli: Cli, pipeline: Database) -> None:
    assert cli("run", "silver.first", "--idempotency-key", "once").code == 0
    again = cli("run", "silver.first", "--idempotency-key", "once")
    assert again.code == 0
    assert "this idempotency key is known: run 1 was started with it, nothing was run now" in again.err
    with pipeline.connect() as conn:
        assert conn.execute("select count(*) from silver.seen").fetchone() == (1,)


def test_messages_of_a_routine_are_passed_on(cli: Cli, pipeline: Database) -> None:
    with pipeline.connect() as conn:
        conn.execute(
            "create or replace function silver.third() returns bigint language plpgsql as "
            "$$ begin raise warning 'three is odd' using hint = 'add one'; return 0; end $$"
        )
    assert "warning: three is odd\nhint: add one\n" in cli("run", "silver.third").err


def test_a_rehearsal_reports_true_counts_and_leaves_nothing(cli: Cli, pipeline: Database) -> None:
    for command in ("run", "plan"):
        done = cli(command, "--execute")
        assert done.code == 0
        words = done.out.splitlines()[3].split()
        assert words[1:6] == ["silver.second", "incremental", "succeeded", "2", "2/0/0"]
        assert "everything was rolled back" in done.out
    with pipeline.connect() as conn:
        assert conn.execute("select count(*) from silver.seen").fetchone() == (0,)
        assert conn.execute("select count(*) from etl.runs").fetchone() == (0,)


def test_a_failed_rehearsal_is_exit_code_1(cli: Cli, pipeline: Database) -> None:
    with pipeline.connect() as conn:
        conn.execute(BROKEN_SECOND)
    done = cli("plan", "--execute", "--json")
    assert done.code == 1
    assert done.document["is_rolled_back"]
    assert done.document["steps"][2]["status"] == "failed"


def test_an_active_run_refuses_a_second_one(cli: Cli, pipeline: Database, gate: Connection) -> None:
    process = start(pipeline, "run")
    waits_at_the_gate(gate)
    refused = cli("run")
    assert refused.code == 3
    assert "error: run 1 of this pipeline is active" in refused.err
    status = cli("status").out
    assert "pipeline bronze_to_silver: run 1 running for " in status
    assert "at [2] silver.gate for " in status
    open_gate(gate)
    assert process.wait(SECONDS) == 0
    process.communicate()


# -- stopping --


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_finishes_the_step_in_flight(
    pipeline: Database, gate: Connection, number: signal.Signals
) -> None:
    process = start(pipeline, "run")
    waits_at_the_gate(gate)
    process.send_signal(number)
    is_asked_to_stop(gate)
    open_gate(gate)
    out, err = process.communicate(timeout=SECONDS)
    assert process.returncode == 1
    assert "cancelling run 1: the step in flight is finished" in err
    assert "run 1 cancelled in " in out
    assert statuses(gate) == {
        "silver.first": "succeeded", "silver.gate": "succeeded",
        "silver.second": "skipped", "silver.third": "skipped",
    }  # fmt: skip


def test_the_second_signal_cancels_the_statement_in_flight(pipeline: Database, gate: Connection) -> None:
    process = start(pipeline, "run")
    waits_at_the_gate(gate)
    process.send_signal(signal.SIGINT)
    is_asked_to_stop(gate)
    process.send_signal(signal.SIGINT)
    out, _ = process.communicate(timeout=SECONDS)
    assert process.returncode == 1
    assert statuses(gate)["silver.gate"] == "cancelled"
    assert "cancelled: [2] silver.gate: canceling statement due to user request" in out
    assert gate.execute("select step from silver.seen").fetchall() == [("first",)]


def test_the_third_signal_leaves(pipeline: Database, gate: Connection) -> None:
    gate.execute(
        "create or replace function silver.gate() returns bigint language plpgsql as $$ "
        "begin "
        f"  begin perform pg_advisory_xact_lock({GATE}); "
        f"  exception when query_canceled then perform pg_advisory_xact_lock({GATE}); end; "
        "  return 1; end $$"
    )
    process = start(pipeline, "run")
    waits_at_the_gate(gate)
    process.send_signal(signal.SIGINT)
    is_asked_to_stop(gate)
    assert process.stderr is not None
    process.send_signal(signal.SIGINT)
    for line in process.stderr:
        if "the statement in flight was cancelled" in line:
            break
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=SECONDS)
    assert process.returncode == 130
    assert "left; run 1 was asked to stop, see: b2s show 1" in err
    assert err.endswith("interrupted\n")
    open_gate(gate)


def test_a_signal_before_there_is_a_run_leaves_nothing(pipeline: Database) -> None:
    with pipeline.connect(autocommit=False) as holder, pipeline.connect() as watcher:
        holder.execute("lock table etl.runs in share mode")
        process = start(pipeline, "run")
        blocked = f"select exists (select from pg_locks where not granted and {HERE})"
        wait_until(watcher, blocked, timeout=SECONDS)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=SECONDS)
    assert (process.returncode, err) == (130, "interrupted\n")
    with pipeline.connect() as conn:
        assert conn.execute("select count(*) from etl.runs").fetchone() == (0,)


# -- status, runs, show, logs, cancel --


def test_status_of_an_empty_database_says_what_to_do(cli: Cli) -> None:
    done = cli("status")
    assert (done.code, done.out) == (0, "no pipeline is configured: b2s sync-config\n")


def test_status_shows_runs_health_and_freeze(cli: Cli, pipeline: Database) -> None:
    assert "nothing has run yet: b2s run" in cli("status").out
    cli("run")
    with pipeline.connect() as conn:
        conn.execute("select etl.freeze_full_refresh(true, reason => 'closing of the year')")
    done = cli("status")
    assert done.code == 0
    assert "pipeline bronze_to_silver: run 1 succeeded" in done.out
    assert "full refreshes are frozen by " in done.out
    assert "silver.second" in done.out
    document = cli("status", "--json").document
    assert document["full_refresh_freeze"]["is_frozen"]
    assert len(document["procedures"]) == 4


def test_runs_are_listed_newest_first_and_filtered(cli: Cli, pipeline: Database) -> None:
    assert cli("runs").out == "no runs\n"
    cli("run", "silver.first")
    with pipeline.connect() as conn:
        conn.execute(BROKEN_SECOND)
    cli("run", "silver.second")
    assert [run["run_id"] for run in cli("runs", "--json").document] == [2, 1]
    assert [run["run_id"] for run in cli("runs", "--json", "--limit", "1").document] == [2]
    assert [run["run_id"] for run in cli("runs", "--json", "--status", "succeeded").document] == [1]
    assert len(cli("runs", "--json", "--since", "1 hour").document) == 2
    assert cli("runs", "--json", "--since", "2999-01-01").document == []
    assert "silver.second: no " in cli("runs").out


def test_a_wrong_time_is_a_usage_error(cli: Cli, pipeline: Database) -> None:
    done = cli("runs", "--since", "yesterdaze")
    assert done.code == 2
    assert "hint: write a time as" in done.err


def test_show_explains_a_failure_in_full(cli: Cli, pipeline: Database) -> None:
    with pipeline.connect() as conn:
        conn.execute(BROKEN_SECOND)
    cli("run", "--reason", "because")
    done = cli("show", "latest")
    assert done.code == 0
    for text in (
        "run 1 of pipeline bronze_to_silver: failed", "request: reason: because",
        "code: P0001 (code, SQLSTATE P0001)",
        "detail: the whole story", "context: PL/pgSQL function silver.second() line 3 at RAISE",
        "statement: select silver.second() as rows", "hint: repair the text",
        "skipped because of it: silver.third",
        "silver.second() line 3, as it is now", "    > 3 |   raise exception 'no ",
        "rolled back: this step alone", "stays committed:\n  [1] silver.first\n  [2] silver.gate\n",
        "b2s resume 1    once the cause is repaired", "b2s run silver.second silver.third",
    ):  # fmt: skip
        assert text in done.out
    assert cli("show", "1", "--json").document["steps"][2]["error_hint"] == "repair the text"


@pytest.mark.parametrize("command", ["show", "logs", "cancel"])
def test_a_run_that_is_not_there_is_refused(cli: Cli, pipeline: Database, command: str) -> None:
    unknown = cli(command, "99")
    assert unknown.code == 3
    assert unknown.err == "error: there is no run 99\nhint: b2s runs lists the runs there are\n"
    none_yet = cli(command, "latest")
    assert none_yet.code == 2
    assert none_yet.err == "error: there is no run yet\nhint: b2s run\n"
    assert cli(command, "first").code == 2
    assert cli(command, str(2**63)).code == 2


def test_logs_are_json_lines_in_order_of_time(cli: Cli, pipeline: Database) -> None:
    cli("run", "silver.first", "silver.gate")
    events = [json.loads(line) for line in cli("logs", "1").out.splitlines()]
    assert [event["event"] for event in events] == [
        "run_started", "step_started", "step_succeeded", "step_started", "step_succeeded", "run_succeeded",
    ]  # fmt: skip
    assert [event["timestamp"] for event in events] == sorted(event["timestamp"] for event in events)
    assert events[2]["rows_affected"] == 1


def test_cancel_stops_a_run_of_another_process(cli: Cli, pipeline: Database, gate: Connection) -> None:
    process = start(pipeline, "run")
    waits_at_the_gate(gate)
    done = cli("cancel", "latest", "--reason", "enough", "--force")
    assert (done.code, done.out[:7]) == (0, "run 1: ")
    process.communicate(timeout=SECONDS)
    assert process.returncode == 1
    run = cli("show", "1").out
    assert "cancelled by " in run
    assert "enough" in run
    ended = cli("cancel", "1", "--json")
    assert ended.code == 3
    assert ended.document["error"]["code"] == "run.ended"


# -- privileges --


@pytest.fixture
def login(db: Database) -> Iterator[Callable[..., str]]:
    """Makes login roles with the given memberships; returns the dsn of each."""
    made: list[str] = []

    def make(*roles: str) -> str:
        name = f"b2s_{uuid.uuid4().hex[:12]}"
        with db.connect() as conn:
            conn.execute(sql.SQL("create role {} login password 'secret'").format(sql.Identifier(name)))
            for role in roles:
                conn.execute(sql.SQL("grant {} to {}").format(sql.Identifier(role), sql.Identifier(name)))
        made.append(name)
        return conninfo.make_conninfo(db.dsn, user=name, password="secret")

    yield make
    with db.connect() as conn:
        for name in made:
            conn.execute(sql.SQL("drop role {}").format(sql.Identifier(name)))


@pytest.mark.parametrize(
    "words", [["status"], ["run"], ["plan"], ["runs"], ["show", "1"], ["sync-config"]], ids=" ".join
)
def test_a_role_without_grants_is_told_what_to_ask_for(
    cli: Cli, pipeline: Database, login: Callable[..., str], words: list[str]
) -> None:
    done = cli(*words, dsn=login())
    assert done.code == 3
    assert done.err.startswith("error: permission denied for schema etl\n")
    assert "grant your role etl_reader, etl_operator or etl_admin" in done.err


def test_an_operator_runs_and_looks_but_does_not_refresh_fully(
    cli: Cli, pipeline: Database, login: Callable[..., str]
) -> None:
    operator = login("etl_operator")
    assert cli("run", dsn=operator).code == 0
    assert cli("show", "latest", dsn=operator).code == 0
    assert cli("doctor", dsn=operator).code == 0
    refused = cli(
        "run", "silver.first", "--mode", "full", "--confirm-full-refresh", "--reason", "x", "--json",
        dsn=operator,
    )  # fmt: skip
    assert refused.code == 3
    assert refused.document["error"]["code"] == "full_refresh.not_admin"


# -- doctor --


def findings(cli: Cli, dsn: str) -> dict[str, list[dict[str, Any]]]:
    """The findings of the doctor, by the name of the check."""
    found: dict[str, list[dict[str, Any]]] = {}
    for finding in cli("doctor", "--json", dsn=dsn).document:
        found.setdefault(finding["check_name"], []).append(finding)
    return found


def test_the_doctor_finds_nothing_in_a_sound_installation(cli: Cli, pipeline: Database) -> None:
    done = cli("doctor")
    assert done.code == 0
    assert [line for line in done.out.splitlines() if not line.startswith("ok")] == [
        "hint  lineage: silver.seen is written by silver.first, silver.gate, silver.second, silver.third",
        "      remedy: one procedure per table",
    ]
    assert "configuration file: transformations.yaml is what the database has" in done.out


def test_the_doctor_names_what_is_wrong_and_its_remedy(cli: Cli, pipeline: Database, tmp_path: Path) -> None:
    with pipeline.connect() as conn:
        conn.execute("drop function silver.third()")
        conn.execute("drop function silver.first(text, int)")
        conn.execute(
            "create function silver.first(country text) returns bigint language sql as 'select 1::bigint'"
        )
        conn.execute("drop index mart.seen_by_step_step_idx")
        conn.execute("alter materialized view mart.seen_by_step owner to current_user")
        conn.execute("update etl.procedures set default_mode = 'full' where name = 'silver.gate'")
        conn.execute("select etl.freeze_full_refresh(true, reason => 'closing of the year')")
    (tmp_path / "transformations.yaml").write_text("version: 2\n")
    dsn = conninfo.make_conninfo(pipeline.dsn, options="-c statement_timeout=30s -c track_counts=off")
    assert cli("doctor", dsn=dsn).code == 1
    found = findings(cli, dsn)
    assert "routine silver.third does not exist" in found["routine"][-1]["detail"]
    assert any("silver.first" in finding["detail"] for finding in found["routine"])
    assert [finding["status"] for finding in found["materialized view"]] == ["fail", "warn"]
    assert "owner to etl_owner" in found["materialized view"][0]["remedy"]
    assert found["pipeline"][0]["status"] == "warn"
    assert "closing of the year" in found["full refresh"][0]["detail"]
    assert found["statement_timeout"][0]["status"] == "warn"
    assert found["track_counts"][0]["status"] == "fail"
    assert found["configuration file"][0]["status"] == "fail"
    assert all(one["remedy"] for several in found.values() for one in several if one["status"] != "ok")


def test_the_doctor_names_a_dead_run_and_a_source_that_cannot_be_read(
    cli: Cli, pipeline: Database, gate: Connection, tmp_path: Path
) -> None:
    gate.execute("create table bronze.rows (ingested_at timestamptz)")
    gate.execute("grant select on bronze.rows to etl_owner")
    gate.execute("drop function silver.third()")
    gate.execute(
        "create function silver.third(p_since timestamptz, p_until timestamptz) returns bigint "
        "language sql as 'select count(*) from bronze.rows where ingested_at between p_since and p_until'"
    )
    watched = CONFIG + "    watermark: {strategy: timestamp, source: bronze.rows.ingested_at}\n"
    (tmp_path / "transformations.yaml").write_text(watched)
    assert cli("sync-config").code == 0
    gate.execute("revoke select on bronze.rows from etl_owner")
    process = start(pipeline, "run")
    waits_at_the_gate(gate)
    process.kill()
    process.communicate(timeout=SECONDS)
    gate.execute("select pg_terminate_backend(worker_pid) from etl.runs")
    wait_until(gate, "select is_dead from etl.run_history")
    found = findings(cli, pipeline.dsn)
    assert "run 1 of bronze_to_silver is dead" in found["run"][0]["detail"]
    assert found["source"][0]["detail"] == "silver.third: role etl_owner may not read bronze.rows.ingested_at"
    assert "its session is gone" in cli("status").out
    assert "its session is gone" in cli("runs").out
    assert "records it as abandoned" in cli("show", "1").out


def test_the_doctor_says_when_it_cannot_look(
    cli: Cli, empty_db: Database, login: Callable[..., str], tmp_path: Path
) -> None:
    not_installed = cli("doctor", dsn=empty_db.dsn)
    assert not_installed.code == 1
    assert "remedy: b2s migrate" in not_installed.out
    unreachable = cli("doctor", dsn=f"host={tmp_path}/nowhere")
    assert unreachable.code == 1
    assert unreachable.out.startswith("fail  connection: connection to server")
    forbidden = cli("doctor", dsn=login())
    assert forbidden.code == 1
    assert "may not use schema etl" in forbidden.out


def test_the_doctor_finds_a_run_lock_that_nobody_uses(cli: Cli, pipeline: Database) -> None:
    holder = pipeline.connect()
    holder.execute("select pg_advisory_lock(6435443, pipeline_id) from etl.pipelines")
    found = findings(cli, pipeline.dsn)["run lock"][0]
    assert found["status"] == "fail"
    assert f"pg_terminate_backend({holder.info.backend_pid})" in found["remedy"]


# -- demo --


def test_the_demo_tours_an_empty_database(cli: Cli, empty_db: Database) -> None:
    done = cli("demo", dsn=empty_db.dsn)
    assert done.code == 0
    for text in (
        "$ b2s migrate", "$ b2s sync-config", "$ b2s run\n", "$ b2s show latest", "8. What is in Silver now",
        "an_order_has_one_customer",
    ):  # fmt: skip
        assert text in done.out
    with empty_db.connect() as conn:
        runs = conn.execute("select status from etl.runs order by run_id").fetchall()
    assert runs == [("succeeded",), ("succeeded",), ("succeeded",), ("failed",), ("succeeded",)]
    again = cli("demo", dsn=empty_db.dsn)
    assert again.code == 2
    assert "has schema bronze, mart, silver" in again.err


@pytest.mark.skipif(wheel(None) is None, reason="the embedded server is not installed")
def test_the_demo_brings_its_own_server_and_leaves_it_only_when_asked_to() -> None:
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("PG", "B2S_"))}
    done = subprocess.run(
        [*B2S, "demo", "--keep", "--json"],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["silver.fact_orders"] > 0
    assert "the server goes on:" in done.stderr
    dsn = done.stderr.partition("export B2S_DSN='")[2].partition("'")[0]
    with psycopg.connect(dsn) as conn:
        assert conn.execute("select count(*) from etl.runs").fetchone() == (5,)
    directory = done.stderr.rpartition("--data-dir ")[2].strip()
    stopped = subprocess.run([*B2S, "demo", "--stop", "--data-dir", directory], env=environment, check=False)
    assert stopped.returncode == 0
    with pytest.raises(psycopg.OperationalError):
        psycopg.connect(dsn)
    shutil.rmtree(directory)


# -- terminals --


def on_a_terminal(database: Database, *words: str, **env: str) -> str:
    """What a command prints when all its streams are a terminal of 80 columns."""
    leader, follower = pty.openpty()
    environment = {"TERM": "xterm", "COLUMNS": "80", "LINES": "24", **env}
    process = start(database, *words, stdin=follower, stdout=follower, stderr=follower, env=environment)
    os.close(follower)
    printed = b""
    while True:
        try:
            piece = os.read(leader, 65536)
        except OSError:
            break
        if not piece:
            break
        printed += piece
    os.close(leader)
    assert process.wait(SECONDS) == 0
    return printed.decode()


def test_a_terminal_gets_colours_and_a_live_line(pipeline: Database) -> None:
    printed = on_a_terminal(pipeline, "run")
    assert "\x1b[32msucceeded\x1b[0m" in printed
    assert "\r\x1b[2K" in printed
    assert "silver.gate succeeded" not in printed


def test_no_color_turns_colours_off(pipeline: Database) -> None:
    printed = on_a_terminal(pipeline, "run", NO_COLOR="1")
    assert "succeeded" in printed
    assert "\x1b[3" not in printed


def test_a_dumb_terminal_gets_plain_lines(pipeline: Database) -> None:
    printed = on_a_terminal(pipeline, "run", TERM="dumb")
    assert "\x1b" not in printed
    assert "[2] silver.gate succeeded 1 row" in printed


def test_logs_on_a_terminal_are_for_people(cli: Cli, pipeline: Database) -> None:
    cli("run", "silver.first")
    printed = on_a_terminal(pipeline, "logs", "1", NO_COLOR="1")
    assert "step_succeeded" in printed
    assert "{" not in printed


# -- parts --


@pytest.mark.parametrize(
    ("milliseconds", "text"),
    [(None, ""), (0, "0 ms"), (999.4, "999 ms"), (999.6, "1.0 s"), (59_940, "59.9 s"), (59_960, "1 min 00 s"),
     (192_000, "3 min 12 s"), (3_599_600, "1 h 00 min"), (7_500_000, "2 h 05 min")],
)  # fmt: skip
def test_durations_read_well_at_every_size(milliseconds: float | None, text: str) -> None:
    assert duration(milliseconds) == text


def test_a_table_gives_way_in_columns_that_may_wrap_and_leaves_out_empty_ones() -> None:
    columns = (Column("name"), Column("empty"), Column("note", may_wrap=True))
    rows = [("silver.first", None, "one two three four five six"), ("x", "", "short")]
    assert table(columns, rows, Style(width=30)) == [
        "name          note",
        "silver.first  one two three",
        "              four five six",
        "x             short",
    ]
    assert len(table(columns, rows, Style())) == 3


def test_the_selection_of_run_and_plan_has_every_argument_of_start_run(cli: Cli, db: Database) -> None:
    """A new argument of etl.start_run must not be forgotten here."""
    from argparse import ArgumentParser

    from b2s import selection

    parser = ArgumentParser()
    selection.configure(parser)
    words = [
        "p",
        "--groups",
        "g",
        "--tags",
        "t",
        "--with-upstream",
        "--with-downstream",
        "--pipeline",
        "l",
        "--mode",
        "full",
        "--as-of",
        "2026-01-01",
        "--param",
        "p.a=1",
        "--transaction-scope",
        "per_group",
        "--mv-refresh",
        "false",
        "--max-concurrency",
        "3",
        "--confirm-full-refresh",
        "--reason",
        "r",
        "--approved-by",
        "b",
    ]
    arguments = parser.parse_args(words)
    arguments.idempotency_key = "k"
    with db.connect() as conn:
        query = "select proargnames from pg_proc where oid::regproc::text = 'etl.start_run'"
        (names,) = conn.execute(query).fetchall()[0]
    assert set(request_of(arguments, {})) == set(names) - {"dry_run", "run_id", "status"}


def test_the_next_command_names_a_pipeline_that_is_not_the_default_one() -> None:
    step = {
        "order_index": 1, "attempt": 1, "procedure": "silver.a", "status": "failed", "skip_reason": None,
        "error_class": "code",
    }  # fmt: skip
    run = {"run_id": 1, "pipeline": "sales", "status": "failed", "is_dead": False, "steps": [step]}
    resume, expected = "b2s resume 1    once the cause is repaired", "silver.a    the same, reading up to now"
    assert next_steps(run) == [resume, f"b2s run --pipeline sales {expected}"]
    assert next_steps({**run, "pipeline": "bronze_to_silver"}) == [resume, f"b2s run {expected}"]


@pytest.mark.parametrize(
    ("step", "when"),
    [({"error_class": "transient"}, "tries again; nothing is wrong with the data"),
     ({"error_class": "transient", "blocked_by": [{"pid": 7, "user": "ann"}]},
      "once backend 7 (ann) has ended"),
     ({"error_class": "timeout"},
      "once it is known what it waited for, or timeout is raised (b2s sync-config)"),
     ({"status": "cancelled"}, "does what is left")],
)  # fmt: skip
def test_the_next_command_says_what_has_to_happen_first(step: dict[str, Any], when: str) -> None:
    failed = {
        "order_index": 1, "attempt": 1, "procedure": "a", "status": "failed", "skip_reason": None, **step,
    }  # fmt: skip
    run = {"run_id": 3, "pipeline": "x", "status": failed["status"], "is_dead": False, "steps": [failed]}
    assert next_steps(run)[0] == f"b2s resume 3    {when}"


def test_a_window_that_was_held_back_is_worth_another_run() -> None:
    step = {
        "order_index": 1, "attempt": 1, "procedure": "a", "status": "succeeded", "skip_reason": None,
        "held_back_by": "backend 7 (ann)",
    }  # fmt: skip
    run = {"run_id": 3, "pipeline": "x", "status": "succeeded", "is_dead": False, "steps": [step]}
    assert next_steps(run) == ["b2s run --pipeline x a    reads the rest, once this is over: backend 7 (ann)"]
