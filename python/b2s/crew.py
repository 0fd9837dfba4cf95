"""The sessions beside the one that began a run: helpers, and one that sees to its timeouts.

They are opened only when a run lasts: a short one is over before they could help, and pays nothing for them.
None of them is needed: whatever happens to them, the run goes on.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Final

import psycopg

from b2s.db import Connection, connect
from b2s.errors import B2SError
from b2s.retry import backoff

PATIENCE: Final = 0.2
"""Seconds that a run must have lasted before anybody is opened for it."""
_WATCHED_EVERY: Final = 1.0
# A scope that waits for nothing is ready or running, and is passed when it has ended.
_LOOK: Final = """
select case r.kind when 'run' then r.max_concurrency else 1 end,
       (select count(*) from etl.run_scopes s
         where s.run_id = r.run_id and s.remaining_dependencies = 0 and not s.is_passed
           and s.kind <> 'barrier'),
       exists (select from etl.procedure_runs p
                where p.run_id = r.run_id and p.ended_at is null and p.settings ? 'timeout_ms')
  from etl.runs r where r.run_id = %s and r.status = 'running'"""


class Crew:
    """Helps with one run until `leave`; `workers` sessions in all, None: as many as the run allows."""

    def __init__(
        self,
        dsn: str,
        run_id: int,
        workers: int | None,
        hear: Callable[[psycopg.errors.Diagnostic], None],
        say: Callable[[str], None],
    ) -> None:
        self._dsn = dsn
        self._run_id = run_id
        self._workers = workers
        self._hear = hear
        self._say = say
        self._is_over = threading.Event()
        self._threads: list[threading.Thread] = []
        self._helping: dict[int, Connection] = {}
        self._helpers = 0

    def start(self) -> None:
        """Returns at once; everything else happens in threads."""
        self._spawn(self._oversee, "b2s crew")

    def leave(self, timeout: float = 1.0) -> None:
        """The run is over: gives the sessions a moment to say what they have done last, and to go."""
        self._is_over.set()
        end = time.monotonic() + timeout
        for thread in list(self._threads):
            thread.join(max(0.0, end - time.monotonic()))

    def cancel_statements(self) -> None:
        """Cancels what the helpers execute, by libpq's own request."""
        for connection in list(self._helping.values()):
            connection.cancel_safe(timeout=10)

    def _spawn(self, work: Callable[[], None], name: str) -> None:
        thread = threading.Thread(target=work, name=name, daemon=True)
        self._threads.append(thread)
        thread.start()

    def _oversee(self) -> None:
        delays = backoff(first=1.0)
        wait = PATIENCE
        has_told = False
        while not self._is_over.wait(wait):
            try:
                with connect(self._dsn) as connection:
                    self._watch(connection)
                return
            except B2SError as error:
                wait = next(delays)
                if not has_told and not self._is_over.is_set():
                    has_told = True
                    self._say(f"the session that sees to timeouts and helpers is gone: {error}; trying again")

    def _watch(self, connection: Connection) -> None:
        """Opens a helper for whatever can be executed at once, and cancels statements whose time is up."""
        while (row := connection.execute(_LOOK, [self._run_id]).fetchone()) is not None:
            allowed, at_once, has_timeouts = row
            if has_timeouts:
                connection.execute("select etl.watchdog()")
            for number in range(self._helpers + 1, min(allowed, self._workers or allowed, at_once)):
                self._helpers = number
                self._spawn(lambda number=number: self._help(number), f"b2s helper {number}")  # type: ignore[misc]
            if self._is_over.wait(_WATCHED_EVERY):
                return

    def _help(self, number: int) -> None:
        """One session that takes steps of the run; lost, it is opened again as long as the run lasts."""
        delays = backoff(first=1.0)
        wait = 0.0
        has_told = False
        while not self._is_over.wait(wait):
            try:
                with connect(self._dsn) as connection:
                    connection.execute("set b2s.progress = 'json'")
                    connection.add_notice_handler(self._hear)
                    self._helping[number] = connection
                    connection.execute("call etl.work(run_id => %s)", [self._run_id])
                return
            except B2SError as error:
                wait = next(delays)
                if not has_told and not self._is_over.is_set():
                    has_told = True
                    self._say(f"a helper session is gone: {error}; the run goes on without it")
            finally:
                self._helping.pop(number, None)
