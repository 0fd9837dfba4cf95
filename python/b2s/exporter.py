"""The exporter: reads what the engine has counted, and serves it to Prometheus.

It keeps nothing itself: counters live in the database, so it may be down, restarted or doubled without
any of them being wrong. Each scrape is one short, read-only transaction, in a session that is kept and opened
again when it is gone: no pool, which would wait for a server that is not there. Scrapes at the same moment,
or within a second, share one reading.
"""

from __future__ import annotations

import base64
import hmac
import ssl
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final, Protocol, cast

import psycopg
from prometheus_client import CollectorRegistry, Metric, make_wsgi_app, start_http_server
from prometheus_client.exposition import choose_encoder
from psycopg import conninfo
from psycopg.rows import dict_row

from b2s import __version__
from b2s.db import Connection, opened, parameters_of
from b2s.errors import DatabaseError, UsageError
from b2s.metricfamilies import Snapshot, families
from b2s.sqlfiles import load_manifest

Environ = dict[str, Any]
StartResponse = Callable[..., Any]

_FRESH_FOR: Final = 1.0
_DRIFT_EVERY: Final = 300.0
_DEFAULT_TIMEOUT: Final = 10.0
_RESERVE: Final = 0.5
_PATIENCE: Final = 10
_CONNECT: Final = {
    "application_name": "b2s exporter", "connect_timeout": "3", "tcp_user_timeout": "5000",
    "keepalives_idle": "15", "keepalives_interval": "5", "keepalives_count": "3",
}  # fmt: skip
QUERIES: Final = {
    "outcomes": "select * from etl.metrics_outcomes",
    "procedures": "select * from etl.metrics_procedures",
    "pipelines": "select * from etl.metrics_pipelines",
    "running": """
select a.pipeline, a.subject as procedure, min(a.started_at) as running_since
  from etl.active_steps a where a.kind = 'run' and a.order_index is not null
 group by a.pipeline, a.subject""",
    "server": "select * from etl.metrics_server",
}
"""What a scrape reads, in one snapshot. Unsorted: that would cost as much as the rest."""
_DRIFT: Final = "select d.pipeline, d.is_drifted from etl._config_drift() d order by d.pipeline"
_BOUNDS: Final = "select etl._bucket_bounds()"
_OF_THE_QUERY: Final = ("57014", "55P03")
"""Timeouts: another session would not help."""
_REASONS: Final = (
    ("57014", "timeout"), ("55P03", "timeout"), ("25P0", "timeout"), ("28", "refused"), ("42501", "refused"),
    ("3F", "not_installed"), ("42P01", "not_installed"), ("42703", "not_installed"),
    ("42883", "not_installed"), ("53", "resources"), ("57P", "unreachable"), ("08", "unreachable"),
)  # fmt: skip
"""What an SQLSTATE that begins so means for a scrape."""


class Log(Protocol):
    """What a structlog logger offers here."""

    def info(self, event: str, **fields: Any) -> Any:
        """Something to know."""

    def warning(self, event: str, **fields: Any) -> Any:
        """Something to look at."""


