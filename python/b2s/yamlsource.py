"""Reads one YAML document so that every value keeps the line and column it was written at.

The dialect is the YAML 1.2 core schema with less freedom: `NO`, `on`, `12:30`, `010` and dates are text, tags
and duplicate keys are refused, aliases cannot recurse or explode. In values, `${VAR}`, `${VAR:-default}`,
`${VAR:?message}` and `$$` are replaced. Everything wrong is collected, so that it can be reported at once.
"""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, NamedTuple

import yaml

Loc = tuple[str | int, ...]

MAX_DEPTH: Final = 32
MAX_ALIASED_VALUES: Final = 200_000
_MAX_DIGITS: Final = 100
_LINE_WIDTH: Final = 120

_LINE_BREAK: Final = re.compile("\r\n|[\n\r\x85\u2028\u2029]")
_UNUSABLE: Final = re.compile("[\x00\ud800-\udfff]")
_NULL: Final = frozenset({"", "~", "null", "Null", "NULL"})
_BOOLEANS: Final = {"true": True, "True": True, "TRUE": True, "false": False, "False": False, "FALSE": False}
_INTEGER: Final = re.compile(r"[-+]?(?:0|[1-9][0-9]*)")
_OCTAL_OR_HEX: Final = re.compile(r"0o[0-7]+|0x[0-9a-fA-F]+")
_FLOAT: Final = re.compile(
    r"[-+]?(?:(?:0|[1-9][0-9]*)\.[0-9]*|\.[0-9]+|(?:0|[1-9][0-9]*)(?=[eE]))(?:[eE][-+]?[0-9]+)?"
)
_NOT_FINITE: Final = re.compile(r"[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)")
_VARIABLE: Final = re.compile(r"\$\$|\$\{([^}]*)\}|\$\{")
_SAFE_TEXT: Final = re.compile(r"[A-Za-z_](?:[\w. ]*\w)?")
_EXPRESSION: Final = re.compile(r"([A-Za-z_][A-Za-z0-9_]*)(?:(:-|:\?)(.*))?", re.DOTALL)


