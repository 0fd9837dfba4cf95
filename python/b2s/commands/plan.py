"""b2s plan: what a run would do, without doing it, or done and rolled back."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from b2s import selection

if TYPE_CHECKING:
    from b2s.db import Connection
    from b2s.render import Style


def configure(parser: argparse.ArgumentParser) -> None:
    """The options of b2s plan."""
    selection.configure(parser)
    shown = parser.add_argument_group("what to show")
    shown.add_argument("--statements", action="store_true", help="the SQL of every step as well")
    shown.add_argument(
        "--execute", action="store_true", help="really run every step, roll everything back, report the rows"
    )


def execute(arguments: argparse.Namespace) -> int:
    """Prints the plan of a request, or the outcome of its rehearsal."""
    from b2s.db import connect
    from b2s.output import documents, print_json, print_lines, style

    with connect(arguments.dsn) as connection:
        request = selection.request_of(arguments, declarations(connection, arguments))
        if arguments.execute:
            return rehearse(connection, request, is_json=arguments.json)
        named, values = selection.call_arguments(selection.without_key(request))
        items = documents(connection, f"select * from etl.plan_run({named})", values)  # noqa: S608 - our own
    if arguments.json:
        print_json(items)
        return 0
    print_lines(plan_lines(items, style()))
    if arguments.statements:
        print_lines(statement_lines(items))
    return 0


def declarations(connection: Connection, arguments: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """The declared parameters of each procedure; asked for only when --param needs them."""
    if not arguments.param:
        return {}
    query = "select name, parameters from etl.list_procedures(%s::text)"
    return dict(connection.execute(query, [arguments.pipeline]).fetchall())


def plan_lines(items: Sequence[Mapping[str, Any]], style: Style) -> list[str]:
    """A plan as a table, in the order of execution."""
    from b2s.render import Column, table
    from b2s.runview import window

    columns = (
        Column("step", is_number=True),
        Column("scope", is_number=True),
        Column("name"),
        Column("mode"),
        Column("transaction", may_wrap=True),
        Column("window", may_wrap=True),
        Column("notes", may_wrap=True),
    )
    rows = [
        (
            item["order_index"],
            item["scope_index"],
            item["name"],
            item["step_mode"] or "refresh",
            _transaction(item),
            window(item["window_since"], item["window_until"]),
            item["notes"],
        )
        for item in items
    ]
    return table(columns, rows, style)


def _transaction(item: Mapping[str, Any]) -> str | None:
    if item["kind"] != "step":
        return None
    scope = f"group {item['group_name']}" if item["tx_scope"] == "per_group" else "its own"
    return scope if item["isolation"] == "read committed" else f"{scope}, {item['isolation']}"


def statement_lines(items: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """The SQL of every step, as it would be executed."""
    yield ""
    for item in items:
        if item["statement"]:
            yield f"-- [{item['order_index']}] {item['name']}"
            yield f"{item['statement']};"


def rehearse(connection: Connection, request: Mapping[str, Any], *, is_json: bool) -> int:
    """Runs a request in one transaction that is rolled back, and reports what it did; 1 on a failure."""
    from b2s.output import print_json, print_lines, remark, style
    from b2s.runview import failure_lines, last_attempts, steps_table

    if not is_json:
        remark("rehearsing: every step really runs, then everything is rolled back")
    named, values = selection.request_arguments(request)
    connection.execute("set client_min_messages = warning")
    query = (
        "select to_jsonb(r.steps), to_jsonb(r.refreshes) from etl._rehearse(etl._request("  # noqa: S608 - our own
        f"{named})) r"
    )
    row = connection.execute(query.encode(), values).fetchone()
    steps, refreshes = row if row else (None, None)
    rehearsed: dict[str, Any] = {
        "steps": [{**step, "procedure": step["procedure_name"]} for step in steps or []],
        "mv_refreshes": refreshes or [],
        "is_rolled_back": True,
    }
    if is_json:
        print_json(rehearsed)
    else:
        look = style()
        print_lines(steps_table(rehearsed, look))
        print_lines(failure_lines(rehearsed, look))
        print("everything was rolled back: no data, no watermark and no run is left of it")
    outcomes = {one["status"] for one in (*last_attempts(rehearsed), *rehearsed["mv_refreshes"])}
    return 1 if outcomes & {"failed", "rolled_back", "cancelled"} else 0
