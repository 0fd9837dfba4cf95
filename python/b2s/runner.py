"""Starting a run and staying with it: the CALL in one thread, signals and display in the main one.

Ctrl-C once (or SIGTERM) asks the run to stop after the step in flight, twice cancels that step's statement,
three times leaves. All of it goes through a second session, because the first one is busy in the CALL.
"""

from __future__ import annotations

import json
import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from queue import Empty, SimpleQueue
from types import FrameType
from typing import Any, Final

import psycopg

from b2s.db import Connection, connect
from b2s.errors import B2SError, DatabaseError
from b2s.progress import Display
from b2s.selection import call_arguments

_PROGRESS: Final = "PT200"
_NAMES: Final = {signal.SIGINT: "Ctrl-C", signal.SIGTERM: "SIGTERM"}


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a run ended. `is_new` is false when the idempotency key was known: nothing was run."""

    run_id: int
    status: str
    is_new: bool


@dataclass(frozen=True, slots=True)
class _Signal:
    number: int


@dataclass(frozen=True, slots=True)
class _Said:
    severity: str
    message: str
    hint: str | None


@dataclass(frozen=True, slots=True)
class _Remark:
    text: str


@dataclass(frozen=True, slots=True)
class _Ended:
    """The CALL returned, or raised."""

    row: tuple[int, str] | None
    error: BaseException | None = None


_Item = _Signal | _Said | _Remark | _Ended | dict[str, Any]


class Runner:
    """One CALL of etl.start_run, watched."""

    def __init__(self, dsn: str, request: Mapping[str, Any], display: Display) -> None:
        self._dsn = dsn
        self._request = request
        self._display = display
        self._inbox: SimpleQueue[_Item] = SimpleQueue()
        self._connection: Connection | None = None
        self._run_id: int | None = None
        self._interrupts = 0

    def run(self) -> Outcome:
        """Runs to the end. Raises what the CALL raised, or KeyboardInterrupt when nobody waits any more."""
        worker = threading.Thread(target=self._call, name="b2s run", daemon=True)
        with _signals(self._inbox.put):
            worker.start()
            try:
                ended = self._watch()
            finally:
                self._display.close()
        if ended.error is not None:
            if self._interrupts and self._run_id is None:
                raise KeyboardInterrupt
            raise ended.error
        assert ended.row is not None  # noqa: S101 - a CALL with INOUT arguments returns one row
        run_id, status = ended.row
        return Outcome(run_id, status, is_new=self._run_id is not None)

    def _watch(self) -> _Ended:
        while True:
            try:
                item = self._inbox.get(timeout=self._display.interval)
            except Empty:
                self._display.tick()
                continue
            match item:
                case _Ended():
                    return item
                case _Signal(number):
                    self._interrupt(number)
                case _Said(severity, message, hint):
                    self._display.notice(severity, message, hint)
                case _Remark(text):
                    self._display.say(text)
                case dict():
                    self._run_id = item["run_id"]
                    self._display.event(item)

    # -- the session that runs --

    def _call(self) -> None:
        try:
            named, values = call_arguments(self._request)
            with connect(self._dsn) as connection:
                connection.execute("set b2s.progress = 'json'")
                connection.add_notice_handler(self._on_notice)
                self._connection = connection
                row = connection.execute(f"call etl.start_run({named})".encode(), values).fetchone()
                self._inbox.put(_Ended(row and (row[0], row[1])))
        except BaseException as error:  # noqa: BLE001 - it is raised again in the main thread
            self._inbox.put(_Ended(None, error))

    def _on_notice(self, notice: psycopg.errors.Diagnostic) -> None:
        if notice.sqlstate == _PROGRESS and notice.message_detail:
            self._inbox.put(json.loads(notice.message_detail))
        else:
            severity = notice.severity_nonlocalized or "NOTICE"
            self._inbox.put(_Said(severity, notice.message_primary or "", notice.message_hint))

    # -- stopping it --

    def _interrupt(self, number: int) -> None:
        connection = self._connection
        self._interrupts += 1
        if self._interrupts > 2 or connection is None:
            if self._run_id is not None:
                self._display.say(f"left; run {self._run_id} was asked to stop, see: b2s show {self._run_id}")
            raise KeyboardInterrupt
        is_forced = self._interrupts == 2
        arguments = (connection, _NAMES.get(signal.Signals(number), "signal"), is_forced)
        threading.Thread(target=self._cancel, args=arguments, name="b2s cancel", daemon=True).start()

    def _cancel(self, connection: Connection, reason: str, is_forced: bool) -> None:
        try:
            with connect(self._dsn) as second:
                run_id = _run_of(second, connection.info.backend_pid)
                if run_id is None:
                    connection.cancel_safe(timeout=10)
                    return
                done = _ask(second, run_id, reason, is_forced=is_forced)
        except (B2SError, psycopg.Error) as error:
            if is_forced:
                self._cancel_statement(connection)
            else:
                self._inbox.put(
                    _Remark(f"could not ask the run to stop: {error}; Ctrl-C again cancels its statement")
                )
            return
        more = "" if is_forced else "; Ctrl-C again cancels that step's statement"
        self._inbox.put(_Remark(f"cancelling run {run_id}: {done}{more}"))

    def _cancel_statement(self, connection: Connection) -> None:
        """The way that needs no right and no second session: libpq's own cancel request."""
        try:
            connection.cancel_safe(timeout=10)
        except psycopg.Error as error:
            self._inbox.put(_Remark(f"could not cancel the statement: {error}; Ctrl-C again leaves"))
        else:
            self._inbox.put(_Remark("cancelling the statement in flight; what follows is skipped"))


def _run_of(second: Connection, pid: int) -> int | None:
    query = "select r.run_id from etl.runs r where r.status = 'running' and r.worker_pid = %s"
    row = second.execute(query, [pid]).fetchone()
    return row[0] if row else None


def _ask(second: Connection, run_id: int, reason: str, *, is_forced: bool) -> str:
    query = "select etl.cancel_run(%s, reason => %s, force => %s)"
    try:
        row = second.execute(query, [run_id, reason, is_forced]).fetchone()
    except psycopg.Error as error:
        failure = DatabaseError.of(error)
        if failure.code == "run.ended":
            return "it has just ended"
        raise
    return str(row[0]) if row else ""


@contextmanager
def _signals(put: Callable[[_Item], None]) -> Iterator[None]:
    """While it lasts SIGINT and SIGTERM become items of the inbox; only the main thread may do that."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def handle(number: int, frame: FrameType | None) -> None:
        put(_Signal(number))

    before = {number: signal.signal(number, handle) for number in _NAMES}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
