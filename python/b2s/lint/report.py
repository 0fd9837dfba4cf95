"""Findings as text for people, JSON, GitHub annotations or SARIF."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator
from typing import Any, Final

from b2s import __version__
from b2s.lint.engine import Finding, Report
from b2s.lint.rule import Example, Rule, all_rules
from b2s.render import Style, plural, visible

_COLOURS: Final = {"error": "red", "warning": "yellow", "info": "cyan"}
_LEVELS: Final = {"error": "error", "warning": "warning", "info": "note", "off": "none"}
_GITHUB: Final = {"error": "error", "warning": "warning", "info": "notice"}
_SCHEMA: Final = "https://json.schemastore.org/sarif-2.1.0.json"


def text_lines(report: Report, style: Style) -> Iterator[str]:
    """Every finding with its line of source, a caret and a hint."""
    for one in report.findings:
        label = style.paint(f"{one.severity}[{one.code}]:", _COLOURS.get(one.severity, "dim"))
        yield f"{one.path}:{one.line}:{one.column}: {label} {visible(one.message)} [{one.name}]"
        number = str(one.line)
        margin = " " * len(number)
        shown = one.text[: one.column - 1].expandtabs(4)
        length = min(one.length, max(1, len(one.text) - one.column + 1))
        yield f"  {number} | {visible(one.text.expandtabs(4))}"
        caret = style.paint("^" * length, _COLOURS.get(one.severity, "dim"))
        yield f"  {margin} | {' ' * len(visible(shown))}{caret}"
        if one.hint:
            yield f"  {style.paint('hint:', 'cyan')} {visible(one.hint)}"


def summary(report: Report) -> str:
    """One line: what was found, in how much."""
    counts = Counter[str](one.severity for one in report.findings)
    words = {"error": "error", "warning": "warning", "info": "remark"}
    found = ", ".join(plural(counts[level], word) for level, word in words.items() if counts[level])
    more = f" ({report.suppressed_count} suppressed)" if report.suppressed_count else ""
    where = f"{plural(report.routine_count, 'routine')} of {plural(report.source_count, 'source')}"
    return f"{found or 'nothing found'} in {where}{more}"


def document(report: Report) -> dict[str, Any]:
    """The report for programs."""
    return {
        "findings": [_finding(one) for one in report.findings],
        "sources": report.source_count,
        "routines": report.routine_count,
        "suppressed": report.suppressed_count,
        "is_clean": not any(one.is_failure for one in report.findings),
    }


def _finding(one: Finding) -> dict[str, Any]:
    return {
        "path": one.path,
        "line": one.line,
        "column": one.column,
        "code": one.code,
        "name": one.name,
        "severity": one.severity,
        "message": one.message,
        "hint": one.hint,
        "routine": one.routine,
    }


def github_lines(report: Report) -> Iterator[str]:
    """Workflow commands, which GitHub shows beside the lines of a pull request."""
    for one in report.findings:
        place = f"file={_property(one.path)},line={one.line},col={one.column}"
        title = f"title={_property(f'{one.code} {one.name}')}"
        words = f"{one.message}; {one.hint}" if one.hint else one.message
        yield f"::{_GITHUB[one.severity]} {place},{title}::{_message(words)}"


def _message(text: str) -> str:
    return text.replace("%", "%25").replace("\r", "%0D").replace("\n", "%0A")


def _property(text: str) -> str:
    return _message(text).replace(":", "%3A").replace(",", "%2C")


def sarif(report: Report) -> dict[str, Any]:
    """SARIF 2.1.0, with the rules that were found."""
    rules = all_rules()
    found = sorted({one.code for one in report.findings})
    driver = {
        "name": "b2s lint",
        "version": __version__,
        "rules": [_rule(rules[code]) for code in found],
    }
    seen: Counter[tuple[str, str, str]] = Counter()
    results = [_result(one, found.index(one.code), seen) for one in report.findings]
    run = {"tool": {"driver": driver}, "columnKind": "unicodeCodePoints", "results": results}
    return {"$schema": _SCHEMA, "version": "2.1.0", "runs": [run]}


def _rule(rule: Rule) -> dict[str, Any]:
    return {
        "id": rule.code,
        "name": rule.name,
        "shortDescription": {"text": rule.summary},
        "fullDescription": {"text": rule.documentation},
        "help": {"text": rule.documentation},
        "defaultConfiguration": {"level": _LEVELS[rule.severity]},
    }


def _result(one: Finding, index: int, seen: Counter[tuple[str, str, str]]) -> dict[str, Any]:
    """One result; its fingerprint is that of the line's text, so that it stays the same when the line
    moves.
    """
    key = (one.path, one.code, one.text.strip())
    seen[key] += 1
    print_ = hashlib.sha256("\0".join([*key, str(seen[key])]).encode("utf-8", "replace")).hexdigest()
    region = {"startLine": one.line, "startColumn": one.column, "endColumn": one.column + one.length}
    location = {"artifactLocation": {"uri": _uri(one.path)}, "region": region}
    return {
        "ruleId": one.code,
        "ruleIndex": index,
        "level": _LEVELS[one.severity],
        "message": {"text": f"{one.message}; {one.hint}" if one.hint else one.message},
        "locations": [{"physicalLocation": location}],
        "partialFingerprints": {"b2sLint/v1": print_},
    }


def _uri(path: str) -> str:
    from urllib.parse import quote

    return quote(path.removeprefix("./"), safe="/")


# -- rules --


def explanation(rule: Rule) -> Iterator[str]:
    """A rule for the terminal: what it means, how it looks when it is broken and when it is kept."""
    yield f"{rule.code} {rule.name} ({rule.severity})"
    yield ""
    yield from rule.documentation.splitlines()
    for title, examples in (("Bad:", rule.bad), ("Good:", rule.good)):
        for one in examples:
            yield ""
            yield title
            yield ""
            yield from (
                f"    {line}".rstrip() for text in (one.config, one.sql) for line in text.splitlines()
            )


def rule_page(rule: Rule) -> str:
    """The page of a rule for docs/rules."""
    scopes = {
        "step": "routines that a pipeline executes",
        "routine": "every routine",
        "engine": "every source",
    }
    lines = [f"# {rule.code}: {rule.name}", ""]
    lines += [f"Severity: {rule.severity}. Looks at {scopes[rule.scope]}.", "", rule.documentation, ""]
    for title, examples in (("Bad", rule.bad), ("Good", rule.good)):
        for one in examples:
            lines += [f"## {title}", "", *_blocks(one)]
    return "\n".join([*lines, "[All rules](../lint.md)"]) + "\n"


def _blocks(example: Example) -> list[str]:
    found = ["```sql", example.sql.rstrip("\n"), "```", ""]
    if example.config:
        found += ["```yaml", example.config.rstrip("\n"), "```", ""]
    return found


def rule_rows() -> list[tuple[str, str, str, str]]:
    """Code, name, severity and summary of each rule, for the table of all rules."""
    return [
        (f"[{rule.code}](rules/{rule.code}.md)", f"`{rule.name}`", rule.severity, rule.summary)
        for rule in all_rules().values()
    ]
