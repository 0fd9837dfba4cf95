"""Loads transformations.yaml: the spec for the database, or everything wrong with it at once, line by line.

`load_config` gives a LoadedConfig; its `spec()` is the one JSON document that the database plans and applies.
"""

from __future__ import annotations

import copy
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from b2s.configcheck import Checker, declaration_of, did_you_mean
from b2s.configmodel import (
    BOOLEAN_WORDS,
    ArrayParam,
    BooleanParam,
    CheckModel,
    Clock,
    Config,
    Defaults,
    Group,
    IntegerParam,
    Items,
    Lint,
    MvRefresh,
    NotNullCheck,
    NumberParam,
    Procedure,
    Retention,
    Retries,
    RoutineCheck,
    RowCountCheck,
    Schedule,
    StringParam,
    UniqueCheck,
    Watermark,
    settings,
)
from b2s.configvalues import shown
from b2s.yamlsource import ConfigError, Document, Loc, Problem, Source, format_problems, read_document

__all__ = [
    "Config",
    "ConfigError",
    "LoadedConfig",
    "Loc",
    "Problem",
    "Source",
    "format_problems",
    "json_schema",
    "load_config",
]

_PARAMS: Final[dict[str, type[BaseModel]]] = {
    "string": StringParam,
    "integer": IntegerParam,
    "number": NumberParam,
    "boolean": BooleanParam,
    "array": ArrayParam,
}
_CHECKS: Final[dict[str, type[BaseModel]]] = {
    "not_null": NotNullCheck,
    "unique": UniqueCheck,
    "row_count": RowCountCheck,
    "routine": RoutineCheck,
}
_KINDS: Final = {"params": _PARAMS, "checks": _CHECKS}
_MODELS: Final[dict[tuple[str, ...], tuple[str, type[BaseModel]]]] = {
    (): ("the top level", Config),
    ("defaults",): ("defaults", Defaults),
    ("groups", "*"): ("a group", Group),
    ("procedures", "*"): ("a procedure", Procedure),
    ("procedures", "*", "watermark"): ("watermark", Watermark),
    ("procedures", "*", "retries"): ("retries", Retries),
    ("defaults", "retries"): ("retries", Retries),
    ("procedures", "*", "params", "*"): ("a param", StringParam),
    ("procedures", "*", "params", "*", "items"): ("items", Items),
    ("procedures", "*", "checks", "*"): ("a check", CheckModel),
    ("procedures", "*", "mv_refresh", "*"): ("an mv_refresh entry", MvRefresh),
    ("schedules", "*"): ("a schedule", Schedule),
    ("clock",): ("clock", Clock),
    ("retention",): ("retention", Retention),
    ("lint",): ("lint", Lint),
}
_SYNONYMS: Final = {
    "depends_on": "dependencies",
    "needs": "dependencies",
    "requires": "dependencies",
    "parameters": "params",
    "arguments": "args",
    "materialized_views": "mv_refresh",
    "refresh": "mv_refresh",
    "retry": "retries",
    "mode": "default_mode",
    "schema": "search_path",
}
_UNUSED_NAME: Final = "unnamed"


@dataclass(frozen=True, slots=True)
class LoadedConfig:
    """A configuration that holds, and the text it came from."""

    config: Config
    source: Source

    def spec(self) -> dict[str, Any]:
        """The fully defaulted JSON document for the database; equal files give equal text."""
        config = self.config
        names = {*config.groups, *(procedure.group for procedure in config.procedures if procedure.group)}
        return {
            "version": config.version,
            "pipeline": config.pipeline,
            "description": config.description,
            "max_concurrency": config.max_concurrency,
            "approvals": config.approvals,
            "search_path": list(config.search_path),
            "observe_lineage": config.observe_lineage,
            "helper_server": config.helper_server,
            "groups": [{"name": name, "description": self._describe(name)} for name in sorted(names)],
            "procedures": [_procedure_spec(config, procedure) for procedure in config.procedures],
            "schedules": [_schedule_spec(schedule) for schedule in config.schedules],
            "clock": config.clock.model_dump(),
            "retention": config.retention.model_dump(),
        }

    def _describe(self, name: str) -> str | None:
        return self.config.groups[name].description if name in self.config.groups else None


