"""The command line: which commands there are, the options they share, and how a failure becomes words.

A command lives in `b2s.commands`, with `configure(parser)` and `execute(arguments) -> exit code`. Only the
one that is called is imported, and heavy libraries only inside `execute`: `b2s --help` answers at once.

Exit codes: 0 ok; 1 findings, drift, a failed or cancelled run; 2 usage or configuration; 3 database
unreachable or refused; 130 interrupted; 141 the reader of the output went away.
"""

from __future__ import annotations

import argparse
import importlib
import json
import keyword
import os
import sys
from collections.abc import Sequence
from typing import Final, NoReturn

from b2s import __version__

COMMANDS: Final = {
    "migrate": "install b2s into a database, or upgrade it",
    "sync-config": "apply transformations.yaml to the database",
    "init": "make a project: configuration, a routine, tables",
    "new": "write a routine by a pattern, with its entry in transformations.yaml",
    "import": "make transformations.yaml from the routines of a database",
    "lint": "find in the SQL what will hurt, before anything runs",
    "lineage": "what procedures read and write: list, check, send to an OpenLineage endpoint",
    "graph": "draw what depends on what",
    "plan": "show what a run would do",
    "test": "prove that routines keep their contract; everything is rolled back",
    "run": "run procedures, with live progress",
    "submit": "leave a request to run procedures for a worker",
    "worker": "keep sessions that execute what is submitted",
    "approve": "approve a full refresh that somebody else asked for",
    "api": "serve the HTTP API",
    "resume": "take up what is left of a run that did not succeed",
    "backfill": "read a past range again, chunk by chunk, beside the runs",
    "status": "what is running, and how each procedure last ended",
    "runs": "list runs, newest first",
    "show": "explain one run: steps, failures, what to do next",
    "logs": "what happened in a run and what its routines said; --follow",
    "report": "write one HTML file that explains a run, or a period",
    "exporter": "serve metrics to Prometheus",
    "cancel": "stop an active run",
    "schedules": "when runs are due, and what became of them",
    "reap": "record runs whose sessions are gone",
    "purge": "delete history that is no longer kept",
    "watermark": "list and move watermarks; give a table the column of the xid strategy",
    "doctor": "check the installation, and say how to repair it",
    "schema": "print the JSON Schema of transformations.yaml",
    "demo": "a tour in a private server: runs, failures, a full refresh",
}
"""Every command, in the order of the help, with what it is for."""

_TAKES_A_VALUE: Final = ("--dsn", "--config")
_BROKEN_PIPE: Final = 141
_INTERRUPTED: Final = 130
_EPILOG: Final = """\
Every option that names a B2S_ variable takes its default from it. NO_COLOR turns colours off.
Exit codes: 0 ok; 1 findings, drift or a failed run; 2 usage or configuration;
3 database unreachable or refused; 130 interrupted."""


class _Parser(argparse.ArgumentParser):
    """Errors in the form of all others: what is wrong, then what to type."""

    def error(self, message: str) -> NoReturn:
        raise _Misuse(message, f"{self.prog} --help")


