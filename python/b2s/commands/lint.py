"""b2s lint: what will hurt, found in the SQL before anything runs."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from b2s.configmodel import Config
    from b2s.lint.database import Live
    from b2s.lint.engine import Report

_FORMATS: Final = ("text", "json", "github", "sarif")
_DEFAULT_CONFIG: Final = "transformations.yaml"


def configure(parser: argparse.ArgumentParser) -> None:
    """The options of b2s lint."""
    parser.epilog = (
        "Needs the parser pglast: pip install 'b2s[lint]'.\n"
        "A comment silences a finding: -- b2s: ignore[B401] reason.\n"
        "Exit codes: 0 clean (remarks do not count), 1 findings, 2 could not lint, 3 database\n"
        "unreachable or refused."
    )
    parser.add_argument(
        "paths", nargs="*", metavar="PATH", help="files or folders of SQL (default: this folder)"
    )
    parser.add_argument("--db", action="store_true", help="the routines as the database has them")
    parser.add_argument("--select", action="append", default=[], metavar="CODES", help="only these: B401,B5")
    parser.add_argument("--ignore", action="append", default=[], metavar="CODES", help="all but these")
    parser.add_argument("--explain", metavar="CODE", help="explain a rule and stop")
    parser.add_argument(
        "--format", choices=_FORMATS, default="text", help="how findings are printed (default: text)"
    )
    parser.add_argument(
        "--target-version", type=int, metavar="MAJOR", help="the oldest PostgreSQL the SQL is for, e.g. 15"
    )


def execute(arguments: argparse.Namespace) -> int:
    """Reads, judges, prints; 1 when there are errors or warnings."""
    from b2s.lint import parser
    from b2s.lint.engine import Options, lint
    from b2s.lint.sources import read_files

    if arguments.explain:
        return _explain(arguments.explain)
    parser.require()
    config = _config(arguments.config)
    select, ignore = _codes(arguments.select), _codes(arguments.ignore)
    sources = read_files(arguments.paths or ([] if arguments.db else ["."]))
    live = _live(arguments.dsn, config) if arguments.db else None
    target = arguments.target_version
    if live is not None:
        sources += live.sources
        given = config.lint.target_version if config else None
        target = target or given or live.version
    report = lint(sources, config, Options(select, ignore, target), (live.foreign if live else None) or ())
    _print(report, "json" if arguments.json else arguments.format)
    return 1 if any(one.is_failure for one in report.findings) else 0


def _print(report: Report, form: str) -> None:
    from b2s.lint import report as reports
    from b2s.output import print_json, print_lines, remark, style

    if form == "json":
        print_json(reports.document(report))
    elif form == "sarif":
        print_json(reports.sarif(report))
    elif form == "github":
        print_lines(reports.github_lines(report))
    else:
        print_lines(reports.text_lines(report, style()))
        remark(reports.summary(report))


def _explain(code: str) -> int:
    from b2s.lint.report import explanation
    from b2s.lint.rule import all_rules
    from b2s.output import print_lines

    (known,) = _codes([code], is_whole=True)
    print_lines(explanation(all_rules()[known]))
    return 0


def _codes(given: list[str], *, is_whole: bool = False) -> tuple[str, ...]:
    """Codes, or beginnings of codes, in one spelling. Raises UsageError for what no rule begins with."""
    from b2s.errors import UsageError
    from b2s.lint.rule import all_rules

    rules = all_rules()
    names = {rule.name: code for code, rule in rules.items()}
    found = []
    for word in (part.strip() for one in given for part in one.split(",")):
        code = names.get(word.lower(), word.upper())
        if not code or not any(known == code if is_whole else known.startswith(code) for known in rules):
            raise UsageError(f"there is no rule {word}", f"the rules: {', '.join(rules)}")
        found.append(code)
    return tuple(found)


def _config(path: str) -> Config | None:
    """The configuration, or None where there is none and none was named. Raises UsageError for a rule
    unknown.
    """
    from b2s.config import load_config
    from b2s.errors import UsageError
    from b2s.lint.rule import all_rules

    if path == _DEFAULT_CONFIG and not Path(path).exists():
        return None
    config = load_config(Path(path)).config
    unknown = [code for code in config.lint.rules if code not in all_rules()]
    if unknown:
        raise UsageError(
            f"{path}: lint names {unknown[0]}, which is no rule", f"the rules: {', '.join(all_rules())}"
        )
    return config


def _live(dsn: str, config: Config | None) -> Live:
    from b2s.db import connect
    from b2s.lint.database import read_database
    from b2s.output import remark

    with connect(dsn) as connection:
        live = read_database(connection, config)
    if live.foreign is None:
        remark("plpgsql_check is not installed in this database: types and columns are not looked at")
    return live