def load_config(path: Path, environ: Mapping[str, str] = os.environ) -> LoadedConfig:
    """Reads and checks a configuration file. Raises ConfigError with everything found, in file order."""
    document = read_document(path, environ)
    validation = _Validation(document)
    config = validation.sound_part()
    problems = [*document.problems, *validation.problems]
    if config is not None:
        checker = Checker(document.source, config, validation.original, frozenset(validation.tainted))
        problems += checker.run()
    if problems or config is None:
        raise ConfigError(document.source, problems)
    return LoadedConfig(config, document.source)


class _Validation:
    """Validates a document and keeps its sound part, so that one wrong field hides nothing else.

    What is refused is cut out and the rest is validated again, until it holds. Errors are reported from the
    first pass only: later ones are consequences of the cutting.
    """

    def __init__(self, document: Document) -> None:
        self.problems: list[Problem] = []
        self.tainted: set[Loc] = set()
        self._source = document.source
        self._broken = document.broken
        self._data: Any = copy.deepcopy(document.source.data)
        self._kept: dict[Loc, list[int]] = {}

    def sound_part(self) -> Config | None:
        """The configuration without what was refused; None when nothing is left of it."""
        is_first = True
        while True:
            try:
                return Config.model_validate(self._data)
            except ValidationError as error:
                details = error.errors(include_url=False, include_input=False)
            locs: set[Loc] = set()
            for detail in details:
                loc, at_key = self._locate(detail["loc"])
                if is_first:
                    self._explain(detail, self.original(loc), at_key)
                locs.add(loc)
            is_first = False
            if not self._cut(locs):
                return None

    def original(self, loc: Loc) -> Loc:
        """The path in the file of a path in what is left."""
        found: Loc = ()
        for segment in loc:
            kept = self._kept.get(found)
            found = (*found, kept[segment] if kept is not None and isinstance(segment, int) else segment)
        return found

    @staticmethod
    def _locate(raw: tuple[str | int, ...]) -> tuple[Loc, bool]:
        """The document's path for an error's path (no tags of unions); True when the key is meant."""
        is_tagged = len(raw) > 4 and raw[0] == "procedures" and raw[2] in _KINDS
        loc = (*raw[:4], *raw[5:]) if is_tagged and raw[4] != "[key]" else raw
        return (loc[:-1], True) if loc and loc[-1] == "[key]" else (loc, False)

    def _explain(self, detail: ErrorDetails, loc: Loc, at_key: bool) -> None:
        if detail["type"].startswith("union_tag"):
            loc = (*loc, "type")
        if any(loc[:size] in self._broken for size in range(1, len(loc) + 1)):
            return
        if detail["type"] == "missing" or detail["type"].startswith("union_tag"):
            value = self._source.value(loc)
        else:
            loc, value = self._source.nearest(loc)
        if detail["type"] == "too_short" and value:
            return
        message, hint = _words(detail, loc, value, self._source)
        at_key = at_key or detail["type"] == "extra_forbidden"
        self.problems.append(self._source.problem(loc, message, hint, at_key=at_key))

    def _cut(self, locs: Iterable[Loc]) -> bool:
        """Takes the refused places out of the data; False when the whole document would go."""
        targets: set[Loc] = set()
        for loc in locs:
            self.tainted.add(self.original(loc))
            if not self._replace(loc):
                targets.add(self._existing(loc))
        if () in targets or ("procedures",) in targets:
            return False
        for loc in sorted(targets, key=_cutting_order):
            self._remove(loc)
        return True

    def _replace(self, loc: Loc) -> bool:
        """Gives a stand-in to what nothing can be without, so that the rest of it can still be checked."""
        if loc == ("version",):
            self._data["version"] = 1
            return True
        if len(loc) == 3 and loc[0] == "procedures" and loc[2] in ("name", "type"):
            stand_in = f"{_UNUSED_NAME}_{loc[1]}" if loc[2] == "name" else "fact"
            self._data["procedures"][loc[1]][loc[2]] = stand_in
            return True
        if len(loc) == 3 and loc[0] == "schedules" and loc[2] in ("name", "cron"):
            self._data["schedules"][loc[1]][loc[2]] = (
                f"{_UNUSED_NAME}_{loc[1]}" if loc[2] == "name" else "0 0 * * *"
            )
            return True
        return False

    def _existing(self, loc: Loc) -> Loc:
        current = self._data
        for size, segment in enumerate(loc):
            is_there = segment in current if isinstance(current, dict) else isinstance(current, list)
            if not is_there:
                return loc[:size]
            current = current[segment]
        return loc

    def _remove(self, loc: Loc) -> None:
        parent_loc, last = loc[:-1], loc[-1]
        parent = self._data
        for segment in parent_loc:
            parent = parent[segment]
        parent_origin = self.original(parent_loc)
        self.tainted.add(self.original(loc))
        if isinstance(parent, list) and isinstance(last, int):
            self._kept.setdefault(parent_origin, list(range(len(parent))))
            self._kept[parent_origin].pop(last)
        del parent[last]


