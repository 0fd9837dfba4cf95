"""From routines to procedures: names, types, dependencies, cycles, watermarks, refresh targets."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Final, Literal

from b2s.importer.classify import Judged, log_tables
from b2s.importer.inventory import Found, Inventory
from b2s.importer.windows import Window
from b2s.names import parts_of

UNKNOWN_TYPE: Final = "nothing says that it is a fact"
_NAME: Final = re.compile(r"[a-z_][a-z0-9_]*")
_DIMENSION: Final = re.compile(r"(^|_)(dim|d|dimension|ref|lookup|lkp)(_|$)")
_FACT: Final = re.compile(r"(^|_)(fact|fct|f|facts)(_|$)")


@dataclass(slots=True)
class Entry:
    """One procedure of the configuration to be, with the reasons for what it says."""

    judged: Judged
    name: str
    routine: str
    type: Literal["dimension", "fact"]
    type_reason: str
    dependencies: dict[str, str] = field(default_factory=dict)
    dropped: dict[str, str] = field(default_factory=dict)
    group: str | None = None
    window: Window | None = None
    refresh: list[str] = field(default_factory=list)

    @property
    def found(self) -> Found:
        """The routine behind it."""
        return self.judged.found


@dataclass(slots=True)
class Inferred:
    """The configuration to be."""

    entries: list[Entry]
    groups: dict[str, list[str]]
    search_path: list[str]
    shared: dict[str, list[str]]


def infer(inventory: Inventory, judged: list[Judged]) -> Inferred:
    """What the configuration says of the routines that can be run as they are."""
    chosen = [one for one in judged if one.role == "transformation"]
    logs = log_tables(inventory)
    entries = [_entry(one, inventory, name) for one, name in _named(chosen)]
    shared = _writers(entries, logs)
    order = _calling_order(judged)
    _depend(entries, inventory, shared)
    _order_writers(entries, shared, order)
    groups = _break_cycles(entries, order)
    _settle_types(entries)
    _refresh(entries, inventory)
    many = {table: names for table, names in shared.items() if len(names) > 1}
    return Inferred(_in_order(entries), groups, _search_path(chosen, inventory), many)


# -- names and types --


def _named(chosen: list[Judged]) -> Iterator[tuple[Judged, str]]:
    """A procedure is called like the table that it fills; one that fills several like its routine."""
    taken: set[str] = set()
    for one in chosen:
        wanted = one.targets[0] if len(one.targets) == 1 else one.found.name
        for candidate in (_as_name(wanted), _as_name(one.found.name)):
            if candidate not in taken:
                break
        else:
            number = 2
            while f"{candidate}_{number}" in taken:
                number += 1
            candidate = f"{candidate}_{number}"
        taken.add(candidate)
        yield one, candidate


def _as_name(relation: str) -> str:
    """A name that a configuration can hold."""
    parts = [re.sub(r"[^a-z0-9_]", "_", part.lower()) for part in parts_of(relation)[-2:]]
    return ".".join(part if _NAME.fullmatch(part) else f"_{part}" for part in parts)


def _entry(one: Judged, inventory: Inventory, name: str) -> Entry:
    kind, reason = type_of(one.targets, inventory)
    overloads = [other for other in inventory.routines if other.name == one.found.name]
    routine = one.found.signature if len(overloads) > 1 else one.found.name
    return Entry(one, name, routine, kind, reason, window=one.window)


def type_of(targets: list[str], inventory: Inventory) -> tuple[Literal["dimension", "fact"], str]:
    """dimension or fact, by what loads these tables, and why."""
    if len(targets) > 1:
        return "fact", f"it loads {len(targets)} tables"
    target = targets[0]
    plain = parts_of(target)[-1].lower()
    if _DIMENSION.search(plain):
        return "dimension", "by the name of its table"
    if _FACT.search(plain):
        return "fact", "by the name of its table"
    referring = [
        table for table, others in inventory.references.items() if target in others and table != target
    ]
    if referring:
        return "dimension", f"{sorted(referring)[0]} has a foreign key to its table"
    referred = sorted(inventory.references.get(target, set()) - {target})
    if referred:
        return "fact", f"its table has a foreign key to {referred[0]}"
    return "dimension", UNKNOWN_TYPE


# -- dependencies --


def _writers(entries: list[Entry], logs: Iterable[str]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for entry in entries:
        for table in sorted(entry.judged.writes - set(logs)):
            found.setdefault(table, []).append(entry.name)
    return found


def _depend(entries: list[Entry], inventory: Inventory, writers: Mapping[str, list[str]]) -> None:
    for entry in entries:
        for table in sorted(inventory.behind(entry.judged.reads)):
            others = writers.get(table, [])
            if entry.name in others:
                continue
            for other in others:
                through = "" if table in entry.judged.reads else " through a view"
                entry.dependencies.setdefault(other, f"reads {table}{through}")
        for target in entry.judged.targets:
            for table in sorted(inventory.references.get(target, set()) - entry.judged.writes):
                for other in writers.get(table, []):
                    entry.dependencies.setdefault(other, f"{target} has a foreign key to {table}")


def _order_writers(entries: list[Entry], writers: Mapping[str, list[str]], order: Mapping[str, int]) -> None:
    """Of several that write one table, each waits for the one that is called before it today."""
    by_name = {entry.name: entry for entry in entries}
    for table, names in writers.items():
        called = [name for name in names if by_name[name].found.signature in order]
        called.sort(key=lambda name: order[by_name[name].found.signature])
        for earlier, later in pairwise(called):
            by_name[later].dependencies.setdefault(earlier, f"writes {table} after it today")


def _calling_order(judged: list[Judged]) -> dict[str, int]:
    """The order in which routines that call the others call them, by signature."""
    order: dict[str, int] = {}
    for one in judged:
        if one.role == "orchestrator":
            for _, _, visit in one.found.step.find("FuncCall"):
                name = ".".join(part.sval for part in visit.node.funcname)
                for other in judged:
                    if other.found.routine.full_name in (name, f"{one.found.routine.schema}.{name}"):
                        order.setdefault(other.found.signature, len(order))
    return order


def _break_cycles(entries: list[Entry], order: Mapping[str, int]) -> dict[str, list[str]]:
    """Procedures that need each other form a group, in the order in which they are called today."""
    by_name = {entry.name: entry for entry in entries}
    groups: dict[str, list[str]] = {}
    for members in _cycles({entry.name: list(entry.dependencies) for entry in entries}):
        name = f"cycle_{len(groups) + 1}"
        position = {entry.name: index for index, entry in enumerate(entries)}
        members.sort(key=lambda one: (order.get(by_name[one].found.signature, len(order)), position[one]))
        groups[name] = members
        for index, member in enumerate(members):
            entry = by_name[member]
            entry.group = name
            for later in members[index + 1 :]:
                if later in entry.dependencies:
                    entry.dropped[later] = entry.dependencies.pop(later)
    return groups


def _cycles(graph: Mapping[str, list[str]]) -> list[list[str]]:
    """The strongly connected components of more than one node (Tarjan), each in the order of the graph."""
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    on_stack: set[str] = set()
    position = {name: number for number, name in enumerate(graph)}
    found: list[list[str]] = []
    for root in graph:
        if root in index:
            continue
        work = [(root, iter(graph[root]))]
        index[root] = low[root] = len(index)
        stack.append(root)
        on_stack.add(root)
        while work:
            node, successors = work[-1]
            for following in successors:
                if following not in index:
                    index[following] = low[following] = len(index)
                    stack.append(following)
                    on_stack.add(following)
                    work.append((following, iter(graph[following])))
                    break
                if following in on_stack:
                    low[node] = min(low[node], index[following])
            else:
                work.pop()
                if work:
                    low[work[-1][0]] = min(low[work[-1][0]], low[node])
                if low[node] == index[node]:
                    cut = stack.index(node)
                    members, stack[cut:] = stack[cut:], []
                    on_stack.difference_update(members)
                    if len(members) > 1:
                        found.append(sorted(members, key=position.__getitem__))
    return found


def _in_order(entries: list[Entry]) -> list[Entry]:
    """Each after those that it depends on."""
    by_name = {entry.name: entry for entry in entries}
    done: dict[str, Entry] = {}
    waiting = sorted(entries, key=lambda one: (one.type, one.name), reverse=True)
    while waiting:
        entry = waiting[-1]
        missing = [by_name[name] for name in entry.dependencies if name not in done]
        if missing:
            waiting += reversed(missing)
        else:
            done.setdefault(entry.name, waiting.pop())
    return list(done.values())


def _settle_types(entries: list[Entry]) -> None:
    """No dimension waits for a fact: it becomes one. So does what reads others' tables and nobody reads."""
    needed = {name for entry in entries for name in entry.dependencies}
    for entry in entries:
        if entry.type_reason == UNKNOWN_TYPE and entry.dependencies and entry.name not in needed:
            entry.type, entry.type_reason = (
                "fact",
                "it is made of other procedures' tables, and none is made of it",
            )
    by_name = {entry.name: entry for entry in entries}
    is_changing = True
    while is_changing:
        is_changing = False
        for entry in entries:
            near = [by_name[one] for one in [*entry.dependencies, *entry.dropped]]
            near += [other for other in entries if entry.group and other.group == entry.group]
            fact = next((other for other in near if other.type == "fact"), None)
            if entry.type == "dimension" and fact is not None:
                entry.type, entry.type_reason = "fact", f"it needs {fact.name}, which is one"
                is_changing = True


