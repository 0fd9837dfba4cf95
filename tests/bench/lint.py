"""How long `b2s lint` takes for a thousand routines, in units of what parsing them alone takes.

The routines are those of tests/lint_corpus, over and over, in files of their own. The floor parses the same
text with the parser alone: each statement as SQL, and each PL/pgSQL body once. Target: a thousand routines in
under ten seconds on two cores.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Final

from b2s.lint.engine import lint
from b2s.lint.parser import SqlError, parse, parse_plpgsql
from b2s.lint.sources import Source

CORPUS: Final = Path(__file__).resolve().parents[1] / "lint_corpus"


def sources(count: int) -> list[Source]:
    """So many routines, or a few more."""
    texts = [path.read_text(encoding="utf-8") for path in sorted(CORPUS.glob("*.sql"))]
    routines = sum(text.count("\ncreate ") for text in texts)
    return [
        Source(f"{n}/{i}.sql", text) for n in range(-(-count // routines)) for i, text in enumerate(texts)
    ]


def floor(given: list[Source]) -> None:
    """Parses every statement once."""
    for source in given:
        for statement in source.text.split("\n\ncreate "):
            text = statement if statement.startswith(("--", "create")) else f"create {statement}"
            for work in (parse, parse_plpgsql):
                try:
                    work(text)
                except SqlError:
                    continue


def seconds(work: Callable[[], object]) -> float:
    """Processor time: it is one process, and beside other work the clock says how much of that there is."""
    begin = time.process_time()
    work()
    return time.process_time() - begin


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--routines", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    given = sources(arguments.routines)
    pairs = [(seconds(lambda: floor(given)), seconds(lambda: lint(given))) for _ in range(arguments.rounds)]
    count = lint(given[: len(given)]).routine_count
    took = [linted for _, linted in pairs]
    ratios = [linted / parsed for parsed, linted in pairs]
    print(
        f"{count} routines, {len(given)} files: {median(took):.2f} s of processor time "
        f"({min(took):.2f}-{max(took):.2f})"
    )
    print(f"ratio to parsing alone: {median(ratios):.2f} ({min(ratios):.2f}-{max(ratios):.2f})")


if __name__ == "__main__":
    main()