def _cutting_order(loc: Loc) -> tuple[int, int]:
    """Deepest first, and a list from its end, so that no path moves before its turn."""
    return -len(loc), -loc[-1] if isinstance(loc[-1], int) else 0


def _words(detail: ErrorDetails, loc: Loc, value: object, source: Source) -> tuple[str, str | None]:
    """What to say about one validation error: the message, and the hint if there is one."""
    kind, context = detail["type"], detail.get("ctx", {})
    name = _label(loc)
    if loc == ("version",) and kind != "missing":
        return f"version must be 1, not {shown(value)}", None
    if kind == "refused":
        return f"{name}: {context['reason']}", context["hint"] or None
    if kind == "extra_forbidden":
        return _unknown_key(loc, source)
    if kind == "missing" or (kind.startswith("union_tag") and value is None):
        return f"missing required key {loc[-1]!r}", _choices_hint(loc)
    if kind.startswith("union_tag") or kind == "literal_error":
        choices = _choices(str(context.get("expected") or context.get("expected_tags")))
        hint = did_you_mean(value, choices) if isinstance(value, str) else None
        return f"{name} must be {_either(choices)}, not {shown(value)}", hint
    if kind in _EXPECTED:
        return f"{name} must be {_EXPECTED[kind]}, not {shown(value)}", _type_hint(kind, value)
    if kind in _LIMITS:
        return f"{name} must be {_LIMITS[kind].format(**context)}, not {shown(value)}", None
    if kind == "too_short":
        return f"{name} must not be empty", None
    return f"{name} is not usable: {detail['msg'][:1].lower()}{detail['msg'][1:]}", None


_EXPECTED: Final = {
    "bool_type": "true or false",
    "int_type": "a whole number",
    "string_type": "text",
    "tuple_type": "a list",
    "dict_type": "a mapping (key: value)",
    "model_type": "a mapping (key: value)",
    "model_attributes_type": "a mapping (key: value)",
}
_LIMITS: Final = {
    "greater_than_equal": "at least {ge}",
    "less_than_equal": "at most {le}",
    "string_too_short": "at least {min_length} characters long",
    "string_too_long": "at most {max_length} characters long",
    "string_pattern_mismatch": "text without white space around it",
}


def _label(loc: Loc) -> str:
    names = [index for index, segment in enumerate(loc) if isinstance(segment, str)]
    if not names:
        return "the document"
    indexes = "".join(f"[{segment}]" for segment in loc[names[-1] + 1 :])
    return f"{loc[names[-1]]}{indexes}"


