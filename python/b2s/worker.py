"""Sessions that stay: they take up queued runs, help with active ones, and come back when the database does.

One thread for each session, and one, the keeper, that listens for submitted runs, sees to timeouts and
records dead runs; with --schedule it is the clock as well, and another one purges history once a day. A
session takes up one run at a time and by its number, so that a worker that is told to stop finishes what it
has begun and takes up nothing else.
"""

from __future__ import annotations

import json
import signal
import threading
import time
from collections.abc import Sequence
from queue import Empty, SimpleQueue
from types import FrameType
from typing import Any, Final

import psycopg
from psycopg import conninfo

from b2s.db import Connection, connect, parameters_of
from b2s.errors import B2SError, DatabaseError, UsageError
from b2s.failure import failure_of
from b2s.progress import log_event
from b2s.retry import backoff, event_in, is_beyond_patience

_WATCHED_EVERY: Final = 1.0
_REAPED_EVERY: Final = 10.0
_PURGE_LOOKED_EVERY: Final = 600.0
_LOOKED_EVERY: Final = 0.2
_KEEPALIVES: Final = {"keepalives_idle": "30", "keepalives_interval": "10", "keepalives_count": "3"}
_SIGNALS: Final = (signal.SIGINT, signal.SIGTERM)
_READY: Final = """
select q.run_id
  from (select distinct on (h.pipeline) h.run_id from etl.run_history h
         where h.kind = 'run'
           and (h.status = 'queued' and not h.awaits_approval or h.status = 'running' and not h.is_dead)
           and (%(pipelines)s::text[] is null or h.pipeline = any (%(pipelines)s::text[]))
         order by h.pipeline, h.status = 'queued', h.run_id) q
 order by q.run_id"""
"""Of each pipeline the active run, else the one that has waited longest."""
_IS_WAITED_FOR: Final = """
select exists (select from etl.run_history h
                where h.kind = 'run' and h.status = 'queued' and not h.awaits_approval
                  and (%(pipelines)s::text[] is null or h.pipeline = any (%(pipelines)s::text[])))"""
_UNKNOWN: Final = """
select array(select n from unnest(%(pipelines)s::text[]) n
              where n not in (select p.name from etl.pipelines p))"""

_FIRE: Final = "select pipeline, schedule, slot_at, outcome, run_id, reason from etl.fire_schedules()"
_IS_PURGE_DUE: Final = """
select not exists (select from etl.heartbeats h
                    where h.name = 'purge' and h.beat_at > clock_timestamp() - interval '1 day')"""
_END: Final = """
select pg_terminate_backend(a.pid, 5000) from pg_stat_activity a
 where a.pid = %s and a.usename = current_user and a.datname = current_database()"""


def lasting(dsn: str) -> str:
    """The same way in, for sessions that stay: a network that is gone is noticed within a minute."""
    parameters = {"application_name": "b2s worker", **_KEEPALIVES, **parameters_of(dsn)}
    return conninfo.make_conninfo("", **parameters)


