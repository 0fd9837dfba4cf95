"""What takes two places of a configuration to know: references, cycles, groups, params, schedules.

Each check looks only at what is sound: a value that was refused already never causes a second finding.
"""

from __future__ import annotations

import difflib
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from b2s.configmodel import (
    CONTRACT_NAMES,
    ArrayParam,
    Config,
    ParamKind,
    Procedure,
    RowCountCheck,
    Schedule,
    Settings,
    settings,
)
from b2s.configvalues import is_query, shown, why_not
from b2s.yamlsource import Loc, Problem, Source

_MAX_SUGGESTIONS: Final = 50
_WINDOW_UNITS: Final = {
    "timestamp": "a duration such as 1 day",
    "id": "a whole number of ids",
    "xid": "a whole number of transactions",
}
_BOUNDS: Final = (
    ("minimum", "maximum"),
    ("minLength", "maxLength"),
    ("minItems", "maxItems"),
    ("min", "max"),
)


def did_you_mean(name: str, known: Iterable[str]) -> str | None:
    """A hint that names the known name closest to `name`, if one is close."""
    names = sorted(known)
    last_parts = [other.rpartition(".")[2] for other in names]
    close = difflib.get_close_matches(name.rpartition(".")[2], last_parts, n=1, cutoff=0.6)
    return f"did you mean {names[last_parts.index(close[0])]!r}?" if close else None


def declaration_of(param: ParamKind) -> dict[str, Any]:
    """A param's declaration with the keys of the YAML, those that were not given left out."""
    given = {key: value for key, value in param.given().items() if value is not None}
    if isinstance(param, ArrayParam):
        given["items"] = {"type": param.items.type}
    return given


@dataclass(frozen=True, slots=True)
class Member:
    """A configured procedure, its path in the sound part and in the file, and the settings it has."""

    procedure: Procedure
    place: Loc
    loc: Loc
    settings: Settings

    @property
    def name(self) -> str:
        return self.procedure.name


