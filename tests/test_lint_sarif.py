"""SARIF 2.1.0: every log is judged against the objects of the specification that it uses.

The packages that model SARIF in Python let unknown properties pass and do not ship the schema of OASIS. So
what the specification demands stands here, object by object (the numbers are its sections): a property that
it does not have, one of another type, a missing one or a value out of range is an error.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any, Final, Literal

import pytest
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

pytest.importorskip("pglast", reason="the SQL parser is not installed: pip install 'b2s[lint]'")

from b2s.lint.engine import Report, lint
from b2s.lint.report import sarif
from b2s.lint.sources import Source, read_files

CORPUS: Final = Path(__file__).resolve().parent / "lint_corpus"
REFERENCE: Final = re.compile(r"(?!.*://)[A-Za-z0-9\-._~!$&'()*+,;=@/%:]+")


def _uri_reference(value: str) -> str:
    """RFC 3986: what may not stand in a URI is percent-encoded; a relative one has no colon up front."""
    assert REFERENCE.fullmatch(value), value
    assert re.fullmatch(r"(?:[^%]|%[0-9A-F]{2})*", value), value
    assert ":" not in value.split("/")[0], value
    return value


Level = Literal["none", "note", "warning", "error"]
Uri = Annotated[str, AfterValidator(_uri_reference)]
Positive = Annotated[int, Field(ge=1)]
Text = Annotated[str, Field(min_length=1)]


class Strict(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")


class Message(Strict):  # 3.11: text or id; in a message string of a rule the text is required (3.12.3)
    text: Text
    markdown: str | None = None


class Configuration(Strict):  # 3.50
    level: Level = "warning"
    enabled: bool = True
    rank: float = -1.0


class Descriptor(Strict):  # 3.49
    id: Text
    name: str | None = None
    shortDescription: Message | None = None
    fullDescription: Message | None = None
    help: Message | None = None
    helpUri: str | None = None
    defaultConfiguration: Configuration | None = None


class Component(Strict):  # 3.19
    name: Text
    version: str | None = None
    semanticVersion: str | None = None
    informationUri: str | None = None
    rules: list[Descriptor] = []


class Tool(Strict):  # 3.18
    driver: Component


class Region(Strict):  # 3.30: columns from 1, the end is behind the last character
    startLine: Positive
    startColumn: Positive = 1
    endLine: Positive | None = None
    endColumn: Positive | None = None

    @model_validator(mode="after")
    def _is_not_empty_backwards(self) -> Region:
        if self.endColumn is not None and (self.endLine or self.startLine) == self.startLine:
            assert self.endColumn >= self.startColumn
        return self


class ArtifactLocation(Strict):  # 3.4
    uri: Uri
    uriBaseId: str | None = None


class PhysicalLocation(Strict):  # 3.29
    artifactLocation: ArtifactLocation
    region: Region


class Location(Strict):  # 3.28
    physicalLocation: PhysicalLocation


class Result(Strict):  # 3.27
    ruleId: Text
    ruleIndex: Annotated[int, Field(ge=-1)] = -1
    level: Level = "warning"
    message: Message
    locations: list[Location] = []
    partialFingerprints: dict[str, str] = {}


class Run(Strict):  # 3.14
    tool: Tool
    results: list[Result]
    columnKind: Literal["utf16CodeUnits", "unicodeCodePoints"] = "utf16CodeUnits"

    @model_validator(mode="after")
    def _results_are_about_rules_of_the_tool(self) -> Run:
        rules = self.tool.driver.rules
        assert len({rule.id for rule in rules}) == len(rules)
        for result in self.results:
            if result.ruleIndex >= 0:
                assert rules[result.ruleIndex].id == result.ruleId  # 3.27.6
        return self


class Log(Strict):  # 3.13
    schema_: str = Field(alias="$schema")
    version: Literal["2.1.0"]
    runs: list[Run]


def log(report: Report) -> dict[str, Any]:
    """The log of a report, which is a valid one."""
    document = sarif(report)
    Log.model_validate(document)
    return document


@pytest.mark.parametrize("path", sorted(CORPUS.rglob("*.sql")), ids=lambda path: str(path.name))
def test_every_log_of_the_corpus_is_valid(path: Path) -> None:
    found = lint(read_files([str(path)]))
    assert len(log(found)["runs"][0]["results"]) == len(found.findings)


@pytest.mark.parametrize(
    "name", ["a b.sql", "ä/ü.sql", "100%.sql", "silver.load(text, int)", "C:/x.sql", "./x.sql", "/abs/x.sql"]
)
def test_any_name_of_a_source_is_a_valid_uri(name: str) -> None:
    faulty = "create function f() returns int language sql security definer as $$ select 1 $$;"
    assert log(lint([Source(name, faulty)]))["runs"][0]["results"]


def test_nothing_found_is_a_valid_log() -> None:
    assert log(lint([Source("x.sql", "")]))["runs"][0]["results"] == []


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("version",), "2.0.0"),
        (("runs", 0, "results", 0, "level"), "fatal"),
        (("runs", 0, "results", 0, "ruleId"), "B999"),
        (("runs", 0, "results", 0, "unknown"), 1),
        (("runs", 0, "results", 0, "message", "text"), ""),
        (("runs", 0, "results", 0, "locations", 0, "physicalLocation", "region", "startLine"), 0),
        (("runs", 0, "results", 0, "locations", 0, "physicalLocation", "artifactLocation", "uri"), "a b"),
        (("runs", 0, "tool", "driver", "name"), ""),
    ],
)
def test_the_judge_sees_what_is_wrong(path: tuple[str | int, ...], value: object) -> None:
    document = log(lint(read_files([str(CORPUS / "faulty_writes.sql")])))
    *way, last = path
    place: Any = document
    for step in way:
        place = place[step]
    place[last] = value
    with pytest.raises(ValidationError):
        Log.model_validate(document)
