"""The shape of a configuration file: one strict, frozen pydantic model per mapping, described in user terms.

What one field can say about itself is checked here; what takes two fields to know, in configcheck.py.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, WithJsonSchema
from pydantic_core import PydanticCustomError

from b2s import configvalues
from b2s.configvalues import Refused, shown

CONTRACT_NAMES = ("p_mode", "p_since", "p_until", "p_run_id", "rows")
BOOLEAN_WORDS = frozenset({"yes", "no", "on", "off", "y", "n", "true", "false"})
Isolation = Literal["read committed", "repeatable read", "serializable"]
Scope = Literal["per_procedure", "per_group"]
Mode = Literal["incremental", "full"]
OnFailure = Literal["continue", "stop"]


def _checked(check: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """`check` as a validator: its refusal becomes an error that carries the hint."""

    def validate(value: Any) -> Any:
        try:
            return check(value)
        except Refused as refused:
            context = {"reason": f"{shown(value)} {refused}", "hint": refused.hint or ""}
            raise PydanticCustomError("refused", "{reason}", context) from None

    return validate


def _named(pattern: str, shape: str) -> AfterValidator:
    return AfterValidator(_checked(lambda value: configvalues.check_name(value, pattern, shape)))


def _matching(pattern: str) -> WithJsonSchema:
    return WithJsonSchema({"type": "string", "pattern": f"^{pattern}$"})


def _check_limit(value: Any) -> int:
    milliseconds = configvalues.bounded_duration(value)
    if milliseconds == 0:
        raise Refused("is not longer than zero", "write null for no limit")
    return milliseconds


def _check_freshness(value: Any) -> int:
    milliseconds = configvalues.parse_duration(value)
    if not 0 < milliseconds <= configvalues.MAX_FRESHNESS:
        raise Refused("is not between 1ms and 3650 days", "write null for no objective")
    return milliseconds


def _check_number(value: Any) -> int | float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise Refused("is not a finite number")
    return value


def _check_concurrently(value: Any) -> Any:
    if value != "auto" and not isinstance(value, bool):
        hint = "write true or false" if str(value).lower() in BOOLEAN_WORDS else None
        raise Refused("is none of auto, true and false", hint)
    return value


def _check_max_window(value: Any) -> Any:
    if isinstance(value, bool) or not isinstance(value, int | str):
        raise Refused("is neither a duration nor a whole number", "write a duration, or a number of ids")
    if isinstance(value, int):
        if not 1 <= value <= configvalues.MAX_BIGINT:
            raise Refused("is not a positive bigint")
        return value
    if configvalues.parse_duration(value) == 0:
        raise Refused("is not longer than zero")
    return value


def _check_catch_up(value: Any) -> Any:
    if isinstance(value, bool):
        return value
    if not isinstance(value, str) or value.lower() in BOOLEAN_WORDS:
        raise Refused("is neither true, nor false, nor a duration", "write true, false, or how late: 2h")
    return _check_limit(value)


_DURATION_SCHEMA: dict[str, Any] = {
    "type": "string",
    "pattern": f"^{configvalues.DURATION}$",
    "examples": ["30s", "5min", "1 day"],
}
Identifier = Annotated[str, _named(configvalues.IDENTIFIER, "name"), _matching(configvalues.IDENTIFIER)]
Qualified = Annotated[
    str, _named(configvalues.QUALIFIED, "name or schema.name"), _matching(configvalues.QUALIFIED)
]
Relation = Annotated[
    str, _named(configvalues.RELATION, "name or schema.name"), _matching(configvalues.RELATION)
]
Source = Annotated[
    str,
    AfterValidator(_checked(configvalues.check_source)),
    _matching(f"({configvalues.TABLE_COLUMN}|{configvalues.QUERY})"),
]
RoutineName = Annotated[
    str,
    _named(configvalues.ROUTINE, "name, schema.name or schema.name(types)"),
    _matching(configvalues.ROUTINE),
]
Duration = Annotated[
    int, BeforeValidator(_checked(configvalues.bounded_duration)), WithJsonSchema(_DURATION_SCHEMA)
]
Limit = Annotated[int, BeforeValidator(_checked(_check_limit)), WithJsonSchema(_DURATION_SCHEMA)]
Freshness = Annotated[int, BeforeValidator(_checked(_check_freshness)), WithJsonSchema(_DURATION_SCHEMA)]
MaxWindow = Annotated[
    Any,
    BeforeValidator(_checked(_check_max_window)),
    WithJsonSchema(
        {
            "anyOf": [
                {"type": "string", "pattern": f"^{configvalues.DURATION}$"},
                {"type": "integer", "minimum": 1},
            ]
        }
    ),
]
CatchUp = Annotated[
    Any,
    BeforeValidator(_checked(_check_catch_up)),
    WithJsonSchema(
        {"anyOf": [{"type": "boolean"}, {"type": "string", "pattern": f"^{configvalues.DURATION}$"}]}
    ),
]
Days = Annotated[
    Any,
    BeforeValidator(_checked(configvalues.parse_days)),
    WithJsonSchema({"type": "string", "pattern": f"^({configvalues.DAYS}|forever)$"}),
]
Pattern = Annotated[
    str,
    AfterValidator(_checked(configvalues.check_pattern)),
    WithJsonSchema({"type": "string", "format": "regex"}),
]
Cron = Annotated[str, AfterValidator(_checked(configvalues.check_cron)), WithJsonSchema({"type": "string"})]
TimeZone = Annotated[
    str, AfterValidator(_checked(configvalues.check_timezone)), WithJsonSchema({"type": "string"})
]
Tag = Annotated[str, Field(min_length=1, max_length=configvalues.MAX_NAME_LENGTH, pattern=r"^\S(.*\S)?$")]
Description = Annotated[
    str | None, Field(description="What it is for, in a sentence; shown wherever it is listed.")
]
Identifiers = Annotated[tuple[Identifier, ...], Field(strict=False)]
QualifiedNames = Annotated[tuple[Qualified, ...], Field(strict=False)]
Tags = Annotated[tuple[Tag, ...], Field(strict=False)]
Count = Annotated[int, Field(ge=0, le=2**31 - 1)]
BigInteger = Annotated[int, Field(ge=-(2**63), le=2**63 - 1)]
FiniteNumber = Annotated[Any, BeforeValidator(_checked(_check_number)), WithJsonSchema({"type": "number"})]
Concurrently = Annotated[
    Any,
    BeforeValidator(_checked(_check_concurrently)),
    WithJsonSchema({"anyOf": [{"const": "auto"}, {"type": "boolean"}]}),
]


def _title(name: str, _: object) -> str:
    return re.sub("([A-Z])", r" \1", name.replace("_", " ")).capitalize()


class Model(BaseModel):
    """Settings shared by every mapping of the file."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, field_title_generator=_title)

    def given(self) -> dict[str, Any]:
        """The keys that stand in the file, with their values, in the order of the model."""
        return {
            name: getattr(self, name) for name in type(self).model_fields if name in self.model_fields_set
        }


