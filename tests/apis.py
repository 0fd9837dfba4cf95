"""The HTTP API in a process of its own, and clients of it."""

from __future__ import annotations

import http.client
import json
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from psycopg import sql
from psycopg.conninfo import make_conninfo

from tests.pipelines import Pipeline
from tests.processes import Command, b2s
from tests.tokens import AUDIENCE, SECRET, bearer

ROOT: Final = "/api/transformations"
ROLES: Final = ("etl_frontend", "etl_admin", "etl_operator", "etl_reader")


@dataclass(frozen=True, slots=True)
class Answer:
    """A response."""

    status: int
    headers: Mapping[str, str]
    content: bytes

    @property
    def document(self) -> Any:
        return json.loads(self.content)

    @property
    def code(self) -> str:
        """The stable code of a problem, whose form is checked too."""
        found = self.document
        assert self.headers["content-type"] == "application/problem+json", self
        assert found["status"] == self.status
        assert found["type"] == f"urn:b2s:error:{found['code']}"
        return str(found["code"])


@dataclass(slots=True)
class Api:
    """A running `b2s api`."""

    command: Command
    port: int
    login: str

    def ask(
        self,
        method: str,
        path: str,
        body: Any = None,
        headers: Mapping[str, str] | None = None,
        **claims: Any,
    ) -> Answer:
        """One request with a good token; bytes go out as they are, anything else as JSON."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        try:
            content = body if isinstance(body, bytes) or body is None else json.dumps(body).encode()
            given = {**bearer(**claims), "Content-Type": "application/json", **(headers or {})}
            connection.request(method, path, content, {k: v for k, v in given.items() if v})
            response = connection.getresponse()
            found = {name.lower(): value for name, value in response.getheaders()}
            return Answer(response.status, found, response.read())
        finally:
            connection.close()

    def submit(self, body: Any = None, **claims: Any) -> Answer:
        return self.ask("POST", f"{ROOT}/runs", {} if body is None else body, **claims)


@contextmanager
def front_end(pipeline: Pipeline, *roles: str) -> Iterator[str]:
    """A login for a front end, without a right of its own; its DSN."""
    name, password = f"b2s_web_{uuid.uuid4().hex[:12]}", uuid.uuid4().hex
    login = sql.Identifier(name)
    with pipeline.db.server.connect() as conn:
        conn.execute(sql.SQL("create role {} login noinherit password {}").format(login, password))
        for role in roles or ROLES:
            conn.execute(sql.SQL("grant {} to {}").format(sql.Identifier(role), login))
    try:
        yield make_conninfo(pipeline.db.dsn, user=name, password=password)
    finally:
        with pipeline.db.server.connect() as conn:
            conn.execute("select pg_terminate_backend(pid) from pg_stat_activity where usename = %s", [name])
            conn.execute(sql.SQL("drop role {}").format(login))


@contextmanager
def serving(
    pipeline: Pipeline,
    directory: Path,
    *words: str,
    dsn: str | None = None,
    environ: Mapping[str, str] | None = None,
) -> Iterator[Api]:
    """`b2s api` on a free port, with the secret of the test tokens."""
    with front_end(pipeline) as login:
        secret = {"B2S_API_JWT_SECRET": SECRET.decode(), **(environ or {})}
        options = ("--port", "0", "--audience", AUDIENCE, "--log-format", "json", *words)
        with b2s(directory, dsn or login, "api", *options, environ=secret) as command:
            command.wait_for('"api_started"')
            (started,) = command.events("api_started")
            yield Api(command, started["port"], login)