class Checker:
    """Runs every cross check over the sound part of a document.

    `original` turns a path in the sound part into the path in the file; `tainted` holds the refused paths.
    """

    def __init__(
        self, source: Source, config: Config, original: Callable[[Loc], Loc], tainted: frozenset[Loc]
    ) -> None:
        self._source = source
        self._config = config
        self._original = original
        self._tainted = tainted
        self._above_tainted = {loc[:size] for loc in tainted for size in range(len(loc))}
        self._problems: list[Problem] = []
        self._suggestions = 0
        self._members: list[Member] = []
        self._by_name: dict[str, Member] = {}
        for index, procedure in enumerate(config.procedures):
            place: Loc = ("procedures", index)
            member = Member(procedure, place, original(place), settings(config, procedure))
            self._members.append(member)
            if self._is_sound((*member.loc, "name")):
                self._by_name.setdefault(member.name, member)
        written = source.value(("procedures",))
        self._count = len(written) if isinstance(written, list) else 0
        self._raw_procedures = self._raw_items("procedures")
        groups = {procedure.group for procedure in config.procedures if procedure.group} | set(config.groups)
        tags = {tag for procedure in config.procedures for tag in procedure.tags}
        self._groups = (groups, self._are_all_sound("group") and self._is_sound(("groups",)))
        self._tags = (tags, self._are_all_sound("tags"))

    def run(self) -> list[Problem]:
        """All findings, in no particular order."""
        self._check_names()
        names = {name for item in self._raw_procedures if isinstance(name := item.get("name"), str)}
        for member in self._members:
            self._check_dependencies(member, names)
            self._check_params(member)
            self._check_args(member)
            self._check_watermark(member)
            self._check_lists(member)
            self._check_retries(member.loc, member.settings)
        self._check_cycles()
        self._check_groups()
        self._check_state_keys()
        for index, schedule in enumerate(self._config.schedules):
            self._check_schedule(schedule, ("schedules", index), names)
        return self._problems

    def _report(self, loc: Loc, message: str, hint: str | None = None, *, at_key: bool = False) -> None:
        self._problems.append(self._source.problem(loc, message, hint, at_key=at_key))

    def _suggest(self, name: str, known: Iterable[str]) -> str | None:
        self._suggestions += 1
        return did_you_mean(name, known) if self._suggestions <= _MAX_SUGGESTIONS else None

    def _is_sound(self, *locs: Loc) -> bool:
        """True when nothing at or below these paths was refused, nor the value that would hold them."""
        return not any(
            loc in self._above_tainted or any(loc[:size] in self._tainted for size in range(1, len(loc) + 1))
            for loc in locs
        )

    def _raw_items(self, *loc: str | int) -> list[dict[str, Any]]:
        value = self._source.value(loc)
        return [item for item in value if isinstance(item, dict)] if isinstance(value, list) else []

    def _items(self, place: Loc, key: str, values: Sequence[Any]) -> Iterator[tuple[Loc, Any]]:
        for index, value in enumerate(values):
            yield self._original((*place, key, index)), value

    def _check_unique(self, entries: Iterable[tuple[Loc, Any]], what: str) -> None:
        first: dict[Any, Loc] = {}
        for loc, value in entries:
            if value in first:
                line = self._source.problem(first[value], "").line
                self._report(
                    loc, f"duplicate {what} {value!r}, first on line {line}", "remove or rename one of them"
                )
            else:
                first[value] = loc

    def _check_names(self) -> None:
        sound = [member for member in self._members if self._is_sound((*member.loc, "name"))]
        self._check_unique((((*member.loc, "name"), member.name) for member in sound), "procedure")
        self._check_unique(self._items((), "search_path", self._config.search_path), "schema")
        for loc, schema in self._items((), "search_path", self._config.search_path):
            if schema == "pg_catalog":
                self._report(loc, "pg_catalog is always first on the search_path", "remove it")
        schedules = self._items((), "schedules", self._config.schedules)
        self._check_unique((((*loc, "name"), schedule.name) for loc, schedule in schedules), "schedule")

    def _check_dependencies(self, member: Member, names: set[str]) -> None:
        procedure = member.procedure
        entries = list(self._items(member.place, "dependencies", procedure.dependencies))
        self._check_unique(entries, "dependency")
        for loc, name in entries:
            if name == procedure.name:
                self._report(loc, f"{name} depends on itself", "remove it from its own dependencies")
            elif name not in names:
                self._report(
                    loc,
                    f"unknown dependency {name!r}: no procedure has this name",
                    self._suggest(name, names),
                )
            else:
                self._check_direction(member, loc, name)

    def _check_direction(self, member: Member, loc: Loc, name: str) -> None:
        other = self._by_name.get(name)
        if other is None or member.procedure.type != "dimension" or other.procedure.type != "fact":
            return
        relevant = ((*member.loc, "type"), (*member.loc, "allow_fact_dependency"), (*other.loc, "type"))
        if member.procedure.allow_fact_dependency or not self._is_sound(*relevant):
            return
        message = f"the dimension {member.name} depends on the fact {name}"
        self._report(
            loc, message, "facts run after dimensions; to allow it here, write allow_fact_dependency: true"
        )

    def _check_params(self, member: Member) -> None:
        for name, param in member.procedure.params.items():
            loc: Loc = (*member.loc, "params", name)
            if name in CONTRACT_NAMES:
                message = f"the param {name!r} has the name of an argument that b2s itself passes"
                self._report(loc, message, "rename it", at_key=True)
            self._check_declaration(loc, param)

    def _check_declaration(self, loc: Loc, param: ParamKind) -> None:
        declaration = declaration_of(param)
        self._check_bounds(loc, declaration)
        if "pattern" in declaration and "format" in declaration:
            self._report(
                (*loc, "format"),
                "a param has a pattern or a format, not both",
                "keep one of them",
                at_key=True,
            )
        choices = declaration.pop("enum", ())
        self._check_unique(
            (((*loc, "enum", index), choice) for index, choice in enumerate(choices)), "enum value"
        )
        for index, choice in enumerate(choices):
            reason = why_not(declaration, choice)
            if reason:
                self._report((*loc, "enum", index), f"the enum value {shown(choice)} {reason}")
        if choices:
            declaration["enum"] = choices
        if "default" not in param.model_fields_set:
            return
        if param.default is None:
            hint = "remove the key if there is no default"
            self._report((*loc, "default"), f"the default is empty, not a value of type {param.type}", hint)
        elif reason := why_not(declaration, param.default):
            self._report((*loc, "default"), f"the default {shown(param.default)} {reason}")
        if param.required:
            message = "a required param has no use for a default"
            self._report((*loc, "default"), message, "remove required or default", at_key=True)

    def _check_bounds(self, loc: Loc, declaration: Mapping[str, Any]) -> None:
        for low, high in _BOUNDS:
            lowest, highest = declaration.get(low), declaration.get(high)
            if lowest is not None and highest is not None and lowest > highest:
                self._report((*loc, low), f"{low} {lowest} is above {high} {highest}", "swap them")

    def _check_args(self, member: Member) -> None:
        declared = self._source.value((*member.loc, "params"))
        known = [*CONTRACT_NAMES, *(declared if isinstance(declared, dict) else ())]
        for name in member.procedure.args:
            if name not in known and not (declared is not None and not isinstance(declared, dict)):
                message = (
                    f"{name!r} is neither a param of {member.name} nor one of {', '.join(CONTRACT_NAMES)}"
                )
                self._report((*member.loc, "args", name), message, self._suggest(name, known), at_key=True)
        entries = (((*member.loc, "args", name), target) for name, target in member.procedure.args.items())
        self._check_unique(entries, "argument")

    def _check_watermark(self, member: Member) -> None:
        watermark, max_window = member.procedure.watermark, member.procedure.max_window
        loc: Loc = (*member.loc, "watermark")
        if watermark is not None:
            self._check_unique(
                self._items((*member.place, "watermark"), "source", watermark.source), "source"
            )
            queries = [source for source in watermark.source if is_query(source)]
            if queries and len(watermark.source) > 1:
                message = "a query stands alone as source"
                hint = "write one query that returns the newest value of all"
                self._report((*loc, "source"), message, hint)
            elif queries and watermark.strategy == "xid":
                message = "the xid strategy reads columns, a query has no meaning for it"
                self._report((*loc, "source"), message, "name the xid8 column: schema.table.column")
            if watermark.strategy != "timestamp" and "delay" in watermark.model_fields_set:
                message = f"delay has no meaning for the {watermark.strategy} strategy"
                self._report((*loc, "delay"), message, "remove it", at_key=True)
        if max_window is None or not self._is_sound((*loc, "strategy")):
            return
        window: Loc = (*member.loc, "max_window")
        if watermark is None:
            if self._is_sound(loc):
                self._report(
                    window,
                    "max_window needs a watermark",
                    "add watermark:, or remove max_window",
                    at_key=True,
                )
        elif (watermark.strategy == "timestamp") == isinstance(max_window, int):
            kind = _WINDOW_UNITS[watermark.strategy]
            self._report(window, f"max_window must be {kind} for the {watermark.strategy} strategy")
        elif any(is_query(source) for source in watermark.source):
            message = "max_window needs columns as source: a query does not say where the rows are"
            self._report(window, message, "name the columns, or remove max_window", at_key=True)

    def _check_lists(self, member: Member) -> None:
        procedure = member.procedure
        self._check_unique(self._items(member.place, "tags", procedure.tags), "tag")
        checks = list(self._items(member.place, "checks", procedure.checks))
        self._check_unique((((*loc, "name"), check.name) for loc, check in checks), "check")
        for loc, check in checks:
            if isinstance(check, RowCountCheck):
                self._check_row_count(loc, check)
            elif check.type in ("not_null", "unique"):
                columns = (((*loc, "columns", index), column) for index, column in enumerate(check.columns))
                self._check_unique(columns, "column")
        targets = list(self._items(member.place, "mv_refresh", procedure.mv_refresh))
        self._check_unique(((loc, target.name) for loc, target in targets), "materialized view")
        has_group = procedure.group is not None or not self._is_sound((*member.loc, "group"))
        for loc, target in targets:
            if target.after == "group" and not has_group:
                message = f"after: group, but {member.name} is in no group"
                self._report(
                    (*loc, "after"), message, "give the procedure a group:, or write after: procedure"
                )

    def _check_row_count(self, loc: Loc, check: RowCountCheck) -> None:
        if check.min is None and check.max is None and self._is_sound((*loc, "min"), (*loc, "max")):
            self._report(loc, f"the check {check.name} bounds nothing", "add min, max or both")
        self._check_bounds(loc, check.given())

    def _check_retries(self, loc: Loc, folded: Settings) -> None:
        retries: Loc = (*loc, "retries")
        if not self._is_sound(retries, ("defaults", "retries")) or folded.backoff_ms <= folded.max_backoff_ms:
            return
        place = retries if self._source.value(retries) is not None else ("defaults", "retries")
        message = f"backoff ({folded.backoff_ms} ms) is longer than max_backoff ({folded.max_backoff_ms} ms)"
        problem = self._source.problem(place, message, "raise max_backoff, or lower backoff")
        if problem not in self._problems:
            self._problems.append(problem)

    def _check_cycles(self) -> None:
        edges = {
            name: [
                other for other in member.procedure.dependencies if other in self._by_name and other != name
            ]
            for name, member in self._by_name.items()
        }
        cycles = find_cycles(edges)
        for cycle in cycles:
            loc = (*self._by_name[cycle[0]].loc, "dependencies", cycle[1])
            path = " -> ".join([*cycle, cycle[0]])
            self._report(
                loc,
                f"dependency cycle: {path}",
                "an arrow means `depends on`; remove one of these dependencies",
            )
        if not cycles:
            self._check_contraction(edges)

    def _check_contraction(self, edges: Mapping[str, Sequence[str]]) -> None:
        """Groups that run in one transaction may wait for each other although no procedure does."""
        scope_of = {name: self._scope(member) for name, member in self._by_name.items()}
        crossings: dict[tuple[str, str], tuple[str, str]] = {}
        contracted: dict[str, list[str]] = {scope: [] for scope in scope_of.values()}
        for name, others in edges.items():
            for other in others:
                pair = (scope_of[name], scope_of[other])
                if pair[0] != pair[1] and pair not in crossings:
                    crossings[pair] = (name, other)
                    contracted[pair[0]].append(pair[1])
        for cycle in find_cycles(contracted):
            steps = [crossings[pair] for pair in zip(cycle, [*cycle[1:], cycle[0]], strict=True)]
            loc = min((*self._by_name[name].loc, "dependencies", other) for name, other in steps)
            groups = sorted(scope.removeprefix("group ") for scope in cycle if scope.startswith("group "))
            waits = ", ".join(f"{name} -> {other}" for name, other in steps)
            kind = "group" if len(groups) == 1 else "groups"
            message = f"the {kind} {', '.join(groups)} cannot run as one transaction each: {waits} is a cycle"
            hint = "move a procedure to another group, or give a group transaction_scope: per_procedure"
            self._report(loc, message, hint)

    def _scope(self, member: Member) -> str:
        """What runs in one transaction with this procedure: its group, or itself if that is in doubt."""
        is_sound = self._is_sound(*self._scope_locs(member, "transaction_scope"))
        is_group = member.settings.transaction_scope == "per_group" and member.procedure.group and is_sound
        return f"group {member.procedure.group}" if is_group else member.name

    def _check_groups(self) -> None:
        groups: dict[str, list[Member]] = {}
        for member in self._members:
            is_sound = self._is_sound((*member.loc, "group"), *self._scope_locs(member, "transaction_scope"))
            if is_sound and member.procedure.group is not None:
                groups.setdefault(member.procedure.group, []).append(member)
            elif is_sound and member.settings.transaction_scope == "per_group":
                loc: Loc = (*member.loc, "transaction_scope")
                is_own = "transaction_scope" in member.procedure.model_fields_set
                origin = "" if is_own else " (from defaults)"
                message = f"{member.name} has transaction_scope per_group{origin} but no group"
                self._report(loc, message, "give it a group:, or write transaction_scope: per_procedure")
        for group, members in groups.items():
            if any(member.settings.transaction_scope == "per_group" for member in members):
                self._check_agreement(group, members, "transaction_scope")
                sound = [
                    member for member in members if self._is_sound(*self._scope_locs(member, "isolation"))
                ]
                self._check_agreement(group, sound, "isolation")

    def _scope_locs(self, member: Member, key: str) -> tuple[Loc, ...]:
        group: tuple[Loc, ...] = (("groups", member.procedure.group, key),) if member.procedure.group else ()
        return ((*member.loc, key), ("defaults", key), *group)

    def _check_agreement(self, group: str, members: Sequence[Member], key: str) -> None:
        for member in members[1:]:
            first, value = getattr(members[0].settings, key), getattr(member.settings, key)
            if value != first:
                message = (
                    f"the group {group} runs as one transaction, but its members disagree on {key}: "
                    f"{members[0].name} has {first!r}, {member.name} has {value!r}"
                )
                self._report((*member.loc, key), message, f"set {key} once, under groups: {group}:")

    def _check_state_keys(self) -> None:
        users: dict[str, list[Member]] = {}
        for member in self._members:
            watermark = member.procedure.watermark
            if watermark is not None and self._is_sound((*member.loc, "watermark"), (*member.loc, "name")):
                users.setdefault(watermark.state_key or member.name, []).append(member)
        for key, members in users.items():
            first = members[0]
            for member in members[1:]:
                if member.name != first.name:
                    self._check_shared_key(key, first, member)

    def _check_shared_key(self, key: str, first: Member, member: Member) -> None:
        loc: Loc = (*member.loc, "watermark", "state_key")
        relevant = [
            place
            for one in (first, member)
            for place in ((*one.loc, "group"), *self._scope_locs(one, "transaction_scope"))
        ]
        if not self._is_sound(*relevant):
            return
        is_one_scope = self._scope(first) == self._scope(member)
        if not is_one_scope:
            message = (
                f"the state_key {key!r} is shared with {first.name}; the two could skip rows of each other"
            )
            hint = "give each its own state_key, or put both into one group with transaction_scope: per_group"
            self._report(loc, message, hint)
            return
        strategies = [one.procedure.watermark.strategy for one in (first, member) if one.procedure.watermark]
        if len(set(strategies)) > 1:
            message = f"the state_key {key!r} is shared with {first.name}, whose strategy is {strategies[0]}"
            self._report(loc, message, "procedures that share a state_key need the same strategy")

    def _check_schedule(self, schedule: Schedule, place: Loc, names: set[str]) -> None:
        loc = self._original(place)
        known: tuple[tuple[str, str, Sequence[str], set[str], bool], ...] = (
            ("procedures", "no procedure has this name", schedule.procedures, names, True),
            ("groups", "no procedure is in it", schedule.groups, *self._groups),
            ("tags", "no procedure has it", schedule.tags, *self._tags),
        )
        for key, reason, values, allowed, is_known in known:
            entries = list(self._items(place, key, values))
            self._check_unique(entries, key.removesuffix("s"))
            for entry, name in entries:
                if is_known and name not in allowed:
                    message = f"unknown {key.removesuffix('s')} {name!r}: {reason}"
                    self._report(entry, message, self._suggest(name, allowed))
        if (
            schedule.mode == "full"
            and not (schedule.reason or "").strip()
            and self._is_sound((*loc, "reason"))
        ):
            message = f"the schedule {schedule.name} refreshes fully and gives no reason"
            self._report((*loc, "mode"), message, "add reason: ..., which is kept with each of its runs")
        for name, values_given in schedule.params.items():
            self._check_schedule_params((*loc, "params", name), name, values_given, names)
        self._check_schedule_is_complete(schedule, loc)

    def _are_all_sound(self, key: str) -> bool:
        return len(self._members) == len(self._raw_procedures) == self._count and all(
            self._is_sound((*member.loc, key)) for member in self._members
        )

    def _check_schedule_params(self, loc: Loc, name: str, given: Mapping[str, Any], names: set[str]) -> None:
        member = self._by_name.get(name)
        if member is None:
            if name not in names:
                self._report(loc, f"unknown procedure {name!r}", self._suggest(name, names), at_key=True)
            return
        declared = self._source.value((*member.loc, "params"))
        for param, value in given.items():
            if param in member.procedure.params:
                reason = why_not(declaration_of(member.procedure.params[param]), value)
                if reason:
                    self._report((*loc, param), f"the param {param} of {name}: {shown(value)} {reason}")
            elif self._is_sound((*member.loc, "params")):
                known = declared if isinstance(declared, dict) else ()
                self._report(
                    (*loc, param), f"{name} has no param {param!r}", self._suggest(param, known), at_key=True
                )

    def _check_schedule_is_complete(self, schedule: Schedule, loc: Loc) -> None:
        """A required param that the schedule leaves out would make every one of its runs fail."""
        if (
            schedule.groups
            or schedule.tags
            or not self._is_sound(*((*loc, key) for key in ("procedures", "groups", "tags", "params")))
        ):
            return
        for name in schedule.procedures or self._by_name:
            member = self._by_name.get(name)
            if member is None:
                continue
            for param, declaration in member.procedure.params.items():
                if declaration.required and param not in schedule.params.get(name, {}):
                    message = (
                        f"the schedule {schedule.name} gives no value for {param}, a required param of {name}"
                    )
                    self._report((*loc, "params"), message, f"add params: {{{name}: {{{param}: ...}}}}")


