"""Runs with several sessions, that lose them, are submitted, resumed, explained: as a user meets them."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path

import pytest

from b2s import crew
from b2s.cli import main
from b2s.commands.show import get_run
from b2s.postmortem import enrich
from tests.pipelines import Gate, Pipeline
from tests.processes import SECONDS, Command, b2s
from tests.servers import Connection, Database, Server, wait_until

Start = Callable[..., AbstractContextManager[Command]]
BROKEN = "raise exception 'it does not fit' using hint = 'make it fit'"


@pytest.fixture
def pipeline(db: Database) -> Iterator[Pipeline]:
    with Pipeline(db) as pipeline:
        yield pipeline


@pytest.fixture
def start(pipeline: Pipeline, tmp_path: Path) -> Start:
    """A command in a process of its own."""
    return lambda *words: b2s(tmp_path, pipeline.db.dsn, *words)


class Result:
    """What a command that has ended printed."""

    def __init__(self, code: int, out: str, err: str) -> None:
        self.code, self.out, self.err = code, out, err


@pytest.fixture
def cli(pipeline: Pipeline, capsys: pytest.CaptureFixture[str]) -> Callable[..., Result]:
    """A command in this process."""

    def run(*words: str) -> Result:
        capsys.readouterr()
        code = main([*words, "--dsn", pipeline.db.dsn])
        captured = capsys.readouterr()
        return Result(code, captured.out, captured.err)

    return run


Cli = Callable[..., Result]


@pytest.fixture
def wide(pipeline: Pipeline) -> Pipeline:
    """Two steps that wait at the gate, and one that needs both."""
    pipeline.add("a", Gate.WAIT, type="dimension")
    pipeline.add("b", Gate.WAIT, type="dimension")
    pipeline.add("c", dependencies=["a", "b"])
    pipeline.apply()
    return pipeline


@pytest.fixture
def failing(pipeline: Pipeline) -> Pipeline:
    """A step that succeeds, one that fails, and one that is skipped because of it."""
    pipeline.add("a", type="dimension")
    pipeline.add("b", BROKEN, dependencies=["a"])
    pipeline.add("c", dependencies=["b"], allow_fact_dependency=True)
    pipeline.apply()
    return pipeline


def executors(pipeline: Pipeline) -> set[int]:
    """The backends that executed a step of run 1."""
    return {step["worker_pid"] for step in pipeline.steps(1) if step["worker_pid"]}


# -- several sessions --


def test_a_run_that_lasts_is_executed_by_as_many_sessions_as_it_may_have(
    wide: Pipeline, start: Start
) -> None:
    with wide.gate() as gate, start("run", "--log-format", "json") as running:
        assert len(set(gate.wait_for_arrivals(2))) == 2
        gate.open()
        assert running.end() == 0
        assert [event["procedure"] for event in running.events("step_started")].count("c") == 1
        assert len(running.events("step_succeeded")) == 3, "what the helper did is shown as well"
    assert len(executors(wide)) == 2


def test_one_worker_is_one_session(wide: Pipeline, start: Start) -> None:
    wide.change("a", timeout_ms=60_000)
    watched = "select query_start from pg_stat_activity where query = 'select etl.watchdog()'"
    with wide.gate() as gate, start("run", "-j", "1") as running:
        gate.wait_for_arrivals(1)
        first = wait_until(wide.conn, f"{watched} union all select null", timeout=SECONDS)
        wait_until(wide.conn, f"select query_start > %s from ({watched}) q", [first], timeout=SECONDS)
        assert len(gate.wait_for_arrivals(1)) == 1, "a second later nobody has come to help"
        gate.open()
        assert running.end() == 0
    assert len(executors(wide)) == 1
    assert wide.run(1)["max_concurrency"] == 2


def test_nobody_is_called_to_a_chain_before_it_widens(pipeline: Pipeline, start: Start) -> None:
    pipeline.add("first", "perform pg_advisory_xact_lock_shared(1)", type="dimension")
    for name in ("a", "b"):
        pipeline.add(name, Gate.WAIT, dependencies=["first"])
    pipeline.apply()
    looked = "select query_start from pg_stat_activity where state = 'idle' and query ~ 'from etl.run_scopes'"
    pipeline.conn.execute("select pg_advisory_lock(1)")
    with pipeline.gate() as gate, start("run") as running:
        seen = wait_until(pipeline.conn, looked, timeout=SECONDS)
        wait_until(pipeline.conn, f"select query_start > %s from ({looked}) q", [seen], timeout=SECONDS)
        assert pipeline.rows("select * from pg_stat_activity where query ~ '^call etl.work'") == []
        pipeline.conn.execute("select pg_advisory_unlock(1)")
        gate.wait_for_arrivals(2)
        gate.open()
        assert running.end() == 0


def test_more_workers_than_configured_are_asked_for(pipeline: Pipeline, start: Start) -> None:
    for name in ("a", "b", "c"):
        pipeline.add(name, Gate.WAIT)
    pipeline.apply()
    with pipeline.gate() as gate, start("run", "--workers", "3") as running:
        gate.wait_for_arrivals(3)
        gate.open()
        assert running.end() == 0
    assert pipeline.run(1)["max_concurrency"] == 3


def test_a_short_run_opens_no_other_session(
    pipeline: Pipeline, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("a", "b", "c"):
        pipeline.add(name)
    pipeline.apply()
    opened: list[str] = []
    monkeypatch.setattr(crew, "PATIENCE", 60)
    monkeypatch.setattr(crew, "connect", opened.append)
    assert cli("run").code == 0
    assert opened == []


def test_no_worker_is_not_a_number_of_workers(pipeline: Pipeline, cli: Cli) -> None:
    refused = cli("run", "-j", "0")
    assert refused.code == 2
    assert "--workers must be at least 1" in refused.err


def test_a_helper_that_dies_does_not_fail_the_run(wide: Pipeline, start: Start) -> None:
    with wide.gate() as gate, start("run") as running:
        pids = gate.wait_for_arrivals(2)
        (helper,) = set(pids) - {wide.run(1)["worker_pid"]}
        wide.conn.execute("select pg_terminate_backend(%s, 5000)", [helper])
        running.wait_for("a helper session is gone")
        gate.open()
        assert running.end() == 0
    assert [s["error_code"] for s in wide.steps(1) if s["status"] == "retrying"] == ["worker.lost"]


def test_a_run_goes_on_when_the_session_that_began_it_dies(wide: Pipeline, start: Start) -> None:
    with wide.gate() as gate, start("run") as running:
        gate.wait_for_arrivals(2)
        wide.conn.execute("select pg_terminate_backend(%s, 5000)", [wide.run(1)["worker_pid"]])
        running.wait_for("other sessions go on with run 1, waiting for its end")
        gate.open()
        assert running.end() == 0
        assert "run 1 succeeded" in running.out
    assert [s["error_code"] for s in wide.steps(1) if s["status"] == "retrying"] == ["worker.lost"]


def test_a_run_that_loses_every_session_is_recorded_and_can_be_resumed(wide: Pipeline, start: Start) -> None:
    with wide.gate() as gate, start("run", "-j", "1") as running:
        gate.wait_for_arrivals(1)
        wide.conn.execute("select pg_terminate_backend(%s, 5000)", [wide.run(1)["worker_pid"]])
        assert running.end() == 1
        assert (
            "terminating connection due to administrator command; nobody is at work on run 1" in running.err
        )
        assert "run 1 abandoned" in running.out
        assert "next: b2s resume 1" in running.out
        gate.open()
        with start("resume", "1") as resumed:
            assert resumed.end() == 0
    assert wide.outcomes(2) == {"a": "succeeded", "b": "succeeded", "c": "succeeded"}


def test_a_server_that_stops_says_how_to_go_on(private_server: Server, tmp_path: Path) -> None:
    database = private_server.create_database(template=private_server.migrated_template())
    with Pipeline(database) as pipeline:
        pipeline.add("a", Gate.WAIT)
        pipeline.apply()
        gate = database.connect()
        gate.execute("select pg_advisory_lock(4242)")
        with b2s(tmp_path, database.dsn, "run") as running:
            Gate(gate).wait_for_arrivals(1)
            # Nobody is let in any more, so that it cannot be looked up how the run stands.
            with private_server.connect() as conn:
                conn.execute(f"alter database {database.name} allow_connections false")
                conn.execute(
                    "select pg_terminate_backend(worker_pid, 5000) from (select %s::int) q(worker_pid)",
                    [pipeline.run(1)["worker_pid"]],
                )
            assert running.end() == 3
            assert "hint: what it committed stays; once the server is back: b2s resume 1" in running.err
    database.drop()


def test_a_second_signal_cancels_the_statements_of_every_session(wide: Pipeline, start: Start) -> None:
    with wide.gate() as gate, start("run") as running:
        gate.wait_for_arrivals(2)
        running.send(signal.SIGINT)
        wait_until(
            wide.conn, "select bool_or(cancel_requested_at is not null) from etl.runs", timeout=SECONDS
        )
        running.send(signal.SIGINT)
        assert running.end() == 1
        assert "run 1 cancelled" in running.out
    assert wide.outcomes(1) == {"a": "cancelled", "b": "cancelled", "c": "cancelled"}


def test_run_sees_to_timeouts(pipeline: Pipeline, start: Start) -> None:
    pipeline.add("a", Gate.WAIT, timeout_ms=300)
    pipeline.add("b", type="dimension")
    pipeline.apply()
    with pipeline.gate(), start("run") as running:
        assert running.end() == 1
        assert "the timeout of 300 ms has passed" in running.out
        assert (
            "next: b2s resume 1    once it is known what it waited for, or timeout is raised" in running.out
        )
    assert pipeline.outcomes(1) == {"b": "succeeded", "a": "failed"}


def test_a_run_that_has_lost_its_first_session_can_be_cancelled(wide: Pipeline, start: Start) -> None:
    with wide.gate() as gate, start("run") as running:
        gate.wait_for_arrivals(2)
        wide.conn.execute("select pg_terminate_backend(%s, 5000)", [wide.run(1)["worker_pid"]])
        running.wait_for("other sessions go on with run 1, waiting for its end")
        running.send(signal.SIGINT)
        running.wait_for("cancelling run 1: ")
        running.send(signal.SIGINT)
        assert running.end() == 1
        assert "run 1 cancelled" in running.out


# -- submit --


def test_submit_prints_the_number_of_the_run(pipeline: Pipeline, cli: Cli) -> None:
    pipeline.add("a")
    pipeline.apply()
    done = cli("submit", "a", "--idempotency-key", "k")
    assert (done.code, done.out) == (0, "1\n")
    assert "run 1 is queued; b2s worker takes it up" in done.err
    again = cli("submit", "a", "--idempotency-key", "k", "--json")
    assert json.loads(again.out) == {"run_id": 1, "status": "queued", "is_new": False}
    assert pipeline.run(1)["request"]["procedures"] == ["a"]


def test_what_is_queued_is_shown_and_can_be_taken_back(pipeline: Pipeline, cli: Cli) -> None:
    pipeline.add("a")
    pipeline.apply()
    cli("submit")
    status = cli("status")
    assert "pipeline bronze_to_silver: run 1 queued since " in status.out
    assert status.out.count("run 1 ") == 1
    assert "b2s worker takes up what is queued" in status.out
    assert json.loads(cli("status", "--json").out)["queued"][0]["run_id"] == 1
    assert "queued" in cli("runs").out
    shown = cli("show", "1").out
    assert "not started" in shown
    assert "b2s cancel 1    takes it back" in shown
    assert cli("cancel", "1").code == 0
    assert pipeline.run(1)["status"] == "cancelled"
    assert "run 1 cancelled" in cli("status").out


def test_submit_refuses_what_run_refuses(pipeline: Pipeline, cli: Cli) -> None:
    pipeline.add("a")
    pipeline.apply()
    refused = cli("submit", "nope")
    assert refused.code == 3
    assert "there is no procedure nope" in refused.err
    assert pipeline.value("select count(*) from etl.runs") == 0


@pytest.mark.parametrize(("body", "code"), [(None, 0), (BROKEN, 1)])
def test_who_waits_sees_the_run_and_gets_its_outcome(
    pipeline: Pipeline, start: Start, body: str | None, code: int
) -> None:
    pipeline.add("a", body)
    pipeline.apply()
    with start("worker", "-j", "1"), start("submit", "--wait") as waiting:
        assert waiting.end() == code
        assert ("run 1 succeeded" if code == 0 else "failed: [1] a: it does not fit") in waiting.out
        assert "[1] a " in waiting.err


def test_who_stops_waiting_leaves_the_run_alone(wide: Pipeline, start: Start) -> None:
    with wide.gate() as gate, start("worker"), start("submit", "--wait") as waiting:
        gate.wait_for_arrivals(2)
        waiting.send(signal.SIGINT)
        assert waiting.end() == 130
        assert "left; run 1 goes on: b2s show 1, b2s cancel 1" in waiting.err
        gate.open()
        wait_until(wide.conn, "select status = 'succeeded' from etl.runs", timeout=SECONDS)


def test_status_counts_the_sessions_at_work(wide: Pipeline, cli: Cli, start: Start) -> None:
    with wide.gate() as gate, start("run") as running:
        gate.wait_for_arrivals(2)
        assert "2 sessions at work" in cli("status").out
        gate.open()
        assert running.end() == 0


# -- resume and reap --


def test_resume_runs_what_is_left(failing: Pipeline, cli: Cli) -> None:
    failed = cli("run")
    assert failed.code == 1
    assert "next: b2s resume 1    once the cause is repaired" in failed.out
    assert cli("resume", "latest").code == 1, "the cause is not repaired"
    failing.routine("b")
    done = cli("resume", "2")
    assert done.code == 0
    assert "an earlier run has done it" in done.out
    assert "changed since run 2, and run as it is now: b" in done.err
    assert failing.outcomes(3) == {"a": "reused", "b": "succeeded", "c": "succeeded"}
    assert "takes up run 2" in cli("show", "3").out
    assert "b2s show 2    shows the run that took it up" in cli("show", "1").out
    assert json.loads(cli("show", "1", "--json").out)["resumed_as"] == 2


def test_resume_refuses_with_a_command_as_remedy(failing: Pipeline, cli: Cli) -> None:
    assert cli("resume", "latest").code == 2
    assert cli("resume", "7").err == "error: there is no run 7\nhint: b2s runs lists the runs there are\n"
    cli("run", "a")
    nothing = cli("resume", "latest")
    assert (nothing.code, "hint: b2s run starts another one" in nothing.err) == (3, True)
    cli("submit", "a")
    queued = cli("resume", "latest")
    assert (queued.code, "hint: b2s worker --once takes it up" in queued.err) == (3, True)


def test_the_latest_run_is_no_backfill(failing: Pipeline, cli: Cli) -> None:
    cli("run")
    failing.conn.execute(
        "insert into etl.runs (kind, pipeline_id, config_version_id, request, fingerprint, requested_by,"
        " max_concurrency, step_count, status, started_at, ended_at)"
        " select 'backfill', pipeline_id, config_version_id, '{}', '', 'ann', 1, 1, 'succeeded', now(), now()"
        " from etl.runs"
    )
    failing.routine("b")
    assert cli("resume", "latest").code == 0
    assert failing.run(3)["parent_run_id"] == 1
    refused = cli("resume", "2")
    assert (refused.code, "hint: b2s backfill --resume RUN takes up" in refused.err) == (3, True)


@pytest.mark.parametrize("changed", ["reuse", "rerun"])
def test_a_step_that_was_done_and_has_changed_is_asked_about(
    failing: Pipeline, cli: Cli, changed: str
) -> None:
    cli("run")
    failing.routine("b")
    failing.routine("a", "insert into silver.trace (step) values ('a anew')")
    refused = cli("resume", "1")
    assert refused.code == 3
    assert "hint: add --changed reuse to keep what was written, or --changed rerun to redo it" in refused.err
    assert cli("resume", "1", "--changed", changed).code == 0
    assert failing.outcomes(2)["a"] == {"reuse": "reused", "rerun": "succeeded"}[changed]
    assert ("a anew" in failing.trace()) == (changed == "rerun")


def test_resume_shares_the_work(wide: Pipeline, start: Start) -> None:
    with wide.gate() as gate:
        with start("run") as running:
            gate.wait_for_arrivals(2)
            running.send(signal.SIGTERM)
            wait_until(
                wide.conn, "select bool_or(cancel_requested_at is not null) from etl.runs", timeout=SECONDS
            )
            running.send(signal.SIGTERM)
            assert running.end() == 1
        with start("resume", "latest", "--json") as resumed:
            gate.wait_for_arrivals(2)
            gate.open()
            assert resumed.end() == 0
            assert json.loads(resumed.out)["parent_run_id"] == 1


def test_reap_records_the_dead_and_says_how_to_go_on(wide: Pipeline, cli: Cli) -> None:
    assert cli("reap").out == "no run is dead\n"
    with wide.gate() as gate:
        wide.start_in_background()
        (pid,) = gate.wait_for_arrivals(1)
        wide.conn.execute("select pg_terminate_backend(%s, 5000)", [pid])
        assert "b2s resume 1    records it as abandoned, and does what is left" in cli("show", "1").out
        assert "its session is gone: b2s resume 1, or b2s reap" in cli("status").out
        assert cli("reap").out == "1 dead run recorded as abandoned\nnext: b2s resume 1\n"
        shown = cli("show", "1").out
    assert f"abandoned: [1] a: its session (backend {pid}) is gone" in shown
    assert json.loads(cli("reap", "--json").out) == {"abandoned": []}


# -- show, at three in the morning --


def test_show_names_the_line_and_prints_it(pipeline: Pipeline, cli: Cli) -> None:
    pipeline.sql(
        "create function silver.inner_one(x int) returns int language plpgsql as"
        " $$\nbegin\n  -- a remark\n  return 1 / x;\nend $$"
    )
    pipeline.add("a", "\nperform silver.inner_one(0)")
    pipeline.apply()
    assert cli("run").code == 1
    shown = cli("show", "latest").out
    assert (
        "  at: silver.inner_one(integer) line 4, as it is now\n"
        "      3 |   -- a remark\n"
        "    > 4 |   return 1 / x;\n"
        "      5 | end\n"
    ) in shown
    assert "  at: silver.a() line 2, as it is now\n" in shown
    assert "    > 2 | perform silver.inner_one(0)" in shown
    assert "rolled back: this step alone" in shown
    places = json.loads(cli("show", "1", "--json").out)["steps"][0]["places"]
    assert [(place["routine"], place["line"]) for place in places] == [
        ("silver.inner_one(integer)", 4),
        ("silver.a()", 2),
    ]


def test_show_says_when_the_routine_is_not_what_failed_any_more(failing: Pipeline, cli: Cli) -> None:
    cli("run")
    assert "it has changed since" not in cli("show", "1").out
    failing.routine("b")
    assert "silver.b() line 1, as it is now; it has changed since this run" in cli("show", "1").out
    failing.sql("drop function silver.b()")
    shown = cli("show", "1")
    assert shown.code == 0
    assert "as it is now" not in shown.out


def test_show_finds_a_routine_on_the_search_path_of_the_step(pipeline: Pipeline, cli: Cli) -> None:
    pipeline.add("a", BROKEN)
    pipeline.apply(search_path=["silver"])
    cli("run")
    assert "  at: a() line 1, as it is now\n" in cli("show", "1").out


def test_show_says_what_was_rolled_back_and_what_stays(pipeline: Pipeline, cli: Cli) -> None:
    for name, body in (("b", None), ("c", BROKEN)):
        pipeline.add(name, body, group="twins", transaction_scope="per_group", dependencies=["a"])
    pipeline.add("a", type="dimension")
    pipeline.apply()
    cli("run")
    shown = cli("show", "1").out
    assert "rolled back: the whole group twins: b, c" in shown
    assert "stays committed:\n  [1] a\n" in shown
    assert "b2s run b c    the same, reading up to now" in shown


def test_show_names_who_was_in_the_way_and_every_attempt(pipeline: Pipeline, cli: Cli) -> None:
    pipeline.sql("create table silver.wanted (x int)")
    pipeline.add(
        "a",
        "lock table silver.wanted",
        lock_timeout_ms=20,
        retries={"attempts": 2, "backoff_ms": 1, "max_backoff_ms": 1},
    )
    pipeline.apply()
    with pipeline.db.connect(autocommit=False, application_name="nightly report") as holder:
        holder.execute("lock table silver.wanted")
        assert cli("run").code == 1
        pid = holder.info.backend_pid
        shown = cli("show", "1").out
    assert f"may have waited for: backend {pid} (" in shown
    assert "nightly report" in shown
    assert "  attempts:\n    1  " in shown
    assert "55P03, canceling statement due to lock timeout; tried again after " in shown
    assert f"b2s resume 1    once backend {pid} (" in shown


def test_a_reader_sees_the_source_of_what_it_may_use(failing: Pipeline, cli: Cli) -> None:
    cli("run")
    reader: Connection = failing.login("etl_reader")
    hidden = enrich(reader, get_run(reader, 1))["steps"][1]
    assert (hidden["places"], hidden["is_changed"]) == ([], False)
    failing.sql("grant usage on schema silver to etl_reader")
    seen = enrich(reader, get_run(reader, 1))["steps"][1]
    assert ([place["routine"] for place in seen["places"]], seen["is_changed"]) == (["silver.b()"], False)
