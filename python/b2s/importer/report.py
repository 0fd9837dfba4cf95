"""What was found, and what to change: a report in Markdown."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from b2s.importer.classify import Judged
from b2s.importer.infer import UNKNOWN_TYPE, Entry, Inferred, type_of
from b2s.importer.inventory import Inventory
from b2s.importer.split import Piece
from b2s.lint.engine import Report
from b2s.lint.rule import all_rules
from b2s.names import parts_of, quoted
from b2s.render import plural

_ROLES = {
    "orchestrator": ("Call the others", "b2s plans the order itself; `b2s run` takes their place."),
    "helper": ("Helpers of transformations", "They stay; what they read and write counts for their callers."),
    "reader": ("Write no table", "They are no transformations."),
    "trigger": ("Trigger functions", "The server calls them."),
    "overload": ("Overloads not used", "A procedure names one routine."),
    "unreadable": ("Not read", "Add an entry by hand when one of them loads a table."),
}  # fmt: skip


def report(
    inventory: Inventory,
    judged: list[Judged],
    inferred: Inferred,
    splits: dict[str, list[Piece]],
    lint: Report | None,
) -> str:
    """The whole report."""
    lines = [f"# What b2s import found in {inventory.origin}", ""]
    lines += _summary(judged, inferred)
    lines += _grants(inferred)
    lines += _blocked([one for one in judged if one.role == "blocked"])
    for name, pieces in splits.items():
        lines += _split(next(one for one in inferred.entries if one.name == name), pieces, inventory)
    lines += _cycles(inferred)
    lines += _shared(inferred)
    lines += _windows(inventory, inferred)
    lines += _findings(lint)
    lines += _others(inventory, judged)
    return "\n".join(lines).rstrip("\n") + "\n"


def _summary(judged: list[Judged], inferred: Inferred) -> Iterator[str]:
    counts = Counter(one.role for one in judged)
    others = len(judged) - len(inferred.entries) - counts["blocked"]
    yield (
        f"{plural(len(judged), 'routine')}: {len(inferred.entries)} configured, "
        f"{counts['blocked']} to be changed first, {others} of other kinds."
    )
    yield ""
    yield "| procedure | routine | type | loads | depends on |"
    yield "| --- | --- | --- | --- | --- |"
    for entry in inferred.entries:
        loads, needs = ", ".join(entry.judged.targets), ", ".join(entry.dependencies)
        yield f"| {entry.name} | `{entry.routine}` | {entry.type}: {entry.type_reason} | {loads} | {needs} |"
    yield ""


def _grants(inferred: Inferred) -> Iterator[str]:
    """What steps, which run as etl_owner, need."""
    entries = inferred.entries
    read = {parts_of(table)[0] for one in entries for table in one.judged.reads if len(parts_of(table)) > 1}
    written = {
        parts_of(table)[0] for one in entries for table in one.judged.writes if len(parts_of(table)) > 1
    }
    routines = {one.found.routine.schema for one in entries if one.found.routine.schema}
    views = sorted({view for one in entries for view in one.refresh})
    if not entries:
        return
    yield "## Grants"
    yield ""
    yield "Steps run as the role `etl_owner`, refreshes as the owner of their view:"
    yield ""
    yield "```sql"
    yield f"grant usage on schema {_listed(read | written | routines)} to etl_owner;"
    if read - written:
        yield f"grant select on all tables in schema {_listed(read - written)} to etl_owner;"
    if written:
        listed = _listed(written)
        yield f"grant select, insert, update, delete, truncate on all tables in schema {listed} to etl_owner;"
        yield f"grant usage on all sequences in schema {listed} to etl_owner;"
    yield f"grant execute on all routines in schema {_listed(routines)} to etl_owner;"
    if views:
        for schema in sorted({quoted(parts_of(view)[0]) for view in views}):
            yield f"grant usage, create on schema {schema} to etl_owner;"
        yield from (f"alter materialized view {view} owner to etl_owner;" for view in views)
    yield "```"
    yield ""


def _listed(schemas: set[str]) -> str:
    return ", ".join(quoted(one) for one in sorted(schemas))


def _blocked(blocked: list[Judged]) -> Iterator[str]:
    if not blocked:
        return
    yield "## To be changed before b2s can run them"
    yield ""
    for one in blocked:
        loads = ", ".join(one.targets) or "what is known at run time only"
        yield f"* `{one.found.signature}`, which loads {loads}:"
        for reason, remedy in zip(one.reasons, one.remedies, strict=False):
            yield f"  * {reason}: {remedy}"
    yield ""


def _split(entry: Entry, pieces: list[Piece], inventory: Inventory) -> Iterator[str]:
    yield f"## {entry.found.signature}: a split"
    yield ""
    yield (
        f"It loads {len(pieces)} tables in one transaction: when one fails, none is loaded, nothing can be "
        "run alone, and nothing runs beside it. It runs as it is; a routine per table would be:"
    )
    yield ""
    yield "| table | statements, by line | needs |"
    yield "| --- | --- | --- |"
    for piece in pieces:
        places = ", ".join(_lines(cut.first_line, cut.last_line) for cut in piece.cuts) or "none"
        yield f"| {piece.table} | {places} | {', '.join(piece.needs)} |"
    yield ""
    for piece in pieces:
        yield from (f"* {piece.table}: {note}." for note in piece.notes)
    if any(piece.notes for piece in pieces):
        yield ""
    yield "```sql"
    for piece in pieces:
        if piece.cuts:
            yield from ([] if piece is pieces[0] else [""])
            yield piece.skeleton
    yield "```"
    yield ""
    yield "```yaml"
    for piece in pieces:
        needs = f", dependencies: [{', '.join(piece.needs)}]" if piece.needs else ""
        kind, reason = type_of([piece.table], inventory)
        kind = "fact" if piece.needs and reason == UNKNOWN_TYPE else kind
        yield f"  - {{name: {piece.table}, routine: {piece.routine}, type: {kind}{needs}}}"
    yield "```"
    yield ""


def _lines(first: int, last: int) -> str:
    return str(first) if first == last else f"{first}-{last}"


def _cycles(inferred: Inferred) -> Iterator[str]:
    if not inferred.groups:
        return
    yield "## Cycles"
    yield ""
    yield (
        "Procedures that read each other's tables have no order. They are one group, in the order in which "
        "they run today; some read rows of the last run:"
    )
    yield ""
    for name, members in inferred.groups.items():
        yield f"* {name}: {', '.join(members)}"
        for entry in inferred.entries:
            if entry.name in members:
                yield from (
                    f"  * {entry.name} {why}, which {later} loads after it"
                    for later, why in entry.dropped.items()
                )
    yield ""


def _shared(inferred: Inferred) -> Iterator[str]:
    if not inferred.shared:
        return
    yield "## Tables with several writers"
    yield ""
    for table, names in inferred.shared.items():
        yield f"* {table}: {', '.join(names)}"
    yield ""


def _windows(inventory: Inventory, inferred: Inferred) -> Iterator[str]:
    """What could become incremental: a column that tells new rows in the tables that are read."""
    rows = []
    for entry in inferred.entries:
        if entry.window is None:
            hints = sorted(
                f"{table}.{column}"
                for table in entry.judged.reads
                for column, type_ in inventory.columns.get(table, {}).items()
                if (type_ == "timestamp with time zone" and column.endswith(("_at", "_ts", "_time", "_on")))
                or type_ == "xid8"
            )
            rows.append(
                f"* {entry.name}{': ' + ', '.join(hints[:3]) + ' could tell new rows' if hints else ''}"
            )
    if rows:
        yield "## Reads everything, each time"
        yield ""
        yield "A routine that declares `p_since` and `p_until` and uses them reads what is new."
        yield ""
        yield from rows
        yield ""


def _findings(lint: Report | None) -> Iterator[str]:
    if lint is None or not lint.findings:
        return
    rules = all_rules()
    counts = Counter((one.code, one.routine or one.path) for one in lint.findings)
    by_code: dict[str, list[str]] = {}
    for (code, routine), count in sorted(counts.items()):
        by_code.setdefault(code, []).append(f"{routine}{f' ({count})' if count > 1 else ''}")
    yield "## What b2s lint says"
    yield ""
    yield "| rule | finds | in |"
    yield "| --- | --- | --- |"
    for code, routines in by_code.items():
        shown = ", ".join(routines[:12]) + (f" and {len(routines) - 12} more" if len(routines) > 12 else "")
        yield f"| {code} {rules[code].name} | {rules[code].summary} | {shown} |"
    yield ""


def _others(inventory: Inventory, judged: list[Judged]) -> Iterator[str]:
    for role, (title, meaning) in _ROLES.items():
        listed = [one for one in judged if one.role == role]
        extra = inventory.foreign if role == "unreadable" else []
        if not listed and not extra:
            continue
        yield f"## {title}"
        yield ""
        yield meaning
        yield ""
        for one in listed:
            called = f", called by {', '.join(one.called_by)}" if one.called_by else ""
            yield f"* `{one.found.signature}`{': ' + '; '.join(one.reasons) if one.reasons else ''}{called}"
        yield from (f"* `{signature}`: it is written in {language}" for signature, language in extra)
        yield ""