def _type_hint(kind: str, value: object) -> str | None:
    if kind == "bool_type" and isinstance(value, str) and value.lower() in BOOLEAN_WORDS:
        return "write true or false, without quotes"
    if kind == "int_type" and isinstance(value, str) and re.fullmatch("[0-9]+", value):
        return f"write {int(value[:20])}, without quotes or leading zeros"
    if kind == "string_type" and isinstance(value, bool | int | float):
        return "put it in quotes to make it text"
    if kind == "tuple_type" and isinstance(value, str):
        return f"write [{value}]"
    return None


def _choices(expected: str) -> list[str]:
    return re.findall(r"'([^']*)'", expected)


def _either(choices: list[str]) -> str:
    quoted = [repr(choice) for choice in choices]
    return quoted[0] if len(quoted) == 1 else f"{', '.join(quoted[:-1])} or {quoted[-1]}"


def _choices_hint(loc: Loc) -> str | None:
    if len(loc) == 3 and loc[0] == "procedures" and loc[2] == "type":
        return "write type: dimension or type: fact"
    if len(loc) == 5 and loc[4] == "type" and loc[2] in _KINDS:
        return f"write one of {', '.join(_KINDS[str(loc[2])])}"
    return "write version: 1" if loc == ("version",) else None


def _unknown_key(loc: Loc, source: Source) -> tuple[str, str | None]:
    key, parent = str(loc[-1]), loc[:-1]
    message = f"unknown key {key!r}"
    if key == "<<":
        return message, "merge keys are not part of YAML 1.2; write what is common under defaults:"
    allowed = _allowed_keys(parent, source)
    if _SYNONYMS.get(key) in allowed:
        return message, f"did you mean {_SYNONYMS[key]!r}?"
    return message, did_you_mean(key, allowed) or _home_of(key, parent) or f"known keys: {', '.join(allowed)}"


def _shape(loc: Loc) -> tuple[str, ...]:
    """A path with a star for every index, and for every name that the user chose."""
    shape: list[str] = []
    for segment in loc:
        is_chosen = isinstance(segment, int) or shape in (["groups"], ["procedures", "*", "params"])
        shape.append("*" if is_chosen else str(segment))
    return tuple(shape)


def _allowed_keys(parent: Loc, source: Source) -> list[str]:
    model = _MODELS.get(_shape(parent), ("", Config))[1]
    if len(parent) == 4 and parent[2] in _KINDS:
        value = source.value(parent)
        kind = str(value.get("type")) if isinstance(value, dict) else ""
        model = _KINDS[str(parent[2])].get(kind, model)
    return list(model.model_fields)


def _home_of(key: str, parent: Loc) -> str | None:
    """Where a key belongs that stands in the wrong place, if there is one such place."""
    if len(parent) == 4 and parent[2] in _KINDS:
        kinds = [kind for kind, model in _KINDS[str(parent[2])].items() if key in model.model_fields]
        if kinds:
            return f"{key} belongs to the type {' or '.join(kinds)}"
    homes = list(dict.fromkeys(label for label, model in _MODELS.values() if key in model.model_fields))
    return f"{key} belongs to {homes[0]}" if len(homes) == 1 else None


def _procedure_spec(config: Config, procedure: Procedure) -> dict[str, Any]:
    folded = settings(config, procedure)
    watermark = procedure.watermark
    return {
        "name": procedure.name,
        "routine": procedure.routine or procedure.name,
        "type": procedure.type,
        "description": procedure.description,
        "dependencies": list(procedure.dependencies),
        "allow_fact_dependency": procedure.allow_fact_dependency,
        "group": procedure.group,
        "tags": list(procedure.tags),
        "default_mode": folded.default_mode,
        "allow_full_refresh": folded.allow_full_refresh,
        "transaction_scope": folded.transaction_scope,
        "isolation": folded.isolation,
        "params": [_param_spec(name, declaration_of(param)) for name, param in procedure.params.items()],
        "args": dict(procedure.args),
        "watermark": watermark
        and {
            "strategy": watermark.strategy,
            "source": list(watermark.source),
            "state_key": watermark.state_key or procedure.name,
            "delay_ms": watermark.delay,
            "on_empty": watermark.on_empty,
        },
        "retries": {
            "attempts": folded.attempts,
            "backoff_ms": folded.backoff_ms,
            "max_backoff_ms": folded.max_backoff_ms,
        },
        "timeout_ms": folded.timeout_ms,
        "lock_timeout_ms": folded.lock_timeout_ms,
        "on_failure": folded.on_failure,
        "freshness_ms": folded.freshness_ms,
        "max_window": procedure.max_window,
        "checks": [_check_spec(check) for check in procedure.checks],
        "mv_refresh": [target.model_dump() for target in procedure.mv_refresh],
    }