_DEFAULT = Field(default=None, description="The value of a request that gives none.")
TextDefault = Annotated[Any, WithJsonSchema({"type": "string"})]
IntegerDefault = Annotated[Any, WithJsonSchema({"type": "integer"})]
NumberDefault = Annotated[Any, WithJsonSchema({"type": "number"})]
BooleanDefault = Annotated[Any, WithJsonSchema({"type": "boolean"})]
ListDefault = Annotated[Any, WithJsonSchema({"type": "array"})]


class StringParam(Model):
    """A param that is text."""

    type: Literal["string"] = Field(description="The type of the value.")
    required: bool = Field(default=False, description="Refuse a request that gives no value.")
    default: TextDefault = _DEFAULT
    enum: Annotated[tuple[str, ...], Field(strict=False, min_length=1)] | None = Field(
        default=None, description="The values allowed; any other is refused."
    )
    pattern: Pattern | None = Field(
        default=None,
        description="A regular expression that must match somewhere in the value; anchor it with ^ and $.",
    )
    minLength: Count | None = Field(default=None, description="The fewest characters allowed.")
    maxLength: Count | None = Field(default=None, description="The most characters allowed.")
    format: Literal["date", "date-time", "uuid"] | None = Field(
        default=None, description="The value must be a date, a date-time with an offset, or a uuid."
    )
    description: Description = None


