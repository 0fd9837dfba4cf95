"""Showing something again and again: on a terminal in place, else one after the other."""

from __future__ import annotations

import json
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from datetime import datetime
from typing import Any

from b2s.db import Connection, connect
from b2s.errors import DatabaseError
from b2s.options import seconds
from b2s.output import style
from b2s.render import Style
from b2s.retry import is_beyond_patience

Read = Callable[[Connection], Mapping[str, Any]]
Lines = Callable[[Mapping[str, Any], Style], Iterable[str]]


def watch(dsn: str, interval: str, read: Read, lines: Lines, *, is_json: bool) -> int:
    """Until Ctrl-C. A database that goes away is said to be away, and looked for again each time."""
    pause = seconds("--watch", interval)
    has_been_there = False
    while True:
        began = time.monotonic()
        try:
            with connect(dsn) as connection:
                while True:
                    _show(read(connection), lines, is_json=is_json)
                    has_been_there = True
                    time.sleep(pause)
        except DatabaseError as error:
            if not has_been_there or is_beyond_patience(error):
                raise
            _print([f"the database is away: {error}"], is_json=is_json)
            time.sleep(max(0.0, pause - (time.monotonic() - began)))


def _show(found: Mapping[str, Any], lines: Lines, *, is_json: bool) -> None:
    if is_json:
        print(json.dumps(found, default=str, ensure_ascii=False), flush=True)
    else:
        _print(lines(found, style()), is_json=False)


def _print(lines: Iterable[str], *, is_json: bool) -> None:
    """In place on a terminal: what is longer or wider than it is cut off, so that the top stays."""
    look = style()
    at = datetime.now().astimezone().strftime("%H:%M:%S")
    shown = [look.paint(at, "dim"), *lines]
    if is_json:
        print("\n".join(shown[1:]), file=sys.stderr, flush=True)
    elif look.width is None:
        print("\n".join([*shown, ""]), flush=True)
    else:
        text = "".join(f"{line}\x1b[K\n" for line in shown[: _height() - 1])
        sys.stdout.write(f"\x1b[?7l\x1b[H{text}\x1b[J\x1b[?7h")
        sys.stdout.flush()


def _height() -> int:
    return max(5, shutil.get_terminal_size().lines)