def _param_spec(name: str, declaration: dict[str, Any]) -> dict[str, Any]:
    ordered = {"name": name, "type": declaration["type"], "required": declaration.get("required", False)}
    rest = {key: _plain(value) for key, value in declaration.items() if key not in ordered}
    return {**ordered, **rest}


def _check_spec(check: CheckModel) -> dict[str, Any]:
    dumped = check.model_dump(mode="json", exclude_none=True)
    first = {key: dumped.pop(key) for key in ("name", "type")}
    severity = dumped.pop("severity")
    return {**first, **dumped, "severity": severity}


def _schedule_spec(schedule: Schedule) -> dict[str, Any]:
    fields = {name: _plain(getattr(schedule, name)) for name in Schedule.model_fields}
    late_after_ms = fields.pop("late_after")
    return {**fields, "late_after_ms": late_after_ms}


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def json_schema() -> dict[str, Any]:
    """The JSON Schema of the file, for editors. `${VAR}` is accepted wherever a value is not free text."""
    schema = Config.model_json_schema()
    schema = {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}
    for model in (schema, *schema.get("$defs", {}).values()):
        for name, field in model.get("properties", {}).items():
            model["properties"][name] = _with_variables(_as_written(field))
    return schema


def _as_written(schema: dict[str, Any]) -> dict[str, Any]:
    """`schema` with its default as a file would write it, and closed to ill-formed names."""
    written = dict(schema)
    default = written.get("default")
    if default is None or isinstance(default, dict | list):
        written.pop("default", None)
    elif "30s" in written.get("examples", ()):
        written["default"] = f"{default // 1000}s"
    elif "forever" in written.get("pattern", ""):
        written["default"] = f"{default} days"
    if "patternProperties" in written:
        written["additionalProperties"] = False
    return written


_ANNOTATIONS: Final = ("title", "description", "default", "examples")
_VARIABLE_SCHEMA: Final = {"type": "string", "pattern": r"\$\{"}


def _with_variables(schema: dict[str, Any]) -> dict[str, Any]:
    """`schema` that also accepts a text with a variable, where it would refuse one."""
    notes: dict[str, Any] = {key: schema[key] for key in _ANNOTATIONS if key in schema}
    core = {key: value for key, value in schema.items() if key not in notes}
    for key in ("items", "additionalProperties"):
        if isinstance(core.get(key), dict):
            core[key] = _with_variables(core[key])
    if "anyOf" in core:
        branches = [_with_items(branch) for branch in core["anyOf"]]
        is_closed = not any(_accepts_any_text(branch) for branch in branches)
        return {**notes, "anyOf": [*branches, _VARIABLE_SCHEMA] if is_closed else branches}
    if "const" in core or "$ref" in core or "oneOf" in core or _accepts_any_text(core):
        return {**notes, **core}
    if core.get("type") in ("array", "object") or ("type" not in core and "enum" not in core):
        return {**notes, **core}
    return {**notes, "anyOf": [core, _VARIABLE_SCHEMA]}


def _with_items(branch: dict[str, Any]) -> dict[str, Any]:
    if isinstance(branch.get("items"), dict):
        return {**branch, "items": _with_variables(branch["items"])}
    return branch


def _accepts_any_text(schema: dict[str, Any]) -> bool:
    return schema.get("type") == "string" and not {"enum", "pattern", "const"} & schema.keys()