class IntegerParam(Model):
    """A param that is a whole number."""

    type: Literal["integer"] = Field(description="The type of the value.")
    required: bool = Field(default=False, description="Refuse a request that gives no value.")
    default: IntegerDefault = _DEFAULT
    enum: Annotated[tuple[BigInteger, ...], Field(strict=False, min_length=1)] | None = Field(
        default=None, description="The values allowed; any other is refused."
    )
    minimum: BigInteger | None = Field(default=None, description="The smallest value allowed.")
    maximum: BigInteger | None = Field(default=None, description="The largest value allowed.")
    description: Description = None


class NumberParam(Model):
    """A param that is a number, with or without decimals."""

    type: Literal["number"] = Field(description="The type of the value.")
    required: bool = Field(default=False, description="Refuse a request that gives no value.")
    default: NumberDefault = _DEFAULT
    enum: Annotated[tuple[FiniteNumber, ...], Field(strict=False, min_length=1)] | None = Field(
        default=None, description="The values allowed; any other is refused."
    )
    minimum: FiniteNumber | None = Field(default=None, description="The smallest value allowed.")
    maximum: FiniteNumber | None = Field(default=None, description="The largest value allowed.")
    description: Description = None


class BooleanParam(Model):
    """A param that is true or false."""

    type: Literal["boolean"] = Field(description="The type of the value.")
    required: bool = Field(default=False, description="Refuse a request that gives no value.")
    default: BooleanDefault = _DEFAULT
    description: Description = None


class Items(Model):
    """What a list param holds."""

    type: Literal["string", "integer"] = Field(description="The type of each item.")


class ArrayParam(Model):
    """A param that is a list."""

    type: Literal["array"] = Field(description="The type of the value.")
    items: Items = Field(description="What the list holds.")
    required: bool = Field(default=False, description="Refuse a request that gives no value.")
    default: ListDefault = _DEFAULT
    minItems: Count | None = Field(default=None, description="The fewest items allowed.")
    maxItems: Count | None = Field(default=None, description="The most items allowed.")
    description: Description = None


ParamKind = StringParam | IntegerParam | NumberParam | BooleanParam | ArrayParam
Param = Annotated[ParamKind, Field(discriminator="type")]


class Watermark(Model):
    """What an incremental step reads since its last success."""

    strategy: Literal["timestamp", "id", "xid"] = Field(
        description="What tells new rows: a timestamp, an id, or the transaction that wrote them."
    )
    source: Annotated[
        tuple[Source, ...],
        BeforeValidator(
            lambda value: [value] if isinstance(value, str) else value, json_schema_input_type=str | list[str]
        ),
        Field(
            strict=False,
            min_length=1,
            description="The column or columns read: schema.table.column, or a list of them; "
            "or one query that returns the newest value there is to read.",
        ),
    ]
    state_key: Qualified | None = Field(
        default=None, description="Where the watermark is kept; default: the procedure's name."
    )
    delay: Duration = Field(
        default=0,
        description="How late a timestamp may be when its row is committed; for the timestamp strategy.",
    )
    on_empty: Literal["run", "skip"] = Field(
        default="run",
        description="What a step does whose window holds no row: run all the same, or be skipped.",
    )


class Retries(Model):
    """How often, and how long after a failure, a step is tried."""

    attempts: int = Field(default=3, ge=1, le=20, description="Attempts in all, the first included.")
    backoff: Duration = Field(
        default=1000, description="The wait before the second attempt; it doubles each time."
    )
    max_backoff: Duration = Field(default=30_000, description="The longest wait between two attempts.")


RetriesOrCount = Annotated[
    Retries,
    BeforeValidator(
        lambda value: {"attempts": value} if isinstance(value, int | str) else value,
        json_schema_input_type=int | Retries,
    ),
]


