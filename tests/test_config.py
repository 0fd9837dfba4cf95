"""transformations.yaml: what is accepted, what it becomes, and where each mistake is reported."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Mapping
from pathlib import Path

import pytest

from b2s.config import ConfigError, LoadedConfig, Problem, format_problems, json_schema, load_config
from b2s.yamlsource import scalar

FULL = """\
version: 1
pipeline: sales
description: Everything at once.
max_concurrency: ${WORKERS:-4}
search_path: [silver, bronze]
defaults:
  retries: {backoff: 2s}
  timeout: 30min
  on_failure: stop
groups:
  customers: {description: Who buys., transaction_scope: per_group, isolation: repeatable read}
  empty:
procedures:
  - name: silver.dim_locations
    type: dimension
    group: customers
    timeout: null
    watermark: {strategy: timestamp, source: bronze.loc.ingested_at, state_key: customers, delay: 5s}
    max_window: 1 day
  - name: silver.dim_customers
    type: dimension
    group: customers
    dependencies: [silver.dim_locations]
    watermark:
      strategy: timestamp
      source: [bronze.crm.ingested_at, bronze.loc.ingested_at]
      state_key: customers
  - name: silver.fact_sales
    routine: silver.load_sales(text, timestamptz)
    type: fact
    description: One row per sale.
    dependencies: [silver.dim_customers]
    group: other
    tags: [daily]
    default_mode: full
    allow_full_refresh: true
    transaction_scope: per_procedure
    isolation: serializable
    params:
      country: {type: string, enum: [DE, NO], default: NO, description: Where.}
      code: {type: string, pattern: '^[A-Z]{2}$', minLength: 2, maxLength: 2}
      since: {type: string, format: date, default: 2026-01-01}
      batch: {type: integer, minimum: 1, maximum: 100, required: true}
      share: {type: number, minimum: 0, default: 0.5}
      flags: {type: array, items: {type: string}, minItems: 1, maxItems: 9, default: [a]}
      dry: {type: boolean, default: false}
    args: {p_since: from_ts, country: in_country, rows: out_rows}
    retries: {attempts: 5, max_backoff: 1min}
    lock_timeout: 10s
    on_failure: continue
    watermark: {strategy: id, source: bronze.sales.id}
    max_window: 1000
    checks:
      - {name: has_customer, type: not_null, table: silver.fact_sales, columns: [customer_id]}
      - {name: once, type: unique, table: silver.fact_sales, columns: [a, b], severity: warn}
      - {name: some, type: row_count, table: silver.fact_sales, min: 1, max: 10}
      - {name: mine, type: routine, routine: silver.check_sales}
    mv_refresh:
      - mart.sales_daily
      - {name: mart.sales_monthly, after: group, on: always, concurrently: false}
schedules:
  - name: nightly
    cron: "0 2 * * 1-5"
    timezone: Europe/Berlin
    mode: incremental
    procedures: [silver.fact_sales]
    groups: [customers]
    tags: [daily]
    params: {silver.fact_sales: {batch: 5}}
    catch_up: true
  - name: often
    cron: 30 seconds
    groups: [customers]
    mode: full
    reason: as agreed
    catch_up: 2h
    late_after: 10min
