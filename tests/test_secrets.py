"""A password is nowhere but where it was put: not in errors, logs, JSON, the catalog, or what others see."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final
from urllib.parse import quote

import pytest
from psycopg import sql
from psycopg.conninfo import make_conninfo

from b2s.cli import COMMANDS
from tests import servers
from tests.apis import ROOT, serving
from tests.pipelines import Pipeline
from tests.processes import b2s
from tests.servers import Connection, Server, wait_until
from tests.tokens import SECRET, token

CANARY: Final = "c4n@ry:/p%ss w'rd"
PIECES: Final = ("c4n", "ry:/p", "p%ss", "w'rd", quote(CANARY, safe=""))
"""The password, and what a parser that cuts it up may show of it."""

WORDS: Final = {
    "approve": ("1",), "backfill": ("load", "--from", "2026-01-01", "--chunk", "1 day"), "cancel": ("1",),
    "logs": ("1",), "resume": ("1",), "show": ("1",), "test": ("load",), "watermark": ("list",),
    "worker": ("--once",), "exporter": ("--once",), "api": ("--audience", "b2s", "--port", "0"),
    "lint": ("--db",), "init": (),
}  # fmt: skip
"""What a command needs to get as far as the database."""
LOCAL: Final = ("schema", "demo", "up", "init", "import", "graph", "report")
"""Commands that need no database, or have one of their own."""


def run(*words: str, cwd: Path, **environ: str) -> str:
    """Everything that a command says."""
    surroundings = {k: v for k, v in os.environ.items() if not k.startswith(("PG", "B2S"))}
    done = subprocess.run(
        [sys.executable, "-m", "b2s.cli", *words],
        cwd=cwd,
        env={**surroundings, "B2S_API_JWT_SECRET": SECRET.decode(), **environ},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    return done.stdout + done.stderr


def leaks(text: str) -> list[str]:
    return [piece for piece in PIECES if piece in text]


@pytest.fixture(scope="module")
def guarded(server: Server) -> Iterator[Pipeline]:
    """A server that asks for passwords, and a login that has the canary for one."""
    if server.bindir is None:
        pytest.skip(f"{server.title} has no programs here to start another one with")
    private = servers.start(server.label)
    database = private.create_database(template=private.migrated_template())
    with Pipeline(database) as pipeline:
        pipeline.add("load")
        pipeline.apply()
        pipeline.conn.execute("set password_encryption = 'scram-sha-256'")
        pipeline.conn.execute(
            sql.SQL("create role canary login superuser password {}").format(sql.Literal(CANARY))
        )
        (hba,) = pipeline.column("show hba_file")
        rules = Path(hba)
        asks = "local all canary,nobody_here scram-sha-256\n"
        rules.write_text(asks + rules.read_text(encoding="utf-8"), encoding="utf-8")
        pipeline.conn.execute("select pg_reload_conf()")
        wait_until(
            pipeline.conn, "select count(*) > 0 from pg_hba_file_rules where auth_method like 'scram%'"
        )
        yield pipeline
    database.drop()
    private.close()


def dsns(pipeline: Pipeline) -> dict[str, str]:
    """Ways to say the canary, right and wrong, that lead nowhere or are refused."""
    host = "host=127.0.0.1 port=1 connect_timeout=2"
    return {
        "unreachable": make_conninfo(host, user="canary", password=CANARY, dbname="shop"),
        "unknown host": f"postgresql://canary:{quote(CANARY, safe='')}@no-such-host.invalid/shop",
        "wrong password": make_conninfo(pipeline.db.dsn, user="canary", password=CANARY + "x"),
        "no such login": make_conninfo(pipeline.db.dsn, user="nobody_here", password=CANARY),
        "no such database": make_conninfo(pipeline.db.dsn, user="canary", password=CANARY, dbname="nowhere"),
        "not encoded": f"postgresql://canary:{CANARY}@127.0.0.1/shop",
        "with an @": "postgresql://canary:c4n@p%25ss@127.0.0.1:1/shop?connect_timeout=2",
        "with a /": "postgresql://canary:c4n/ry:/p@127.0.0.1:1/shop?connect_timeout=2",
        "with a ?": "postgresql://canary:c4n?ry:/p@127.0.0.1:1/shop",
        "in pieces": f"host=127.0.0.1 user=canary password={CANARY.replace(chr(39), '')} dbname=shop",
        "an option that is none": f"host=127.0.0.1 passwrd={quote(CANARY)}",
        "quoted badly": f"host=127.0.0.1 password='{CANARY}'",
    }


@pytest.mark.parametrize("command", [name for name in COMMANDS if name not in LOCAL])
def test_no_command_tells_the_password_of_a_connection_that_fails(
    guarded: Pipeline, tmp_path: Path, command: str
) -> None:
    (tmp_path / "transformations.yaml").write_text(
        "version: 1\nprocedures:\n  - {name: load, routine: silver.load, type: fact}\n", encoding="utf-8"
    )
    given = dsns(guarded)
    # Every command fails in the same place, so the rest of the ways is for some of them.
    few = (
        given
        if command in ("status", "worker", "api")
        else {k: given[k] for k in ("wrong password", "with an @")}
    )
    words = WORDS.get(command, ())
    for name, dsn in few.items():
        if command == "worker" and name in ("unreachable", "unknown host"):
            continue
        extra = ("--port", "-1") if command == "api" else ()
        said = run(command, *words, *extra, "--json", cwd=tmp_path, B2S_DSN=dsn, B2S_DEBUG="1")
        assert said, (command, name)
        assert leaks(said) == [], (command, name, said)


def test_a_right_password_is_told_nowhere(guarded: Pipeline, tmp_path: Path) -> None:
    """Commands that work, with the DSN in a file; then all that the database keeps, and shows of sessions."""
    dsn = make_conninfo(guarded.db.dsn, user="canary", password=CANARY)
    path = tmp_path / "dsn"
    path.write_text(dsn + "\n", encoding="utf-8")
    (tmp_path / "transformations.yaml").write_text(
        "version: 1\nprocedures:\n  - {name: load, routine: silver.load, type: fact}\n", encoding="utf-8"
    )
    said = ""
    for words in (
        ("migrate",), ("sync-config",), ("run",), ("status",), ("runs",), ("show", "latest"),
        ("logs", "latest"), ("doctor",), ("submit",), ("worker", "--once"), ("exporter", "--once"),
        ("plan",), ("reap",),
        ("show", "99"),
    ):  # fmt: skip
        said += run(*words, cwd=tmp_path, B2S_DSN_FILE=str(path))
        said += run(*words, "--json", cwd=tmp_path, B2S_DSN_FILE=str(path), B2S_DEBUG="1")
    assert "succeeded" in said
    assert leaks(said) == []
    assert leaks(everything(guarded.conn)) == []
    with b2s(tmp_path, dsn, "worker", "--log-format", "json") as worker:
        worker.wait_for('"session_opened"', 2)
        shown = guarded.rows("select usename, application_name, query from pg_stat_activity")
        assert leaks(str(shown)) == []
        assert leaks(worker.err) == []


def everything(conn: Connection) -> str:
    """Every row of every table of schema etl."""
    tables = conn.execute(
        "select oid::regclass::text from pg_class"
        " where relnamespace = 'etl'::regnamespace and relkind in ('r', 'p', 'v')"
    ).fetchall()
    found: list[Any] = []
    for (table,) in tables:
        found += conn.execute(f"select to_jsonb(t)::text from {table} t".encode()).fetchall()
    assert len(found) > 20
    return str(found)


def test_the_api_tells_neither_its_password_nor_its_secret_nor_a_token(
    guarded: Pipeline, tmp_path: Path
) -> None:
    wrong = make_conninfo(guarded.db.dsn, user="canary", password=CANARY + "x")
    with serving(guarded, tmp_path, dsn=wrong) as api:
        good = token()
        answer = api.ask("GET", f"{ROOT}/procedures", headers={"Authorization": f"Bearer {good}"})
        assert answer.code == "database.unavailable"
        said = answer.content.decode() + api.ask("GET", "/ready").content.decode()
        bad = api.ask("GET", f"{ROOT}/procedures", headers={"Authorization": f"Bearer {good}x"})
        said += bad.content.decode() + str(bad.headers) + api.command.err + api.command.out
    assert leaks(said) == []
    assert SECRET.decode() not in said
    assert good not in said
    assert good.split(".")[2] not in said


def test_a_file_that_cannot_be_read_is_told_without_its_content(tmp_path: Path) -> None:
    said = run("status", cwd=tmp_path, B2S_DSN_FILE=str(tmp_path / "nowhere"))
    assert "B2S_DSN_FILE" in said
    assert "cannot be read: No such file" in said
    (tmp_path / "odd").write_bytes(b"\xff\xfe" + CANARY.encode())
    said = run("status", cwd=tmp_path, B2S_DSN_FILE=str(tmp_path / "odd"))
    assert "it is not text" in said
    assert leaks(said) == []
