"""What every command does with its result: data to stdout, remarks to stderr."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from typing import Any

from b2s.db import Connection
from b2s.render import Style


def print_lines(lines: Iterable[str]) -> None:
    """Prints lines of data."""
    for line in lines:
        print(line)


def print_json(document: object) -> None:
    """Prints one JSON document of data."""
    print(json.dumps(document, indent=2, default=str, ensure_ascii=False))


def remark(text: str) -> None:
    """Prints a line about what is going on, to stderr; what was printed before it goes out first."""
    if sys.stdout is not None and not sys.stdout.closed:
        sys.stdout.flush()
    print(text, file=sys.stderr, flush=True)


def style() -> Style:
    """How stdout is written."""
    return Style.of(sys.stdout)


def documents(
    connection: Connection, query: str, arguments: dict[str, Any] | None = None
) -> list[dict[str, Any]]:
    """The rows of a query, each as the object that the server's to_jsonb makes of it."""
    rows = connection.execute(f"select to_jsonb(q) from ({query}) q".encode(), arguments)  # noqa: S608 - our own query
    return [row[0] for row in rows]
