"""Starting a run and staying with it: the CALL in one thread, signals and display in the main one.

Ctrl-C once (or SIGTERM) asks the run to stop after the step in flight, twice cancels that step's statement,
three times leaves. All of it goes through a second session, because the first one is busy in the CALL. What
other sessions do for the run (`b2s.crew`) arrives in the same inbox.
"""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from queue import Empty, SimpleQueue
from types import FrameType
from typing import Any, Final, TypeGuard

import psycopg

from b2s.crew import Crew
from b2s.db import Connection, connect
from b2s.errors import B2SError, DatabaseError
from b2s.progress import Display
from b2s.retry import backoff, event_in
from b2s.selection import call_arguments

_LOOKED_EVERY: Final = 0.25
_TRIES: Final = 5
"""How often a session is tried that asks how a run stands which has lost its first one: some four seconds."""
_STANDING: Final = """
select h.status, h.is_dead, exists (select from pg_stat_activity a where a.pid = %(pid)s)
  from etl.run_history h where h.run_id = %(run_id)s"""
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
    is_final: bool = False
    """Whether it was looked up how the run itself ended."""


_Item = _Signal | _Said | _Remark | _Ended | dict[str, Any]


class Runner:
    """One CALL of etl.start_run, watched; `workers` sessions in all, None: as many as the run allows."""

    def __init__(
        self, dsn: str, request: Mapping[str, Any], display: Display, workers: int | None = None
    ) -> None:
        self._dsn = dsn
        self._request = request
        self._display = display
        self._workers = workers
        self._inbox: SimpleQueue[_Item] = SimpleQueue()
        self._connection: Connection | None = None
        self._pid = 0
        self._crew: Crew | None = None
        self._run_id: int | None = None
        self._interrupts = 0

    def run(self) -> Outcome:
        """Runs to the end. Raises what the CALL raised, or KeyboardInterrupt when nobody waits any more."""
        worker = threading.Thread(target=self._call, name="b2s run", daemon=True)
        with _signals(self._inbox.put):
            worker.start()
            try:
                ended = self._watch()
                self._dismiss()
            finally:
                self._display.close()
        if ended.error is not None:
            if self._interrupts and self._run_id is None:
                raise KeyboardInterrupt
            raise ended.error
        assert ended.row is not None  # noqa: S101 - a CALL with INOUT arguments returns one row
        run_id, status = ended.row
        return Outcome(run_id, status, is_new=self._run_id is not None)

    def _statement(self) -> tuple[str, dict[str, Any]]:
        """The CALL and its values; it returns the number of the run and its status."""
        named, values = call_arguments(self._request)
        return f"call etl.start_run({named})", values

    def _watch(self) -> _Ended:
        while True:
            try:
                item = self._inbox.get(timeout=self._display.interval)
            except Empty:
                self._display.tick()
                continue
            if not isinstance(item, _Ended):
                self._take(item)
            elif self._run_id is not None and not item.is_final and _is_lost(item.error):
                arguments = (self._run_id, item.error)
                threading.Thread(target=self._outlive, args=arguments, name="b2s wait", daemon=True).start()
            else:
                return item

    def _take(self, item: _Item) -> None:
        match item:
            case _Signal(number):
                self._interrupt(number)
            case _Said(severity, message, hint):
                self._display.notice(severity, message, hint)
            case _Remark(text):
                self._display.say(text)
            case dict():
                self._meet(item)
                self._display.event(item)

    def _meet(self, event: Mapping[str, Any]) -> None:
        """The first event tells which run it is; who helps with it is called when it lasts."""
        if self._run_id is None and "run_id" in event:
            self._run_id = event["run_id"]
            self._crew = Crew(self._dsn, event["run_id"], self._workers, self._on_notice, self._remark)
            self._crew.start()

    def _dismiss(self) -> None:
        """Shows what the others still had to say."""
        if self._crew is None:
            return
        self._crew.leave()
        while not self._inbox.empty():
            self._take(self._inbox.get())

    def _remark(self, text: str) -> None:
        self._inbox.put(_Remark(text))

    # -- the session that runs --

    def _call(self) -> None:
        try:
            statement, values = self._statement()
            with connect(self._dsn) as connection:
                connection.execute("set b2s.progress = 'json'")
                connection.add_notice_handler(self._on_notice)
                self._pid = connection.info.backend_pid
                self._connection = connection
                row = connection.execute(statement.encode(), values).fetchone()
                self._inbox.put(_Ended(row and (row[0], row[1])))
        except BaseException as error:  # noqa: BLE001 - it is raised again in the main thread
            self._inbox.put(_Ended(None, error))

    def _on_notice(self, notice: psycopg.errors.Diagnostic) -> None:
        event = event_in(notice)
        if event is not None:
            self._inbox.put(event)
        else:
            severity = notice.severity_nonlocalized or "NOTICE"
            self._inbox.put(_Said(severity, notice.message_primary or "", notice.message_hint))

    # -- when it is gone --

    def _outlive(self, run_id: int, lost: DatabaseError) -> None:
        """The session of the CALL is gone. Others may go on with the run: waits for its end on record."""
        delays = backoff()
        for _ in range(_TRIES):
            try:
                with connect(self._dsn) as second:
                    self._inbox.put(_Ended((run_id, self._await_end(second, run_id, lost)), is_final=True))
                    return
            except B2SError:
                time.sleep(next(delays))
        hint = f"what it committed stays; once the server is back: b2s resume {run_id}"
        self._inbox.put(_Ended(None, DatabaseError(str(lost), hint, sqlstate=lost.sqlstate), is_final=True))

    def _await_end(self, second: Connection, run_id: int, lost: DatabaseError) -> str:
        """The status that a run ends with; when nobody is at work on it any more, that is recorded."""
        has_told = False
        while True:
            row = second.execute(_STANDING, {"run_id": run_id, "pid": self._pid}).fetchone()
            status, is_dead, is_there = row or ("abandoned", False, False)
            if status != "running":
                return str(status)
            if is_dead:
                self._remark(f"{lost}; nobody is at work on run {run_id} any more")
                second.execute("select etl.reap()")
            elif not has_told and not is_there:
                has_told = True
                self._remark(f"{lost}; other sessions go on with run {run_id}, waiting for its end")
            time.sleep(_LOOKED_EVERY)

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
                run_id = self._run_id or _run_of(second, self._pid)
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
            if self._crew is not None:
                self._crew.cancel_statements()
        except psycopg.Error as error:
            self._inbox.put(_Remark(f"could not cancel the statement: {error}; Ctrl-C again leaves"))
        else:
            self._inbox.put(_Remark("cancelling the statement in flight; what follows is skipped"))


class ResumeRunner(Runner):
    """One CALL of etl.resume_run, watched."""

    def _statement(self) -> tuple[str, dict[str, Any]]:
        text = "call etl.resume_run(run_id => %(run_id)s::bigint, changed_steps => %(changed_steps)s::text)"
        return text, dict(self._request)


def _is_lost(error: BaseException | None) -> TypeGuard[DatabaseError]:
    """Whether the session of a CALL is gone, and not the run that it worked on."""
    return isinstance(error, DatabaseError) and (
        error.sqlstate is None or error.sqlstate.startswith(("57P", "08"))
    )


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
