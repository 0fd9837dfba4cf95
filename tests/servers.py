"""The Postgres servers that the tests run on.

`python -m tests.servers` prints the `--pg` values worth testing, one a line: the oldest and the newest major.

    --pg dsn         the superuser's DSN in B2S_TEST_DSN, used as it is
    --pg docker      a postgres:18 container (docker15: postgres:15)
    --pg embedded    Postgres 18 of the wheel (embedded16: its Postgres 16)
    --pg system      the newest Postgres installed on this machine, started privately
    --pg auto        the first of these that is there
"""

from __future__ import annotations

import functools
import os
import shutil
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import psycopg
from psycopg import sql
from psycopg.conninfo import make_conninfo

from b2s.embedded import Binaries, EmbeddedError, EmbeddedServer, Setting, StopMode, find_binaries

OLDEST_MAJOR: Final = 15
NEWEST_MAJOR: Final = 18
CHOICES: Final = ("auto", "dsn", "docker", "docker15", "embedded", "embedded16", "system")
SETTINGS: Final[Mapping[str, Setting]] = {
    "max_connections": 200,
    "max_prepared_transactions": 50,
    "wal_level": "logical",
    "deadlock_timeout": "200ms",
    "log_lock_waits": True,
}

CRON_DATABASE: Final = "cron"
INITDB: Final = Path(__file__).resolve().parents[1] / "docker" / "initdb.d"

Connection = psycopg.Connection[Any]


class NoServer(Exception):
    """No Postgres to test on; the message says what to install or to set."""


@dataclass(slots=True)
class Server:
    """A running Postgres, ours or not."""

    label: str
    """The `--pg` value that leads to it."""
    conninfo: str
    """The superuser's way in, to any database."""
    version: str
    """`18.4`"""
    bindir: Path | None = None
    """Its programs, where they are on this machine."""
    embedded: EmbeddedServer | None = None
    """What started it, when it is this process that may stop it."""
    close: Callable[[], None] = lambda: None
    """Ends what was started for it."""
    template: str = field(default_factory=lambda: f"b2s_template_{uuid.uuid4().hex[:12]}")
    """The name of its migrated database, once `migrated_template` has made it."""

    @property
    def major(self) -> int:
        return int(self.version.split(".")[0])

    @property
    def title(self) -> str:
        return f"PostgreSQL {self.version} (--pg {self.label})"

    def dsn(self, dbname: str = "postgres") -> str:
        return make_conninfo(self.conninfo, dbname=dbname)

    def connect(self, dbname: str = "postgres") -> Connection:
        return psycopg.connect(self.dsn(dbname), autocommit=True)

    def restart(self, mode: StopMode = "fast") -> None:
        """Stop and start it: only where nobody else uses it (the fixture `private_server`)."""
        if self.embedded is None:
            raise NoServer(f"{self.title} is shared or not ours to restart; use the fixture private_server")
        self.embedded.restart(mode)

    def migrated_template(self) -> str:
        """A database that `b2s migrate` has been run on, to be cloned; made once, whoever asks first."""
        name = self.template
        with self.connect() as conn:
            conn.execute("select pg_advisory_lock(hashtext(%s))", [name])
            done = conn.execute("select datistemplate from pg_database where datname = %s", [name]).fetchone()
            if done is None or not done[0]:
                from b2s.migrate import migrate

                self.drop_database(name)
                self.create_database(name)
                migrate(self.dsn(name))
                seal = sql.SQL("alter database {} is_template true allow_connections false")
                conn.execute(seal.format(sql.Identifier(name)))
        return name

    def create_database(self, name: str | None = None, *, template: str = "template0") -> Database:
        database = Database(self, name or f"b2s_test_{uuid.uuid4().hex[:12]}")
        with self.connect() as conn:
            conn.execute(
                sql.SQL("create database {} template {}").format(
                    sql.Identifier(database.name), sql.Identifier(template)
                )
            )
        return database

    def drop_database(self, name: str) -> None:
        with self.connect() as conn:
            if name == self.template:
                conn.execute("update pg_database set datistemplate = false where datname = %s", [name])
            conn.execute(sql.SQL("drop database if exists {} with (force)").format(sql.Identifier(name)))


