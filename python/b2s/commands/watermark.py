"""b2s watermark: up to where everything has been read, and the column that makes windows strongest."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from b2s.online import Done
    from b2s.render import Style
    from b2s.watermarkcolumn import Step, Table

_Options = Callable[[argparse.ArgumentParser], None]
_Action = Callable[[argparse.Namespace], int]

_LIST: Final = """
select w.*, extract(epoch from w.lag) * 1000 as lag_ms from etl.watermarks w order by w.state_key"""
_HISTORY: Final = """
select h.* from etl.state_history h
 where h.state_key = %(key)s order by h.state_history_id desc limit %(limit)s"""
_IS_KNOWN: Final = """
select exists (select from etl.state s where s.state_key = %(key)s)
    or exists (select from etl.procedures p where p.state_key = %(key)s)"""
_BEFORE: Final = "select s.last_success_watermark from etl.state s where s.state_key = %s"
_COLUMN_EPILOG: Final = """\
The table stays in use. The column and the trigger need a lock that keeps everybody out for some
milliseconds: each attempt waits for it 100 ms at most, and is repeated until --lock-timeout is over. The
index is built concurrently, which waits for the transactions that are open. What was interrupted is
completed by the next call."""


def configure(parser: argparse.ArgumentParser) -> None:
    """The actions of b2s watermark, each with its options."""
    from b2s.cli import add_shared

    actions = parser.add_subparsers(
        dest="action", metavar="ACTION", title="actions", required=True, parser_class=type(parser)
    )
    for name, (purpose, add_options, _) in _ACTIONS.items():
        action = actions.add_parser(
            name,
            help=purpose,
            description=f"{purpose[0].upper()}{purpose[1:]}.",
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        add_options(action)
        add_shared(action, is_outer=False)


def execute(arguments: argparse.Namespace) -> int:
    """Performs the action."""
    _, _, perform = _ACTIONS[arguments.action]
    return perform(arguments)


def _no_options(parser: argparse.ArgumentParser) -> None:
    """The action has none of its own."""


def _add_state_key(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "state_key", metavar="STATE_KEY", help="the watermark, as b2s watermark list names it"
    )


def _add_reason(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--reason", metavar="TEXT", required=True, help="why; it is kept in the history")


def _history_options(parser: argparse.ArgumentParser) -> None:
    _add_state_key(parser)
    parser.add_argument("--limit", type=int, default=20, metavar="N", help="at most so many (default 20)")


def _set_options(parser: argparse.ArgumentParser) -> None:
    _add_state_key(parser)
    meaning = "a time, id or snapshot; now: the latest that is safe; null: the beginning"
    parser.add_argument("value", metavar="VALUE", help=meaning)
    _add_reason(parser)


def _rebase_options(parser: argparse.ArgumentParser) -> None:
    _add_state_key(parser)
    _add_reason(parser)


def _column_options(parser: argparse.ArgumentParser) -> None:
    parser.epilog = _COLUMN_EPILOG
    parser.add_argument("table", metavar="TABLE", help="the Bronze table, schema.table")
    no_trigger = "no trigger: rows are never updated, and no insert names the column"
    parser.add_argument("--insert-only", action="store_true", help=no_trigger)
    patience = "how long to try for each brief lock (default 5s)"
    parser.add_argument("--lock-timeout", default="5s", metavar="TIME", help=patience)
    parser.add_argument("--dry-run", action="store_true", help="print the SQL for psql, and change nothing")


# -- list, history --


def _list(arguments: argparse.Namespace) -> int:
    from b2s.db import connect
    from b2s.output import documents, print_json, print_lines, style

    with connect(arguments.dsn) as connection:
        found = documents(connection, _LIST)
    if arguments.json:
        print_json(found)
        return 0
    print_lines(_list_lines(found, style()) if found else ["no procedure has a watermark"])
    return 0


def _list_lines(found: Sequence[Mapping[str, Any]], style: Style) -> Iterator[str]:
    from b2s.render import Column, duration, moment, table, visible
    from b2s.runview import bound

    columns = (
        Column("state key"),
        Column("strategy"),
        Column("complete up to", may_wrap=True),
        Column("lag", is_number=True),
        Column("safe up to", may_wrap=True),
        Column("run", is_number=True),
        Column("last run"),
        Column("rows", is_number=True),
    )
    rows = [
        (
            one["state_key"],
            one["strategy"],
            bound(one["watermark"]) or "the beginning",
            duration(one["lag_ms"]),
            bound(one["horizon"]),
            one["last_run_id"],
            moment(one["last_run_at"]),
            one["last_rowcount"],
        )
        for one in found
    ]
    yield from table(columns, rows, style)
    for name, colour in (("problem", "red"), ("held_back_by", "yellow"), ("hint", "cyan")):
        for one in found:
            if one[name]:
                word = name.replace("_", " ")
                yield f"{style.paint(f'{word}:', colour)} {one['state_key']}: {visible(one[name])}"


def _history(arguments: argparse.Namespace) -> int:
    from b2s.db import connect
    from b2s.errors import UsageError
    from b2s.output import documents, print_json, print_lines, style
    from b2s.render import Column, moment, table
    from b2s.runview import bound

    if arguments.limit < 1:
        raise UsageError("--limit must be at least 1", "leave it out for the last 20 moves")
    asked = {"key": arguments.state_key, "limit": arguments.limit}
    with connect(arguments.dsn) as connection:
        if connection.execute(_IS_KNOWN.encode(), asked).fetchone() != (True,):
            raise UsageError(f"there is no watermark {arguments.state_key}", "b2s watermark list")
        found = documents(connection, _HISTORY, asked)
    if arguments.json:
        print_json(found)
        return 0
    columns = (
        Column("at"),
        Column("from", may_wrap=True),
        Column("to", may_wrap=True),
        Column("cause"),
        Column("run", is_number=True),
        Column("by"),
        Column("reason", may_wrap=True),
    )
    rows = [
        (
            moment(one["changed_at"]),
            bound(one["old_watermark"]) or "the beginning",
            bound(one["new_watermark"]) or "the beginning",
            one["cause"],
            one["run_id"],
            one["changed_by"],
            one["reason"],
        )
        for one in found
    ]
    print_lines(table(columns, rows, style()) or [f"{arguments.state_key} has not moved yet"])
    return 0


# -- set, rebase --


def _set(arguments: argparse.Namespace) -> int:
    from b2s.db import connect
    from b2s.output import print_json

    value = None if arguments.value == "null" else arguments.value
    with connect(arguments.dsn) as connection:
        before = connection.execute(_BEFORE, [arguments.state_key]).fetchone()
        row = connection.execute(
            "select etl.set_watermark(state_key => %s, value => %s, reason => %s)",
            [arguments.state_key, value, arguments.reason],
        ).fetchone()
    old, new = before[0] if before else None, row[0] if row else None
    if arguments.json:
        print_json({"state_key": arguments.state_key, "old_watermark": old, "new_watermark": new})
    else:
        print(f"{arguments.state_key}: {old or 'the beginning'} -> {new or 'the beginning'}")
    return 0


def _rebase(arguments: argparse.Namespace) -> int:
    from b2s.db import connect
    from b2s.output import print_json
    from b2s.render import plural

    with connect(arguments.dsn) as connection:
        row = connection.execute(
            "select etl.rebase_watermark(state_key => %s, reason => %s)",
            [arguments.state_key, arguments.reason],
        ).fetchone()
    count = row[0] if row else 0
    if arguments.json:
        print_json({"state_key": arguments.state_key, "row_count": count})
    else:
        stamped = f"{plural(count, 'row')} stamped anew"
        print(f"{arguments.state_key} counts this server's transactions now; {stamped}")
    return 0


# -- add-column --


def _add_column(arguments: argparse.Namespace) -> int:
    from b2s.db import connect
    from b2s.online import execute as execute_online
    from b2s.online import script
    from b2s.output import print_json, print_lines, remark, style
    from b2s.watermarkcolumn import find_table, plan

    patience_ms = _milliseconds(arguments.lock_timeout)
    done: list[Done] = []
    with connect(arguments.dsn) as connection:
        table = find_table(connection, arguments.table)
        steps = plan(table, is_insert_only=arguments.insert_only)
        if not arguments.dry_run:

            def report(one: Done) -> None:
                remark(_done_line(one))

            done = execute_online(connection, table, steps, patience_ms=patience_ms, report=report)
    if arguments.json:
        print_json(_document(table, steps, done, is_dry_run=arguments.dry_run))
    elif arguments.dry_run and steps:
        print_lines(script(steps))
    else:
        print_lines(_conclusion(table, steps, style()))
    return 0


def _milliseconds(text: str) -> int:
    from b2s.configvalues import Refused, bounded_duration
    from b2s.errors import UsageError

    try:
        return bounded_duration(text)
    except Refused as refused:
        raise UsageError(f"--lock-timeout {text} {refused}", "for example --lock-timeout 30s") from None


def _done_line(done: Done) -> str:
    from b2s.render import duration

    attempts = f", at attempt {done.attempts}" if done.attempts > 1 else ""
    return f"{done.step.purpose}: done in {duration(done.duration_ms)}{attempts}"


def _conclusion(table: Table, steps: Sequence[Step], style: Style) -> Iterator[str]:
    """What is there now, and how a procedure uses it."""
    name = table.root.name
    if not steps:
        yield f"{name} has all that the xid strategy needs: nothing to do"
        return
    yield f"{name} is ready for the xid strategy. In transformations.yaml:"
    yield ""
    yield f"    watermark: {{strategy: xid, source: {name}.etl_xid, state_key: ...}}"
    yield ""
    yield "with a state_key that no other strategy has used: the first run reads the whole table."
    yield "The routine:"
    yield ""
    yield "    create function silver.load_...(p_since pg_snapshot, p_until pg_snapshot) ..."
    yield f"      from {name} r where etl.arrived(r.etl_xid, p_since, p_until)"
    if not table.is_readable:
        schema = table.root.schema
        yield ""
        yield style.paint("steps may not read it yet:", "yellow")
        yield f"    grant usage on schema {schema} to etl_owner; grant select on {name} to etl_owner"


def _document(
    table: Table, steps: Sequence[Step], done: Sequence[Done], *, is_dry_run: bool
) -> dict[str, Any]:
    took = {one.step: one for one in done}
    return {
        "table": table.root.name,
        "is_dry_run": is_dry_run,
        "steps": [
            {
                "purpose": step.purpose,
                "statements": step.statements,
                "is_brief": step.is_brief,
                "duration_ms": took[step].duration_ms if step in took else None,
                "attempts": took[step].attempts if step in took else None,
            }
            for step in steps
        ],
    }


_ACTIONS: Final[Mapping[str, tuple[str, _Options, _Action]]] = {
    "list": ("how far each watermark is, and what holds it back", _no_options, _list),
    "history": ("every move of a watermark, newest first", _history_options, _history),
    "set": ("move a watermark by hand", _set_options, _set),
    "rebase": ("after a restore: count this server's transactions", _rebase_options, _rebase),
    "add-column": (
        "give a table the column, trigger and index of the xid strategy",
        _column_options,
        _add_column,
    ),
}
"""Every action: what it is for, its options, and what performs it."""
