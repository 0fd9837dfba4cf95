"""`b2s lint` on a corpus: faulty routines, with the line of every finding, and clean ones."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path
from typing import Final

import pytest

pytest.importorskip("pglast", reason="the SQL parser is not installed: pip install 'b2s[lint]'")

from b2s.config import load_config
from b2s.lint.engine import Options, Report, lint
from b2s.lint.sources import read_files

CORPUS: Final = Path(__file__).resolve().parent / "lint_corpus"
FAULTY: Final = sorted(CORPUS.rglob("faulty*.sql"))
CLEAN: Final = sorted(CORPUS.rglob("clean*.sql"))
EXPECTED: Final = re.compile(r"--> (.*)$")
ENOUGH: Final = 60


def ids(path: Path) -> str:
    return str(path.relative_to(CORPUS))


def judge(path: Path) -> Report:
    """A file, with the configuration beside it if there is one."""
    beside = path.parent / "transformations.yaml"
    config = load_config(beside, {}).config if beside.exists() else None
    return lint(read_files([str(path)]), config, Options())


def expected(path: Path) -> Counter[tuple[int, str]]:
    """(line, code) of the findings that a file announces; @-1 means the line before."""
    found: Counter[tuple[int, str]] = Counter()
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        match = EXPECTED.search(line)
        for word in match[1].split() if match and number > 1 else ():
            code, _, shift = word.partition("@")
            found[number + int(shift or 0), code] += 1
    return found


@pytest.mark.parametrize("path", FAULTY, ids=ids)
def test_every_fault_is_found_on_its_line_and_nothing_else(path: Path) -> None:
    found = Counter((one.line, one.code) for one in judge(path).findings)
    assert found == expected(path)


@pytest.mark.parametrize("path", CLEAN, ids=ids)
def test_nothing_is_found_in_what_is_clean(path: Path) -> None:
    assert [(one.line, one.code, one.message) for one in judge(path).findings] == []


def test_the_corpus_has_enough_routines_of_both_kinds() -> None:
    def routines(paths: list[Path]) -> int:
        return sum(path.read_text(encoding="utf-8").count("\ncreate ") for path in paths)

    assert routines(FAULTY) >= ENOUGH
    assert routines(CLEAN) >= ENOUGH