def find_cycles(edges: Mapping[str, Sequence[str]]) -> list[list[str]]:
    """One shortest cycle for each strongly connected part of a graph; without recursion."""
    return [_cycle_within(edges, part) for part in _components(edges) if len(part) > 1]


def _components(edges: Mapping[str, Sequence[str]]) -> list[set[str]]:
    """The strongly connected components (Tarjan)."""
    number: dict[str, int] = {}
    low: dict[str, int] = {}
    path: list[str] = []
    on_path: set[str] = set()
    found: list[set[str]] = []
    for root in edges:
        if root in number:
            continue
        work: list[tuple[str, Iterator[str]]] = [(root, iter(edges[root]))]
        number[root] = low[root] = len(number)
        path.append(root)
        on_path.add(root)
        while work:
            node, others = work[-1]
            advanced = False
            for other in others:
                if other not in number:
                    number[other] = low[other] = len(number)
                    path.append(other)
                    on_path.add(other)
                    work.append((other, iter(edges[other])))
                    advanced = True
                    break
                if other in on_path:
                    low[node] = min(low[node], number[other])
            if advanced:
                continue
            work.pop()
            if work:
                low[work[-1][0]] = min(low[work[-1][0]], low[node])
            if low[node] == number[node]:
                cut = path.index(node)
                found.append(set(path[cut:]))
                on_path.difference_update(path[cut:])
                del path[cut:]
    return found


def _cycle_within(edges: Mapping[str, Sequence[str]], part: set[str]) -> list[str]:
    """A shortest cycle through the first node of a strongly connected part."""
    start = next(node for node in edges if node in part)
    came_from: dict[str, str] = {}
    queue = deque([start])
    while queue:
        node = queue.popleft()
        for other in edges[node]:
            if other == start:
                cycle = [node]
                while cycle[-1] != start:
                    cycle.append(came_from[cycle[-1]])
                return cycle[::-1]
            if other in part and other not in came_from:
                came_from[other] = node
                queue.append(other)
    raise AssertionError(f"{start} is in no cycle")
