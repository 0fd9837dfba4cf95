"""The rules of `b2s lint`: each finds what its Bad examples show, and nothing at all in the Good ones."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Final

import pytest

pytest.importorskip("pglast", reason="the SQL parser is not installed: pip install 'b2s[lint]'")

from b2s.config import Config, load_config
from b2s.lint import rules
from b2s.lint.engine import Finding, Options, lint
from b2s.lint.rule import Example, Rule, all_rules, register, rule
from b2s.lint.sources import Source, read_files
from docs import generate

PROJECT: Final = Path(__file__).resolve().parents[1]
RULES: Final = all_rules()
FOUND_BY_A_SERVER: Final = {"B002"}


def config_of(text: str, folder: Path) -> Config | None:
    """A configuration from its text; None for no text."""
    if not text:
        return None
    path = folder / "transformations.yaml"
    path.write_text(text, encoding="utf-8")
    return load_config(path, {}).config


def judge(example: Example, folder: Path, select: tuple[str, ...] = ()) -> tuple[Finding, ...]:
    """What is found in an example."""
    options = Options(select=select, target_version=example.target_version)
    return lint([Source("example.sql", example.sql)], config_of(example.config, folder), options).findings


def examples(which: str) -> list[object]:
    """(rule, example) for each example of one kind."""
    return [
        pytest.param(one, example, id=f"{code}-{number}")
        for code, one in RULES.items()
        for number, example in enumerate(getattr(one, which), 1)
    ]


@pytest.mark.parametrize(("one", "example"), examples("bad"))
def test_a_rule_finds_what_its_bad_example_shows(one: Rule, example: Example, tmp_path: Path) -> None:
    select = (one.code,) if one.severity == "off" else ()
    found = judge(example, tmp_path, select)
    assert one.code in {finding.code for finding in found}
    for finding in found:
        assert finding.text == example.sql.splitlines()[finding.line - 1]
        assert 1 <= finding.column <= len(finding.text) + 1


@pytest.mark.parametrize(("one", "example"), examples("good"))
def test_no_rule_finds_anything_in_a_good_example(one: Rule, example: Example, tmp_path: Path) -> None:
    assert judge(example, tmp_path) == ()
    assert judge(example, tmp_path, (one.code,)) == ()


def test_every_rule_has_examples_of_both_kinds_but_what_only_a_server_finds() -> None:
    assert {code for code, one in RULES.items() if not (one.bad and one.good)} == FOUND_BY_A_SERVER
    assert len(RULES) >= 20


def test_every_rule_has_a_file_of_its_own_named_after_its_code() -> None:
    files = [path.stem for path in Path(rules.__path__[0]).glob("b*.py")]
    assert sorted(name.split("_")[0].upper() for name in files) == list(RULES)


def test_a_code_or_a_name_cannot_be_registered_twice() -> None:
    known = RULES["B401"]
    with pytest.raises(ValueError, match="registered twice"):
        register(known)
    with pytest.raises(ValueError, match="registered twice"):
        rule("B999", known.name, "error")(lambda step, project: iter(()))
    with pytest.raises(ValueError, match="no docstring"):
        rule("B999", "says-nothing", "error")(lambda step, project: iter(()))
    assert "B999" not in all_rules()


def test_the_pages_of_the_rules_are_what_the_rules_say() -> None:
    pages = {path.name: path.read_text(encoding="utf-8") for path in generate.RULES.glob("*.md")}
    expected = {path.name: text for path, text in generate.rule_pages().items()}
    assert pages == expected, "out of date: make docs"
    text = generate.LINT.read_text(encoding="utf-8")
    assert text == generate.lint(text), "out of date: make docs"


def test_our_own_sql_is_clean() -> None:
    sources = read_files([str(PROJECT / "plpgsql"), str(PROJECT / "migrations")])
    report = lint(sources)
    assert report.findings == ()
    assert report.routine_count > 250


def test_the_worked_pipeline_is_clean_under_its_own_configuration() -> None:
    config = load_config(PROJECT / "transformations.yaml", {}).config
    folder = PROJECT / "python" / "b2s" / "demo"
    report = lint(read_files([str(folder)]), config)
    assert report.findings == ()
    assert lint(read_files([str(folder)])).findings == (), "also where nothing is configured"


def test_only_one_module_imports_the_parser_and_not_before_it_is_needed() -> None:
    importing = [
        path.name
        for path in (PROJECT / "python").rglob("*.py")
        if "import pglast" in path.read_text(encoding="utf-8")
        or "from pglast" in path.read_text(encoding="utf-8")
    ]
    assert importing == ["parser.py"]
    code = (
        "import sys, b2s.cli, b2s.commands.lint, b2s.lint.engine, b2s.lint.report; "
        "b2s.lint.report.rule_rows(); sys.exit('pglast' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=PROJECT / "python", check=False).returncode == 0
