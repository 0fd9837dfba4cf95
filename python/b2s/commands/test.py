"""b2s test: proves that routines keep their contract, on a scratch copy that only one transaction sees."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from b2s.db import Connection
    from b2s.render import Style

Finding = Mapping[str, Any]

_QUERY: Final = """\
select t.*, array(select (d.line->'row')::text
    from jsonb_array_elements(t.difference) with ordinality d(line, n) order by d.n) as row_texts
  from etl.test_procedure(%(procedure)s, since => %(since)s, until => %(until)s, pieces => %(pieces)s,
    params => %(params)s::jsonb, ignore_columns => %(ignore)s, max_rows => %(max_rows)s,
    pipeline => %(pipeline)s) t"""
_COLUMNS: Final = ("check_name", "status", "detail", "remedy", "difference")
"""What --json shows of a finding; people see `row_texts`, with numbers as the database writes them."""
_EPILOG: Final = """\
Nothing is kept: every call is rolled back. While it lasts, others wait for the rows it writes, so prefer a
database for development. Exit code 1 when a check fails; warnings do not count."""


def configure(parser: argparse.ArgumentParser) -> None:
    """The options of b2s test."""
    parser.epilog = _EPILOG
    what = parser.add_argument_group("what to test")
    what.add_argument("procedures", nargs="*", metavar="PROCEDURE", help="names of procedures")
    what.add_argument("--all", action="store_true", help="every procedure of the pipeline")
    what.add_argument(
        "--pipeline",
        default=os.environ.get("B2S_PIPELINE"),
        metavar="NAME",
        help="which pipeline (B2S_PIPELINE)",
    )
    how = parser.add_argument_group("how to test it")
    how.add_argument(
        "--since", metavar="BOUND", help="start of the window; default: the newest 10,000 rows of a source"
    )
    how.add_argument(
        "--until", metavar="BOUND", help="end of the window, exclusive; default: behind the newest row"
    )
    how.add_argument(
        "--pieces", type=int, default=3, metavar="N", help="into how many pieces the window is cut (3)"
    )
    how.add_argument(
        "--param",
        action="append",
        default=[],
        metavar="[PROCEDURE.]NAME=VALUE",
        help="a parameter; repeatable",
    )
    how.add_argument(
        "--ignore",
        action="append",
        default=[],
        metavar="COLUMN",
        help="do not compare this column, or schema.table.column; repeatable",
    )
    how.add_argument(
        "--max-rows", type=int, default=200_000, metavar="N", help="refuse larger tables (200000)"
    )


def execute(arguments: argparse.Namespace) -> int:
    """Tests one procedure after the other; 1 when a check of one of them fails."""
    from b2s.db import connect
    from b2s.output import print_json, print_lines, style

    with connect(arguments.dsn) as connection:
        names, params = _asked(connection, arguments)
        tested: list[dict[str, Any]] = []
        for name in names:
            findings = _findings(connection, name, params.get(name), arguments, is_only=len(names) == 1)
            shown = [{column: finding[column] for column in _COLUMNS} for finding in findings]
            tested.append({"procedure": name, "status": _status(findings), "findings": shown})
            if not arguments.json:
                print_lines(finding_lines(name, findings, style()))
    failed = [one["procedure"] for one in tested if one["status"] == "fail"]
    if arguments.json:
        print_json(tested)
    else:
        print(conclusion(len(tested), failed))
    return 1 if failed else 0


def _asked(connection: Connection, arguments: argparse.Namespace) -> tuple[list[str], dict[str, Any]]:
    """The procedures to test and the parameters of each."""
    from b2s.errors import UsageError
    from b2s.selection import params_of

    query = "select name, parameters from etl.list_procedures(%s::text)"
    declared: dict[str, Any] = dict(connection.execute(query, [arguments.pipeline]).fetchall())
    names = list(declared) if arguments.all else list(dict.fromkeys(arguments.procedures))
    if not names or (arguments.all and arguments.procedures):
        raise UsageError("name the procedures to test, or --all", "for example: b2s test silver.fact_sales")
    words = []
    for word in arguments.param:
        name, equals, value = word.partition("=")
        if "." in name or not equals:
            words.append(word)
        elif len(names) == 1:
            words.append(f"{names[0]}.{name.strip()}={value}")
        else:
            raise UsageError(
                f"--param {word} does not say of which procedure", f"for example: --param {names[0]}.{word}"
            )
    return names, params_of(words, declared)


def _findings(
    connection: Connection,
    name: str,
    params: Mapping[str, Any] | None,
    arguments: argparse.Namespace,
    *,
    is_only: bool,
) -> list[dict[str, Any]]:
    """What the database found; repeatable read, so that what others commit meanwhile makes no difference."""
    import psycopg

    from b2s.output import documents

    connection.isolation_level = psycopg.IsolationLevel.REPEATABLE_READ
    values = {
        "procedure": name,
        "since": arguments.since,
        "until": arguments.until,
        "pieces": arguments.pieces,
        "params": json.dumps(params) if params else None,
        "ignore": [column for word in arguments.ignore for column in word.split(",")] or None,
        "max_rows": arguments.max_rows,
        "pipeline": arguments.pipeline,
    }
    try:
        with connection.transaction(force_rollback=True):
            return documents(connection, _QUERY, values)
    except psycopg.Error as error:
        if is_only or not (error.diag.sqlstate or "").startswith("PT"):
            raise
        refusal = ("runs", "fail", error.diag.message_primary, error.diag.message_hint, None)
        return [dict(zip(_COLUMNS, refusal, strict=True))]


def _status(findings: Sequence[Finding]) -> str:
    return "fail" if any(finding["status"] == "fail" for finding in findings) else "ok"


def finding_lines(name: str, findings: Sequence[Finding], style: Style) -> Iterator[str]:
    """A line per check, each with its remedy and the rows that differ."""
    from b2s.render import visible

    yield style.paint(name, "bold")
    for finding in findings:
        status = finding["status"]
        padding = " " * (len("skipped") - len(status))
        yield f"{style.status(status)}{padding}  {finding['check_name']}: {visible(finding['detail'])}"
        if finding["remedy"]:
            yield f"         {style.paint('remedy:', 'cyan')} {visible(finding['remedy'])}"
        yield from _difference_lines(finding, style)


def _difference_lines(finding: Finding, style: Style) -> Iterator[str]:
    from b2s.render import visible

    table = None
    for line, text in zip(finding["difference"] or (), finding.get("row_texts", ()), strict=True):
        if line["table"] != table:
            table = line["table"]
            yield f"         {visible(table)}"
        colour = "red" if line["change"] == "-" else "green"
        yield style.paint(f"         {line['change']} {visible(text)}", colour)


def conclusion(count: int, failed: Sequence[str]) -> str:
    """How many procedures were tested, and which of them failed."""
    from b2s.render import plural

    if not failed:
        return f"{plural(count, 'procedure')} tested, no check failed; everything was rolled back"
    return f"{plural(count, 'procedure')} tested, failed: {', '.join(failed)}; everything was rolled back"