class CheckModel(Model):
    """What all checks have in common."""

    name: Identifier = Field(description="The check's name, unique in its procedure.")
    severity: Literal["error", "warn"] = Field(
        default="error", description="error: the step fails and is undone; warn: the run ends with a warning."
    )


class NotNullCheck(CheckModel):
    """No row has null in any of the columns."""

    type: Literal["not_null"] = Field(description="The kind of check.")
    table: Qualified = Field(description="The table that is checked.")
    columns: Annotated[Identifiers, Field(min_length=1, description="The columns that must not be null.")]


class UniqueCheck(CheckModel):
    """No two rows agree in all of the columns."""

    type: Literal["unique"] = Field(description="The kind of check.")
    table: Qualified = Field(description="The table that is checked.")
    columns: Annotated[
        Identifiers, Field(min_length=1, description="The columns that together must be unique.")
    ]


class RowCountCheck(CheckModel):
    """The table has as many rows as expected."""

    type: Literal["row_count"] = Field(description="The kind of check.")
    table: Qualified = Field(description="The table that is counted.")
    min: Annotated[int, Field(ge=0, le=2**63 - 1)] | None = Field(
        default=None, description="The fewest rows allowed."
    )
    max: Annotated[int, Field(ge=0, le=2**63 - 1)] | None = Field(
        default=None, description="The most rows allowed."
    )


class RoutineCheck(CheckModel):
    """A function of yours says whether all is well."""

    type: Literal["routine"] = Field(description="The kind of check.")
    routine: RoutineName = Field(
        description="A function without required arguments: true, or 0 violations, means all is well."
    )


CheckKind = NotNullCheck | UniqueCheck | RowCountCheck | RoutineCheck
Check = Annotated[CheckKind, Field(discriminator="type")]


class MvRefresh(Model):
    """A materialized view that is refreshed because of a procedure."""

    name: Relation = Field(description="The materialized view, with double quotes where its name needs them.")
    after: Literal["procedure", "group", "run"] = Field(default="run", description="When it is refreshed.")
    on: Literal["success", "always"] = Field(
        default="success", description="Whether a failure holds it back."
    )
    concurrently: Concurrently = Field(
        default="auto", description="REFRESH ... CONCURRENTLY; auto: where Postgres accepts it."
    )


MvRefreshOrName = Annotated[
    MvRefresh,
    BeforeValidator(
        lambda value: {"name": value} if isinstance(value, str) else value,
        json_schema_input_type=str | MvRefresh,
    ),
]


class Defaults(Model):
    """What every procedure has that does not say otherwise."""

    default_mode: Mode = Field(default="incremental", description="The mode of a run that names none.")
    allow_full_refresh: bool = Field(
        default=False, description="Whether a full refresh may be requested at all."
    )
    transaction_scope: Scope = Field(
        default="per_procedure", description="One transaction for each procedure, or one for its whole group."
    )
    isolation: Isolation = Field(
        default="read committed", description="The isolation level of the transaction."
    )
    retries: RetriesOrCount = Field(default=Retries(), description="Attempts in all, or attempts and waits.")
    timeout: Limit | None = Field(default=None, description="How long one attempt may take; null: no limit.")
    lock_timeout: Limit | None = Field(
        default=None, description="How long to wait for a lock; null: no limit."
    )
    on_failure: OnFailure = Field(
        default="continue",
        description="After a failure: continue with what does not depend on it, or stop the run.",
    )
    freshness: Freshness | None = Field(
        default=None,
        description="Freshness objective: how long at most what is committed may be missing in the target.",
    )


class Group(Model):
    """Procedures that belong together."""

    description: Description = None
    transaction_scope: Scope | None = Field(
        default=None, description="For each member that does not say otherwise."
    )
    isolation: Isolation | None = Field(
        default=None, description="For each member that does not say otherwise."
    )


GroupOrNothing = Annotated[
    Group, BeforeValidator(lambda value: {} if value is None else value, json_schema_input_type=Group | None)
]