class _Misuse(Exception):
    """The command line cannot be understood."""

    def __init__(self, message: str, remedy: str) -> None:
        super().__init__(message)
        self.remedy = remedy


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code; errors are printed, never raised."""
    words = list(sys.argv[1:] if argv is None else argv)
    try:
        return _run(words)
    except BrokenPipeError:
        _abandon_stdout()
        return _BROKEN_PIPE
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return _INTERRUPTED


def _run(words: list[str]) -> int:
    try:
        arguments = _parser(words).parse_args(words)
        if arguments.command is None:
            _parser(words).print_help()
            return 0
        arguments.dsn = arguments.dsn or _dsn_from_file()
        code: int = importlib.import_module(_module_of(arguments.command)).execute(arguments)
        _flush()
    except SystemExit as done:
        _flush()
        return done.code if isinstance(done.code, int) else 0
    except (BrokenPipeError, KeyboardInterrupt):
        raise
    except Exception as error:  # noqa: BLE001 - the last place where an error can become words
        return _explain(error, is_json="--json" in words)
    return code


def _module_of(command: str) -> str:
    name = command.replace("-", "_")
    return f"b2s.commands.{name}_" if keyword.iskeyword(name) else f"b2s.commands.{name}"


def _parser(words: Sequence[str]) -> argparse.ArgumentParser:
    parser = _Parser(
        prog="b2s",
        description="Bronze to Silver transformations that run inside Postgres.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"b2s {__version__}")
    add_shared(parser, is_outer=True)
    commands = parser.add_subparsers(
        dest="command", metavar="COMMAND", title="commands", parser_class=_Parser
    )
    chosen = _chosen(words)
    for name, purpose in COMMANDS.items():
        command = commands.add_parser(
            name,
            help=purpose,
            description=f"{purpose[0].upper()}{purpose[1:]}.",
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        add_shared(command, is_outer=False)
        if name == chosen:
            importlib.import_module(_module_of(name)).configure(command)
    return parser


def add_shared(parser: argparse.ArgumentParser, *, is_outer: bool) -> None:
    """The options that may stand before or after the command; the inner must not overwrite the outer."""

    def default(value: object) -> object:
        return value if is_outer else argparse.SUPPRESS

    shared = parser.add_argument_group("connection, configuration, output")
    shared.add_argument(
        "--dsn",
        default=default(os.environ.get("B2S_DSN", "")),
        help="database: a URI or key=value pairs (B2S_DSN, or the file that B2S_DSN_FILE names;"
        " without both the PG* variables of libpq)",
    )
    shared.add_argument(
        "--config",
        metavar="FILE",
        default=default(os.environ.get("B2S_CONFIG") or "transformations.yaml"),
        help="configuration file (B2S_CONFIG; default ./transformations.yaml)",
    )
    shared.add_argument("--json", action="store_true", default=default(False), help="print JSON for programs")


def _dsn_from_file() -> str:
    """The connection string that a file holds, where secrets are handed to processes as files."""
    name = os.environ.get("B2S_DSN_FILE")
    if not name:
        return ""
    try:
        with open(name, encoding="utf-8") as file:
            return file.read().strip()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not text"
        raise _Misuse(f"B2S_DSN_FILE: {name} cannot be read: {reason}", "a file that holds the DSN") from None


def _chosen(words: Sequence[str]) -> str | None:
    """The command, found without parsing: the first word that is neither an option nor the value of one."""
    is_value = False
    for word in words:
        if is_value:
            is_value = False
        elif word in _TAKES_A_VALUE:
            is_value = True
        elif not word.startswith("-"):
            return word
    return None


def _explain(error: Exception, *, is_json: bool) -> int:
    if isinstance(error, _Misuse):
        hint = _did_you_mean(str(error)) or error.remedy
        if is_json:
            print(json.dumps({"error": {"code": "usage", "message": str(error), "hint": hint, "errors": []}}))
        else:
            print(f"error: {error}\nhint: {hint}", file=sys.stderr)
        return 2
    from b2s.failure import explain

    return explain(error, is_json=is_json)


def _did_you_mean(message: str) -> str | None:
    """The command that was probably meant, when the message is about one that does not exist."""
    import difflib
    import re

    match = re.match(r"argument COMMAND: invalid choice: '([^']*)'", message)
    close = difflib.get_close_matches(match[1], COMMANDS, n=1) if match else []
    return f"did you mean: b2s {close[0]}" if close else None


def _flush() -> None:
    for stream in (sys.stdout, sys.stderr):
        if stream is not None and not stream.closed:
            stream.flush()


def _abandon_stdout() -> None:
    """Nobody reads any more: whatever is still buffered must not fail once more when Python ends."""
    try:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (OSError, ValueError, AttributeError):
        return


if __name__ == "__main__":
    sys.exit(main())