class Position(NamedTuple):
    """Where a value stands, and its key if it has one; lines and columns count from 1."""

    line: int
    column: int
    key_line: int | None = None
    key_column: int | None = None


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing wrong with a file. `line` 0 means the file as a whole (it could not be read)."""

    loc: Loc
    line: int
    column: int
    message: str
    hint: str | None = None


@dataclass(frozen=True, slots=True)
class Source:
    """The text of a configuration file and the place of every value in it."""

    path: str
    lines: tuple[str, ...] = ()
    data: object = None
    positions: Mapping[Loc, Position] = field(default_factory=dict)

    def problem(
        self, loc: Iterable[str | int], message: str, hint: str | None = None, *, at_key: bool = False
    ) -> Problem:
        """Places a finding: `loc` is a path in the document, of which the longest existing part counts.

        An item of a list may be given by its index or name: `("procedures", "silver.fact_sales", "routine")`.
        """
        wanted = tuple(loc)
        found, complete = self._resolve(wanted)
        position = self.positions.get(found)
        if position is None:
            return Problem(wanted, 1 if self.lines else 0, 1, message, hint)
        line, column = position.line, position.column
        if position.key_line is not None and position.key_column is not None:
            is_collection = isinstance(self.value(found), dict | list)
            starts_below = line != position.key_line
            if at_key or (is_collection and (starts_below or not complete)):
                line, column = position.key_line, position.key_column
        return Problem(found if complete else wanted, line, column, message, hint)

    def nearest(self, loc: Loc) -> tuple[Loc, object]:
        """The longest part of `loc` that exists, and its value."""
        found, _ = self._resolve(loc)
        return found, self.value(found)

    def value(self, loc: Loc) -> object:
        """The value at `loc`, or None where there is none."""
        current: object = self.data
        for segment in loc:
            if isinstance(current, dict):
                current = current.get(segment)
            elif isinstance(current, list) and isinstance(segment, int) and 0 <= segment < len(current):
                current = current[segment]
            else:
                return None
        return current

    def _resolve(self, loc: Loc) -> tuple[Loc, bool]:
        found: list[str | int] = []
        current: object = self.data
        for segment in loc:
            key = _child(current, segment)
            if key is None:
                return tuple(found), False
            found.append(key)
            current = self.value(tuple(found))
        return tuple(found), True


def _child(value: object, segment: str | int) -> str | int | None:
    """The key or index under which `value` holds `segment`; None if it does not."""
    if isinstance(value, dict):
        name = str(segment)
        if name in value:
            return name
        without_unit = name.removesuffix("_ms")
        return without_unit if without_unit in value else None
    if isinstance(value, list):
        if isinstance(segment, int):
            return segment if 0 <= segment < len(value) else None
        for index, item in enumerate(value):
            if item == segment or (isinstance(item, dict) and item.get("name") == segment):
                return index
    return None


class ConfigError(Exception):
    """A configuration that cannot be used; `str()` is the report, `problems` its entries in file order."""

    def __init__(self, source: Source, problems: Iterable[Problem]) -> None:
        self.source = source
        self.problems = sorted(problems, key=_place)
        super().__init__(format_problems(source, self.problems))


def _place(problem: Problem) -> tuple[int, int, str]:
    return problem.line, problem.column, problem.message


def scalar(text: str) -> str:
    """A text as a file has it: plain where it is read back as that, else in double quotes as in JSON."""
    if _SAFE_TEXT.fullmatch(text) and resolve_plain(text) == text:
        return text
    return json.dumps(text, ensure_ascii=False)


def format_problems(source: Source, problems: Iterable[Problem]) -> str:
    """All problems in file order: `file:line:col: error: message`, the source line, a caret, and a hint."""
    return "\n".join(_format(source, problem) for problem in sorted(problems, key=_place))


def _format(source: Source, problem: Problem) -> str:
    place = f"{source.path}:{problem.line}:{problem.column}" if problem.line else source.path
    rows = [f"{place}: error: {_visible(problem.message)}"]
    if 1 <= problem.line <= len(source.lines):
        rows += _excerpt(source.lines[problem.line - 1], problem.line, problem.column)
    if problem.hint:
        rows.append(f"  hint: {_visible(problem.hint)}")
    return "\n".join(rows)


def _excerpt(text: str, line: int, column: int) -> list[str]:
    offset = column - 1
    start = max(0, offset - _LINE_WIDTH // 2) if len(text) > _LINE_WIDTH else 0
    shown = _visible(text[start : start + _LINE_WIDTH].replace("\t", " "))
    if not shown.strip():
        return []
    before = shown[: offset - start]
    padding = sum(2 if unicodedata.east_asian_width(char) in "WF" else 1 for char in before)
    gutter = " " * len(str(line))
    return [f"  {line} | {shown}".rstrip(), f"  {gutter} | {' ' * padding}^"]


def _visible(text: str) -> str:
    """The text with control characters replaced, so that a file cannot steer the terminal that shows it."""
    return "".join("\ufffd" if unicodedata.category(char) in ("Cc", "Cf", "Cs") else char for char in text)


@dataclass(frozen=True, slots=True)
class Document:
    """A parsed file: its source, the problems so far, and the places left without a value."""

    source: Source
    problems: tuple[Problem, ...]
    broken: frozenset[Loc]


def read_document(path: Path, environ: Mapping[str, str]) -> Document:
    """Reads one YAML document whose root is a mapping. Raises ConfigError when there is none to work with."""
    text = _read_text(path)
    source = Source(str(path), tuple(_LINE_BREAK.split(text)))
    root, problems = _Composer(source, text).compose()
    if root is None:
        if not problems:
            hint = "a configuration starts with `version: 1`"
            problems.append(Problem((), 1, 1, "the file holds no configuration", hint))
        raise ConfigError(source, problems)
    converter = _Converter(environ, problems)
    data = converter.convert(root, ())
    if not isinstance(data, dict):
        found = "a list" if isinstance(data, list) else "a single value"
        problems.append(
            Problem((), root.line, root.column, f"the file must hold a mapping (`key: value`), not {found}")
        )
        raise ConfigError(source, problems)
    full = Source(source.path, source.lines, data, converter.positions)
    return Document(full, tuple(problems), frozenset(converter.broken))


def _read_text(path: Path) -> str:
    try:
        raw = path.read_bytes()
    except (OSError, ValueError) as error:
        reason = (error.strerror if isinstance(error, OSError) else None) or str(error)
        hint = "name the file with --config or B2S_CONFIG" if isinstance(error, FileNotFoundError) else None
        raise ConfigError(
            Source(str(path)), [Problem((), 0, 0, f"cannot read the file: {reason}", hint)]
        ) from None
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        before = raw[: error.start].decode("utf-8-sig", errors="replace")
        lines = _LINE_BREAK.split(before)
        source = Source(str(path), tuple(_LINE_BREAK.split(raw.decode("utf-8-sig", errors="replace"))))
        byte = raw[error.start]
        message = f"byte 0x{byte:02x} is not valid UTF-8"
        problem = Problem((), len(lines), len(lines[-1]) + 1, message, "save the file as UTF-8")
        raise ConfigError(source, [problem]) from None


@dataclass(slots=True)
class _Node:
    """One value as written: text, items or pairs, or an alias of another node."""

    line: int
    column: int
    text: str | None = None
    is_plain: bool = False
    items: list[_Node] | None = None
    pairs: list[tuple[_Node, _Node]] | None = None
    alias: _Node | None = None
    is_broken: bool = False
    is_open: bool = False
    pending_key: _Node | None = None


class _Composer:
    """Builds the tree of nodes from parser events, without recursion: depth is bounded before it can hurt."""

    def __init__(self, source: Source, text: str) -> None:
        self._source = source
        self._text = text
        self._begin()

    def _begin(self) -> None:
        self._problems: list[Problem] = []
        self._anchors: dict[str, _Node] = {}
        self._stack: list[_Node] = []
        self._root: _Node | None = None

    def compose(self) -> tuple[_Node | None, list[Problem]]:
        """The root node, or None when there is none or the text is not YAML, and the problems found."""
        # The parser in C is several times faster; the one in Python says better what is wrong.
        if fast := getattr(yaml, "CSafeLoader", None):
            try:
                return self._read(fast(self._text))
            except (yaml.YAMLError, ValueError, OverflowError):
                self._begin()
        loader: yaml.SafeLoader | None = None
        try:
            loader = yaml.SafeLoader(self._text)
            return self._read(loader)
        except yaml.reader.ReaderError as error:
            self._bad_character(error)
        except yaml.MarkedYAMLError as error:
            self._bad_syntax(error)
        except (ValueError, OverflowError):
            line, column = (loader.line + 1, loader.column + 1) if loader else (1, 1)
            self._problems.append(Problem((), line, column, "invalid YAML: no such character in this escape"))
        return None, self._problems

    def _read(self, loader: Any) -> tuple[_Node | None, list[Problem]]:
        while loader.check_event() and self._take(loader.get_event()):
            pass
        return self._root, self._problems

    def _take(self, event: yaml.Event) -> bool:
        """Handles one event; False ends the reading."""
        mark = event.start_mark
        line, column = (mark.line + 1, mark.column + 1) if mark else (1, 1)
        if isinstance(event, yaml.DocumentStartEvent) and self._root is not None:
            hint = "keep one document per file: remove the `---` and what follows"
            self._problems.append(
                Problem((), line, column, "the file holds more than one YAML document", hint)
            )
            return False
        if isinstance(event, yaml.ScalarEvent):
            node = _Node(line, column, text=event.value, is_plain=not event.style)
            self._add(node, event.anchor, event.tag)
        elif isinstance(event, yaml.AliasEvent):
            self._add(self._alias(line, column, event.anchor), None, None)
        elif isinstance(event, yaml.SequenceStartEvent | yaml.MappingStartEvent):
            node = _Node(line, column, is_open=True)
            if isinstance(event, yaml.SequenceStartEvent):
                node.items = []
            else:
                node.pairs = []
            self._add(node, event.anchor, event.tag)
            self._stack.append(node)
            if len(self._stack) > MAX_DEPTH:
                self._problems.append(Problem((), line, column, f"nested more than {MAX_DEPTH} levels deep"))
                self._root = None
                return False
        elif isinstance(event, yaml.SequenceEndEvent | yaml.MappingEndEvent):
            self._stack.pop().is_open = False
        return True

    def _add(self, node: _Node, anchor: str | None, tag: str | None) -> None:
        if tag is not None:
            hint = "quote a value to make it text; numbers, true, false and null need no tag"
            message = f"the tag {tag.replace('tag:yaml.org,2002:', '!!')} is not allowed"
            self._problems.append(Problem((), node.line, node.column, message, hint))
            node.is_broken = True
        if anchor is not None:
            self._anchors[anchor] = node
        if not self._stack:
            self._root = node
            return
        parent = self._stack[-1]
        if parent.items is not None:
            parent.items.append(node)
        elif parent.pending_key is None:
            parent.pending_key = node
        elif parent.pairs is not None:
            parent.pairs.append((parent.pending_key, node))
            parent.pending_key = None

    def _alias(self, line: int, column: int, name: str | None) -> _Node:
        target = self._anchors.get(name or "")
        if target is None:
            self._problems.append(Problem((), line, column, f"no anchor &{name} stands before this alias"))
        elif target.is_open:
            self._problems.append(
                Problem((), line, column, f"the alias *{name} stands inside its own anchor &{name}")
            )
            target = None
        return _Node(line, column, alias=target, is_broken=target is None)

    def _bad_character(self, error: yaml.reader.ReaderError) -> None:
        before = _LINE_BREAK.split(self._text[: error.position])
        code = error.character if isinstance(error.character, int) else ord(str(error.character)[:1] or "\0")
        message = f"the character U+{code:04X} is not allowed in YAML"
        self._problems.append(Problem((), len(before), len(before[-1]) + 1, message, "remove it"))

    def _bad_syntax(self, error: yaml.MarkedYAMLError) -> None:
        mark = error.problem_mark or error.context_mark
        line, column = (mark.line + 1, mark.column + 1) if mark else (1, 1)
        line = min(line, len(self._source.lines))
        problem = error.problem or "cannot be parsed"
        if "'\\t'" in problem:
            message, hint = "a tab stands where YAML expects spaces", _syntax_hint(problem)
        else:
            message, hint = f"invalid YAML: {problem}", _syntax_hint(problem)
            if error.context and error.context_mark:
                message += f" ({error.context} that begins on line {error.context_mark.line + 1})"
        self._problems.append(Problem((), line, column, message, hint))


def _syntax_hint(problem: str) -> str | None:
    if "'\\t'" in problem:
        return "indent with spaces"
    if "mapping values are not allowed" in problem:
        return "put quotes around a value that contains `: `, and check the indentation"
    if "cannot start any token" in problem:
        return "put quotes around the value"
    if "could not find expected ':'" in problem:
        return "write `key: value`, with a space after the colon"
    if "expected <block end>" in problem:
        return "indent the keys of one mapping, and the dashes of one list, by the same amount"
    return None


class _Converter:
    """Turns nodes into plain values and notes where each one stands."""

    def __init__(self, environ: Mapping[str, str], problems: list[Problem]) -> None:
        self.positions: dict[Loc, Position] = {}
        self.broken: set[Loc] = set()
        self._environ = environ
        self._problems = problems
        self._aliased = 0

    def convert(self, node: _Node, loc: Loc, key: _Node | None = None, in_alias: bool = False) -> object:
        place = (key.line, key.column) if key else (None, None)
        self.positions[loc] = Position(node.line, node.column, *place)
        if len(loc) > MAX_DEPTH:
            return self._fail(node, loc, f"nested more than {MAX_DEPTH} levels deep")
        if node.is_broken:
            self.broken.add(loc)
            return None
        if node.alias is not None:
            value = self.convert(node.alias, loc, key, True)
            self.positions[loc] = Position(node.line, node.column, *place)
            return value
        if in_alias:
            self._aliased += 1
            if self._aliased > MAX_ALIASED_VALUES:
                message = (
                    f"aliases repeat more than {MAX_ALIASED_VALUES} values" if self._aliased_once() else None
                )
                return self._fail(node, loc, message)
        if node.items is not None:
            return [
                self.convert(item, (*loc, index), None, in_alias) for index, item in enumerate(node.items)
            ]
        if node.pairs is not None:
            return self._mapping(node.pairs, loc, in_alias)
        return self._scalar(node, loc)

    def _aliased_once(self) -> bool:
        return self._aliased == MAX_ALIASED_VALUES + 1

    def _mapping(self, pairs: list[tuple[_Node, _Node]], loc: Loc, in_alias: bool) -> dict[str, object]:
        values: dict[str, object] = {}
        first_lines: dict[str, int] = {}
        for key, value in pairs:
            if key.text is None:
                self._report(key, loc, "a key must be plain text, not an alias, a list or a mapping")
            elif key.text in values:
                message = f"duplicate key {key.text!r}, first on line {first_lines[key.text]}"
                self._report(key, loc, message, "remove one of them")
            elif _UNUSABLE.search(key.text):
                self._report(key, loc, "a key holds a character that no text in Postgres can hold")
            else:
                first_lines[key.text] = key.line
                values[key.text] = self.convert(value, (*loc, key.text), key, in_alias)
        return values

    def _scalar(self, node: _Node, loc: Loc) -> object:
        text = node.text or ""
        if "$" in text:
            replaced = self._substitute(node, loc, text)
            if replaced is None:
                self.broken.add(loc)
                return None
            text = replaced
        if _UNUSABLE.search(text):
            return self._fail(node, loc, "the value holds a character that no text in Postgres can hold")
        if not node.is_plain:
            return text
        if len(text) > _MAX_DIGITS and (_INTEGER.fullmatch(text) or _OCTAL_OR_HEX.fullmatch(text)):
            return self._fail(
                node, loc, f"a number of {len(text)} digits is too long", "quote it to make it text"
            )
        return resolve_plain(text)

    def _substitute(self, node: _Node, loc: Loc, text: str) -> str | None:
        """The text with its variables replaced; None when one of them cannot be, which is then reported."""
        pieces: list[str] = []
        end, is_sound = 0, True
        for match in _VARIABLE.finditer(text):
            pieces.append(text[end : match.start()])
            end = match.end()
            if match.group() == "$$":
                pieces.append("$")
                continue
            value, problem, hint = self._variable(match.group(1))
            if problem is not None:
                self._report(node, loc, problem, hint)
                is_sound = False
            pieces.append(value)
        return "".join([*pieces, text[end:]]) if is_sound else None

    def _variable(self, inner: str | None) -> tuple[str, str | None, str | None]:
        """The value of what stands between the braces, or a problem and its hint."""
        if inner is None:
            return "", "a ${ without its closing }", "write $${ for a literal ${"
        match = _EXPRESSION.fullmatch(inner)
        if match is None:
            hint = "write ${NAME}, ${NAME:-default} or ${NAME:?message}; write $$ for a literal $"
            return "", f"${{{inner}}} is not a variable reference", hint
        name, operator, word = match.group(1), match.group(2), match.group(3)
        value = self._environ.get(name)
        if operator and not value:
            if operator == ":-":
                return word, None, None
            return "", f"the environment variable {name} is not set: {word or 'it is required'}", None
        if value is None:
            hint = f"set {name}, or give a default: ${{{name}:-value}}"
            return "", f"the environment variable {name} is not set", hint
        return value, None, None

    def _fail(self, node: _Node, loc: Loc, message: str | None, hint: str | None = None) -> object:
        """Reports a value that cannot be had; it counts as null, and as broken."""
        self.broken.add(loc)
        if message is not None:
            self._report(node, loc, message, hint)
        return None

    def _report(self, node: _Node, loc: Loc, message: str, hint: str | None = None) -> None:
        self._problems.append(Problem(loc, node.line, node.column, message, hint))


def resolve_plain(text: str) -> object:
    """The value of an unquoted scalar: null, boolean, number or text, by the YAML 1.2 core schema.

    A number with leading zeros stays text: it is far more often a code than an amount.
    """
    if text in _NULL:
        return None
    if text in _BOOLEANS:
        return _BOOLEANS[text]
    first = text[0]
    if first not in "-+.0123456789":
        return text
    if _INTEGER.fullmatch(text):
        return int(text)
    if _OCTAL_OR_HEX.fullmatch(text):
        return int(text[2:], 8 if text[1] == "o" else 16)
    if _FLOAT.fullmatch(text):
        return float(text)
    if _NOT_FINITE.fullmatch(text):
        return float(text.replace(".", "", 1))
    return text
