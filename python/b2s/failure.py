"""An error as words for people or as JSON for programs, and the exit code that belongs to it."""

from __future__ import annotations

import json
import os
import sys
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import psycopg

from b2s.errors import B2SError, DatabaseError, detail_of
from b2s.render import Style, visible, visible_lines

_COMMANDS: Final = {
    "run.unknown": "b2s runs lists the runs there are",
    "run.ended": "b2s show explains how it ended",
    "run.dead": "nothing is left to cancel: b2s resume takes it up, b2s reap records it as abandoned",
    "run.nothing_left": "b2s run starts another one",
    "run.definition_changed": "add --changed reuse to keep what was written, or --changed rerun to redo it",
    "run.not_resumable": "b2s backfill --resume RUN takes up what is left of a backfill",
    "run.queued": "b2s worker --once takes it up",
    "procedure.unknown": "b2s status lists the procedures there are",
    "full_refresh.unconfirmed": "add --confirm-full-refresh",
    "full_refresh.no_reason": "add --reason '...'",
    "approval.required": "b2s submit leaves it for a worker; another admin approves it: b2s approve RUN",
}
"""What to type, by code, where the database can only say what to call."""
_NOT_A_TIME: Final = ("22007", "22008")


@dataclass(frozen=True, slots=True)
class Failure:
    """What is wrong, what to do about it, every single problem found, and the exit code."""

    message: str
    hint: str | None
    code: str
    exit_code: int
    errors: tuple[dict[str, Any], ...] = ()

    def document(self) -> dict[str, Any]:
        """The failure for programs."""
        return {
            "error": {
                "code": self.code,
                "message": self.message,
                "hint": self.hint,
                "errors": list(self.errors),
            }
        }


def explain(error: BaseException, *, is_json: bool = False) -> int:
    """Prints an error and returns its exit code. B2S_DEBUG=1 shows the traceback as well."""
    if os.environ.get("B2S_DEBUG") == "1":
        traceback.print_exception(error)
    failure = failure_of(error)
    if is_json:
        print(json.dumps(failure.document(), default=str), flush=True)
    else:
        print("\n".join(_lines(failure, Style.of(sys.stderr))), file=sys.stderr, flush=True)
    return failure.exit_code


def failure_of(error: BaseException) -> Failure:
    """The failure behind any exception; an unexpected one says where it was raised."""
    if isinstance(error, psycopg.Error):
        error = _with_cause(DatabaseError.of(error), error)
    if isinstance(error, DatabaseError):
        cause = error.__cause__
        found = detail_of(cause).get("errors", []) if isinstance(cause, psycopg.Error) else []
        code = error.code or error.sqlstate or "database.unreachable"
        problems = tuple(
            {**one, "hint": _in_words_of_the_shell(one.get("code"), one.get("hint"))}
            for one in found
            if isinstance(one, dict)
        )
        if error.sqlstate in _NOT_A_TIME:
            return Failure(str(error), "write a time as '2026-11-21 02:00+00'", "usage", 2)
        hint = _in_words_of_the_shell(error.code, error.hint)
        return Failure(str(error).removeprefix("connection is bad: "), hint, code, error.exit_code, problems)
    if isinstance(error, B2SError):
        return Failure(str(error), error.hint, "usage", error.exit_code)
    return _by_type(error)


def _by_type(error: BaseException) -> Failure:
    from b2s.yamlsource import ConfigError

    if isinstance(error, ConfigError):
        problems = tuple(
            {"line": p.line, "column": p.column, "loc": list(p.loc), "message": p.message, "hint": p.hint}
            for p in error.problems
        )
        return Failure(str(error), None, "config.invalid", 2, problems)
    if isinstance(error, OSError):
        subject = f"{error.filename}: " if error.filename else ""
        return Failure(f"{subject}{error.strerror or error}", None, "os", 2)
    frame = traceback.extract_tb(error.__traceback__)[-1:]
    place = f" ({Path(frame[0].filename).name}:{frame[0].lineno})" if frame else ""
    return Failure(
        f"b2s itself failed: {type(error).__name__}: {error}{place}",
        "this is a defect of b2s, please report it with the output of the same command under B2S_DEBUG=1",
        "internal",
        2,
    )


def _in_words_of_the_shell(code: str | None, hint: str | None) -> str | None:
    """A hint of the database, which is written for SQL clients, as a command where there is one."""
    return _COMMANDS.get(code or "", hint)


def _lines(failure: Failure, style: Style) -> list[str]:
    if failure.code == "config.invalid" and failure.errors:
        return failure.message.splitlines()
    problems = [(str(one.get("message", "")), one.get("hint")) for one in failure.errors]
    if "; ".join(message for message, _ in problems) != failure.message:
        problems.insert(0, (failure.message, failure.hint))
    lines: list[str] = []
    said: set[str | None] = {None}
    for message, hint in [*problems, ("", failure.hint)]:
        if message not in said and message:
            first, *more = visible_lines(message)
            lines += [f"{style.paint('error:', 'red')} {first}", *more]
        if hint not in said:
            lines.append(f"{style.paint('hint:', 'cyan')} {visible(str(hint))}")
        said |= {message, hint}
    return lines


def _with_cause(error: DatabaseError, cause: psycopg.Error) -> DatabaseError:
    error.__cause__ = cause
    return error