@dataclass(slots=True)
class Database:
    """One database of a test."""

    server: Server
    name: str
    connections: list[Connection] = field(default_factory=list)

    @property
    def dsn(self) -> str:
        return self.server.dsn(self.name)

    def connect(self, *, autocommit: bool = True, **options: Any) -> Connection:
        """A new connection, closed when the test ends; options as for `psycopg.connect` (`user=`, ...)."""
        conn: Connection = psycopg.connect(self.dsn, autocommit=autocommit, **options)
        self.connections.append(conn)
        return conn

    def drop(self) -> None:
        for conn in self.connections:
            conn.close()
        self.server.drop_database(self.name)


def wait_until(
    conn: Connection,
    query: str,
    params: Sequence[Any] | Mapping[str, Any] | None = None,
    timeout: float = 10,
) -> Any:
    """Ask until the first column of the first row is true, and return it.

    For conditions that another session brings about (`pg_stat_activity`, `pg_locks`): it polls every few
    milliseconds and fails with the last value after `timeout` seconds. The connection must be in autocommit,
    because a transaction would go on seeing its first answer.
    """
    assert conn.autocommit, "wait_until needs a connection in autocommit"
    end = time.monotonic() + timeout
    while True:
        row = conn.execute(query.encode(), params).fetchone()
        if row and row[0]:
            return row[0]
        if time.monotonic() > end:
            raise AssertionError(f"not true within {timeout} s (last value: {row}): {query}")
        time.sleep(0.005)


def choose(wanted: str) -> str:
    """The label behind `auto`; any other label is itself."""
    if wanted != "auto":
        return wanted
    if os.environ.get("B2S_TEST_DSN"):
        return "dsn"
    if docker_answers():
        return "docker"
    if wheel(None):
        return "embedded"
    if system():
        return "system"
    raise NoServer(
        "no Postgres to test on: pip install 'b2s[embedded]', or install Postgres 15 or newer, "
        "or set B2S_TEST_DSN to a superuser's DSN"
    )


def start(label: str, settings: Mapping[str, Setting] | None = None) -> Server:
    """Start (or reach) the server behind a label that `choose` returned."""
    if label == "dsn":
        return _given()
    if label.startswith("docker"):
        return _container(label, settings or {})
    binaries = binaries_of(label)
    if binaries is None:
        raise NoServer(
            f"--pg {label}: there is no such Postgres here; python -m tests.servers lists what there is"
        )
    embedded = EmbeddedServer(bindir=binaries.directory, settings={**SETTINGS, **(settings or {})})
    embedded.start()
    return Server(label, embedded.dsn, embedded.version, embedded.bindir, embedded, embedded.stop)


def start_with_cron() -> Server:
    """The system's Postgres with pg_cron, set up by the files that the image of docker/ runs.

    The jobs connect through the Unix socket, which trusts every login: pg_cron 1.4 must not use background
    workers, since one long job would hold up all others.
    """
    binaries = system()
    if binaries is None:
        raise NoServer("there is no Postgres of the system to start with pg_cron")
    place = Path(tempfile.mkdtemp(prefix="b2s-cron-", dir="/tmp"))
    place.chmod(0o755)
    settings: dict[str, Setting] = {
        **SETTINGS,
        "shared_preload_libraries": "pg_cron",
        "cron.database_name": CRON_DATABASE,
        "cron.use_background_workers": False,
        "cron.host": str(place / "server" / "run"),
    }
    embedded = EmbeddedServer(place / "server", bindir=binaries.directory, settings=settings)

    def close() -> None:
        embedded.stop("immediate")
        shutil.rmtree(place, ignore_errors=True)

    try:
        embedded.start()
        server = Server("system", embedded.dsn, embedded.version, embedded.bindir, embedded, close)
        server.create_database(CRON_DATABASE)
        embedded.restart()  # the scheduler gives up for good when its database is missing
        run_init_files(server)
    except BaseException:
        close()
        raise
    return server