class Team:
    """What the sessions of one `b2s worker` share."""

    def __init__(
        self,
        dsn: str,
        workers: int,
        pipelines: Sequence[str] | None,
        log: Any,
        *,
        poll: float,
        is_once: bool,
        is_clock: bool = False,
    ) -> None:
        self.dsn = lasting(dsn)
        self.log = log
        self.filter = {"pipelines": list(pipelines) if pipelines else None}
        self.is_once = is_once
        self.is_clock = is_clock
        self.executed: set[int] = set()
        self.error: B2SError | None = None
        self.is_stopping = threading.Event()
        self._poll = poll
        self._news = 0
        self._changed = threading.Condition()
        self._is_over = threading.Event()
        self._sessions = [_Session(self, number) for number in range(1, workers + 1)]
        self._inbox: SimpleQueue[int] = SimpleQueue()

    def work(self, grace: float) -> bool:
        """Works until told to stop, or, once, until nothing is queued. False when steps were cut off."""
        self._check()
        before = {number: signal.signal(number, self._on_signal) for number in _SIGNALS}
        keeper = threading.Thread(target=self._keep, name="b2s keeper", daemon=True)
        purger = threading.Thread(target=self._purge, name="b2s purger", daemon=True)
        try:
            self.log.info("worker_started", workers=len(self._sessions), pipelines=self.filter["pipelines"])
            keeper.start()
            if self.is_clock and not self.is_once:
                purger.start()
            for session in self._sessions:
                session.start()
            is_clean = self._attend(grace)
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
            self._is_over.set()
            self.rouse()
        keeper.join(2 * _WATCHED_EVERY)
        self.log.info("worker_stopped", executed=len(self.executed))
        if self.error is not None:
            raise self.error
        return is_clean

    # -- what sessions ask --

    @property
    def news(self) -> int:
        """Counts what was heard, for `wait_for_news`."""
        return self._news

    @property
    def is_busy(self) -> bool:
        """Whether any session works on a run: there may be more to do then, even with an empty queue."""
        return any(one.run_id is not None for one in self._sessions)

    def wait_for_news(self, seen: int) -> None:
        """Until something was heard since `seen`, for at most the poll interval."""
        with self._changed:
            self._changed.wait_for(lambda: self._news != seen or self.is_stopping.is_set(), self._poll)

    def rouse(self) -> None:
        """Something may be ready."""
        with self._changed:
            self._news += 1
            self._changed.notify_all()

    def take(self, session: _Session, run_id: int) -> bool:
        """Notes that a session is about to work on a run; false once the worker is to stop."""
        with self._changed:
            session.run_id = None if self.is_stopping.is_set() else run_id
            return session.run_id is not None

    # -- the main thread --

    def _check(self) -> None:
        """Says at once what no patience repairs. A server that does not answer is waited for, except once."""
        try:
            with connect(self.dsn) as connection:
                row = connection.execute(_UNKNOWN, self.filter).fetchone()
                if self.is_clock:
                    self._fire(connection)
        except DatabaseError as error:
            if self.is_once or is_beyond_patience(error):
                raise
            return
        if row and row[0]:
            raise UsageError(f"there is no pipeline {', '.join(row[0])}", "b2s status lists them")

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self._inbox.put(number)

    def _attend(self, grace: float) -> bool:
        deadline: float | None = None
        while any(session.is_alive() for session in self._sessions):
            try:
                number = self._inbox.get(timeout=_LOOKED_EVERY)
            except Empty:
                if deadline is not None and time.monotonic() > deadline:
                    return self._cut_off()
                continue
            if deadline is not None:
                return self._cut_off()
            deadline = time.monotonic() + grace
            self._stop(number, grace)
        return True

    def _stop(self, number: int, grace: float) -> None:
        with self._changed:
            self.is_stopping.set()
            self._changed.notify_all()
        runs = sorted({one.run_id for one in self._sessions if one.run_id is not None})
        self.log.info("worker_stopping", signal=signal.Signals(number).name, active_runs=runs, grace_s=grace)

    def _cut_off(self) -> bool:
        """Ends the sessions that are still at work: their steps are rolled back, for others to try again."""
        active = [one for one in self._sessions if one.is_alive() and one.pid is not None]
        runs = sorted({one.run_id for one in active if one.run_id is not None})
        try:
            with connect(self.dsn) as connection:
                for session in active:
                    connection.execute(_END, [session.pid])
                connection.execute("select etl.reap()")
        except B2SError as error:
            self.log.warning("sessions_left_behind", error_message=str(error), active_runs=runs)
            return False
        for session in active:
            session.join(_WATCHED_EVERY)
        hint = "other workers try the steps again; where there are none: b2s resume RUN"
        self.log.warning("sessions_cut_off", active_runs=runs, hint=hint)
        return False

    # -- the keeper --

    def _keep(self) -> None:
        delays = backoff()
        while not self._is_over.is_set():
            try:
                with connect(self.dsn) as connection:
                    connection.add_notice_handler(self._hear)
                    connection.execute("listen etl")
                    delays = backoff()
                    self._watch(connection)
            except B2SError:
                self._is_over.wait(next(delays))  # the sessions log that the database is gone

    def _watch(self, connection: Connection) -> None:
        reaped_at = 0.0
        while not self._is_over.is_set():
            if time.monotonic() - reaped_at >= _REAPED_EVERY:
                reaped_at = time.monotonic()
                connection.execute("select etl.reap()")
            connection.execute("select etl.watchdog()")
            if self.is_clock:
                self._fire(connection)
            end = time.monotonic() + _WATCHED_EVERY
            while (left := end - time.monotonic()) > 0 and not self._is_over.is_set():
                for notice in connection.notifies(timeout=min(left, _LOOKED_EVERY), stop_after=1):
                    if str(json.loads(notice.payload).get("event")).startswith("run_"):
                        self.rouse()

    def _fire(self, connection: Connection) -> None:
        """Asks what is due; what was queued is there for the sessions at once."""
        names = ("pipeline", "schedule", "slot_at", "outcome", "run_id", "reason")
        for row in connection.execute(_FIRE).fetchall():
            found = {name: value for name, value in zip(names, row, strict=True) if value is not None}
            say = self.log.info if found["outcome"] == "submitted" else self.log.warning
            say("schedule_fired", **{**found, "slot_at": found["slot_at"].isoformat()})
            self.rouse()

    def _purge(self) -> None:
        """Once a day, whoever did it last."""
        while not self._is_over.is_set():
            try:
                with connect(self.dsn) as connection:
                    if connection.execute(_IS_PURGE_DUE.encode()).fetchone() == (True,):
                        row = connection.execute("call etl.purge()").fetchone()
                        self.log.info(
                            "history_purged",
                            **{k.replace(" ", "_"): n for k, n in row[0].items()} if row else {},
                        )
            except B2SError as error:
                self.log.warning("history_not_purged", error_message=str(error))
            self._is_over.wait(_PURGE_LOOKED_EVERY)

    def _hear(self, notice: psycopg.errors.Diagnostic) -> None:
        hear(self.log, notice)


