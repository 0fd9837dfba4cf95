"""The way to the database: a bounded pool, and a transaction in the role of whoever asks for each request."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Mapping
from typing import Any, Final

import psycopg
from psycopg import conninfo
from psycopg_pool import AsyncConnectionPool

from b2s.api.problems import Problem
from b2s.api.settings import Limits
from b2s.api.tokens import Identity
from b2s.db import parameters_of

Connection = psycopg.AsyncConnection[tuple[Any, ...]]

_ACT_AS: Final = """
select set_config('request.jwt.claims', %(claims)s, true), set_config('application_name', %(client)s, true),
       set_config('statement_timeout', %(timeout)s, true), set_config('lock_timeout', %(timeout)s, true),
       set_config('idle_in_transaction_session_timeout', %(timeout)s, true),
       set_config('timezone', 'UTC', true), set_config('role', %(role)s, true)"""
_HOLDS: Final = "select pg_has_role(session_user, to_regrole(quote_ident(%s))::oid, 'member') is true"
_PROBE: Final = """
select to_regnamespace('etl') is not null,
       exists (select from pg_auth_members m
                 join pg_roles g on g.oid = m.roleid and g.rolname = 'etl_frontend'
                 join pg_roles r on r.oid = m.member and r.rolname = session_user),
       array(select r from unnest(%s::text[]) r
              where pg_has_role(session_user, to_regrole(quote_ident(r))::oid, 'member') is not true)"""
_PROBED_FOR: Final = 1.0
_PROBE_TIMEOUT: Final = 3.0


class Database:
    """Connections of the front end's login. That login has no right of its own: each request takes a role."""

    def __init__(self, dsn: str, limits: Limits) -> None:
        parameters = parameters_of(dsn)
        parameters.setdefault("application_name", "b2s api")
        parameters.setdefault("connect_timeout", "3")
        self._conninfo = conninfo.make_conninfo("", **parameters)
        self._limits = limits
        self._pool: AsyncConnectionPool[Connection] = AsyncConnectionPool(
            self._conninfo,
            min_size=0,
            max_size=limits.connections,
            max_waiting=limits.waiting,
            timeout=limits.acquire_s,
            kwargs={"autocommit": True, "prepare_threshold": None},
            check=AsyncConnectionPool.check_connection,
            reconnect_timeout=5,
            open=False,
        )
        self._probed_at = float("-inf")
        self._found: dict[str, str] = {}
        self._probing = asyncio.Lock()

    async def open(self) -> None:
        """Begins to hold connections; waits for none, so that the API starts before its database."""
        await self._pool.open()

    async def close(self) -> None:
        """Lets go of all connections."""
        await self._pool.close(timeout=self._limits.acquire_s)

    async def call(self, identity: Identity, client: str, query: str, values: Any) -> Any:
        """The one row that a call returns, in a transaction in the role and in the name of an identity.

        All of it goes out in one message. Raises psycopg.Error, and Problem when the role cannot be taken.
        """
        settings = {
            "claims": json.dumps({"sub": identity.subject, "role": identity.role}),
            "client": client,
            "timeout": str(int(self._limits.request_s * 1000)),
            "role": identity.role,
        }
        async with self._pool.connection() as connection:
            try:
                async with connection.pipeline():
                    await connection.execute("begin")
                    await connection.execute(_ACT_AS, settings)
                    cursor = await connection.execute(query.encode(), values)
                    await connection.execute("commit")
            except (psycopg.errors.InsufficientPrivilege, psycopg.errors.InvalidParameterValue):
                await connection.execute("rollback")
                found = await (await connection.execute(_HOLDS, [identity.role])).fetchone()
                if found == (True,):
                    raise
                raise Problem(
                    503,
                    "auth.role_unavailable",
                    f"the API may not act as {identity.role}",
                    f"let an administrator grant {identity.role} to the login of the API",
                ) from None
            return await cursor.fetchone()

    async def findings(self, roles: Mapping[str, str]) -> dict[str, str]:
        """What keeps the API from its work, by part; nothing: it is ready.

        Asked on a connection of its own, because a pool whose server is away makes everybody wait. An answer
        counts for a second, so that many who ask do not become many connections.
        """
        async with self._probing:
            if time.monotonic() - self._probed_at >= _PROBED_FOR:
                self._found = await self._probe(sorted(set(roles.values())))
                self._probed_at = time.monotonic()
            return self._found

    async def _probe(self, roles: list[str]) -> dict[str, str]:
        try:
            async with asyncio.timeout(_PROBE_TIMEOUT):
                connection = await psycopg.AsyncConnection.connect(self._conninfo, autocommit=True)
                async with connection:
                    row = await (await connection.execute(_PROBE, [roles])).fetchone()
        except (psycopg.Error, TimeoutError):
            return {"database": "it cannot be reached"}
        is_installed, is_front_end, missing = row or (False, False, roles)
        found = {}
        if not is_installed:
            found["database"] = "b2s is not installed in it"
        if not is_front_end:
            found["front_end"] = "the login was not granted etl_frontend"
        if missing:
            found["roles"] = f"the login was not granted {', '.join(missing)}"
        return found