class Scraper:
    """Reads snapshots of one database, one at a time."""

    def __init__(self, dsn: str, log: Log) -> None:
        self._dsn = conninfo.make_conninfo("", **{**_CONNECT, **parameters_of(dsn)})
        self._log = log
        self._lock = threading.Lock()
        self._connection: Connection | None = None
        self._snapshot = Snapshot()
        self._read_at = float("-inf")
        self._drift: list[dict[str, Any]] = []
        self._drift_at = float("-inf")
        self._errors: Counter[str] = Counter()
        self._migrations = [migration.name for migration in load_manifest().migrations]
        self._was_up: bool | None = None

    def read(self, timeout: float = _DEFAULT_TIMEOUT) -> Snapshot:
        """What is true now, or why that cannot be told; takes at most about `timeout` seconds."""
        with self._lock:
            if time.monotonic() - self._read_at > _FRESH_FOR:
                began = time.monotonic()
                self._snapshot = self._attempt(began + max(timeout - _RESERVE, 0.2))
                self._snapshot = replace(
                    self._snapshot, seconds=time.monotonic() - began, errors_total=dict(self._errors)
                )
                self._read_at = time.monotonic()
            return self._snapshot

    def _attempt(self, deadline: float) -> Snapshot:
        try:
            snapshot = self._query(deadline)
        except DatabaseError as error:
            reason = _reason(error)
            self._errors[reason] += 1
            self._note(is_up=False, reason=reason, error_message=str(error))
            return Snapshot(error=reason)
        self._note(is_up=True)
        return snapshot

    def _query(self, deadline: float) -> Snapshot:
        """Reads in the session that is there, else in a new one; a session that fails is given up."""
        is_new = self._connection is None
        connection = self._connection or opened(self._dsn)
        self._connection = None
        try:
            snapshot = self._read_in(connection, deadline)
        except psycopg.Error as error:
            connection.close()
            if is_new or not isinstance(error, psycopg.OperationalError) or error.sqlstate in _OF_THE_QUERY:
                raise DatabaseError.of(error) from error
            return self._query(deadline)  # it had ended since the last scrape
        self._connection = connection
        return snapshot

    def _read_in(self, connection: Connection, deadline: float) -> Snapshot:
        with connection.cursor(row_factory=dict_row) as cursor:
            cursor.execute("begin isolation level repeatable read read only")
            cursor.execute("select set_config('jit', 'off', true), set_config('lock_timeout', '500ms', true)")

            def rows(query: str) -> list[dict[str, Any]]:
                left = max(int((deadline - time.monotonic()) * 1000), 1)
                cursor.execute("select set_config('statement_timeout', %s, true)", [f"{left}ms"])
                return cursor.execute(query.encode()).fetchall()

            found: dict[str, Any] = {name: rows(query) for name, query in QUERIES.items()}
            bounds = rows(_BOUNDS)[0]["_bucket_bounds"]
            if time.monotonic() - self._drift_at > _DRIFT_EVERY:
                self._drift, self._drift_at = rows(_DRIFT), time.monotonic()
            cursor.execute("commit")
        server = found["server"][0]
        is_current = server["version"] == __version__ and server["migrations"] == self._migrations
        return Snapshot(**found, bounds=bounds, drift=self._drift, is_current=is_current)

    def close(self) -> None:
        """Ends its session."""
        with self._lock:
            if self._connection is not None:
                self._connection.close()
                self._connection = None

    def _note(self, *, is_up: bool, **fields: str) -> None:
        """A change is worth a line, its repetition is not."""
        if is_up and self._was_up is not True:
            self._log.info("database_is_there")
        elif not is_up and self._was_up is not False:
            self._log.warning("database_is_away", **fields)
        self._was_up = is_up


def _reason(error: DatabaseError) -> str:
    state = error.sqlstate or ""
    return next(
        (reason for start, reason in _REASONS if state.startswith(start)), "other" if state else "unreachable"
    )


class _Families:
    """One scrape as the collector that prometheus_client asks for."""

    def __init__(self, snapshot: Snapshot, *, is_openmetrics: bool) -> None:
        self._snapshot = snapshot
        self._is_openmetrics = is_openmetrics

    def collect(self) -> Iterator[Metric]:
        yield from families(self._snapshot, is_openmetrics=self._is_openmetrics)


