"""b2s backfill: reads a past range again, chunk by chunk, and shows it while it goes."""

from __future__ import annotations

import argparse
import os
from typing import TYPE_CHECKING, Any, Final

from b2s import selection

if TYPE_CHECKING:
    from b2s.db import Connection
    from b2s.progress import Display

_NOT_ASKED: Final[dict[str, Any]] = {
    "procedures": [], "groups": [], "tags": [], "with_upstream": False, "with_downstream": False,
    "mode": None, "as_of": None, "transaction_scope": None, "mv_refresh": None, "confirm_full_refresh": False,
    "approved_by": None, "max_concurrency": None,
}  # fmt: skip
"""The options of b2s run that a backfill does not have."""
_NEWEST: Final = "select max(r.run_id) from etl.runs r where r.kind = 'backfill'"
_NOT_FOR_PLANS: Final = ("pause", "reason", "idempotency_key")


def configure(parser: argparse.ArgumentParser) -> None:
    """The options of b2s backfill."""
    parser.epilog = (
        "Runs go on beside a backfill, and no watermark moves. Ctrl-C once: the chunk in flight is\n"
        "finished, the rest is left for --resume. Twice: its statement is cancelled. Three times: leave.\n"
        "Exit code 1 unless every chunk succeeded."
    )
    parser.set_defaults(**_NOT_ASKED)
    what = parser.add_argument_group("what to read again")
    what.add_argument("words", nargs="*", metavar="PROCEDURE", help="names of procedures with a watermark")
    what.add_argument(
        "--from",
        dest="from_",
        metavar="X",
        help="from here on: a time, id or transaction; default: the first row",
    )
    what.add_argument("--until", metavar="Y", help="up to here, exclusive; default: the watermark")
    what.add_argument(
        "--chunk", metavar="SIZE", help="how much is one transaction: 1d, 12h, '1 month', or a number of ids"
    )
    what.add_argument(
        "--resume", metavar="RUN", help="what is left of an earlier backfill: its number, or latest"
    )
    what.add_argument(
        "--pipeline",
        default=os.environ.get("B2S_PIPELINE"),
        metavar="NAME",
        help="which pipeline (B2S_PIPELINE)",
    )
    how = parser.add_argument_group("how to do it")
    how.add_argument("--pause", metavar="TIME", help="wait after each chunk, e.g. 1s")
    how.add_argument(
        "--param", action="append", default=[], metavar="PROCEDURE.NAME=VALUE", help="a parameter; repeatable"
    )
    how.add_argument("--params", metavar="JSON", help="parameters by procedure, as for b2s run")
    how.add_argument("--reason", metavar="TEXT", help="why; it is kept with the run")
    how.add_argument(
        "--idempotency-key", metavar="KEY", help="do it only once, whoever asks again with the same key"
    )
    shown = parser.add_argument_group("what to show")
    shown.add_argument("--dry-run", action="store_true", help="only the chunks, nothing is done")
    shown.add_argument(
        "--log-format",
        choices=("json", "console"),
        default=os.environ.get("B2S_LOG_FORMAT") or None,
        help="structured log lines to stderr instead of progress (B2S_LOG_FORMAT)",
    )


def execute(arguments: argparse.Namespace) -> int:
    """Does it, and prints what became of each procedure (or with --json the document of etl.get_run)."""
    from b2s.backfillrunner import BackfillRunner, arguments_of
    from b2s.backfillview import chunk_failures, next_steps, plan_lines, procedures_table, summary
    from b2s.commands.show import get_run
    from b2s.db import connect
    from b2s.errors import UsageError
    from b2s.output import documents, print_json, print_lines, remark, style

    if arguments.log_format not in (None, "json", "console"):
        raise UsageError(
            f"B2S_LOG_FORMAT={arguments.log_format} is neither json nor console", "unset B2S_LOG_FORMAT"
        )
    with connect(arguments.dsn) as connection:
        request = _request(connection, arguments)
        if arguments.dry_run:
            asked = {name: value for name, value in request.items() if name not in _NOT_FOR_PLANS}
            named, values = arguments_of(asked)
            chunks = documents(connection, f"select * from etl.plan_backfill({named})", values)  # noqa: S608 - our own
            if arguments.json:
                print_json(chunks)
            else:
                print_lines(plan_lines(chunks, style()))
            return 0
    outcome = BackfillRunner(arguments.dsn, request, _display(arguments)).run()
    with connect(arguments.dsn) as connection:
        run = get_run(connection, outcome.run_id)
        look = style()
        lines = [] if arguments.json else procedures_table(connection, outcome.run_id, look)
    if arguments.json:
        print_json(run)
        return 0 if run["status"] in ("succeeded", "completed_with_warnings") else 1
    if not outcome.is_new:
        remark(
            f"this idempotency key is known: backfill {outcome.run_id} was started with it, nothing was done"
        )
    print_lines([*lines, *chunk_failures(run, look), summary(run, look)])
    print_lines(f"next: {line}" for line in next_steps(run))
    return 0 if outcome.status in ("succeeded", "completed_with_warnings") else 1


def _request(connection: Connection, arguments: argparse.Namespace) -> dict[str, Any]:
    """The arguments for etl.backfill that were given. Raises UsageError for what cannot be understood."""
    from b2s.commands.plan import declarations

    request = selection.request_of(arguments, declarations(connection, arguments))
    more = {
        "from_": arguments.from_,
        "until": arguments.until,
        "chunk": arguments.chunk,
        "pause": _pause(arguments.pause),
        "resume": _resumed(connection, arguments.resume),
    }
    return {**request, **{name: value for name, value in more.items() if value is not None}}


def _pause(text: str | None) -> str | None:
    from b2s.configvalues import Refused, bounded_duration
    from b2s.errors import UsageError

    if text is None:
        return None
    try:
        return f"{bounded_duration(text)} milliseconds"
    except Refused as refusal:
        raise UsageError(f"--pause {text} {refusal}", "for example: --pause 1s") from None


def _resumed(connection: Connection, word: str | None) -> int | None:
    from b2s.commands.show import run_id_of
    from b2s.errors import UsageError

    if word != "latest":
        return None if word is None else run_id_of(connection, word)
    row = connection.execute(_NEWEST).fetchone()
    if row is None or row[0] is None:
        raise UsageError("there is no backfill yet", "b2s backfill PROCEDURE --chunk 1d")
    run_id: int = row[0]
    return run_id


def _display(arguments: argparse.Namespace) -> Display:
    import sys

    from b2s.backfillview import LiveBackfillDisplay, PlainBackfillDisplay
    from b2s.db import connect
    from b2s.errors import B2SError
    from b2s.progress import LiveDisplay, display_for
    from b2s.render import Style

    def total_of(run_id: int) -> int | None:
        try:
            with connect(arguments.dsn) as connection:
                row = connection.execute(
                    "select step_count from etl.runs where run_id = %s", [run_id]
                ).fetchone()
        except B2SError:
            return None
        return row[0] if row else None

    usual = display_for(is_json=arguments.json, log_format=arguments.log_format)
    if arguments.json or arguments.log_format is not None:
        return usual
    fitting = LiveBackfillDisplay if isinstance(usual, LiveDisplay) else PlainBackfillDisplay
    return fitting(sys.stderr, Style.of(sys.stderr), total_of)