# -- the rest --


def _refresh(entries: list[Entry], inventory: Inventory) -> None:
    """Materialized views made of what a procedure writes, directly, through views or through each other."""
    for view in sorted(inventory.materialized):
        made_of = inventory.behind(inventory.materialized[view], through_materialized=True)
        for entry in entries:
            if made_of & entry.judged.writes:
                entry.refresh.append(view)


def _search_path(chosen: list[Judged], inventory: Inventory) -> list[str]:
    """The schemas in which routines without a search_path of their own find what they name without schema."""
    needed: set[str] = set()
    for one in chosen:
        routine = one.found.routine
        if routine.search_path is not None:
            continue
        bare = {access.name for access in one.found.step.accesses if not access.schema}
        known = [*one.found.own.reads, *one.found.own.writes]
        needed |= {
            parts_of(table)[0] for table in known if len(parts_of(table)) == 2 and parts_of(table)[1] in bare
        }
        for _, _, visit in one.found.step.find("FuncCall"):
            if len(visit.node.funcname) == 1:
                name = visit.node.funcname[0].sval
                needed |= {
                    other.routine.schema
                    for other in inventory.routines
                    if other.routine.name == name and other.routine.schema
                }
    ordered = [schema for schema in inventory.search_path if schema in needed]
    return ordered + sorted(needed - set(ordered))