class _Session(threading.Thread):
    """One session: executes what is ready, then waits for more."""

    def __init__(self, team: Team, number: int) -> None:
        super().__init__(name=f"b2s worker {number}", daemon=True)
        self.run_id: int | None = None
        self.pid: int | None = None
        self._team = team
        self._log = team.log.bind(worker=number)
        self._is_done = False

    def run(self) -> None:
        """Until the worker stops; a session that is lost is opened again, after a wait that grows."""
        team = self._team
        delays = backoff()
        while not team.is_stopping.is_set() and not self._is_done:
            opened_at = time.monotonic()
            try:
                with connect(team.dsn) as connection:
                    self._open(connection)
                    self._serve(connection)
            except Exception as error:  # noqa: BLE001 - a worker lives on, whatever happened to one session
                delays = backoff() if time.monotonic() - opened_at > 60 else delays
                self._lose(error, delays)
            finally:
                self.pid = None

    def _open(self, connection: Connection) -> None:
        connection.execute("set b2s.progress = 'json'")
        connection.add_notice_handler(lambda notice: hear(self._log, notice))
        self.pid = connection.info.backend_pid
        self._log.info("session_opened", pid=self.pid)

    def _lose(self, error: Exception, delays: Any) -> None:
        failure = failure_of(error)
        known = {"error_message": failure.message, "run_id": self.run_id, "pid": self.pid}
        fields = {name: value for name, value in known.items() if value is not None}
        self.run_id = None
        if self._team.is_stopping.is_set():
            self._log.warning("session_ended", **fields)
        elif self._team.is_once:
            self._is_done = True
            self._team.error = error if isinstance(error, B2SError) else DatabaseError(failure.message)
            self._log.error("session_lost", **fields)
        else:
            wait = next(delays)
            self._log.warning("session_lost", **fields, retry_in_s=round(wait, 2))
            self._team.is_stopping.wait(wait)

    def _serve(self, connection: Connection) -> None:
        team = self._team
        while not team.is_stopping.is_set():
            seen = team.news
            if self._execute_ready(connection):
                continue
            if team.is_once and not team.is_busy:
                row = connection.execute(_IS_WAITED_FOR, team.filter).fetchone()
                if row == (False,):
                    self._is_done = True
                    team.rouse()
                    return
            team.wait_for_news(seen)

    def _execute_ready(self, connection: Connection) -> bool:
        """Executes the first run that has room for this session; false when there is none."""
        for (run_id,) in connection.execute(_READY, self._team.filter).fetchall():
            if not self._team.take(self, run_id):
                return False
            try:
                row = connection.execute("call etl.work(run_id => %s)", [run_id]).fetchone()
            except psycopg.errors.QueryCanceled as error:
                self._log.warning("session_interrupted", run_id=run_id, error_message=str(error).strip())
                row = None
            self.run_id = None
            if row and row[0]:
                self._team.executed.add(run_id)
                self._team.rouse()
                return True
        return False


def hear(log: Any, notice: psycopg.errors.Diagnostic) -> None:
    """Logs what the server says: events of runs as such, everything else as a notice."""
    event = event_in(notice)
    if event is not None:
        log_event(log, event)
        return
    say = log.warning if notice.severity_nonlocalized == "WARNING" else log.info
    hint = {"hint": notice.message_hint} if notice.message_hint else {}
    say("notice", message=notice.message_primary, **hint)