clock: {executor: pg_cron, workers: 2, role: clock_of_sales}
retention: {runs: forever, logs: 60 days}
"""

# Line 3 is the procedure, so that a case which begins with `    ` continues it on line 5.
HEAD = "version: 1\nprocedures:\n  - name: silver.a\n    type: fact\n"


def load(tmp_path: Path, text: str | bytes, environ: Mapping[str, str] | None = None) -> LoadedConfig:
    path = tmp_path / "t.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return load_config(path, environ or {})


def problems_of(tmp_path: Path, text: str | bytes, environ: Mapping[str, str] | None = None) -> list[Problem]:
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, text, environ)
    return caught.value.problems


def places(problems: list[Problem]) -> list[str]:
    return [f"{problem.line}:{problem.column} {problem.message}" for problem in problems]


@pytest.mark.parametrize(
    "text", ["silver.load", "Orders of a shop", "true", "Null", "no", "1", "a: b", 'silver."Odd"', "ends "]
)
def test_a_text_that_is_written_is_read_back_as_that(tmp_path: Path, text: str) -> None:
    assert load(tmp_path, f"{HEAD}    description: {scalar(text)}\n").config.procedures[0].description == text


def test_a_full_file_becomes_the_spec_with_every_default_written_out(tmp_path: Path) -> None:
    spec = load(tmp_path, FULL).spec()
    assert json.loads(json.dumps(spec)) == spec
    locations, customers, sales = spec.pop("procedures")
    nightly, often = spec.pop("schedules")
    assert spec == {
        "version": 1,
        "pipeline": "sales",
        "description": "Everything at once.",
        "max_concurrency": 4,
        "search_path": ["silver", "bronze"],
        "observe_lineage": "daily",
        "approvals": "none",
        "helper_server": None,
        "groups": [
            {"name": "customers", "description": "Who buys."},
            {"name": "empty", "description": None},
            {"name": "other", "description": None},
        ],
        "clock": {"executor": "pg_cron", "workers": 2, "role": "clock_of_sales"},
        "retention": {"runs": "forever", "logs": 60, "ticks": 30},
    }
    assert locations == {
        "name": "silver.dim_locations",
        "routine": "silver.dim_locations",
        "type": "dimension",
        "description": None,
        "dependencies": [],
        "allow_fact_dependency": False,
        "group": "customers",
        "tags": [],
        "default_mode": "incremental",
        "allow_full_refresh": False,
        "transaction_scope": "per_group",
        "isolation": "repeatable read",
        "params": [],
        "args": {},
        "watermark": {
            "strategy": "timestamp",
            "source": ["bronze.loc.ingested_at"],
            "state_key": "customers",
            "delay_ms": 5000,
            "on_empty": "run",
        },
        "retries": {"attempts": 3, "backoff_ms": 2000, "max_backoff_ms": 30000},
        "timeout_ms": None,
        "lock_timeout_ms": None,
        "on_failure": "stop",
        "freshness_ms": None,
        "max_window": "1 day",
        "checks": [],
        "mv_refresh": [],
    }
    assert customers["timeout_ms"] == 1_800_000
    assert customers["watermark"]["source"] == ["bronze.crm.ingested_at", "bronze.loc.ingested_at"]
    assert sales == {
        "name": "silver.fact_sales",
        "routine": "silver.load_sales(text, timestamptz)",
        "type": "fact",
        "description": "One row per sale.",
        "dependencies": ["silver.dim_customers"],
        "allow_fact_dependency": False,
        "group": "other",
        "tags": ["daily"],
        "default_mode": "full",
        "allow_full_refresh": True,
        "transaction_scope": "per_procedure",
        "isolation": "serializable",
        "params": [
            {
                "name": "country",
                "type": "string",
                "required": False,
                "default": "NO",
                "enum": ["DE", "NO"],
                "description": "Where.",
            },
            {
                "name": "code",
                "type": "string",
                "required": False,
                "pattern": "^[A-Z]{2}$",
                "minLength": 2,
                "maxLength": 2,
            },
            {"name": "since", "type": "string", "required": False, "default": "2026-01-01", "format": "date"},
            {"name": "batch", "type": "integer", "required": True, "minimum": 1, "maximum": 100},
            {"name": "share", "type": "number", "required": False, "default": 0.5, "minimum": 0},
            {
                "name": "flags",
                "type": "array",
                "required": False,
                "items": {"type": "string"},
                "default": ["a"],
                "minItems": 1,
                "maxItems": 9,
            },
            {"name": "dry", "type": "boolean", "required": False, "default": False},
        ],
        "args": {"p_since": "from_ts", "country": "in_country", "rows": "out_rows"},
        "watermark": {
            "strategy": "id",
            "source": ["bronze.sales.id"],
            "state_key": "silver.fact_sales",
            "delay_ms": 0,
            "on_empty": "run",
        },
        "retries": {"attempts": 5, "backoff_ms": 2000, "max_backoff_ms": 60000},
        "timeout_ms": 1_800_000,
        "lock_timeout_ms": 10_000,
        "on_failure": "continue",
        "freshness_ms": None,
        "max_window": 1000,
        "checks": [
            {
                "name": "has_customer",
                "type": "not_null",
                "table": "silver.fact_sales",
                "columns": ["customer_id"],
                "severity": "error",
            },
            {
                "name": "once",
                "type": "unique",
                "table": "silver.fact_sales",
                "columns": ["a", "b"],
                "severity": "warn",
            },
            {
                "name": "some",
                "type": "row_count",
                "table": "silver.fact_sales",
                "min": 1,
                "max": 10,
                "severity": "error",
            },
            {"name": "mine", "type": "routine", "routine": "silver.check_sales", "severity": "error"},
        ],
        "mv_refresh": [
            {"name": "mart.sales_daily", "after": "run", "on": "success", "concurrently": "auto"},
            {"name": "mart.sales_monthly", "after": "group", "on": "always", "concurrently": False},
        ],
    }
    assert nightly == {
        "name": "nightly",
        "cron": "0 2 * * 1-5",
        "timezone": "Europe/Berlin",
        "mode": "incremental",
        "procedures": ["silver.fact_sales"],
        "groups": ["customers"],
        "tags": ["daily"],
        "params": {"silver.fact_sales": {"batch": 5}},
        "reason": None,
        "on_conflict": "skip",
        "catch_up": True,
        "late_after_ms": 3_600_000,
    }
    assert (often["cron"], often["timezone"], often["mode"]) == ("30 seconds", "UTC", "full")
    assert (often["reason"], often["catch_up"], often["late_after_ms"]) == ("as agreed", 7_200_000, 600_000)


def test_a_minimal_file_has_the_documented_defaults(tmp_path: Path) -> None:
    spec = load(tmp_path, HEAD).spec()
    assert (spec["pipeline"], spec["max_concurrency"], spec["search_path"]) == ("bronze_to_silver", 2, [])
    procedure = spec["procedures"][0]
    assert procedure["retries"] == {"attempts": 3, "backoff_ms": 1000, "max_backoff_ms": 30000}
    assert procedure["transaction_scope"] == "per_procedure"
    assert procedure["on_failure"] == "continue"
    assert procedure["watermark"] is None


def test_the_same_file_gives_the_same_text(tmp_path: Path) -> None:
    assert json.dumps(load(tmp_path, FULL).spec()) == json.dumps(load(tmp_path, FULL).spec())


def test_a_procedure_beats_its_group_and_its_group_beats_the_defaults(tmp_path: Path) -> None:
    text = """\
        version: 1
        defaults: {isolation: serializable, transaction_scope: per_procedure}
        groups: {g: {isolation: repeatable read}}
        procedures:
          - {name: a, type: fact, group: g, isolation: read committed}
          - {name: b, type: fact, group: g}
          - {name: c, type: fact}
        """
    procedures = load(tmp_path, textwrap.dedent(text)).spec()["procedures"]
    assert [item["isolation"] for item in procedures] == ["read committed", "repeatable read", "serializable"]


def test_a_freshness_objective_of_the_defaults_can_be_taken_back(tmp_path: Path) -> None:
    text = """\
        version: 1
        defaults: {freshness: 2 hours}
        procedures:
          - {name: a, type: fact, freshness: 40 days}
          - {name: b, type: fact}
          - {name: c, type: fact, freshness: null}
        """
    procedures = load(tmp_path, textwrap.dedent(text)).spec()["procedures"]
    assert [item["freshness_ms"] for item in procedures] == [40 * 86_400_000, 7_200_000, None]


def test_only_the_words_of_yaml_1_2_are_not_text(tmp_path: Path) -> None:
    words = ["NO", "on", "yes", "12:30", "010", "2026-01-01", "1_000", "0x1g", "=", "-", "1.2.3", "+", "."]
    listed = ", ".join(words).replace(", -,", ", '-',")
    params = f"    params: {{p: {{type: string, enum: [{listed}]}}}}\n"
    assert load(tmp_path, HEAD + params).spec()["procedures"][0]["params"][0]["enum"] == words


@pytest.mark.parametrize(
    ("written", "value"),
    [("1.5", 1.5), (".5", 0.5), ("1e3", 1000.0), ("-2", -2), ("+2", 2), ("0x1F", 31), ("0o17", 15), ("0", 0)],
)
def test_numbers_are_those_of_yaml_1_2(tmp_path: Path, written: str, value: float) -> None:
    text = HEAD + f"    params: {{p: {{type: number, default: {written}}}}}\n"
    assert load(tmp_path, text).spec()["procedures"][0]["params"][0]["default"] == value


@pytest.mark.parametrize(
    ("written", "environ", "value"),
    [
        ("${V}", {"V": "7"}, 7),
        ("${V:-8}", {}, 8),
        ("${V:-8}", {"V": ""}, 8),
        ("${V:-8}", {"V": "9"}, 9),
        ("${V:?is needed}", {"V": "6"}, 6),
        ("1${V}", {"V": "2"}, 12),
    ],
)
def test_a_variable_in_a_plain_scalar_may_become_a_number(
    tmp_path: Path, written: str, environ: dict[str, str], value: int
) -> None:
    text = f"max_concurrency: {written}\n" + HEAD
    assert load(tmp_path, text, environ).spec()["max_concurrency"] == value


def test_a_quoted_variable_stays_text_and_two_dollars_are_one(tmp_path: Path) -> None:
    text = HEAD + "    description: '${V} costs 5$$, $x and $${V}'\n"
    assert (
        load(tmp_path, text, {"V": "12"}).spec()["procedures"][0]["description"] == "12 costs 5$, $x and ${V}"
    )


def test_an_alias_repeats_its_anchor(tmp_path: Path) -> None:
    text = HEAD + "    retries: &r {attempts: 9}\n  - {name: b, type: fact, retries: *r}\n"
    assert [item["retries"]["attempts"] for item in load(tmp_path, text).spec()["procedures"]] == [9, 9]


def test_a_mistake_inside_an_anchor_is_reported_where_it_is_written(tmp_path: Path) -> None:
    text = HEAD + "    retries: &r {attempts: 99}\n  - {name: b, type: fact, retries: *r}\n"
    assert {place.split()[0] for place in places(problems_of(tmp_path, text))} == {"5:28"}


UNREADABLE: list[tuple[str, str | bytes, str]] = [
    ("an empty file", "", "1:1 the file holds no configuration"),
    ("comments only", "# nothing\n", "1:1 the file holds no configuration"),
    ("a list", "- a\n", "1:1 the file must hold a mapping (`key: value`), not a list"),
    ("a scalar", "---\nhello\n", "2:1 the file must hold a mapping (`key: value`), not a single value"),
    ("bytes that are not UTF-8", b"version: 1\npipeline: a\xff\n", "2:12 byte 0xff is not valid UTF-8"),
    ("UTF-16", "version: 1\n".encode("utf-16"), "1:1 byte 0xff is not valid UTF-8"),
    ("a tab as indentation", "version: 1\ngroups:\n\ta: {}\n", "3:1 a tab stands where YAML expects spaces"),
    ("a control character", "version: 1\nb: \x07\n", "2:4 the character U+0007 is not allowed in YAML"),
    (
        "a colon in a plain value",
        "description: a: b\n",
        "1:15 invalid YAML: mapping values are not allowed here",
    ),
    ("an open bracket", "search_path: [a\nversion: 1\n", "2:8 invalid YAML: "),
    ("an open quote", 'description: "a\n', "2:1 invalid YAML: "),
    ("an impossible escape", 'description: "\\UFFFFFFFF"\n', "1:"),
    ("a value like @x", "description: @x\n", "1:14 invalid YAML: found character '@'"),
    ("deep nesting", "a: " + "[" * 5000, "1:35 nested more than 32 levels deep"),
]


@pytest.mark.parametrize(
    ("text", "expected"), [case[1:] for case in UNREADABLE], ids=[case[0] for case in UNREADABLE]
)
def test_text_that_is_no_mapping_in_yaml_is_one_clear_error(
    tmp_path: Path, text: str | bytes, expected: str
) -> None:
    found = places(problems_of(tmp_path, text))
    assert len(found) == 1
    assert found[0].startswith(expected)


def test_a_missing_file_is_reported_without_a_line(tmp_path: Path) -> None:
    path = tmp_path / "none.yaml"
    with pytest.raises(ConfigError) as caught:
        load_config(path, {})
    assert str(caught.value).splitlines() == [
        f"{path}: error: cannot read the file: No such file or directory",
        "  hint: name the file with --config or B2S_CONFIG",
    ]


def test_a_directory_cannot_be_read_as_a_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot read the file: Is a directory"):
        load_config(tmp_path, {})


DOCUMENT: list[tuple[str, str, str]] = [
    ("two documents", HEAD + "---\nversion: 1\n", "5:1 the file holds more than one YAML document"),
    ("a duplicate key", HEAD + "    type: fact\n", "5:5 duplicate key 'type', first on line 4"),
    ("a tag", HEAD + "    description: !!str 5\n", "5:18 the tag !!str is not allowed"),
    (
        "a python tag",
        HEAD + "    tags: !!python/object:os.x [a]\n",
        "5:11 the tag !!python/object:os.x is not allowed",
    ),
    ("an unknown alias", HEAD + "    tags: *x\n", "5:11 no anchor &x stands before this alias"),
    ("a recursive alias", HEAD + "    tags: &x [*x]\n", "5:15 the alias *x stands inside its own anchor &x"),
    ("a key that is a list", HEAD + "    ? [a]\n    : b\n", "5:7 a key must be plain text"),
    ("a null character", HEAD + '    description: "a\\0"\n', "5:18 the value holds a character that no text"),
    (
        "half a surrogate pair",
        HEAD + '    description: "\\ud800"\n',
        "5:18 the value holds a character that no text",
    ),
    ("an unset variable", HEAD + "    group: ${G}\n", "5:12 the environment variable G is not set"),
    (
        "a variable that says why",
        HEAD + "    group: '${G:?see docs}'\n",
        "5:12 the environment variable G is not set: see docs",
    ),
    ("an open variable", HEAD + "    group: ${G\n", "5:12 a ${ without its closing }"),
    ("an odd variable", HEAD + "    group: ${G-x}\n", "5:12 ${G-x} is not a variable reference"),
    (
        "a very long number",
        HEAD + f"    max_window: {'9' * 5000}\n",
        "5:17 a number of 5000 digits is too long",
    ),
    (
        "a very long hex number",
        HEAD + f"    max_window: 0x{'f' * 5000}\n",
        "5:17 a number of 5002 digits is too long",
    ),
]

FIELDS: list[tuple[str, str, str]] = [
    ("no version", HEAD.replace("version: 1\n", ""), "1:1 missing required key 'version'"),
    ("another version", HEAD.replace("version: 1", "version: 2"), "1:10 version must be 1, not 2"),
    ("a version that is text", HEAD.replace("version: 1", "version: '1'"), "1:10 version must be 1, not '1'"),
    (
        "a version that is true",
        HEAD.replace("version: 1", "version: true"),
        "1:10 version must be 1, not true",
    ),
    ("no procedures", "version: 1\n", "1:1 missing required key 'procedures'"),
    ("an empty list of procedures", "version: 1\nprocedures: []\n", "2:13 procedures must not be empty"),
    (
        "procedures that are a mapping",
        "version: 1\nprocedures: {a: b}\n",
        "2:13 procedures must be a list, not a mapping",
    ),
    ("a procedure that is text", HEAD + "  - silver.b\n", "5:5 procedures[1] must be a mapping (key: value)"),
    ("no name", HEAD + "  - type: fact\n", "5:5 missing required key 'name'"),
    ("no type", HEAD + "  - name: b\n", "5:5 missing required key 'type'"),
    (
        "a misspelt type",
        HEAD + "  - {name: b, type: fcat}\n",
        "5:21 type must be 'dimension' or 'fact', not 'fcat'",
    ),
    ("an unknown key", HEAD + "    dependancies: []\n", "5:5 unknown key 'dependancies'"),
    ("a merge key", HEAD + "    <<: {tags: [a]}\n", "5:5 unknown key '<<'"),
    (
        "a name in capitals",
        HEAD + "  - {name: Silver.B, type: fact}\n",
        "5:12 name: 'Silver.B' is not of the form",
    ),
    (
        "a name of three parts",
        HEAD + "  - {name: a.b.c, type: fact}\n",
        "5:12 name: 'a.b.c' is not of the form",
    ),
    ("a name that is too long", HEAD + f"  - {{name: {'a' * 64}, type: fact}}\n", "5:12 name: '"),
    (
        "a routine that is a statement",
        HEAD + "    routine: call x()()\n",
        "5:14 routine: 'call x()()' is not of the form",
    ),
    (
        "yes for true",
        HEAD + "    allow_full_refresh: yes\n",
        "5:25 allow_full_refresh must be true or false, not 'yes'",
    ),
    ("a number for text", HEAD + "    description: 5\n", "5:18 description must be text, not 5"),
    ("text for a list", HEAD + "    tags: daily\n", "5:11 tags must be a list, not 'daily'"),
    ("nothing for a list", HEAD + "    tags:\n    group: a\n", "5:10 tags must be a list, not nothing"),
    (
        "a duration without unit",
        HEAD + "    timeout: 30\n",
        "5:14 timeout: 30 is not a duration: it has no unit",
    ),
    (
        "a duration of nonsense",
        HEAD + "    timeout: 5 minuts\n",
        "5:14 timeout: '5 minuts' is not a duration",
    ),
    (
        "a freshness of nothing",
        HEAD + "    freshness: 0s\n",
        "5:16 freshness: '0s' is not between 1ms and 3650 days",
    ),
    ("a duration of zero", HEAD + "    timeout: 0s\n", "5:14 timeout: '0s' is not longer than zero"),
    (
        "a duration that overflows",
        HEAD + "    lock_timeout: 25d\n",
        "5:19 lock_timeout: '25d' is longer than 24 days",
    ),
    ("too many attempts", HEAD + "    retries: 99\n", "5:14 retries must be at most 20, not 99"),
    (
        "attempts that are text",
        HEAD + "    retries: {attempts: many}\n",
        "5:25 attempts must be a whole number, not 'many'",
    ),
    (
        "a backoff above its limit",
        HEAD + "    retries: {backoff: 1h}\n",
        "5:14 backoff (3600000 ms) is longer than",
    ),
    (
        "a default backoff above its limit",
        HEAD + "defaults: {retries: {backoff: 1h}}\n",
        "5:21 backoff (3600000 ms)",
    ),
    ("concurrency of zero", "max_concurrency: 0\n" + HEAD, "1:18 max_concurrency must be at least 1, not 0"),
    (
        "concurrency with zeros",
        "max_concurrency: 010\n" + HEAD,
        "1:18 max_concurrency must be a whole number, not '010'",
    ),
    ("pg_catalog on the path", "search_path: [a, pg_catalog]\n" + HEAD, "1:18 pg_catalog is always first"),
    ("a schema twice", "search_path: [a, a]\n" + HEAD, "1:18 duplicate schema 'a', first on line 1"),
    (
        "a watermark without source",
        HEAD + "    watermark: {strategy: id}\n",
        "5:5 missing required key 'source'",
    ),
    ("a source of two parts", HEAD + "    watermark: {strategy: id, source: b.c}\n", "5:39 source"),
    (
        "an unknown strategy",
        HEAD + "    watermark: {strategy: time, source: a.b.c}\n",
        "5:27 strategy must be 'timestamp', 'id' or 'xid'",
    ),
    (
        "a delay of an id",
        HEAD + "    watermark: {strategy: id, source: a.b.c, delay: 1s}\n",
        "5:46 delay has no meaning for the id",
    ),
    ("a window without watermark", HEAD + "    max_window: 5\n", "5:5 max_window needs a watermark"),
    (
        "a window in ids for a timestamp",
        HEAD + "    watermark: {strategy: timestamp, source: a.b.c}\n    max_window: 5\n",
        "6:17 max_window must be a duration",
    ),
    (
        "a window in days for an id",
        HEAD + "    watermark: {strategy: id, source: a.b.c}\n    max_window: 1d\n",
        "6:17 max_window must be a whole number of ids",
    ),
    (
        "a window for xid",
        HEAD + "    watermark: {strategy: xid, source: a.b.c}\n    max_window: 1d\n",
        "6:17 max_window must be a whole number of transactions",
    ),
    (
        "concurrently: yes",
        HEAD + "    mv_refresh: [{name: m, concurrently: yes}]\n",
        "5:42 concurrently: 'yes' is none of auto, true and false",
    ),
    ("a view twice", HEAD + "    mv_refresh: [m, n, m]\n", "5:24 duplicate materialized view 'm'"),
    (
        "after: group without a group",
        HEAD + "    mv_refresh: [{name: m, after: group}]\n",
        "5:35 after: group, but silver.a is in no group",
    ),
    (
        "a check of an unknown type",
        HEAD + "    checks: [{name: a, type: notnull}]\n",
        "5:30 type must be 'not_null', 'unique'",
    ),
    ("a check without a type", HEAD + "    checks: [{name: a}]\n", "5:14 missing required key 'type'"),
    (
        "a check without columns",
        HEAD + "    checks: [{name: a, type: unique, table: t, columns: []}]\n",
        "5:57 columns must not be empty",
    ),
    (
        "a column twice",
        HEAD + "    checks: [{name: a, type: unique, table: t, columns: [b, b]}]\n",
        "5:61 duplicate column 'b'",
    ),
    (
        "a check twice",
        HEAD + "    checks: [{name: a, type: routine, routine: r}, {name: a, type: routine, routine: r}]\n",
        "5:59 duplicate check 'a'",
    ),
    (
        "a row count without bounds",
        HEAD + "    checks: [{name: a, type: row_count, table: t}]\n",
        "5:14 the check a bounds nothing",
    ),
    (
        "a row count upside down",
        HEAD + "    checks: [{name: a, type: row_count, table: t, min: 5, max: 1}]\n",
        "5:56 min 5 is above max 1",
    ),
    (
        "args for nothing",
        HEAD + "    args: {p_sinc: x}\n",
        "5:12 'p_sinc' is neither a param of silver.a nor one of",
    ),
    (
        "two args with one target",
        HEAD + "    args: {p_since: x, p_until: x}\n",
        "5:33 duplicate argument 'x'",
    ),
]

PARAMS: list[tuple[str, str, str]] = [
    ("no type", "{required: true}", "6:7 missing required key 'type'"),
    ("an unknown type", "{type: strin}", "6:17 type must be 'string', 'integer'"),
    ("a key of another type", "{type: string, minimum: 1}", "6:25 unknown key 'minimum'"),
    (
        "a default outside its enum",
        "{type: string, enum: [a], default: b}",
        "6:45 the default 'b' is not one of 'a'",
    ),
    ("a default of another type", "{type: integer, default: x}", "6:35 the default 'x' is not an integer"),
    ("a boolean as a number", "{type: integer, default: true}", "6:35 the default true is not an integer"),
    ("a decimal as an integer", "{type: integer, default: 1.0}", "6:35 the default 1.0 is not an integer"),
    (
        "a default above bigint",
        "{type: integer, default: 9223372036854775808}",
        "6:35 the default 9223372036854775808 does not fit",
    ),
    ("infinity", "{type: number, default: .inf}", "6:34 the default inf is not a finite number"),
    ("an infinite bound", "{type: number, minimum: -.inf}", "6:34 minimum: -inf is not a finite number"),
    (
        "a default that is too small",
        "{type: integer, minimum: 1, default: 0}",
        "6:47 the default 0 is below the minimum of 1",
    ),
    (
        "a default that is too large",
        "{type: number, maximum: 1, default: 1.5}",
        "6:46 the default 1.5 is above the maximum of 1",
    ),
    (
        "a default that is too short",
        "{type: string, minLength: 2, default: a}",
        "6:48 the default 'a' is shorter than minLength 2",
    ),
    (
        "a default that is too long",
        "{type: string, maxLength: 1, default: ab}",
        "6:48 the default 'ab' is longer than maxLength 1",
    ),
    (
        "a default off its pattern",
        "{type: string, pattern: ^a$, default: b}",
        "6:48 the default 'b' does not match the pattern",
    ),
    (
        "a newline at the end",
        '{type: string, pattern: ^a$, default: "a\\n"}',
        "6:48 the default 'a\\n' does not match",
    ),
    (
        "a default that is no date",
        "{type: string, format: date, default: 2026-02-30}",
        "6:48 the default '2026-02-30' is not a date",
    ),
    (
        "a date-time without offset",
        "{type: string, format: date-time, default: '2026-02-03T00:00:00'}",
        "6:53 the default '2026-02-03T00:00:00' is not",
    ),
    (
        "a default that is no uuid",
        "{type: string, format: uuid, default: x}",
        "6:48 the default 'x' is not a uuid",
    ),
    (
        "a list of the wrong items",
        "{type: array, items: {type: integer}, default: [1, a]}",
        "6:57 the default a list holds 'a'",
    ),
    (
        "a list that is too short",
        "{type: array, items: {type: string}, minItems: 1, default: []}",
        "6:69 the default a list has fewer",
    ),
    (
        "a list that is too long",
        "{type: array, items: {type: string}, maxItems: 0, default: [a]}",
        "6:69 the default a list has more",
    ),
    (
        "a list of lists",
        "{type: array, items: {type: array}}",
        "6:38 type must be 'string' or 'integer', not 'array'",
    ),
    ("an empty default", "{type: string, default: }", "6:34 the default is empty"),
    (
        "a required default",
        "{type: string, default: a, required: true}",
        "6:25 a required param has no use for a default",
    ),
    (
        "an enum below its minimum",
        "{type: integer, minimum: 5, enum: [7, 3]}",
        "6:48 the enum value 3 is below the minimum of 5",
    ),
    (
        "an enum of mixed types",
        "{type: integer, enum: [1, x]}",
        "6:36 enum[1] must be a whole number, not 'x'",
    ),
    ("an enum value twice", "{type: string, enum: [a, a]}", "6:35 duplicate enum value 'a'"),
    ("an empty enum", "{type: string, enum: []}", "6:31 enum must not be empty"),
    ("bounds upside down", "{type: integer, minimum: 5, maximum: 1}", "6:35 minimum 5 is above maximum 1"),
    (
        "lengths upside down",
        "{type: string, minLength: 5, maxLength: 1}",
        "6:36 minLength 5 is above maxLength 1",
    ),
    (
        "a pattern with look-ahead",
        "{type: string, pattern: '(?=a)'}",
        "6:34 pattern: '(?=a)' uses look-around",
    ),
    (
        "a pattern with look-behind",
        "{type: string, pattern: '(?<!a)'}",
        "6:34 pattern: '(?<!a)' uses look-around",
    ),
    (
        "a pattern with a named group",
        "{type: string, pattern: '(?P<x>a)'}",
        "6:34 pattern: '(?P<x>a)' uses a named group",
    ),
    (
        "a pattern with inline flags",
        "{type: string, pattern: '(?i)a'}",
        "6:34 pattern: '(?i)a' uses the group (?i",
    ),
    ("a possessive pattern", "{type: string, pattern: 'a++'}", "6:34 pattern: 'a++' repeats a repeat with +"),
    (
        "a pattern with a word boundary",
        "{type: string, pattern: '\\bx'}",
        "6:34 pattern: '\\\\bx' uses \\b, which Postgres",
    ),
    (
        "a pattern with a back-reference",
        "{type: string, pattern: '(a)\\1'}",
        "6:34 pattern: '(a)\\\\1' uses \\1",
    ),
    (
        "a pattern with a named class",
        "{type: string, pattern: '[[:alpha:]]'}",
        "6:34 pattern: '[[:alpha:]]' has a [ inside a set",
    ),
    ("a pattern that is open", "{type: string, pattern: '(a'}", "6:34 pattern: '(a' is not a usable pattern"),
    (
        "a pattern that repeats too often",
        "{type: string, pattern: 'a{256}'}",
        "6:34 pattern: 'a{256}' repeats {256}",
    ),
    (
        "a pattern with a loose brace",
        "{type: string, pattern: 'a{,3}'}",
        "6:34 pattern: 'a{,3}' has a { that is no repeat",
    ),
    (
        "a pattern and a format",
        "{type: string, pattern: a, format: date}",
        "6:37 a param has a pattern or a format, not both",
    ),
]

CROSS: list[tuple[str, str, str]] = [
    (
        "a procedure twice",
        HEAD + "  - {name: silver.a, type: fact}\n",
        "5:12 duplicate procedure 'silver.a', first on line 3",
    ),
    ("an unknown dependency", HEAD + "    dependencies: [silver.z]\n", "5:20 unknown dependency 'silver.z'"),
    ("a self dependency", HEAD + "    dependencies: [silver.a]\n", "5:20 silver.a depends on itself"),
    (
        "a dependency twice",
        HEAD + "    dependencies: [b, b]\n  - {name: b, type: fact}\n",
        "5:23 duplicate dependency 'b'",
    ),
    (
        "a cycle",
        HEAD + "    dependencies: [b]\n  - {name: b, type: fact, dependencies: [c]}\n"
        "  - {name: c, type: fact, dependencies: [silver.a]}\n",
        "5:20 dependency cycle: silver.a -> b -> c -> silver.a",
    ),
    (
        "a dimension on a fact",
        HEAD + "  - {name: d, type: dimension, dependencies: [silver.a]}\n",
        "5:47 the dimension d depends on the fact silver.a",
    ),
    (
        "a group scope without group",
        HEAD + "    transaction_scope: per_group\n",
        "5:24 silver.a has transaction_scope per_group but no group",
    ),
    (
        "a group scope from the defaults",
        HEAD + "defaults: {transaction_scope: per_group}\n",
        "3:5 silver.a has transaction_scope per_group (from defaults) but no group",
    ),
    (
        "members with different scopes",
        HEAD + "    group: g\n    transaction_scope: per_group\n  - {name: b, type: fact, group: g}\n",
        "7:5 the group g runs as one transaction, but its members disagree on transaction_scope",
    ),
    (
        "members with different isolation",
        HEAD + "    group: g\n  - {name: b, type: fact, group: g, isolation: serializable}\n"
        "groups: {g: {transaction_scope: per_group}}\n",
        "6:48 the group g runs as one transaction, but its members disagree on isolation",
    ),
    (
        "groups that wait for each other",
        "version: 1\ngroups: {g: {transaction_scope: per_group}}\nprocedures:\n"
        "  - {name: a, type: fact, group: g}\n"
        "  - {name: b, type: fact, dependencies: [a]}\n"
        "  - {name: c, type: fact, group: g, dependencies: [b]}\n",
        "5:42 the group g cannot run as one transaction each: c -> b, b -> a is a cycle",
    ),
    (
        "a shared state key",
        HEAD + "    watermark: {strategy: id, source: a.b.c, state_key: k}\n"
        "  - {name: b, type: fact, watermark: {strategy: id, source: a.b.c, state_key: k}}\n",
        "6:79 the state_key 'k' is shared with silver.a",
    ),
    (
        "a state key that is another's name",
        HEAD + "    watermark: {strategy: id, source: a.b.c}\n"
        "  - {name: b, type: fact, watermark: {strategy: id, source: a.b.c, state_key: silver.a}}\n",
        "6:79 the state_key 'silver.a' is shared with silver.a",
    ),
    (
        "a shared state key of two strategies",
        "version: 1\ngroups: {g: {transaction_scope: per_group}}\nprocedures:\n"
        "  - {name: a, type: fact, group: g, watermark: {strategy: id, source: a.b.c, state_key: k}}\n"
        "  - {name: b, type: fact, group: g, watermark: {strategy: xid, source: a.b.c, state_key: k}}\n",
        "5:90 the state_key 'k' is shared with a, whose strategy is id",
    ),
    (
        "a param called p_since",
        HEAD + "    params: {p_since: {type: string}}\n",
        "5:14 the param 'p_since' has the name of an argument",
    ),
    (
        "a param in capitals",
        HEAD + "    params: {Country: {type: string}}\n",
        "5:14 Country: 'Country' is not of the form name",
    ),
]

SCHEDULES: list[tuple[str, str, str]] = [
    ("no cron", "name: n", "8:5 missing required key 'cron'"),
    ("no name", "cron: '* * * * *'", "8:5 missing required key 'name'"),
    ("four fields", "name: n, cron: '* * * *'", "8:21 cron: '* * * *' has 4 fields; a cron time has five"),
    ("an hour out of range", "name: n, cron: '0 24 * * *'", "8:21 cron: '0 24 * * *' has 24 as its hour"),
    (
        "a backward range",
        "name: n, cron: '0 5-3 * * *'",
        "8:21 cron: '0 5-3 * * *' has the range 5-3 as its hour",
    ),
    (
        "a step of zero",
        "name: n, cron: '*/0 * * * *'",
        "8:21 cron: '*/0 * * * *' has the step 0 as its minute",
    ),
    (
        "a step from a number",
        "name: n, cron: '5/10 * * * *'",
        "8:21 cron: '5/10 * * * *' has a step without a range",
    ),
    (
        "a day by name",
        "name: n, cron: '0 0 * * mon'",
        "8:21 cron: '0 0 * * mon' has 'mon' as its day of week",
    ),
    ("a macro", "name: n, cron: '@daily'", "8:21 cron: '@daily' is not a cron time of five fields"),
    ("sixty seconds", "name: n, cron: 60 seconds", "8:21 cron: '60 seconds' is not a time"),
    (
        "an unknown time zone",
        "name: n, cron: 5 seconds, timezone: Mars",
        "8:42 timezone: 'Mars' is not a known time zone",
    ),
    (
        "a path as time zone",
        "name: n, cron: 5 seconds, timezone: ../x",
        "8:42 timezone: '../x' is not a known time zone",
    ),
    (
        "an unknown procedure",
        "name: n, cron: 5 seconds, procedures: [silver.b]",
        "8:45 unknown procedure 'silver.b'",
    ),
    ("an unknown group", "name: n, cron: 5 seconds, groups: [g]", "8:41 unknown group 'g'"),
    ("an unknown tag", "name: n, cron: 5 seconds, tags: [t]", "8:39 unknown tag 't'"),
    (
        "params of an unknown procedure",
        "name: n, cron: 5 seconds, params: {b: {}}",
        "8:41 unknown procedure 'b'",
    ),
    (
        "an unknown param",
        "name: n, cron: 5 seconds, tags: [x], params: {silver.a: {p: 1}}",
        "8:63 silver.a has no param 'p'",
    ),
    (
        "a value that is refused",
        "name: n, cron: 5 seconds, params: {silver.a: {k: x}}",
        "8:55 the param k of silver.a: 'x' is not an integer",
    ),
    (
        "a required param left out",
        "name: n, cron: 5 seconds",
        "8:5 the schedule n gives no value for k, a required param",
    ),
    (
        "a full refresh without a reason",
        "name: n, cron: 5 seconds, tags: [x], mode: full",
        "8:49 the schedule n refreshes fully and gives no reason",
    ),
    (
        "a number as lateness",
        "name: n, cron: 5 seconds, tags: [x], catch_up: 5",
        "8:53 catch_up: 5 is neither true, nor false, nor a duration",
    ),
    (
        "no time to be late",
        "name: n, cron: 5 seconds, tags: [x], late_after: 0s",
        "8:55 late_after: '0s' is not longer than zero",
    ),
    (
        "an unknown reaction",
        "name: n, cron: 5 seconds, tags: [x], on_conflict: wait",
        "8:56 on_conflict must be 'skip', 'queue' or 'fail'",
    ),
]
SCHEDULED = HEAD + "    tags: [x]\n    params: {k: {type: integer, required: true}}\nschedules:\n  - {"
CASES = [
    *DOCUMENT,
    *FIELDS,
    *(
        (f"a param with {name}", f"{HEAD}    params:\n      x: {text}\n", place)
        for name, text, place in PARAMS
    ),
    *CROSS,
]


@pytest.mark.parametrize(("text", "expected"), [case[1:] for case in CASES], ids=[case[0] for case in CASES])
def test_a_single_mistake_is_one_problem_at_its_place(tmp_path: Path, text: str, expected: str) -> None:
    found = places(problems_of(tmp_path, text))
    assert len(found) == 1, found
    assert found[0].startswith(expected)


@pytest.mark.parametrize(
    ("text", "expected"), [case[1:] for case in SCHEDULES], ids=[case[0] for case in SCHEDULES]
)
def test_a_mistake_in_a_schedule_is_found_at_its_place(tmp_path: Path, text: str, expected: str) -> None:
    found = places(problems_of(tmp_path, f"{SCHEDULED}{text}}}\n"))
    assert any(place.startswith(expected) for place in found), found


def test_a_schedule_that_gives_the_required_param_is_accepted(tmp_path: Path) -> None:
    text = f"{SCHEDULED}name: n, cron: '*/5 0-6/2,12 1 * 7', params: {{silver.a: {{k: 1}}}}}}\n"
    assert load(tmp_path, text).spec()["schedules"][0]["params"] == {"silver.a": {"k": 1}}


@pytest.mark.parametrize(
    ("text", "hint"),
    [
        ("    dependancies: []", "did you mean 'dependencies'?"),
        ("    depends_on: []", "did you mean 'dependencies'?"),
        ("    cron: 1", "cron belongs to a schedule"),
        ("    colour: red", "known keys: "),
        ("    <<: {tags: [a]}", "merge keys are not part of YAML 1.2"),
        ("    allow_full_refresh: yes", "write true or false, without quotes"),
        ("    retries: '3'", "write 3, without quotes or leading zeros"),
        ("    routine: Silver.Load", "write 'silver.load'"),
        ("    tags: daily", "write [daily]"),
        ("    isolation: read-committed", "did you mean 'read committed'?"),
        ("    timeout: 30", "write 30s for seconds, or 30min for minutes"),
        ("    dependencies: [slver.b]", "did you mean 'silver.b'?"),
        ("    dependencies: [b]", "did you mean 'silver.b'?"),
        ("    params: {x: {type: string, minimum: 1}}", "minimum belongs to the type integer or number"),
        ("    args: {p_sinc: x}", "did you mean 'p_since'?"),
        ("retention: {runs: 400}", "write 400 days"),
        ("retention: {logs: 0 days}", "write 400 days, or forever"),
        ("retention: {log: 9 days}", "did you mean 'logs'?"),
        ("clock: {executor: cron}", "did you mean 'pg_cron'?"),
        ("schedules: [{name: n, cron: '@daily'}]", "write '0 0 * * *'"),
        ("schedules: [{name: n, cron: '5/10 * * * *'}]", "write 5-59/10"),
        ("schedules: [{name: n, cron: 9 seconds, timezone: europe/berlin}]", "did you mean 'Europe/Berlin'?"),
    ],
)
def test_a_mistake_comes_with_its_remedy(tmp_path: Path, text: str, hint: str) -> None:
    head = HEAD.replace("procedures:\n", "procedures:\n  - {name: silver.b, type: fact}\n")
    [problem] = problems_of(tmp_path, f"{head}{text}\n")
    assert problem.hint is not None
    assert problem.hint.startswith(hint)


def test_all_mistakes_are_reported_at_once_in_file_order(tmp_path: Path) -> None:
    text = """\
        version: 1
        max_concurency: 3
        pipeline: ${NOPE}
        procedures:
          - name: silver.a
            type: fcat
            dependencies: [silver.b, 7, silver.zz]
            allow_full_refresh: yes
          - name: silver.b
            type: dimension
            dependencies: [silver.a]
            checks:
              - {name: c, type: row_cont}
              - {name: d, type: row_count, table: t}
          - bad
          - name: silver.c
            type: fact
            type: fact
            dependencies: [silver.unknown]
        schedules:
          - {name: n, groups: [g], params: {silver.b: {x: 1}}}
        """
    assert [place.split(" not ")[0] for place in places(problems_of(tmp_path, textwrap.dedent(text)))] == [
        "2:1 unknown key 'max_concurency'",
        "3:11 the environment variable NOPE is",
        "6:11 type must be 'dimension' or 'fact',",
        "7:20 dependency cycle: silver.a -> silver.b -> silver.a",
        "7:30 dependencies[1] must be text,",
        "7:33 unknown dependency 'silver.zz': no procedure has this name",
        "8:25 allow_full_refresh must be true or false,",
        "13:25 type must be 'not_null', 'unique', 'row_count' or 'routine',",
        "14:9 the check d bounds nothing",
        "15:5 procedures[2] must be a mapping (key: value),",
        "18:5 duplicate key 'type', first on line 17",
        "19:20 unknown dependency 'silver.unknown': no procedure has this name",
        "21:5 missing required key 'cron'",
        "21:48 silver.b has no param 'x'",
    ]


def test_a_refused_value_causes_no_second_finding(tmp_path: Path) -> None:
    text = """\
        version: 1
        procedures:
          - {name: f, type: fact}
          - {name: d, type: dimension, dependencies: [f], allow_fact_dependency: yes}
          - {name: e, type: dimensoin, dependencies: [f]}
          - {name: m, type: fact, group: [], mv_refresh: [{name: v, after: group}]}
          - {name: w, type: fact, watermark: {strategy: tme, source: a.b.c}, max_window: 1 day}
        """
    found = places(problems_of(tmp_path, textwrap.dedent(text)))
    assert [place.partition(" ")[0] for place in found] == ["4:74", "5:21", "6:34", "7:49"]


def test_the_report_shows_the_line_a_caret_and_a_hint(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, HEAD + "    type_: 日本\n    group: &x 日本\n")
    assert str(caught.value) == "\n".join(
        [
            f"{tmp_path / 't.yaml'}:5:5: error: unknown key 'type_'",
            "  5 |     type_: 日本",
            "    |     ^",
            "  hint: did you mean 'type'?",
            f"{tmp_path / 't.yaml'}:6:12: error: group: '日本' is not of the form name, "
            "in lower case letters, digits and underscores",
            "  6 |     group: &x 日本",
            "    |            ^",
        ]
    )


def test_the_caret_stands_under_its_column_after_wide_characters(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, HEAD + "groups: {日本: {}, Ab: {}}\n")
    assert str(caught.value).splitlines()[-2] == "    | " + " " * (len("groups: {日本: {}, ") + 2) + "^"


def test_a_long_line_is_cut_around_its_column(tmp_path: Path) -> None:
    schemas = ", ".join(f"schema_{number}" for number in range(100))
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, f"search_path: [{schemas}, 7, {schemas}_]\n{HEAD}")
    _, line, caret, *_ = str(caught.value).splitlines()
    assert len(line) < 130
    assert line[caret.index("^")] == "7"


def test_control_characters_of_a_file_do_not_reach_the_terminal(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, HEAD + '    group: "\\e[31m"\n    "\\e[31mx": 1\n    tags: \u200e\n')
    assert "\x1b" not in str(caught.value)
    assert "\u200e" not in str(caught.value)


def test_windows_line_ends_and_a_byte_order_mark_do_not_shift_positions(tmp_path: Path) -> None:
    text = b"\xef\xbb\xbf" + (HEAD + "    tags: daily\n").replace("\n", "\r\n").encode()
    assert places(problems_of(tmp_path, text)) == ["5:11 tags must be a list, not 'daily'"]


@pytest.mark.parametrize(
    ("loc", "place"),
    [
        (("procedures", "silver.fact_sales", "routine"), "29:14"),
        (("procedures", 2, "routine"), "29:14"),
        (("procedures", "silver.fact_sales", "params", "country", "default"), "40:56"),
        (("procedures", "silver.fact_sales", "params", "country"), "40:16"),
        (("procedures", "silver.fact_sales", "checks", "once", "table"), "55:43"),
        (("procedures", "silver.fact_sales", "mv_refresh", "mart.sales_daily"), "59:9"),
        (("procedures", "silver.fact_sales", "mv_refresh", "mart.sales_monthly", "name"), "60:16"),
        (("procedures", "silver.fact_sales", "dependencies", "silver.dim_customers"), "32:20"),
        (("procedures", "silver.fact_sales", "lock_timeout_ms"), "49:19"),
        (("procedures", "silver.fact_sales", "timeout_ms"), "28:5"),
        (("procedures", "silver.dim_customers", "watermark", "delay_ms"), "24:5"),
        (("procedures", "silver.fact_sales", "checks"), "53:5"),
        (("procedures", "silver.nowhere", "routine"), "13:1"),
        (("groups", "customers", "isolation"), "11:80"),
        (("nowhere",), "1:1"),
        ((), "1:1"),
    ],
)
def test_a_finding_of_the_database_is_placed_by_name(
    tmp_path: Path, loc: tuple[str | int, ...], place: str
) -> None:
    problem = load(tmp_path, FULL).source.problem(loc, "does not exist")
    assert f"{problem.line}:{problem.column}" == place


def test_findings_of_the_database_print_like_those_of_the_file(tmp_path: Path) -> None:
    source = load(tmp_path, FULL).source
    found = [
        source.problem(("procedures", "silver.fact_sales", "routine"), "no such routine", "create it first"),
        source.problem(["procedures", "silver.dim_customers", "watermark"], "no such column"),
    ]
    assert format_problems(source, found).splitlines() == [
        f"{tmp_path / 't.yaml'}:24:5: error: no such column",
        "  24 |     watermark:",
        "     |     ^",
        f"{tmp_path / 't.yaml'}:29:14: error: no such routine",
        "  29 |     routine: silver.load_sales(text, timestamptz)",
        "     |              ^",
        "  hint: create it first",
    ]


def test_an_alias_bomb_is_refused_before_it_explodes(tmp_path: Path) -> None:
    levels = "".join(f"  l{n + 1}: &l{n + 1} [{', '.join([f'*l{n}'] * 10)}]\n" for n in range(12))
    found = places(problems_of(tmp_path, f"{HEAD}groups:\n  l0: &l0 [a]\n{levels}"))
    assert any("aliases repeat more than 200000 values" in place for place in found)


def test_depth_gained_through_aliases_is_bounded_too(tmp_path: Path) -> None:
    levels = "".join(f"  l{n + 1}: &l{n + 1} [*l{n}]\n" for n in range(50))
    found = places(problems_of(tmp_path, f"{HEAD}groups:\n  l0: &l0 [a]\n{levels}"))
    assert any("nested more than 32 levels deep" in place for place in found)


def large(count: int, **last: str) -> str:
    rows = ["version: 1", "procedures:"]
    for number in range(count):
        rows += [f"  - name: silver.t{number}", "    type: fact", "    tags: [daily]"]
        if number:
            rows.append(f"    dependencies: [silver.t{number - 1}]")
    rows += [f"    {key}: {value}" for key, value in last.items()]
    return "\n".join(rows) + "\n"


def test_two_thousand_procedures_in_one_chain_load(tmp_path: Path) -> None:
    assert len(load(tmp_path, large(2000)).spec()["procedures"]) == 2000


def test_a_cycle_through_two_thousand_procedures_is_named_whole(tmp_path: Path) -> None:
    text = large(2000).replace("    type: fact\n", "    type: fact\n    dependencies: [silver.t1999]\n", 1)
    [problem] = problems_of(tmp_path, text)
    assert problem.message.count(" -> ") == 2000


def test_two_thousand_unknown_dependencies_are_all_reported(tmp_path: Path) -> None:
    text = large(2000).replace("dependencies: [silver.t", "dependencies: [silver.u")
    assert len(problems_of(tmp_path, text)) == 1999


def attempt(tmp_path: Path, text: str | bytes) -> None:
    """Loads the text; any error but ConfigError, or a ConfigError without a usable report, is a failure."""
    report: ConfigError | None = None
    try:
        json.dumps(load(tmp_path, text).spec(), allow_nan=False)
    except ConfigError as error:
        report = error
    if report is not None:
        assert report.problems
        assert str(report).count(": error: ") >= len(report.problems)


def test_a_file_cut_anywhere_never_raises_anything_but_a_config_error(tmp_path: Path) -> None:
    for end in range(0, len(FULL), 17):
        attempt(tmp_path, FULL[:end])


def test_a_file_without_any_one_line_never_raises_anything_but_a_config_error(tmp_path: Path) -> None:
    lines = FULL.splitlines(keepends=True)
    for index in range(len(lines)):
        attempt(tmp_path, "".join(lines[:index] + lines[index + 1 :]))


@pytest.mark.parametrize("value", ["", "true", "7", ".nan", "text", "[1, null, {}]", "{a: {b: [c]}}", "${X}"])
def test_any_value_at_any_key_never_raises_anything_but_a_config_error(tmp_path: Path, value: str) -> None:
    lines = FULL.splitlines(keepends=True)
    for index, line in enumerate(lines):
        key, colon, _ = line.partition(":")
        attempt(tmp_path, "".join([*lines[:index], f"{key}{colon} {value}\n", *lines[index + 1 :]]))


@pytest.mark.parametrize("wrong", ["@", "\t", "'", "{", "]", ": ", "!!x ", "&a *a", "\x00", "${"])
def test_a_stray_mark_in_any_line_never_raises_anything_but_a_config_error(
    tmp_path: Path, wrong: str
) -> None:
    lines = FULL.splitlines(keepends=True)
    for index, line in enumerate(lines):
        middle = len(line) // 2
        attempt(
            tmp_path, "".join([*lines[:index], line[:middle] + wrong + line[middle:], *lines[index + 1 :]])
        )


def test_the_json_schema_describes_every_key_in_words() -> None:
    schema = json_schema()
    for model in (schema, *schema["$defs"].values()):
        for name, field in model["properties"].items():
            assert field.get("description"), (model["title"], name)
    assert schema["required"] == ["version", "procedures"]
    assert schema["additionalProperties"] is False


def test_the_json_schema_takes_a_variable_where_a_value_is_no_free_text() -> None:
    schema = json_schema()
    variable = {"type": "string", "pattern": r"\$\{"}
    procedure, retries = schema["$defs"]["Procedure"]["properties"], schema["$defs"]["Retries"]["properties"]
    for field in (
        schema["properties"]["max_concurrency"],
        procedure["allow_full_refresh"],
        procedure["isolation"],
        procedure["timeout"],
        procedure["retries"],
        procedure["dependencies"]["items"],
        retries["backoff"],
    ):
        assert variable in field["anyOf"]
    assert "anyOf" not in schema["$defs"]["StringParam"]["properties"]["type"]


def test_the_json_schema_shows_defaults_as_a_file_writes_them() -> None:
    retries = json_schema()["$defs"]["Retries"]["properties"]
    assert [retries[name]["default"] for name in ("attempts", "backoff", "max_backoff")] == [3, "1s", "30s"]
