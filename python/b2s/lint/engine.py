"""Runs the rules over what was read, and sorts out what is suppressed, switched off or not selected."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from b2s.lint.access import TOO_DEEP
from b2s.lint.frontend import Parsed, read
from b2s.lint.project import OLDEST_SERVER, Project, Step
from b2s.lint.rule import Hit, Rule, Severity, all_rules
from b2s.lint.sources import Source
from b2s.lint.suppressions import Suppression, find, mistakes

if TYPE_CHECKING:
    from b2s.configmodel import Config

UNREADABLE: Final = "B001"
FROM_SERVER: Final = "B002"
UNUSED: Final = "B901"
MALFORMED: Final = "B902"


@dataclass(frozen=True, slots=True, order=True)
class Finding:
    """One finding, with everything that a report may show."""

    path: str
    line: int
    column: int
    code: str
    message: str
    name: str
    severity: Severity
    hint: str | None
    text: str
    routine: str | None = None
    length: int = 1

    @property
    def is_failure(self) -> bool:
        """Whether it makes the command fail."""
        return self.severity in ("error", "warning")


@dataclass(frozen=True, slots=True)
class Options:
    """What was asked for: codes (or beginnings of codes) to look at and to leave out, the oldest server."""

    select: tuple[str, ...] = ()
    ignore: tuple[str, ...] = ()
    target_version: int | None = None


@dataclass(frozen=True, slots=True)
class Report:
    """All findings in order, and how much was read."""

    findings: tuple[Finding, ...]
    source_count: int
    routine_count: int
    suppressed_count: int


@dataclass(frozen=True, slots=True)
class Foreign:
    """A finding that somebody else made, such as plpgsql_check."""

    source: Source
    offset: int
    message: str
    hint: str | None
    severity: Severity
    routine: str


def lint(
    sources: Iterable[Source],
    config: Config | None = None,
    options: Options | None = None,
    foreign: Iterable[Foreign] = (),
) -> Report:
    """Reads the sources and applies every rule that is on."""
    options = options or Options()
    rules = enabled(config, options)
    parsed = [read(source) for source in sources]
    given = config.lint.target_version if config else None
    project = Project(parsed, config, options.target_version or given or OLDEST_SERVER)
    found: list[Finding] = []
    for step in project.steps:
        found += _judge(step, project, rules)
    found += _unreadable(parsed, rules)
    found += _foreign(foreign, rules)
    kept, suppressed = _without_suppressed(parsed, found, rules)
    routines = sum(len(one.routines) for one in parsed)
    return Report(tuple(sorted(set(kept), key=_order)), len(parsed), routines, suppressed)


def _order(finding: Finding) -> tuple[str, int, int, str, str]:
    return finding.path, finding.line, finding.column, finding.code, finding.message


def enabled(config: Config | None, options: Options) -> dict[str, tuple[Rule, Severity]]:
    """The rules that are on, each with the severity it has here. Naming a rule that is off turns it on."""
    chosen = config.lint.rules if config else {}
    found: dict[str, tuple[Rule, Severity]] = {}
    for code, rule in all_rules().items():
        severity: Severity = chosen.get(code, rule.severity)
        if options.select and not code.startswith(options.select):
            continue
        if options.ignore and code.startswith(options.ignore):
            continue
        if severity == "off" and code not in options.select:
            continue
        found[code] = (rule, "warning" if severity == "off" else severity)
    return found


def _judge(step: Step, project: Project, rules: dict[str, tuple[Rule, Severity]]) -> Iterator[Finding]:
    for rule, severity in rules.values():
        if rule.check is None or (rule.scope == "step" and not step.is_step):
            continue
        try:
            hits = list(rule.check(step, project))
        except RecursionError:
            hits = []
            step.routine.failures.append((step.routine.offset, TOO_DEEP))
        for hit in hits:
            yield _finding(step.routine.source, rule, severity, hit, step.routine.full_name)


def _finding(source: Source, rule: Rule, severity: Severity, hit: Hit, routine: str | None = None) -> Finding:
    line, column = source.place(hit.offset)
    text = source.line(line)
    return Finding(
        source.path, line, column, rule.code, hit.message, rule.name, severity, hit.hint, text, routine,
        _word(text, column),
    )  # fmt: skip


def _word(text: str, column: int) -> int:
    """How many characters from a column on belong to one name."""
    length = 0
    for character in text[column - 1 :]:
        if not (character.isalnum() or character in "_.%"):
            break
        length += 1
    return max(1, length)


def _unreadable(parsed: list[Parsed], rules: dict[str, tuple[Rule, Severity]]) -> Iterator[Finding]:
    if UNREADABLE not in rules:
        return
    rule, severity = rules[UNREADABLE]
    for one in parsed:
        for offset, message in one.all_failures:
            yield _finding(one.source, rule, severity, Hit(offset, message))


def _foreign(foreign: Iterable[Foreign], rules: dict[str, tuple[Rule, Severity]]) -> Iterator[Finding]:
    if FROM_SERVER not in rules:
        return
    rule, severity = rules[FROM_SERVER]
    for one in foreign:
        shown = one.severity if severity == rule.severity else severity
        yield _finding(one.source, rule, shown, Hit(one.offset, one.message, one.hint), one.routine)


def _without_suppressed(
    parsed: list[Parsed], found: list[Finding], rules: dict[str, tuple[Rule, Severity]]
) -> tuple[list[Finding], int]:
    by_path = {one.source.path: (one.source, list(find(one.source))) for one in parsed}
    kept = [finding for finding in found if not _silenced(finding, by_path[finding.path][1])]
    suppressed = len(found) - len(kept)
    for source, suppressions in by_path.values():
        for one in suppressions:
            kept += _of_suppression(source, one, rules)
    return kept, suppressed


def _silenced(finding: Finding, suppressions: list[Suppression]) -> bool:
    """Whether a comment silences a finding; all that do are noted as used."""
    silencing = [one for one in suppressions if one.silences(finding.code, finding.line)]
    return bool(silencing)


def _of_suppression(
    source: Source, suppression: Suppression, rules: dict[str, tuple[Rule, Severity]]
) -> Iterator[Finding]:
    if MALFORMED in rules:
        rule, severity = rules[MALFORMED]
        for mistake in mistakes(suppression, set(all_rules())):
            yield _finding(source, rule, severity, Hit(suppression.offset, f"this comment {mistake}"))
    if UNUSED in rules:
        rule, severity = rules[UNUSED]
        for code in suppression.codes:
            if code in rules and code not in suppression.used:
                message = f"{code} is suppressed, but not found here"
                yield _finding(source, rule, severity, Hit(suppression.offset, message, "remove the comment"))