def registry_of(snapshot: Snapshot, *, is_openmetrics: bool) -> CollectorRegistry:
    """A registry that holds one snapshot."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Families(snapshot, is_openmetrics=is_openmetrics))
    return registry


_CHALLENGE: Final = ("WWW-Authenticate", 'Basic realm="b2s exporter", charset="UTF-8"')


class App:
    """The WSGI application: /metrics, /-/healthy, and a page for people at /."""

    def __init__(self, scraper: Scraper, credentials: str | None = None) -> None:
        self._scraper = scraper
        self._expected = credentials and "Basic " + base64.b64encode(credentials.encode()).decode()

    def __call__(self, environ: Environ, start_response: StartResponse) -> Iterable[bytes]:
        path = environ.get("PATH_INFO", "/")
        if path == "/-/healthy":
            return _plain(start_response, "200 OK", "the exporter is up; b2s_up tells of the database\n")
        if not self._is_allowed(environ):
            return _plain(
                start_response, "401 Unauthorized", "a user and a password are needed\n", _CHALLENGE
            )
        if path == "/metrics":
            return self._metrics(environ, start_response)
        found = "200 OK" if path == "/" else "404 Not Found"
        return _plain(start_response, found, f"b2s exporter {__version__}: the metrics are at /metrics\n")

    def _is_allowed(self, environ: Environ) -> bool:
        given = str(environ.get("HTTP_AUTHORIZATION", "")).encode("utf-8", "replace")
        return not self._expected or hmac.compare_digest(given, self._expected.encode())

    def _metrics(self, environ: Environ, start_response: StartResponse) -> Iterable[bytes]:
        _, content_type = choose_encoder(environ.get("HTTP_ACCEPT", ""))
        snapshot = self._scraper.read(_timeout_of(environ))
        registry = registry_of(snapshot, is_openmetrics=content_type.startswith("application/openmetrics"))
        answer: Iterable[bytes] = make_wsgi_app(registry)(environ, start_response)
        return answer


def _timeout_of(environ: Environ) -> float:
    try:
        seconds = float(environ.get("HTTP_X_PROMETHEUS_SCRAPE_TIMEOUT_SECONDS", _DEFAULT_TIMEOUT))
    except ValueError:
        return _DEFAULT_TIMEOUT
    return seconds if 0 < seconds < 3600 else _DEFAULT_TIMEOUT


def _plain(
    start_response: StartResponse, status: str, text: str, *headers: tuple[str, str]
) -> Iterable[bytes]:
    start_response(status, [("Content-Type", "text/plain; charset=utf-8"), *headers])
    return [text.encode()]


@dataclass(frozen=True, slots=True)
class Endpoint:
    """Where to listen, and how callers are checked."""

    host: str
    port: int
    certificate: str | None = None
    key: str | None = None
    client_ca: str | None = None
    credentials: str | None = None

    @property
    def url(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{'https' if self.certificate else 'http'}://{host}:{self.port}/metrics"


@contextmanager
def serving(endpoint: Endpoint, scraper: Scraper) -> Iterator[int]:
    """Serves in threads of its own while the block lasts; yields the port. Raises UsageError."""
    try:
        _check_files(endpoint)
        server, thread = start_http_server(
            endpoint.port,
            endpoint.host,
            CollectorRegistry(),  # empty: nobody sees anything before the application below has taken over
            certfile=endpoint.certificate,
            keyfile=endpoint.key,
            client_cafile=endpoint.client_ca,
            client_auth_required=endpoint.client_ca is not None,
        )
    except (OSError, ssl.SSLError) as error:
        raise UsageError(
            f"cannot listen on {endpoint.url}: {error}", "name another --listen, or other files"
        ) from None
    server.set_app(App(scraper, endpoint.credentials))
    handler = cast("type", server.RequestHandlerClass)
    server.RequestHandlerClass = type("Handler", (handler,), {"timeout": _PATIENCE})
    listener: Any = server.socket
    if isinstance(listener, ssl.SSLSocket):
        # Shake hands in the thread of the request: a slow caller holds up nobody else.
        listener.do_handshake_on_connect = False  # type: ignore[attr-defined]
    try:
        yield server.server_port
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
        scraper.close()


def _check_files(endpoint: Endpoint) -> None:
    """Raises what is wrong with the files, before a port is taken."""
    if endpoint.certificate:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(endpoint.certificate, endpoint.key)
        if endpoint.client_ca:
            context.load_verify_locations(endpoint.client_ca)


def credentials_in(path: str) -> str:
    """The `user:password` in the first line of a file. Raises UsageError."""
    lines = Path(path).read_text(encoding="utf-8").splitlines()
    if not lines or not lines[0].partition(":")[0] or not lines[0].partition(":")[2]:
        raise UsageError(f"{path} holds no user:password in its first line", "for example: prometheus:s3cret")
    return lines[0]
