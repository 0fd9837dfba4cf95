"""The process: the application on a socket, until it is told to stop."""

from __future__ import annotations

import asyncio
import signal
from types import FrameType
from typing import Any

import uvicorn

from b2s.api.app import Api, application
from b2s.api.database import Database
from b2s.api.keys import Keys
from b2s.api.settings import Limits, TokenRules
from b2s.errors import UsageError


class _Server(uvicorn.Server):
    """Says where it listens, once it does."""

    def __init__(self, config: uvicorn.Config, log: Any) -> None:
        super().__init__(config)
        self._log = log

    async def startup(self, sockets: Any = None) -> None:
        await super().startup(sockets)
        for server in self.servers if self.started else ():
            for socket in server.sockets:
                host, port = socket.getsockname()[:2]
                self._log.info("api_started", host=host, port=port)


def serve(
    dsn: str,
    keys: Keys,
    rules: TokenRules,
    limits: Limits,
    log: Any,
    *,
    host: str,
    port: int,
    tls: tuple[str, str] | None,
    grace_s: float,
) -> int:
    """Serves until SIGTERM or SIGINT. Requests under way get `grace_s` to end, and no new ones are taken.

    Raises UsageError when the address cannot be listened on.
    """
    stopped_by: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        stopped_by.append(number)

    def on_loop_error(_: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        # A client that connects just as the listening socket is closed, say: asyncio prints a traceback then.
        log.warning("connection_lost", error_message=context["message"], error=repr(context.get("exception")))

    async def run() -> bool:
        asyncio.get_running_loop().set_exception_handler(on_loop_error)
        api = Api(Database(dsn, limits), keys, rules, limits)
        config = uvicorn.Config(
            application(api, log),
            host=host,
            port=port,
            log_config=None,
            access_log=False,
            server_header=False,
            lifespan="on",
            ws="none",
            timeout_graceful_shutdown=max(1, round(grace_s)),
            ssl_certfile=tls[0] if tls else None,
            ssl_keyfile=tls[1] if tls else None,
        )
        server = _Server(config, log)
        await server.serve()
        return server.started

    # The server passes on the signal that ended it, once it has ended.
    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        is_started = asyncio.run(run())
    except SystemExit:
        is_started = False
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if not is_started:
        raise UsageError(f"{host} port {port} cannot be listened on", "another program has it: --port ...")
    log.info("api_stopped", signal=signal.Signals(stopped_by[0]).name if stopped_by else None)
    return 0