class Procedure(Defaults):
    """One transformation: a routine in the database that fills one table."""

    name: Qualified = Field(description="The procedure's name, usually that of the table it fills.")
    routine: RoutineName | None = Field(
        default=None,
        description="The function or procedure called, with double quotes where its name needs them; "
        "default: the name. A list of types picks an overload.",
    )
    type: Literal["dimension", "fact"] = Field(
        description="Facts start after every selected dimension has ended."
    )
    description: Description = None
    dependencies: QualifiedNames = Field(
        default=(), description="The procedures that must have succeeded before this one."
    )
    allow_fact_dependency: bool = Field(default=False, description="Let this dimension depend on a fact.")
    group: Identifier | None = Field(default=None, description="The group this procedure belongs to.")
    tags: Tags = Field(default=(), description="Words to select procedures by.")
    params: dict[Identifier, Param] = Field(default={}, description="What a request may pass to the routine.")
    args: dict[str, Identifier] = Field(
        default={},
        description="Contract name or param name -> the argument name that the routine uses for it.",
    )
    watermark: Watermark | None = Field(
        default=None, description="What an incremental step reads; null: everything."
    )
    max_window: MaxWindow | None = Field(
        default=None,
        description="The longest window one transaction reads: a duration for timestamps, a number of ids, "
        "or a number of transactions for xid.",
    )
    checks: Annotated[tuple[Check, ...], Field(strict=False)] = Field(
        default=(), description="Conditions that must hold before the step is committed."
    )
    mv_refresh: Annotated[tuple[MvRefreshOrName, ...], Field(strict=False)] = Field(
        default=(), description="Materialized views that are refreshed afterwards."
    )


class Schedule(Model):
    """A run that starts by the clock."""

    name: Identifier = Field(description="The schedule's name.")
    cron: Cron = Field(
        description="Five fields (minute, hour, day of month, month, day of week), or `30 seconds`."
    )
    timezone: TimeZone = Field(default="UTC", description="The time zone that the cron time is meant in.")
    mode: Mode | None = Field(
        default=None, description="The mode of the run; default: each procedure's default_mode."
    )
    procedures: QualifiedNames = Field(default=(), description="The procedures that run; default: all.")
    groups: Identifiers = Field(default=(), description="The groups that run.")
    tags: Tags = Field(default=(), description="The tags of which the procedures run.")
    params: dict[str, dict[str, Any]] = Field(default={}, description="Procedure -> param -> value.")
    reason: str | None = Field(
        default=None, description="Kept with each run; required for `mode: full`, which this file confirms."
    )
    on_conflict: Literal["skip", "queue", "fail"] = Field(
        default="skip",
        description="When a run is active already: skip this one, queue it behind, or record a failed run.",
    )
    catch_up: CatchUp = Field(
        default=False,
        description="Whether a time at which no clock ran is made up for, once: false, true, or how late it "
        "may be, such as `2h`. Up to five minutes are never too late.",
    )
    late_after: Limit = Field(
        default=3_600_000,
        description="A time without a successful run so long afterwards is reported as late.",
    )


class Clock(Model):
    """Who runs what is due, and who executes the runs."""

    executor: Literal["auto", "pg_cron", "worker"] = Field(
        default="auto",
        description="pg_cron: jobs of it; worker: `b2s worker --schedule`; auto: pg_cron where there is one.",
    )
    workers: Annotated[int, Field(ge=0, le=64)] = Field(
        default=1, description="How many jobs of pg_cron execute runs of this pipeline."
    )
    role: Identifier | None = Field(
        default=None, description="The role that owns the jobs; default: who runs `b2s sync-config`."
    )


class Retention(Model):
    """How long history is kept before `etl.purge` deletes it: `400 days`, or `forever`."""

    runs: Days = Field(default=400, description="Runs with their attempts, and moves of watermarks.")
    logs: Days = Field(default=90, description="Log lines of steps, by whole months.")
    ticks: Days = Field(default=30, description="How far back `as_of` reaches for ids and transactions.")


