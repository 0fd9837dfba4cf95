"""Parameters: what the database accepts, what it says about the rest, and which values a step then gets."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Final

import pytest
from psycopg.types.json import Jsonb

from tests.pipelines import Pipeline, refused
from tests.servers import Database, Server

STRING: Final = {"type": "string"}
INTEGER: Final = {"type": "integer"}
NUMBER: Final = {"type": "number"}
BOOLEAN: Final = {"type": "boolean"}
STRINGS: Final = {"type": "array", "items": STRING}
INTEGERS: Final = {"type": "array", "items": INTEGER}
DATE: Final = {"type": "string", "format": "date"}
DATE_TIME: Final = {"type": "string", "format": "date-time"}
UUID: Final = {"type": "string", "format": "uuid"}


@pytest.fixture(scope="module")
def pipeline(server: Server, template: str) -> Iterator[Pipeline]:
    """One database for all tests of this module: each of them rolls back what it declares."""
    database: Database = server.create_database(template=template)
    with Pipeline(database) as made:
        made.add("load")
        made.apply()
        yield made
    database.drop()


class Check:
    """What `_check_parameters` returns."""

    def __init__(self, parameters: dict[str, Any], problems: list[dict[str, Any]] | None) -> None:
        self.parameters = parameters
        self.problems = problems or []
        self.messages = [problem["message"] for problem in self.problems]


Checker = Callable[[dict[str, dict[str, Any]], Any], Check]


@pytest.fixture
def check(pipeline: Pipeline) -> Checker:
    """Declares parameters for the procedure `load` and validates values for it; a string is JSON text."""

    def run(declared: dict[str, dict[str, Any]], given: Any) -> Check:
        value = given if isinstance(given, str) else json.dumps(given)
        with pipeline.conn.transaction(force_rollback=True):
            for ordinal, (name, declaration) in enumerate(declared.items(), 1):
                pipeline.conn.execute(
                    "insert into etl.parameters select procedure_id, %s, %s, %s from etl.procedures where "
                    "name = 'load'",
                    [name, ordinal, Jsonb({"name": name, **declaration})],
                )
            row = pipeline.conn.execute(
                "select c.parameters, c.problems from etl.procedures p, "
                "etl._check_parameters(p.procedure_id, p.name, %s::jsonb) c"
                " where p.name = 'load'",
                [value],
            ).fetchone()
        assert row is not None
        return Check(*row)

    return run


VALID: Final[list[tuple[dict[str, Any], str]]] = [
    (STRING, '""'),
    (STRING, '"DE"'),
    (STRING, '"two\\nlines"'),
    (STRING, '"1"'),
    ({**STRING, "minLength": 3, "maxLength": 3}, '"äöü"'),
    ({**STRING, "maxLength": 1}, '"😀"'),
    ({**STRING, "minLength": 0}, '""'),
    ({**STRING, "pattern": "^[A-Z]{2}$"}, '"DE"'),
    ({**STRING, "pattern": "b"}, '"abc"'),
    ({**STRING, "pattern": "^ä+$"}, '"ää"'),
    ({**STRING, "enum": ["DE", "US"]}, '"US"'),
    ({**STRING, "enum": ["", "x"]}, '""'),
    (DATE, '"2024-02-29"'),
    (DATE, '"0001-01-01"'),
    (DATE_TIME, '"2024-02-29T23:59:59Z"'),
    (DATE_TIME, '"2024-02-29t23:59:59.123456+02:00"'),
    (DATE_TIME, '"2024-02-29 23:59-0530"'),
    (UUID, '"6f1c1b7e-3b1a-4b0e-9f59-0f1d6d3c5a10"'),
    (UUID, '"6F1C1B7E-3B1A-4B0E-9F59-0F1D6D3C5A10"'),
    (INTEGER, "0"),
    (INTEGER, "-7"),
    (INTEGER, "1.0"),
    (INTEGER, "1e3"),
    (INTEGER, "9223372036854775807"),
    (INTEGER, "-9223372036854775808"),
    ({**INTEGER, "minimum": 1, "maximum": 3}, "1"),
    ({**INTEGER, "minimum": 1, "maximum": 3}, "3"),
    ({**INTEGER, "enum": [1, 2]}, "2"),
    ({**INTEGER, "enum": [1, 2]}, "2.0"),
    (NUMBER, "0.1"),
    (NUMBER, "3"),
    (NUMBER, "-1e-9"),
    ({**NUMBER, "minimum": 0.5, "maximum": 0.5}, "0.5"),
    ({**NUMBER, "enum": [0.5, 1]}, "1.0"),
    (BOOLEAN, "true"),
    (BOOLEAN, "false"),
    (STRINGS, "[]"),
    (STRINGS, '["a", "", "ä"]'),
    (INTEGERS, "[1, 2.0, -3]"),
    ({**STRINGS, "minItems": 1, "maxItems": 2}, '["a", "b"]'),
    ({"type": "array", "items": {**STRING, "enum": ["a", "b"]}}, '["b", "b"]'),
    ({"type": "array", "items": DATE}, '["2024-01-01"]'),
    ({"type": "array", "items": {**INTEGER, "minimum": 1}}, "[1]"),
]

INVALID: Final[list[tuple[dict[str, Any], str, str]]] = [
    (STRING, "1", "must be a string, not 1"),
    (STRING, "true", "must be a string, not true"),
    (STRING, '["a"]', 'must be a string, not ["a"]'),
    (STRING, '{"a": 1}', 'must be a string, not {"a": 1}'),
    ({**STRING, "minLength": 3}, '"äö"', "is shorter than 3 characters"),
    ({**STRING, "maxLength": 2}, '"äöü"', "is longer than 2 characters"),
    ({**STRING, "pattern": "^[A-Z]{2}$"}, '"de"', "does not match the pattern ^[A-Z]{2}$"),
    ({**STRING, "pattern": "^[A-Z]{2}$"}, '"DE\\n"', "does not match the pattern ^[A-Z]{2}$"),
    ({**STRING, "pattern": "^[A-Z]{2}$"}, '"x\\nDE"', "does not match the pattern ^[A-Z]{2}$"),
    ({**STRING, "enum": ["DE", "US"]}, '"FR"', 'must be one of ["DE", "US"], not "FR"'),
    ({**STRING, "enum": ["DE", "US"]}, '"de"', 'must be one of ["DE", "US"], not "de"'),
    ({**STRING, "enum": ["1"]}, "1", "must be a string, not 1"),
    (DATE, '"2023-02-29"', "is not a date (YYYY-MM-DD)"),
    (DATE, '"2024-1-1"', "is not a date (YYYY-MM-DD)"),
    (DATE, '"01.02.2024"', "is not a date (YYYY-MM-DD)"),
    (DATE, '"today"', "is not a date (YYYY-MM-DD)"),
    (DATE, '"infinity"', "is not a date (YYYY-MM-DD)"),
    (DATE, '""', "is not a date (YYYY-MM-DD)"),
    (DATE, '"2024-01-01 "', "is not a date (YYYY-MM-DD)"),
    (DATE, '"2024-01-01T00:00:00Z"', "is not a date (YYYY-MM-DD)"),
    (DATE, '"0000-01-01"', "is not a date (YYYY-MM-DD)"),
    (DATE, '"\\u0662\\u0660\\u0662\\u0664-\\u0660\\u0661-\\u0660\\u0661"', "is not a date (YYYY-MM-DD)"),
    (DATE_TIME, '"2024-02-29T23:59:59"', "is not a date-time with a time zone"),
    (DATE_TIME, '"2024-02-29"', "is not a date-time with a time zone"),
    (DATE_TIME, '"2024-02-29T25:00:00Z"', "is not a date-time with a time zone"),
    (DATE_TIME, '"2023-02-29T00:00:00Z"', "is not a date-time with a time zone"),
    (DATE_TIME, '"now"', "is not a date-time with a time zone"),
    (DATE_TIME, '"2024-02-29T23:59:59 Europe/Berlin"', "is not a date-time with a time zone"),
    (UUID, '"6f1c1b7e3b1a4b0e9f590f1d6d3c5a10"', "is not a UUID"),
    (UUID, '"6f1c1b7e-3b1a-4b0e-9f59-0f1d6d3c5a1g"', "is not a UUID"),
    (UUID, '"{6f1c1b7e-3b1a-4b0e-9f59-0f1d6d3c5a10}"', "is not a UUID"),
    (INTEGER, "1.5", "must be an integer, not 1.5"),
    (INTEGER, '"1"', 'must be an integer, not "1"'),
    (INTEGER, "true", "must be an integer, not true"),
    (INTEGER, "[1]", "must be an integer, not [1]"),
    (INTEGER, "9223372036854775808", "is outside the range of bigint"),
    (INTEGER, "-9223372036854775809", "is outside the range of bigint"),
    (INTEGER, "1e400", "is outside the range of bigint"),
    ({**INTEGER, "minimum": 1}, "0", "is below the minimum of 1"),
    ({**INTEGER, "maximum": 3}, "4", "is above the maximum of 3"),
    ({**INTEGER, "enum": [1, 2]}, "3", "must be one of [1, 2], not 3"),
    (NUMBER, '"0.1"', 'must be a number, not "0.1"'),
    (NUMBER, "false", "must be a number, not false"),
    ({**NUMBER, "minimum": 0.5}, "0.49", "is below the minimum of 0.5"),
    ({**NUMBER, "maximum": 0.5}, "0.500001", "is above the maximum of 0.5"),
    (BOOLEAN, '"true"', 'must be a boolean, not "true"'),
    (BOOLEAN, "1", "must be a boolean, not 1"),
    (STRINGS, '"a"', 'must be an array, not "a"'),
    (STRINGS, '{"0": "a"}', 'must be an array, not {"0": "a"}'),
    (STRINGS, '["a", 1]', "item 2 must be a string, not 1"),
    (STRINGS, "[null]", "item 1 must be a string, not null"),
    (STRINGS, '[["a"]]', 'item 1 must be a string, not ["a"]'),
    (INTEGERS, "[1, 1.5]", "item 2 must be an integer, not 1.5"),
    (INTEGERS, "[9223372036854775808]", "item 1 is outside the range of bigint"),
    ({**STRINGS, "minItems": 1}, "[]", "has fewer than 1 items"),
    ({**STRINGS, "maxItems": 1}, '["a", "b"]', "has more than 1 items"),
    (
        {"type": "array", "items": {**STRING, "pattern": "^a"}},
        '["a", "b"]',
        "item 2 does not match the pattern ^a",
    ),
    ({"type": "array", "items": {**INTEGER, "maximum": 3}}, "[4]", "item 1 is above the maximum of 3"),
]


@pytest.mark.parametrize(
    ("declaration", "value"), VALID, ids=lambda part: part if isinstance(part, str) else json.dumps(part)
)
def test_a_valid_value_is_taken_as_it_is(declaration: dict[str, Any], value: str, check: Checker) -> None:
    found = check({"p": declaration}, f'{{"p": {value}}}')
    assert (found.messages, found.parameters) == ([], {"p": json.loads(value)})


@pytest.mark.parametrize(
    ("declaration", "value", "problem"),
    INVALID,
    ids=lambda part: part if isinstance(part, str) else json.dumps(part),
)
def test_an_invalid_value_is_refused_with_its_reason(
    declaration: dict[str, Any], value: str, problem: str, check: Checker
) -> None:
    found = check({"p": declaration}, f'{{"p": {value}}}')
    assert len(found.problems) == 1
    assert found.messages[0].startswith(f"param p of load {problem}")
    assert found.problems[0]["loc"] == ["params", "load", "p"]
    assert found.problems[0]["code"] == "params.invalid"
    assert found.parameters == {}


@pytest.mark.parametrize(
    ("declaration", "value", "taken"),
    [(INTEGER, "1.0", "1"), (INTEGER, "1e2", "100"), (INTEGERS, "[1.0, 2]", "[1, 2]")],
)
def test_an_integer_written_with_a_point_reaches_the_routine_as_an_integer(
    declaration: dict[str, Any], value: str, taken: str, check: Checker, pipeline: Pipeline
) -> None:
    found = check({"p": declaration}, f'{{"p": {value}}}')
    assert json.dumps(found.parameters["p"]) == taken


# -- given, missing, unknown --


def test_defaults_are_filled_in_and_optional_values_stay_away(check: Checker) -> None:
    declared: dict[str, dict[str, Any]] = {
        "country": {**STRING, "default": "DE"},
        "days": {**INTEGER, "default": 7},
        "flags": {**STRINGS, "default": []},
        "note": STRING,
    }
    assert check(declared, {}).parameters == {"country": "DE", "days": 7, "flags": []}
    assert check(declared, {"country": "US", "note": "x"}).parameters == {
        "country": "US",
        "days": 7,
        "flags": [],
        "note": "x",
    }


@pytest.mark.parametrize("default", [False, 0, "", []])
def test_a_default_that_is_false_in_python_is_still_a_default(default: Any, check: Checker) -> None:
    kinds: dict[type, dict[str, Any]] = {bool: BOOLEAN, int: INTEGER, str: STRING, list: STRINGS}
    assert check({"p": {**kinds[type(default)], "default": default, "required": True}}, {}).parameters == {
        "p": default
    }


def test_null_counts_as_not_given(check: Checker) -> None:
    declared: dict[str, dict[str, Any]] = {
        "country": {**STRING, "default": "DE"},
        "note": STRING,
        "batch": {**INTEGER, "required": True},
    }
    found = check(declared, {"country": None, "note": None, "batch": None})
    assert found.messages == ["param batch of load is required"]
    assert found.parameters == {"country": "DE"}


def test_a_required_parameter_without_a_default_must_be_given(check: Checker) -> None:
    declared: dict[str, dict[str, Any]] = {"batch": {**INTEGER, "required": True}}
    assert check(declared, {}).messages == ["param batch of load is required"]
    assert check(declared, {"batch": 1}).messages == []


def test_an_unknown_parameter_is_named_with_those_there_are(check: Checker) -> None:
    assert check({"country": STRING, "batch": INTEGER}, {"cuntry": "DE"}).messages == [
        "param cuntry of load is unknown; it takes batch, country"
    ]
    assert check({}, {"country": "DE"}).messages == ["param country of load is unknown; it takes none"]


@pytest.mark.parametrize("given", ["[]", '"DE"', "1", "null"])
def test_parameters_that_are_no_object_are_refused(given: str, check: Checker) -> None:
    found = check({"country": STRING}, given)
    assert len(found.problems) == 1
    assert 'params of load must be an object like {"name": value}' in found.messages[0]
    assert found.problems[0]["loc"] == ["params", "load"]


def test_all_problems_are_found_at_once_in_the_order_of_their_names(check: Checker) -> None:
    declared: dict[str, dict[str, Any]] = {
        "b": INTEGER,
        "a": {**STRING, "required": True},
        "c": {**STRING, "enum": ["x"]},
        "ok": BOOLEAN,
    }
    found = check(declared, {"b": "1", "c": "y", "zz": 1, "ok": True})
    assert found.messages == [
        "param a of load is required",
        'param b of load must be an integer, not "1"',
        'param c of load must be one of ["x"], not "y"',
        "param zz of load is unknown; it takes a, b, c, ok",
    ]
    assert found.parameters == {"ok": True}


# -- against a second opinion --


def is_valid(declaration: dict[str, Any], value: Any) -> bool:
    """The same rules, written a second time in Python."""
    kind = declaration["type"]
    if kind == "boolean":
        return isinstance(value, bool)
    if kind == "array":
        if not isinstance(value, list) or not declaration.get("minItems", 0) <= len(value) <= declaration.get(
            "maxItems", 99
        ):
            return False
        return all(is_valid(declaration["items"], item) for item in value)
    if "enum" in declaration and not any(
        type(one) is type(value) and one == value for one in declaration["enum"]
    ):
        return False
    if kind == "string":
        return (
            isinstance(value, str)
            and declaration.get("minLength", 0) <= len(value) <= declaration.get("maxLength", 99)
            and (
                "pattern" not in declaration
                or re.search(declaration["pattern"].replace("$", r"\Z"), value) is not None
            )
        )
    if (
        isinstance(value, bool)
        or not isinstance(value, int | float)
        or (kind == "integer" and value != int(value))
    ):
        return False
    in_bigint = kind == "number" or -(2**63) <= value < 2**63
    return in_bigint and declaration.get("minimum", value) <= value <= declaration.get("maximum", value)


def random_declaration(rng: random.Random, depth: int = 0) -> dict[str, Any]:
    kind = rng.choice(
        ["string", "integer", "number", "boolean", "array"] if depth == 0 else ["string", "integer"]
    )
    declaration: dict[str, Any] = {"type": kind}
    if kind == "string":
        optional: dict[str, Any] = {
            "minLength": rng.randint(0, 3),
            "maxLength": rng.randint(1, 4),
            "pattern": rng.choice(["^[a-c]+$", "b", "^ä"]),
            "enum": ["a", "bb", "ä"],
        }
    elif kind == "array":
        declaration["items"] = random_declaration(rng, depth + 1)
        optional = {"minItems": rng.randint(0, 2), "maxItems": rng.randint(1, 3)}
    elif kind == "boolean":
        optional = {}
    else:
        optional = {"minimum": rng.randint(-2, 2), "maximum": rng.randint(0, 4)}
        if kind == "integer":
            optional["enum"] = [1, 2, 3]
    return declaration | {key: value for key, value in optional.items() if rng.random() < 0.4}


def random_value(rng: random.Random, depth: int = 0) -> Any:
    """A value of some type, more often than not near a limit of some declaration."""
    choices: list[Callable[[], Any]] = [
        lambda: "".join(rng.choices("abcdä\n😀", k=rng.randint(0, 4))),
        lambda: rng.choice(["a", "bb", "ä", "1", ""]),
        lambda: rng.randint(-3, 5),
        lambda: rng.choice([0.5, -1.5, 2.25]),
        lambda: rng.choice([2**63, -(2**63), 2**63 - 1]),
        lambda: rng.random() < 0.5,
        lambda: {"a": 1},
    ]
    if depth < 2:
        choices += [lambda: [random_value(rng, depth + 1) for _ in range(rng.randint(0, 3))]] * 3
    return rng.choice(choices)()


def test_four_thousand_random_values_are_judged_as_a_second_implementation_judges_them(
    pipeline: Pipeline,
) -> None:
    rng = random.Random(20240229)
    cases = [(random_declaration(rng), random_value(rng)) for _ in range(4000)]
    judged = pipeline.column(
        "select etl._parameter_problem(c->0, c->1) is null from jsonb_array_elements(%s) with ordinality "
        "x(c, n) order by n",
        Jsonb(cases),
    )
    expected = [is_valid(*case) for case in cases]
    assert [
        case for case, found, wanted in zip(cases, judged, expected, strict=True) if found != wanted
    ] == []
    assert 300 < sum(expected) < 3700


# -- what a step gets --


@contextmanager
def loading(db: Database, arguments: str, params: list[dict[str, Any]], shown: str) -> Iterator[Pipeline]:
    with Pipeline(db) as pipeline:
        pipeline.add(
            "load", f"insert into silver.trace (step) values ({shown})", arguments=arguments, params=params
        )
        pipeline.apply()
        yield pipeline


def test_values_arrive_in_the_routine_in_its_own_types(db: Database) -> None:
    arguments = (
        "p_day date, tags text[], numbers int[], ratio numeric, is_new boolean, big bigint, at "
        "timestamptz, id uuid, whole jsonb"
    )
    params: list[dict[str, Any]] = [
        {"name": "day", **DATE, "required": True},
        {"name": "tags", **STRINGS, "required": True},
        {"name": "numbers", **INTEGERS, "required": True},
        {"name": "ratio", **NUMBER, "required": True},
        {"name": "is_new", **BOOLEAN, "required": True},
        {"name": "big", **INTEGER, "required": True},
        {"name": "at", **DATE_TIME, "required": True},
        {"name": "id", **UUID, "required": True},
        {"name": "whole", **STRINGS, "required": True},
    ]
    given = {
        "day": "2024-02-29",
        "tags": ["a,b", 'c"d', "", "null", "{x}"],
        "numbers": [1, 2.0],
        "ratio": 0.1,
        "is_new": False,
        "big": 2**63 - 1,
        "at": "2024-02-29T12:00:00+02:00",
        "id": "6F1C1B7E-3B1A-4B0E-9F59-0F1D6D3C5A10",
        "whole": ["x"],
    }
    shown = (
        "concat_ws('|', p_day, to_json(tags), numbers, ratio, is_new, big, at at time zone 'UTC', id, whole)"
    )
    with loading(db, arguments, params, shown) as pipeline:
        run = pipeline.start(params={"load": given})
        assert (run.status, pipeline.steps(run.run_id)[0]["error_message"]) == ("succeeded", None)
        assert pipeline.trace() == [
            '2024-02-29|["a,b","c\\"d","","null","{x}"]|{1,2}|0.1|f|9223372036854775807|2024-02-29 10:00:00'
            '|6f1c1b7e-3b1a-4b0e-9f59-0f1d6d3c5a10|["x"]'
        ]


def test_an_optional_value_that_is_not_given_leaves_the_default_of_the_routine(db: Database) -> None:
    params = [{"name": "country", **STRING, "required": False}]
    with loading(db, "country text default upper('de')", params, "country") as pipeline:
        assert pipeline.start().status == "succeeded"
        assert pipeline.start(params={"load": {"country": "US"}}).status == "succeeded"
        assert pipeline.start(params={"load": {"country": None}}).status == "succeeded"
        assert pipeline.trace() == ["DE", "US", "DE"]


def test_a_value_cannot_leave_its_place_in_the_statement(db: Database) -> None:
    nasty = "'; drop table silver.trace; -- $1 $2 \\"
    with loading(
        db, "country text", [{"name": "country", **STRING, "required": True}], "country"
    ) as pipeline:
        run = pipeline.start(params={"load": {"country": nasty}})
        assert run.status == "succeeded"
        assert pipeline.trace() == [nasty]
        statement = pipeline.value("select statement from etl.step_history")
        pipeline.sql(statement.replace("%", "%%"))
        assert pipeline.trace() == [nasty, nasty]


def test_a_run_with_invalid_parameters_is_refused_before_it_exists(db: Database) -> None:
    with loading(
        db, "country text", [{"name": "country", **STRING, "required": True}], "country"
    ) as pipeline:
        pipeline.add("other")
        pipeline.apply()
        with refused("PT422", "params.invalid") as refusal:
            pipeline.start(params={"load": {"country": 1, "x": 2}, "othr": {}})
        assert refusal.codes == ["params.invalid", "params.invalid", "params.unused"]
        assert pipeline.value("select count(*) from etl.runs") == 0
