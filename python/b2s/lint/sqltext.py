"""Cuts a file into statements, so that one that cannot be parsed hides no other. Offsets never change.

What only psql and CREATE EXTENSION understand (backslash lines, variables, the data of COPY, @extschema@) is
replaced by text of equal length.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final

from b2s.lint.parser import COMMENTS, SqlError, Token, parse, scan

_COPY: Final = re.compile(r"(?im)^copy\s[^;]*from\s+stdin\b[^;]*;[^\n]*\n(?P<data>(?:.*\n)*?\\\.)[^\n]*$")
_META: Final = re.compile(r"\\(?P<word>[a-zA-Z!?]+)[^\n]*")
_VARIABLE: Final = re.compile(r""":(?=['"]\w+['"])|(?<![:\w]):(?=[a-zA-Z_]\w*\b)|:\{\?\w+\}""")


@dataclass(frozen=True, slots=True)
class Piece:
    """One statement: its node and the offset that its locations count from, or why there is none."""

    offset: int
    text: str
    node: Any = None
    failure: str | None = None
    failure_offset: int = 0


def pieces(text: str) -> Iterator[Piece]:
    """The statements of a file in their order."""
    text = _COPY.sub(lambda match: _blank_group(match, "data"), text)
    text = _without_meta(text.replace("@extschema@", "_extschema_"))
    try:
        for start, end in _spans(text):
            yield from _piece(text[start:end], start)
    except SqlError as error:
        yield Piece(0, text, None, error.message, error.offset or 0)


def _piece(text: str, start: int) -> Iterator[Piece]:
    try:
        found = parse(text)
    except SqlError as error:
        try:
            found = parse(_VARIABLE.sub(lambda match: " " * len(match[0]), text))
        except SqlError:
            where = start + (error.offset if error.offset is not None else len(text) - len(text.lstrip()))
            yield Piece(start, text, None, error.message, where)
            return
    for raw in found:
        yield Piece(start, text, raw.stmt)


def _blank_group(match: re.Match[str], group: str) -> str:
    begin, end = match.start(group) - match.start(), match.end(group) - match.start()
    whole = match[0]
    return whole[:begin] + re.sub(r"[^\n]", " ", whole[begin:end]) + whole[end:]


def _without_meta(text: str) -> str:
    """The text without psql's backslash commands; one that sends the statement before it becomes a
    semicolon.
    """
    if "\\" not in text:
        return text
    spans = _strings(text)
    parts: list[str] = []
    done = 0
    for match in _META.finditer(text):
        begin = match.start()
        if begin < done or any(start <= begin < end for start, end in spans):
            continue
        if text[text.rfind("\n", 0, begin) + 1 : begin].strip() and not match["word"].startswith("g"):
            continue
        stand_in = ";" if match["word"].startswith("g") else " "
        parts += [text[done:begin], stand_in, " " * (len(match[0]) - 1)]
        done = match.end()
    return "".join([*parts, text[done:]])


_STRING: Final = re.compile(
    r"""--[^\n]*|/\*.*?\*/|(?<![\w$])(?P<tag>\$(?:[a-zA-Z_]\w*)?\$).*?(?P=tag)"""
    r"""|(?<!\w)[eE]'(?:[^'\\]|\\.|'')*'|'(?:[^']|'')*'|"[^"]*\"""",
    re.DOTALL,
)


def _strings(text: str) -> list[tuple[int, int]]:
    """Where strings, quoted names and comments stand, found without the parser, which would trip over
    psql's own.
    """
    return [match.span() for match in _STRING.finditer(text)]


def _spans(text: str) -> Iterator[tuple[int, int]]:
    """The extent of each statement, its semicolon left out; BEGIN ATOMIC bodies hold semicolons of their
    own.
    """
    tokens = [token for token in scan(text) if token.kind not in COMMENTS]
    start, depth, blocks, is_any = 0, 0, 0, False
    for index, token in enumerate(tokens):
        if token.text in ("(", "["):
            depth += 1
        elif token.text in (")", "]"):
            depth = max(0, depth - 1)
        elif (blocks and token.kind == "CASE") or (
            token.kind == "ATOMIC" and index and tokens[index - 1].kind == "BEGIN_P"
        ):
            blocks += 1
        elif blocks and token.kind == "END_P":
            blocks -= 1
        elif token.text == ";" and not depth and not blocks:
            if is_any:
                yield _first(tokens, start), token.start
            start, is_any = token.end, False
            continue
        is_any = True
    if is_any:
        yield _first(tokens, start), len(text)


def _first(tokens: list[Token], offset: int) -> int:
    """Where the first token at or after an offset begins, comments passed over."""
    low, high = 0, len(tokens)
    while low < high:
        middle = (low + high) // 2
        if tokens[middle].start < offset:
            low = middle + 1
        else:
            high = middle
    return tokens[low].start if low < len(tokens) else offset
