"""The application: its routes, and what is around each request."""

from __future__ import annotations

import asyncio
import re
import time
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from importlib import resources
from typing import Any, Final, cast

import psycopg
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from b2s.api.bodies import APPROVE_FIELDS, CANCEL_FIELDS, LIST_PARAMETERS, RUN_FIELDS, read_object, read_query
from b2s.api.database import Database
from b2s.api.keys import Keys
from b2s.api.problems import Problem, invalid, of_database
from b2s.api.settings import Limits, TokenRules
from b2s.api.tokens import Identity, Verifier
from b2s.selection import call_arguments, without_key

ROOT: Final = "/api/transformations"
_REQUEST_ID: Final = re.compile(r"[A-Za-z0-9._-]{1,64}")
_HEADERS: Final = [(b"cache-control", b"no-store"), (b"x-content-type-options", b"nosniff")]


_HEADER_KEY: Final = re.compile(r"[!-~]{1,255}")


class Api:
    """What the routes share."""

    def __init__(self, database: Database, keys: Keys, rules: TokenRules, limits: Limits) -> None:
        self.database = database
        self.limits = limits
        self._keys = keys
        self._rules = rules
        self._verifier = Verifier(keys, rules)
        self._openapi = resources.files("b2s.api").joinpath("openapi.json").read_bytes()

    async def _identify(self, request: Request) -> Identity:
        """Whoever asks: the first thing that any request is asked for."""
        identity = await self._verifier.identify(request.headers.get("authorization"))
        request.state.subject, request.state.role = identity.subject, identity.role
        return identity

    async def _one(self, request: Request, identity: Identity, query: str, values: Any) -> Any:
        """The one row that a call returns, made in the role and in the name of whoever asks."""
        try:
            return await self.database.call(identity, _client(request), query, values)
        except psycopg.Error as error:
            problem = of_database(error)
            if problem.status >= 500:
                request.state.failure = f"{type(error).__name__} {error.sqlstate or ''}".strip()
            raise problem from None

    async def submit(self, request: Request) -> Response:
        """Records a request for a run, or shows what it would do (dry_run)."""
        identity = await self._identify(request)
        body = await read_object(request, RUN_FIELDS, self.limits.body_bytes)
        key = request.headers.get("idempotency-key")
        if key is not None:
            if body.setdefault("idempotency_key", key) != key:
                message = "the header Idempotency-Key and the field idempotency_key differ"
                raise invalid([{"loc": ["idempotency_key"], "code": "request.invalid", "message": message}])
            if not _HEADER_KEY.fullmatch(key):
                message = "Idempotency-Key is 1 to 255 printable characters of ASCII, without spaces"
                raise invalid([{"loc": ["idempotency_key"], "code": "request.invalid", "message": message}])
        if body.pop("dry_run", False):
            named, values = call_arguments(without_key(body))
            query = f"select coalesce(jsonb_agg(to_jsonb(p)), '[]') from etl.plan_run({named}) p"  # noqa: S608 - ours
            (plan,) = await self._one(request, identity, query, values)
            return JSONResponse({"plan": plan})
        named, values = call_arguments(body)
        query = f"select run_id, status, is_new from etl.submit_run({named})"  # noqa: S608 - names are ours
        run_id, status, is_new = await self._one(request, identity, query, values)
        return JSONResponse(
            {"run_id": run_id, "status": status, "is_new": is_new},
            202 if is_new else 200,
            {"Location": f"{ROOT}/runs/{run_id}"},
        )

    async def show(self, request: Request) -> Response:
        """One run, whole."""
        identity = await self._identify(request)
        (run,) = await self._one(request, identity, "select etl.get_run(%s)", [_run_id(request)])
        return JSONResponse(run)

    async def runs(self, request: Request) -> Response:
        """A page of runs, newest first."""
        identity = await self._identify(request)
        given = read_query(request.query_params, LIST_PARAMETERS)
        named = ", ".join(f"{name} => %({name})s::{LIST_PARAMETERS[name]}" for name in given)
        (page,) = await self._one(request, identity, f"select etl.list_runs({named})", given)
        headers = {}
        if page["next_before"] is not None:
            after = request.url.include_query_params(before=page["next_before"])
            headers["Link"] = f'<{after.path}?{after.query}>; rel="next"'
        return JSONResponse(page, headers=headers)

    async def cancel(self, request: Request) -> Response:
        """Asks a run to stop."""
        identity = await self._identify(request)
        run_id = _run_id(request)
        body = await read_object(request, CANCEL_FIELDS, self.limits.body_bytes)
        values = [run_id, body.get("reason"), body.get("force", False)]
        (effect,) = await self._one(request, identity, "select etl.cancel_run(%s, %s::text, %s)", values)
        return JSONResponse({"run_id": run_id, "effect": effect})

    async def approve(self, request: Request) -> Response:
        """Approves a full refresh that somebody else asked for."""
        identity = await self._identify(request)
        run_id = _run_id(request)
        body = await read_object(request, APPROVE_FIELDS, self.limits.body_bytes)
        (effect,) = await self._one(
            request, identity, "select etl.approve_run(%s, %s::text)", [run_id, body.get("reason")]
        )
        return JSONResponse({"run_id": run_id, "effect": effect})

    async def procedures(self, request: Request) -> Response:
        """What is configured."""
        identity = await self._identify(request)
        given = read_query(request.query_params, {"pipeline": "text"})
        query = "select coalesce(jsonb_agg(to_jsonb(p)), '[]') from etl.list_procedures(%s::text) p"
        (found,) = await self._one(request, identity, query, [given.get("pipeline")])
        return JSONResponse({"procedures": found})

    async def health(self, request: Request) -> Response:
        """The process answers."""
        return JSONResponse({"status": "ok"})

    async def ready(self, request: Request) -> Response:
        """Whether requests can be served: the database is there, its grants are, and there are keys."""
        findings = await self.database.findings(self._rules.roles)
        if not await self._keys.is_ready():
            findings = {**findings, "keys": "there is no key to verify tokens with"}
        body = {"status": "unavailable" if findings else "ready", "findings": findings}
        return JSONResponse(body, 503 if findings else 200)

    async def openapi(self, request: Request) -> Response:
        """The description of this API."""
        return Response(self._openapi, media_type="application/json")