class Lint(Model):
    """How `b2s lint` judges the SQL of this pipeline."""

    rules: dict[str, Literal["error", "warning", "info", "off"]] = Field(
        default={}, description="Rule (B401) -> the severity of its findings here, or off."
    )
    bronze: Identifiers = Field(default=("bronze",), description="Schemas that no step may write.")
    target_version: Annotated[int, Field(ge=15, le=99)] | None = Field(
        default=None, description="The oldest PostgreSQL that must understand the SQL; default: 15."
    )
    on_sync: Literal["error", "warn", "off"] = Field(
        default="off",
        description="What `b2s sync-config` does about findings in the routines: refuse, show, or nothing.",
    )


class Config(Model):
    """A b2s pipeline: procedures, their order and their rules."""

    model_config = ConfigDict(title="b2s transformations")

    version: int = Field(ge=1, le=1, description="The version of this file format: 1.")
    pipeline: Identifier = Field(
        default="bronze_to_silver",
        description="The pipeline's name; one run of a pipeline is active at a time.",
    )
    description: Description = None
    max_concurrency: int = Field(
        default=2, ge=1, le=64, description="The most steps that run at the same time."
    )
    approvals: Literal["none", "two_person"] = Field(
        default="none",
        description="`two_person`: a full refresh needs the approval of an admin other than who asked.",
    )
    search_path: Identifiers = Field(
        default=(), description="Schemas on the search_path of every step, after pg_catalog."
    )
    helper_server: Identifier | None = Field(
        default=None,
        description="Foreign server of dblink through which a plain CALL opens further sessions.",
    )
    defaults: Defaults = Field(
        default=Defaults(), description="Settings of every procedure that does not say otherwise."
    )
    groups: dict[Identifier, GroupOrNothing] = Field(default={}, description="The groups, by name.")
    procedures: Annotated[tuple[Procedure, ...], Field(strict=False, min_length=1)] = Field(
        description="The transformations, in any order."
    )
    schedules: Annotated[tuple[Schedule, ...], Field(strict=False)] = Field(
        default=(), description="Runs that start by the clock."
    )
    clock: Clock = Field(default=Clock(), description="Who runs what is due.")
    retention: Retention = Field(default=Retention(), description="How long history is kept.")
    observe_lineage: Literal["daily", "always", "never"] = Field(
        default="daily",
        description="When b2s looks at what a step locks: once a day and after each change of its routine, "
        "at every step, or never.",
    )
    lint: Lint = Field(default=Lint(), description="How `b2s lint` judges the SQL; no run depends on it.")


@dataclass(frozen=True, slots=True)
class Settings:
    """What applies to one procedure once its own keys, its group and the defaults are folded together."""

    default_mode: str
    allow_full_refresh: bool
    transaction_scope: str
    isolation: str
    attempts: int
    backoff_ms: int
    max_backoff_ms: int
    timeout_ms: int | None
    lock_timeout_ms: int | None
    on_failure: str
    freshness_ms: int | None


def settings(config: Config, procedure: Procedure) -> Settings:
    """Folds, strongest first: the procedure's own keys, its group's, the defaults, b2s' own defaults."""
    own, common = procedure.given(), config.defaults.given()
    group = config.groups.get(procedure.group) if procedure.group else None
    shared = {name: value for name, value in group.given().items() if value is not None} if group else {}

    def pick(name: str) -> Any:
        for layer in (own, shared, common):
            if name in layer:
                return layer[name]
        return getattr(config.defaults, name)

    retries = {**config.defaults.retries.given(), **procedure.retries.given()}
    folded = Retries.model_construct(**retries)
    return Settings(
        default_mode=pick("default_mode"),
        allow_full_refresh=pick("allow_full_refresh"),
        transaction_scope=pick("transaction_scope"),
        isolation=pick("isolation"),
        attempts=folded.attempts,
        backoff_ms=folded.backoff,
        max_backoff_ms=folded.max_backoff,
        timeout_ms=pick("timeout"),
        lock_timeout_ms=pick("lock_timeout"),
        on_failure=pick("on_failure"),
        freshness_ms=pick("freshness"),
    )
