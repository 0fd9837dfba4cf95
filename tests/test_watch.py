"""b2s status and show while something goes on: who is running, for how long, who is in the way."""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from b2s.activity import late_text, step_lines
from b2s.cli import main
from b2s.render import Style
from tests.pipelines import Gate, Pipeline
from tests.processes import b2s
from tests.servers import Database, Server, wait_until


@pytest.fixture
def pipeline(db: Database) -> Iterator[Pipeline]:
    with Pipeline(db) as pipeline:
        yield pipeline


def printed(capsys: pytest.CaptureFixture[str], pipeline: Pipeline, *words: str) -> str:
    assert main([*words, "--dsn", pipeline.db.dsn]) == 0
    return capsys.readouterr().out


def test_status_says_for_how_long_a_step_runs_and_how_long_it_usually_takes(
    pipeline: Pipeline, capsys: pytest.CaptureFixture[str]
) -> None:
    pipeline.add("a", "perform pg_sleep(0.05)")
    pipeline.apply()
    for _ in range(3):
        pipeline.start()
    pipeline.routine("a", Gate.WAIT)
    with pipeline.gate() as gate:
        running = pipeline.start_in_background()
        (pid,) = gate.wait_for_arrivals()
        for words in (["status"], ["show", "latest"]):
            text = printed(capsys, pipeline, *words)
            assert "  at [1] a for " in text
            assert (
                ", usually 5" in text
                or ", usually 6" in text
                or ", usually 7" in text
                or ", usually 8" in text
            )
            assert f", backend {pid}" in text
        (run,) = json.loads(printed(capsys, pipeline, "status", "--json"))["runs"]
        assert run["running_steps"][0]["usual_ms"] >= 50
    running.result()
    assert json.loads(printed(capsys, pipeline, "status", "--json"))["runs"][0]["running_steps"] is None


def test_who_is_in_the_way_is_named(pipeline: Pipeline, capsys: pytest.CaptureFixture[str]) -> None:
    pipeline.add("a", "lock table silver.trace in exclusive mode")
    pipeline.apply()
    with pipeline.db.connect(autocommit=False, application_name="the culprit") as culprit:
        culprit.execute("lock table silver.trace in share mode")
        running = pipeline.start_in_background()
        wait_until(pipeline.conn, "select lock_wait_since is not null from etl.active_steps")
        for words in (["status"], ["show", "1"]):
            text = printed(capsys, pipeline, *words)
            assert ", waits for a lock since 20" in text
            who = f"backend {culprit.info.backend_pid} (postgres, the culprit)"
            assert f"    blocked by {who}, in a transaction since 20" in text
        culprit.rollback()
    running.result()


def test_status_names_who_is_late_and_what_holds_windows_back(
    pipeline: Pipeline, capsys: pytest.CaptureFixture[str]
) -> None:
    pipeline.add("a", freshness_ms=1)
    pipeline.add("b", "raise exception 'no'", freshness_ms=60_000)
    pipeline.add("c", freshness_ms=86_400_000)
    pipeline.apply()
    pipeline.start()
    lines = {
        line.split()[0]: line
        for line in printed(capsys, pipeline, "status").splitlines()
        if line[:1] in "abc" and line
    }
    assert "objective 1 ms" in lines["a"]
    assert "never succeeded, objective 1 min 00 s" in lines["b"]
    assert "objective" not in lines["c"]
    assert "held back" not in printed(capsys, pipeline, "status")


def test_parts_read_well() -> None:
    step: dict[str, Any] = {
        "order_index": None, "procedure": "mart.v", "duration_ms": 100, "usual_ms": 50, "attempt": 2,
        "pid": 7, "lock_wait_since": None, "wait_event_type": "IO", "wait_event": "DataFileRead",
        "blocked_by": None,
    }  # fmt: skip
    assert list(step_lines([step], Style())) == [
        "  at mart.v for 100 ms, usually 50 ms, attempt 2, backend 7, waits for IO DataFileRead"
    ]
    assert "\x1b[33mfor 100 ms" in next(step_lines([step], Style(is_coloured=True)))
    quiet = {**step, "usual_ms": None, "attempt": 1, "wait_event_type": "Timeout"}
    assert list(step_lines([quiet], Style())) == ["  at mart.v for 100 ms, backend 7"]
    late = late_text({"is_late": True, "late_ms": 90_000, "freshness_ms": 3_600_000})
    assert late == "by 1 min 30 s, objective 1 h 00 min"
    assert late_text({"is_late": False}) is None


# -- again and again --


def test_watch_shows_it_again_until_it_is_interrupted(pipeline: Pipeline, tmp_path: Path) -> None:
    pipeline.add("a")
    pipeline.apply()
    with b2s(tmp_path, pipeline.db.dsn, "status", "--watch", "100ms") as command:
        command.wait_for_output("nothing has run yet", 2)
        pipeline.start()
        command.wait_for_output("run 1 succeeded", 2)
        command.send(signal.SIGINT)
        assert command.end() == 130


def test_watch_prints_a_document_a_line_for_programs(pipeline: Pipeline, tmp_path: Path) -> None:
    pipeline.add("a")
    pipeline.apply()
    with b2s(tmp_path, pipeline.db.dsn, "status", "--watch", "100ms", "--json") as command:
        command.wait_for_output("\n", 3)
        command.send(signal.SIGINT)
        command.end()
        documents = [json.loads(line) for line in command.out.splitlines()]
    assert {one["procedures"][0]["procedure"] for one in documents} == {"a"}


def test_watch_lives_through_a_restart(private_server: Server, tmp_path: Path) -> None:
    db = private_server.create_database(template=private_server.migrated_template())
    with b2s(tmp_path, db.dsn, "status", "--watch", "50ms") as command:
        command.wait_for_output("no pipeline is configured", 1)
        private_server.restart("immediate")
        command.wait_for_output("the database is away", 1)
        before = command.out.count("no pipeline is configured")
        command.wait_for_output("no pipeline is configured", before + 1)
        command.send(signal.SIGINT)
        command.end()
    db.drop()


def test_a_watch_that_cannot_begin_says_why(capsys: pytest.CaptureFixture[str]) -> None:
    began = time.monotonic()
    assert main(["status", "--watch", "--dsn", "host=127.0.0.1 port=1"]) == 3
    assert main(["status", "--watch", "soon"]) == 2
    assert "--watch soon is not a duration" in capsys.readouterr().err
    assert time.monotonic() - began < 30
