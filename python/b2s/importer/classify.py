"""Which routines are transformations, and what the others are."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Final, Literal

from b2s.importer.inventory import Found, Inventory
from b2s.importer.windows import Window, window_of
from b2s.lint.access import Access, mentions_of
from b2s.lint.idioms import inserted_from_tables
from b2s.lint.model import NUMBERS, Argument
from b2s.names import parts_of, quoted

Role = Literal[
    "transformation", "blocked", "orchestrator", "helper", "reader", "trigger", "unreadable", "overload"
]

_TRIGGERS: Final = ("trigger", "event_trigger")
_MODE: Final = ("text", "varchar")
_LOG_WORDS: Final = re.compile(r"(^|[._])(log|logs|audit|journal|trace)([._]|$)")
_STAGE_WORDS: Final = frozenset({"stg", "stage", "staging", "tmp", "temp", "work", "wrk"})


@dataclass(slots=True)
class Judged:
    """A routine and what it is. `targets`: the tables it is there for; `reasons`: why it is blocked, or what
    else is to be known.
    """

    found: Found
    role: Role
    targets: list[str] = field(default_factory=list)
    reasons: list[str] = field(default_factory=list)
    remedies: list[str] = field(default_factory=list)
    called_by: list[str] = field(default_factory=list)
    window: Window | None = None

    @property
    def reads(self) -> dict[str, set[str]]:
        """What it reads, functions that it calls included."""
        return self.found.static.reads

    @property
    def writes(self) -> set[str]:
        """What it writes, functions that it calls included."""
        return set(self.found.static.writes)


def classify(inventory: Inventory) -> list[Judged]:
    """Every routine with its role, in the order in which they were found."""
    callers: dict[str, list[Found]] = {}
    for one in inventory.routines:
        for signature in one.calls:
            callers.setdefault(signature, []).append(one)
    logs = log_tables(inventory)
    orchestrators = {one.signature for one in inventory.routines if _is_orchestrator(one, inventory, logs)}
    judged = [_judge(one, inventory, callers, orchestrators, logs) for one in inventory.routines]
    _settle_overloads(judged)
    return judged


def log_tables(inventory: Inventory) -> set[str]:
    """Tables that routines only append single rows to, and that several write or that are called so: what
    routines did, not what they are for.
    """
    writers: dict[str, set[str]] = {}
    more: set[str] = set()
    for one in inventory.routines:
        for access in one.step.writes:
            table = _full_name(one, access)
            writers.setdefault(table, set()).add(one.signature)
            is_entry = access.verb == "insert" and not inserted_from_tables(access.owner)
            # The row of a run that is closed when it has ended.
            is_end = access.verb == "update" and _LOG_WORDS.search(table) is not None
            if not is_entry and not is_end:
                more.add(table)
    return {
        table
        for table, names in writers.items()
        if table not in more and (len(names) > 1 or _LOG_WORDS.search(table))
    }


def _full_name(found: Found, access: Access) -> str:
    """The table of an access under the name that the lineage of the routine gives it."""
    if access.schema:
        return f"{quoted(access.schema)}.{quoted(access.name)}"
    written = [
        one for one in {**found.own.reads, **found.own.writes} if one.endswith(f".{quoted(access.name)}")
    ]
    return written[0] if len(written) == 1 else quoted(access.name)


def _is_orchestrator(one: Found, inventory: Inventory, logs: set[str]) -> bool:
    """Calls others that write, and writes nothing itself."""
    writing = {other.signature for other in inventory.routines if set(other.static.writes) - logs}
    return not (set(one.own.writes) - logs) and bool(writing & set(one.calls)) and len(one.calls) > 1


def _judge(
    one: Found,
    inventory: Inventory,
    callers: dict[str, list[Found]],
    orchestrators: set[str],
    logs: set[str],
) -> Judged:
    routine = one.routine
    by = callers.get(one.signature, [])
    names = [other.signature for other in by]
    if routine.returns in _TRIGGERS:
        return Judged(one, "trigger")
    if routine.failures or routine.language not in ("sql", "plpgsql"):
        why = routine.failures[0][1] if routine.failures else f"it is written in {routine.language}"
        return Judged(one, "unreadable", reasons=[why])
    if one.signature in orchestrators:
        return Judged(one, "orchestrator", reasons=[f"calls {', '.join(one.calls)}"])
    written = set(one.static.writes) - logs
    if not written and one.own.is_complete:
        return Judged(one, "reader", called_by=names)
    if any(other.signature not in orchestrators for other in by):
        return Judged(one, "helper", called_by=names)
    if not written:
        judged = Judged(one, "blocked", reasons=["it executes text that is known at run time only"])
        judged.remedies.append("write the statements out, or add the entry by hand when it loads a table")
        return judged
    judged = Judged(one, "transformation", targets_of(one, logs), called_by=names)
    judged.window = window_of(one, inventory.columns)
    for reason, remedy in obstacles(one, inventory, judged.window):
        judged.role = "blocked"
        judged.reasons.append(reason)
        judged.remedies.append(remedy)
    return judged


def targets_of(one: Found, logs: Iterable[str]) -> list[str]:
    """The tables that a routine is there for: logs, and stages that it fills and reads itself, are not."""
    written = [table for table in _in_order(one) if table not in set(logs)]
    stages = [table for table in written if table in one.own.reads and _is_stage_name(table)]
    return [table for table in written if table not in stages] or written


def _in_order(one: Found) -> list[str]:
    """The tables written, in the order in which the text writes them; those of called routines come last."""
    own = [_full_name(one, access) for access in mentions_of(one.routine) if access.is_write]
    known = [table for table in own if table in one.static.writes]
    return list(dict.fromkeys([*known, *sorted(one.static.writes)]))


def _is_stage_name(table: str) -> bool:
    words = table.replace('"', "").lower().replace(".", "_").split("_")
    return bool(_STAGE_WORDS & set(words))


# -- what keeps a routine from being run by b2s --


def obstacles(one: Found, inventory: Inventory, window: Window | None) -> Iterator[tuple[str, str]]:
    """Why b2s cannot run a routine as it is, each with what to do."""
    for step in one.routine.all_statements:
        if step.kind in ("commit", "rollback"):
            yield (
                f"it ends its own transaction ({step.kind} in line {_line(one, step.offset)})",
                "take COMMIT and ROLLBACK out: a step is one transaction, which b2s ends",
            )
            break
    passed = set(window.args.values()) if window else set()
    for position, argument in enumerate(one.routine.arguments, 1):
        if not argument.is_input or argument.has_default or argument.name in passed or _is_served(argument):
            continue
        if argument.name:
            yield (
                f"argument {argument.name} {argument.type} needs a value",
                f"give it a default, or declare it: params: {{{_param(argument)}}}",
            )
        else:
            yield f"argument #{position} has no name", "name it: b2s passes arguments by name"
    if window is not None and window.problem:
        yield window.problem, window.remedy
    if inventory.columns:
        bare = sorted(table for table in {**one.own.reads, **one.own.writes} if len(parts_of(table)) == 1)
        if bare:
            yield (
                f"{', '.join(bare)} is named without a schema, and no schema looked at has such a table",
                "write the schema, or: alter routine ... set search_path = ...",
            )


def _line(one: Found, offset: int) -> int:
    return one.routine.source.place(offset)[0]


def _is_served(argument: Argument) -> bool:
    is_counter = argument.mode == "b" and argument.type in NUMBERS
    return (
        is_counter
        or argument.name in ("p_since", "p_until")
        or (argument.name == "p_mode" and argument.type in _MODE)
        or (argument.name == "p_run_id" and argument.type in NUMBERS)
    )


def _param(argument: Argument) -> str:
    types = {"bool": "boolean", "numeric": "number", "float8": "number"}
    kind = "integer" if argument.type in ("int2", "int4", "int8") else types.get(argument.type, "string")
    form = {"date": ", format: date", "timestamptz": ", format: date-time", "uuid": ", format: uuid"}
    return (
        f"{argument.name.removeprefix('p_')}: {{type: {kind}{form.get(argument.type, '')}, required: true}}"
    )


def _settle_overloads(judged: list[Judged]) -> None:
    """Of several transformations with one name that fill the same tables, the one that needs least is run."""
    by_name: dict[str, list[Judged]] = {}
    for one in judged:
        if one.role in ("transformation", "blocked"):
            by_name.setdefault(one.found.name, []).append(one)
    for same in by_name.values():
        runnable = [one for one in same if one.role == "transformation"]
        if len(same) < 2 or not runnable:
            continue
        best = min(runnable, key=lambda one: len([a for a in one.found.routine.arguments if a.is_input]))
        for one in same:
            if one is not best and set(one.targets) <= set(best.targets):
                one.role = "overload"
                one.reasons = [f"{best.found.signature} of the same name is used"]
                one.remedies = []
