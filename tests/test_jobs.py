"""The jobs of pg_cron: planned, made, corrected and shown, in whichever database it lives."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import pytest
from psycopg.conninfo import make_conninfo

from b2s.cli import main
from b2s.migrate import migrate
from tests.pipelines import Pipeline, Row
from tests.servers import CRON_DATABASE, Connection, Database, Server

DEPLOYER: Final = "b2s_deployer"
FILE: Final = """\
version: 1
procedures:
  - {name: silver.orders, routine: silver.orders, type: fact}
schedules:
  - {name: nightly, cron: "0 2 * * *"}
clock: {role: b2s_clock}
"""
JOBS: Final = ["clock", "purge", "reaper", "worker bronze_to_silver 1"]
HERE: Final = ["clock", "details", *JOBS[1:]]
"""Where pg_cron lives itself, what it notes is kept short as well."""


@dataclass(slots=True)
class Shell:
    """The command line, as the deployer, in a directory with a configuration."""

    database: Database
    config: Path
    capsys: pytest.CaptureFixture[str]
    user: str = DEPLOYER

    def __call__(self, *words: str) -> tuple[int, str, str]:
        dsn = make_conninfo(self.database.dsn, user=self.user)
        code = main([*words, "--dsn", dsn, "--config", str(self.config)])
        said = self.capsys.readouterr()
        return code, said.out, said.err

    def write(self, text: str) -> None:
        self.config.write_text(text, encoding="utf-8")


ShellIn = Callable[[Database], Shell]


@pytest.fixture
def shell_in(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> ShellIn:
    def shell(database: Database) -> Shell:
        with Pipeline(database) as pipeline:
            pipeline.routine("orders", "perform 1")
        made = Shell(database, tmp_path / "transformations.yaml", capsys)
        made.write(FILE)
        return made

    return shell


@pytest.fixture
def shell(cron_db: Database, shell_in: ShellIn) -> Shell:
    return shell_in(cron_db)


@pytest.fixture
def cron(cron_db: Database) -> Connection:
    """The superuser, in the database that pg_cron lives in."""
    return cron_db.connect()


@pytest.fixture
def other_db(cron_server: Server, cron_db: Database) -> Iterator[Database]:
    """A database of the same server that b2s is installed in and pg_cron is not."""
    database = cron_server.create_database()
    with database.connect() as conn:
        conn.execute(f"grant create on database {database.name} to b2s_deployer")
    migrate(make_conninfo(database.dsn, user=DEPLOYER))
    yield database
    database.drop()


def jobs(cron: Connection, database: str = CRON_DATABASE) -> list[Row]:
    rows = cron.execute(
        "select jobname::text, schedule, command, username, database, active, jobid from cron.job"
        " where database = %s order by jobname",
        [database],
    ).fetchall()
    names = ("name", "schedule", "command", "owner", "database", "active", "id")
    return [dict(zip(names, row, strict=True)) for row in rows]


def names(cron: Connection, database: str = CRON_DATABASE) -> list[str]:
    return [job["name"].removeprefix(f"b2s {database} ") for job in jobs(cron, database)]


# -- making them --


def test_sync_config_shows_and_makes_the_jobs(shell: Shell, cron: Connection) -> None:
    code, out, _ = shell("sync-config", "--dry-run")
    assert code == 0
    assert "+ job b2s cron clock\n" in out
    assert "5 jobs of pg_cron to be changed\n" in out
    assert names(cron) == []
    _, out, err = shell("sync-config")
    assert "5 jobs of pg_cron changed\n" in out
    assert err == ""
    assert names(cron) == HERE
    assert {job["owner"] for job in jobs(cron)} == {"b2s_clock"}
    assert [job["command"] for job in jobs(cron)] == [
        "select * from etl.fire_schedules()",
        "delete from cron.job_run_details where end_time < now() - interval '14 days'",
        "call etl.purge()",
        "select etl.reap()",
        "call etl.run_due(pipeline => 'bronze_to_silver')",
    ]
    assert shell("sync-config")[1] == "pipeline bronze_to_silver is up to date\n"
    assert shell("sync-config", "--check")[0] == 0


def test_there_are_the_jobs_that_a_configuration_needs(shell: Shell, cron: Connection) -> None:
    shell.write(FILE.replace("fact}", "fact, timeout: 5min}").replace("b2s_clock}", "b2s_clock, workers: 2}"))
    shell("sync-config")
    assert names(cron) == [
        *HERE[:4],
        "watchdog",
        *(f"worker bronze_to_silver {n}" for n in (1, 2)),
    ]
    shell.write(FILE.replace('schedules:\n  - {name: nightly, cron: "0 2 * * *"}\n', ""))
    code, out, _ = shell("sync-config", "--check")
    assert code == 1
    assert "- job b2s cron clock\n" in out
    shell("sync-config")
    assert names(cron) == HERE[1:]
    shell.write(FILE.replace("role: b2s_clock", "role: b2s_clock, executor: worker"))
    shell("sync-config")
    assert names(cron) == []


def test_whoever_owns_the_jobs_may_do_what_they_do(shell: Shell, cron: Connection) -> None:
    shell.write(FILE.replace("fact}", "fact, timeout: 5min}"))
    shell("sync-config")
    owner = shell.database.connect(user="b2s_clock")
    for job in jobs(cron):
        owner.execute(job["command"].encode())
    assert len(jobs(cron)) == 6


def test_a_job_that_was_changed_by_hand_is_drift_and_put_right(shell: Shell, cron: Connection) -> None:
    shell("sync-config")
    before = {job["name"]: job["id"] for job in jobs(cron)}
    cron.execute("update cron.job set schedule = '*/5 * * * *' where jobname = 'b2s cron clock'")
    cron.execute("update cron.job set active = false where jobname = 'b2s cron reaper'")
    code, out, _ = shell("sync-config", "--check")
    assert code == 1
    assert "! drift: ~ job b2s cron clock\n    schedule: */5 * * * * -> * * * * *\n" in out
    assert "~ job b2s cron reaper\n    active: false -> true\n" in out
    shell("sync-config")
    assert [(job["schedule"], job["active"]) for job in jobs(cron)][:1] == [("* * * * *", True)]
    assert all(job["active"] for job in jobs(cron))
    after = {job["name"]: job["id"] for job in jobs(cron)}
    assert after["b2s cron clock"] == before["b2s cron clock"]


def test_a_job_that_is_missing_is_made_again(shell: Shell, cron: Connection) -> None:
    shell("sync-config")
    cron.execute("delete from cron.job where jobname = 'b2s cron clock'")
    assert shell("sync-config", "--check")[0] == 1
    shell("sync-config")
    assert names(cron) == HERE


def test_jobs_of_others_are_left_alone(shell: Shell, cron: Connection) -> None:
    cron.execute("select cron.schedule('b2s mine', '* * * * *', 'select 1')")
    cron.execute("select cron.schedule('vacuum', '0 3 * * *', 'vacuum')")
    shell.user = "postgres"
    shell.write(FILE.replace("clock: {role: b2s_clock}", "clock: {executor: worker}"))
    shell("sync-config")
    assert [job["name"] for job in jobs(cron)] == ["b2s mine", "vacuum"]


def test_who_sees_the_jobs_of_another_owner_moves_them(shell: Shell, cron: Connection) -> None:
    shell("sync-config")
    shell.user = "postgres"
    shell.write(FILE.replace("clock: {role: b2s_clock}", ""))
    _, out, _ = shell("sync-config")
    assert (
        "- job b2s cron clock\n+ job b2s cron clock\n" in out
        or "+ job b2s cron clock\n- job b2s cron clock\n" in out
    )
    assert {job["owner"] for job in jobs(cron)} == {"postgres"}
    assert names(cron) == HERE


def test_the_plan_is_there_for_programs(shell: Shell) -> None:
    _, out, _ = shell("sync-config", "--dry-run", "--json")
    found = json.loads(out)["jobs"]
    assert found["is_available"]
    assert found["changes"][0] == {"action": "+", "name": "b2s cron clock", "fields": {}}


# -- in another database --


def test_jobs_for_another_database_are_made_where_pg_cron_lives(
    other_db: Database, shell_in: ShellIn, cron: Connection
) -> None:
    cron.execute("revoke execute on function cron.schedule_in_database from b2s_clock")
    shell = shell_in(other_db)
    code, _, err = shell("sync-config")
    assert code == 3
    assert "b2s_clock may not make jobs for another database than cron, where pg_cron lives" in err
    assert "hint: in cron: grant execute on function cron.schedule_in_database to b2s_clock" in err
    cron.execute("grant execute on function cron.schedule_in_database to b2s_clock")
    assert shell("sync-config")[0] == 0
    assert names(cron, other_db.name) == JOBS
    assert names(cron) == []
    assert shell("sync-config", "--check")[0] == 0


def test_the_way_to_pg_cron_can_be_given(other_db: Database, shell_in: ShellIn, cron_db: Database) -> None:
    shell = shell_in(other_db)
    way = make_conninfo(cron_db.dsn, user=DEPLOYER)
    assert "+ job" in shell("sync-config", "--dry-run", "--cron-dsn", way)[1]
    code, _, err = shell("sync-config", "--dry-run", "--cron-dsn", make_conninfo(way, dbname="postgres"))
    assert code == 0
    assert "no jobs: the extension pg_cron is missing in database postgres" in err
    code, _, err = shell("sync-config", "--dry-run", "--cron-dsn", make_conninfo(way, dbname="nowhere"))
    assert "no jobs: cannot reach the database of pg_cron: " in err


# -- where there is none, or none to be used --


def test_without_pg_cron_it_is_said_what_else_fires_schedules(db: Database, shell_in: ShellIn) -> None:
    shell = shell_in(db)
    shell.user = "postgres"
    shell.write(FILE.replace("clock: {role: b2s_clock}\n", ""))
    code, _, err = shell("sync-config")
    assert code == 0
    assert "no jobs: pg_cron does not run on this server, so nothing fires schedules" in err
    assert "hint: b2s worker --schedule does both" in err
    shell.write(FILE.replace("clock: {role: b2s_clock}", "clock: {executor: worker}"))
    assert shell("sync-config")[2] == ""
    shell.write(FILE.replace("clock: {role: b2s_clock}", "clock: {executor: pg_cron}"))
    code, out, err = shell("sync-config")
    assert (code, out) == (2, "")
    assert "error: pg_cron does not run on this server" in err


def test_without_schedules_nobody_is_bothered_with_pg_cron(db: Database, shell_in: ShellIn) -> None:
    shell = shell_in(db)
    shell.user = "postgres"
    shell.write(FILE.partition("schedules:")[0])
    assert shell("sync-config")[2] == ""


@pytest.mark.parametrize(
    ("prepare", "message", "hint"),
    [
        (
            "revoke usage on schema cron from b2s_clock",
            "b2s_clock may not use pg_cron",
            "grant usage on schema cron",
        ),
        ("revoke b2s_clock from b2s_deployer", "b2s_deployer may not become b2s_clock", "grant b2s_clock to"),
        (
            "revoke etl_operator from b2s_clock",
            "who may not run procedures",
            "grant etl_operator to b2s_clock",
        ),
        ("alter role b2s_clock nologin", "who cannot log in", "alter role b2s_clock login"),
    ],
)
def test_a_missing_right_is_named_with_its_grant(
    shell: Shell, cron: Connection, prepare: str, message: str, hint: str
) -> None:
    undo = {
        "revoke usage": "grant usage on schema cron to b2s_clock",
        "revoke b2s_clock": "grant b2s_clock to b2s_deployer",
        "revoke etl": "grant etl_operator to b2s_clock",
        "alter role": "alter role b2s_clock login",
    }
    cron.execute(prepare.encode())
    try:
        _, _, err = shell("sync-config", "--dry-run")
    finally:
        cron.execute(next(sql for start, sql in undo.items() if prepare.startswith(start)).encode())
    assert message in err
    assert hint in err


def test_a_role_that_does_not_exist_is_named(shell: Shell) -> None:
    shell.write(FILE.replace("b2s_clock", "nobody_here"))
    assert "clock.role: there is no role nobody_here" in shell("sync-config", "--dry-run")[2]


# -- without Python --


def test_the_jobs_can_be_scheduled_by_hand(shell: Shell, cron: Connection) -> None:
    """The statement of docs/clock.md."""
    shell.write(FILE.replace("role: b2s_clock", "executor: worker"))
    shell("sync-config")
    cron.execute("""update etl.pipelines set clock = '{"executor": "pg_cron"}'""")
    cron.execute("set role b2s_clock")
    cron.execute("select cron.schedule(jobname, schedule, command) from etl.list_jobs()")
    assert names(cron) == HERE


def test_a_long_name_is_cut_so_that_it_stays_one_of_its_own(db: Database) -> None:
    with Pipeline(db, "p" * 63) as pipeline:
        pipeline.add("orders")
        pipeline.apply(clock={"workers": 2})
        found = pipeline.column(
            "select jobname from etl.list_jobs() where jobname ~ '^b2s worker ppp [0-9a-f]{8}$'"
        )
        assert len(set(found)) == 2


def test_ticks_are_noted_where_watermarks_are_ids_and_workers_may_be_none(db: Database) -> None:
    with Pipeline(db) as pipeline:
        pipeline.sql("create table bronze.rows (id bigint primary key)")
        watermark = {"strategy": "id", "source": ["bronze.rows.id"], "state_key": "rows", "delay_ms": 0}
        pipeline.add("rows", arguments="p_since bigint, p_until bigint", watermark=watermark)
        pipeline.apply(clock={"workers": 0})
        found = pipeline.column("select split_part(jobname, ' ', 3) from etl.list_jobs() order by 1")
        assert found == ["purge", "reaper", "ticks"]


def test_every_few_seconds_where_pg_cron_can(db: Database) -> None:
    with Pipeline(db) as pipeline:
        pipeline.add("orders", timeout_ms=1000)
        pipeline.apply(schedules=[{"name": "often", "cron": "20 seconds", "timezone": "UTC"}])
        every = (
            "select split_part(jobname, ' ', 3), schedule from etl.list_jobs(has_seconds => %s) order by 1"
        )
        assert dict(pipeline.conn.execute(every, [True]).fetchall()) == {
            "clock": "20 seconds", "purge": "17 3 * * *", "reaper": "* * * * *", "watchdog": "10 seconds",
            "worker": "20 seconds",
        }  # fmt: skip
        found = dict(pipeline.conn.execute(every, [False]).fetchall())
        assert {found[name] for name in ("clock", "watchdog", "worker")} == {"* * * * *"}


def test_a_schedule_of_seconds_on_an_old_pg_cron_is_remarked(shell: Shell) -> None:
    shell.write(FILE.replace('"0 2 * * *"', "30 seconds"))
    assert "warning: pg_cron 1.4 fires once a minute, more often from 1.5 on" in shell("sync-config")[2]


# -- doctor --


def findings(shell: Shell, name: str, *words: str) -> list[Row]:
    _, out, _ = shell("doctor", "--json", *words)
    found: list[Row] = [one for one in json.loads(out) if one["check_name"] == name]
    return found


def test_doctor_knows_the_jobs(shell: Shell, cron: Connection) -> None:
    shell("sync-config")
    (found,) = findings(shell, "jobs")
    assert (found["status"], found["detail"]) == ("ok", "5 of pg_cron, owned by b2s_clock")
    (version,) = findings(shell, "pg_cron")
    assert version["detail"] == "version 1.4-1, its scheduler runs in database cron"
    cron.execute("delete from cron.job where jobname = 'b2s cron clock'")
    (found,) = findings(shell, "jobs")
    assert (found["status"], found["detail"]) == ("fail", "the job b2s cron clock is missing")
    assert found["remedy"] == "b2s sync-config puts it right"


def test_doctor_reports_jobs_that_failed_do_not_begin_or_do_not_end(shell: Shell, cron: Connection) -> None:
    shell.write(FILE.replace("fact}", "fact, timeout: 5min}"))
    shell("sync-config")
    for name, status, ago in (
        ("clock", "succeeded", 9),
        ("reaper", "failed", 1),
        ("purge", "succeeded", 500),
        ("watchdog", "running", 5),
        ("worker bronze_to_silver 1", "running", 99),
    ):
        cron.execute(
            "insert into cron.job_run_details (jobid, runid, username, status, return_message, start_time)"
            " select jobid, jobid + 100000, username, %s, 'ERROR:  it broke',"
            " now() - %s * interval '1 minute'"
            " from cron.job where jobname = %s",
            [status, ago, f"b2s cron {name}"],
        )
    details = [one["detail"] for one in findings(shell, "jobs") if one["status"] == "fail"]
    assert details == [
        "the job b2s cron clock has not begun for three minutes",
        "the job b2s cron reaper failed when it was last executed: ERROR:  it broke",
        "the job b2s cron watchdog began more than three minutes ago and has not ended",
    ]


def test_doctor_without_pg_cron(db: Database, shell_in: ShellIn) -> None:
    shell = shell_in(db)
    shell.user = "postgres"
    shell.write(FILE.replace("clock: {role: b2s_clock}\n", ""))
    shell("sync-config")
    (found,) = findings(shell, "jobs")
    assert (found["status"], found["remedy"][:21]) == ("fail", "b2s worker --schedule")
    (clock,) = findings(shell, "clock")
    assert (clock["status"], clock["detail"]) == ("warn", "nothing has asked yet what is due")
    with db.connect() as conn, conn.transaction():
        conn.execute("set local session_replication_role = replica")
        conn.execute("update etl.config_versions set applied_at = applied_at - interval '4 minutes'")
    (clock,) = findings(shell, "clock")
    assert clock["status"] == "fail"
    assert clock["detail"] == "there are schedules, and nothing has ever asked what is due"
    db.connect().execute("select * from etl.fire_schedules()")
    assert [one["status"] for one in findings(shell, "jobs") + findings(shell, "clock")] == ["ok", "ok"]


def test_a_setting_that_stalls_the_scheduler_is_found(shell: Shell, cron: Connection) -> None:
    """Seen by who may read all settings. The setting needs a restart; what is compared with it does not."""
    shell("sync-config")
    shell.user = "postgres"
    shell.write(FILE.replace("b2s_clock}", "b2s_clock, workers: 30}"))
    shell("sync-config")
    cron.execute("grant pg_read_all_settings to etl_engine")
    try:
        found = [one["detail"] for one in findings(shell, "pg_cron") if one["status"] == "warn"]
    finally:
        cron.execute("revoke pg_read_all_settings from etl_engine")
    assert found == [
        "30 worker jobs, each of which lasts as long as a run, and cron.max_running_jobs = 32: "
        "the clock may have to wait for them"
    ]
