"""The configuration as text: YAML with a comment for whatever was inferred, and for what is left out."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from b2s.importer.classify import Judged
from b2s.importer.infer import Entry, Inferred
from b2s.importer.inventory import Inventory
from b2s.yamlsource import scalar

_WIDTH: Final = 110


def document(inventory: Inventory, judged: list[Judged], inferred: Inferred, pipeline: str) -> str:
    """A transformations.yaml."""
    lines = [
        f"# Made by b2s import from {inventory.origin}. Comments say why; the report says what to change.",
        "# Check it: b2s sync-config --dry-run. Its JSON Schema: b2s schema > transformations.schema.json",
        "# yaml-language-server: $schema=./transformations.schema.json",
        "version: 1",
        f"pipeline: {pipeline}",
    ]
    if inferred.search_path:
        lines.append(
            f"search_path: [{', '.join(inferred.search_path)}]   # routines name tables without a schema"
        )
    lines += list(_groups(inferred))
    if not inferred.entries:
        lines += ["", "# No routine can be run as it is: the report says why.", "procedures: []"]
    else:
        lines += ["", "procedures:"]
        for entry in inferred.entries:
            lines += [*_entry(entry, inferred), ""]
    lines += list(_blocked([one for one in judged if one.role == "blocked"]))
    return "\n".join(lines).rstrip("\n") + "\n"


def _groups(inferred: Inferred) -> Iterator[str]:
    if not inferred.groups:
        return
    yield ""
    yield "groups:"
    for name, members in inferred.groups.items():
        yield f"  # {', '.join(members)} read each other's tables: one transaction, in this order."
        yield f"  {name}:"
        yield f"    description: {scalar('read each other: ' + ', '.join(members))}"
        yield "    transaction_scope: per_group"


def _entry(entry: Entry, inferred: Inferred) -> Iterator[str]:
    targets = entry.judged.targets
    if len(targets) > 1:
        yield f"  # Loads {len(targets)} tables: {', '.join(targets)}. The report proposes a split."
    yield f"  - name: {entry.name}"
    yield f"    routine: {scalar(entry.routine)}"
    yield f"    type: {entry.type}   # {entry.type_reason}"
    if entry.group:
        yield f"    group: {entry.group}"
    if entry.dependencies:
        yield "    dependencies:"
        yield from (f"      - {name}   # {why}" for name, why in entry.dependencies.items())
    for name, why in entry.dropped.items():
        yield f"    # It also {why}, which {name} loads later: it sees the rows of the last run."
    if entry.window is not None:
        window = entry.window
        source = window.sources[0] if len(window.sources) == 1 else None
        shown = scalar(source) if source else f"[{', '.join(scalar(one) for one in window.sources)}]"
        if window.args:
            inner = ", ".join(f"{contract}: {scalar(name)}" for contract, name in window.args.items())
            yield f"    args: {{{inner}}}"
        yield f"    watermark: {{strategy: {window.strategy}, source: {shown}}}"
    if entry.refresh:
        yield f"    mv_refresh: [{', '.join(scalar(one) for one in entry.refresh)}]"
    shared = [table for table, names in inferred.shared.items() if entry.name in names]
    for table in shared:
        others = [name for name in inferred.shared[table] if name != entry.name]
        yield f"    # {table} is written by {', '.join(others)} too."


def _blocked(blocked: list[Judged]) -> Iterator[str]:
    if not blocked:
        return
    yield "# Not configured, because b2s cannot run them as they are:"
    for one in blocked:
        name = one.targets[0] if len(one.targets) == 1 else one.found.name
        yield f"  # - name: {name}"
        yield f"  #   routine: {scalar(one.found.signature)}"
        for reason, remedy in zip(one.reasons, one.remedies, strict=False):
            yield f"  #   {reason}: {remedy}"