def run_init_files(server: Server) -> None:
    """What the entry point of the image does with docker/initdb.d, as far as it concerns these files."""
    where = psycopg.conninfo.conninfo_to_dict(server.dsn(CRON_DATABASE))
    environment = {**os.environ, "PGHOST": str(where["host"]), "PGPORT": str(where["port"])}
    environment |= {"POSTGRES_USER": str(where["user"]), "POSTGRES_DB": CRON_DATABASE}
    psql = ["psql", "-X", "-v", "ON_ERROR_STOP=1", "-d", server.dsn(CRON_DATABASE), "-f"]
    for file in sorted(INITDB.iterdir()):
        command = [*psql, str(file)] if file.suffix == ".sql" else ["sh", str(file)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise NoServer(f"{file.name} failed: {done.stderr}")


def binaries_of(label: str) -> Binaries | None:
    """The programs behind a label that needs no container and no DSN."""
    return {"embedded": wheel(None), "embedded16": wheel(16), "system": system()}.get(label)


def wheel(major: int | None) -> Binaries | None:
    try:
        return find_binaries(major)
    except EmbeddedError:
        return None


@functools.cache
def system() -> Binaries | None:
    """The newest Postgres installed on this machine that is not too old for b2s."""
    directories = set(Path("/usr/lib/postgresql").glob("*/bin"))
    if pg_config := shutil.which("pg_config"):
        answer = subprocess.run([pg_config, "--bindir"], capture_output=True, text=True, check=False)
        directories.add(Path(answer.stdout.strip()))
    found = []
    for directory in directories:
        try:
            found.append(find_binaries(directory=directory))
        except EmbeddedError:
            continue
    usable = [one for one in found if one.major >= OLDEST_MAJOR]
    return max(usable, key=lambda one: one.major, default=None)


def has_pg_cron(binaries: Binaries) -> bool:
    """Whether the extension is installed for these programs."""
    pg_config = binaries.directory / "pg_config"
    if not pg_config.exists():
        return False
    answer = subprocess.run([pg_config, "--pkglibdir"], capture_output=True, text=True, check=True)
    return (Path(answer.stdout.strip()) / "pg_cron.so").exists()


@functools.cache
def docker_answers() -> bool:
    """Whether containers can be started: a daemon that answers within 5 seconds, and testcontainers."""
    try:
        import testcontainers.postgres  # noqa: F401 - only whether it is there

        return subprocess.run(["docker", "info"], capture_output=True, timeout=5, check=False).returncode == 0
    except (ImportError, OSError, subprocess.TimeoutExpired):
        return False


def _given() -> Server:
    dsn = os.environ.get("B2S_TEST_DSN")
    if not dsn:
        raise NoServer("--pg dsn: set B2S_TEST_DSN to a superuser's DSN")
    try:
        with psycopg.connect(dsn, connect_timeout=10) as conn:
            version = conn.info.parameter_status("server_version") or "0"
            is_superuser = conn.info.parameter_status("is_superuser") == "on"
    except psycopg.Error as error:
        raise NoServer(f"B2S_TEST_DSN leads nowhere: {error}") from error
    server = Server("dsn", dsn, version.split()[0])
    if server.major < OLDEST_MAJOR:
        raise NoServer(f"B2S_TEST_DSN leads to Postgres {version}; b2s needs {OLDEST_MAJOR} or newer")
    if not is_superuser:
        raise NoServer("B2S_TEST_DSN must be a superuser's: the tests make roles and databases")
    return server


def _container(label: str, settings: Mapping[str, Setting]) -> Server:
    if not docker_answers():
        raise NoServer(
            f"--pg {label}: needs a Docker daemon that answers, and pip install 'b2s[docker-tests]'"
        )
    from testcontainers.postgres import PostgresContainer

    container = PostgresContainer(f"postgres:{label.removeprefix('docker') or NEWEST_MAJOR}", driver=None)
    parameters = {"fsync": "off", "full_page_writes": "off", **SETTINGS, **settings}
    container.with_command(" ".join(f"-c {name}={value}" for name, value in parameters.items()))
    container.start()
    conninfo = container.get_connection_url()
    with psycopg.connect(conninfo) as conn:
        version = (conn.info.parameter_status("server_version") or "0").split()[0]
    return Server(label, conninfo, version, close=container.stop)


def worth_testing() -> list[str]:
    """The labels of the oldest and the newest supported major there is; B2S_TEST_DSN alone when it is set."""
    if os.environ.get("B2S_TEST_DSN"):
        return ["dsn"]
    majors: dict[int, str] = {}
    if docker_answers():
        majors = {OLDEST_MAJOR: "docker15", NEWEST_MAJOR: "docker"}
    for label in ("system", "embedded", "embedded16"):
        if binaries := binaries_of(label):
            majors.setdefault(binaries.major, label)
    return [majors[major] for major in sorted({min(majors), max(majors)})] if majors else []


def main() -> int:
    labels = worth_testing()
    if not labels:
        try:
            choose("auto")
        except NoServer as error:
            print(error, file=sys.stderr)
        return 2
    print("\n".join(labels))
    return 0


if __name__ == "__main__":
    sys.exit(main())