def application(api: Api, log: Any) -> ASGIApp:
    """The ASGI application."""

    @asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        await api.database.open()
        yield
        await api.database.close()

    runs = f"{ROOT}/runs"
    starlette = Starlette(
        routes=[
            Route(runs, api.submit, methods=["POST"]),
            Route(runs, api.runs, methods=["GET"]),
            Route(f"{runs}/{{run_id}}", api.show, methods=["GET"]),
            Route(f"{runs}/{{run_id}}/cancel", api.cancel, methods=["POST"]),
            Route(f"{runs}/{{run_id}}/approve", api.approve, methods=["POST"]),
            Route(f"{ROOT}/procedures", api.procedures, methods=["GET"]),
            Route("/health", api.health, methods=["GET"]),
            Route("/ready", api.ready, methods=["GET"]),
            Route("/openapi.json", api.openapi, methods=["GET"]),
        ],
        exception_handlers={HTTPException: _of_starlette, Problem: _of_problem},
        lifespan=lifespan,
    )
    starlette.router.redirect_slashes = False
    return _Around(starlette, api.limits, log)


class _Around:
    """Around each request: its time, its number, its line in the log, and an answer whatever happens."""

    def __init__(self, app: ASGIApp, limits: Limits, log: Any) -> None:
        self._app = app
        self._limits = limits
        self._log = log

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request = Request(scope)
        request_id = _request_id(request)
        answered: dict[str, Any] = {}

        async def send_on(message: Message) -> None:
            if message["type"] == "http.response.start":
                answered["status"] = message["status"]
                message["headers"] = [*message["headers"], *_HEADERS, (b"x-request-id", request_id.encode())]
            await send(message)

        started = time.monotonic()
        failure = None
        try:
            failure = await self._answer(scope, receive, send_on, answered)
        finally:
            state = scope.get("state", {})
            failure = failure or state.get("failure")
            fields = {"subject": state.get("subject"), "role": state.get("role"), "error": failure}
            say = self._log.error if failure else self._log.info
            say(
                "request",
                method=scope["method"],
                path=scope["path"],
                status=answered.get("status"),
                duration_ms=round((time.monotonic() - started) * 1000, 1),
                request_id=request_id,
                **{name: value for name, value in fields.items() if value},
            )

    async def _answer(
        self, scope: Scope, receive: Receive, send: Send, answered: dict[str, Any]
    ) -> str | None:
        """Has the request answered; what went wrong with that, for the log."""
        try:
            async with asyncio.timeout(self._limits.request_s):
                await self._app(scope, receive, send)
        except TimeoutError:
            problem, failure = Problem(504, "api.timeout", "the request took too long"), "TimeoutError"
        except Exception as error:  # noqa: BLE001 - the last place where it can become an answer
            problem = Problem(500, "internal", "the request failed; the log of the API says why")
            failure = f"{type(error).__name__} in {_place_of(error)}"
        else:
            return None
        if "status" not in answered:
            await problem.response()(scope, receive, send)
        return failure


def _place_of(error: BaseException) -> str:
    """Where an error was raised, without its text, which may hold what nobody should read."""
    traceback = error.__traceback__
    while traceback is not None and traceback.tb_next is not None:
        traceback = traceback.tb_next
    return f"{traceback.tb_frame.f_code.co_qualname}:{traceback.tb_lineno}" if traceback else "?"


async def _of_problem(request: Request, error: Exception) -> Response:
    return cast("Problem", error).response()


async def _of_starlette(request: Request, error: Exception) -> Response:
    found = cast("HTTPException", error)
    code, message = {
        404: ("request.not_found", f"there is nothing at {request.url.path[:200]}"),
        405: ("request.method", f"{request.method} is not for {request.url.path[:200]}"),
    }.get(found.status_code, ("request.refused", str(found.detail)))
    return Problem(found.status_code, code, message, headers=found.headers or {}).response()


def _run_id(request: Request) -> int:
    text = str(request.path_params["run_id"])
    if not (text.isascii() and text.isdecimal() and len(text) < 20 and int(text) < 2**63):
        raise Problem(
            404, "run.unknown", "the number of a run is a whole number", "GET /api/transformations/runs"
        )
    return int(text)


def _client(request: Request) -> str:
    """How the client is recorded: what it calls itself, in what a name of an application can hold."""
    agent = request.headers.get("user-agent", "")
    return f"b2s api: {''.join(c for c in agent if ' ' <= c <= '~')}"[:63].rstrip(": ")


def _request_id(request: Request) -> str:
    given = request.headers.get("x-request-id", "")
    return given if _REQUEST_ID.fullmatch(given) else uuid.uuid4().hex
