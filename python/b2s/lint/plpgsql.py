"""Reads a PL/pgSQL body: the tree that libpg_query makes of it, with the places that it leaves out.

libpg_query gives statements a line but no column, and expressions neither. So each expression is looked up
in the text, from the line of its statement onwards.
"""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Callable, Iterator
from typing import Any, Final

from b2s.lint.model import Branch, Expr, Routine, Stmt, Variable
from b2s.lint.parser import SqlError, parse, tokens_of
from b2s.lint.sources import line_starts
from b2s.lint.standins import parse_body

_PRAGMA: Final = re.compile(r"^[ \t]*#[^\n]*", re.MULTILINE)
_LONG_GAP: Final = re.compile(r" {6,}")
_TARGET: Final = re.compile(r"^.*?(:=|=)", re.DOTALL)
_CASE: Final = re.compile(r'^"__Case__Variable_\d+__" IN \((.*)\)$', re.DOTALL)
_SYNTAX: Final = re.compile(r'at or near "(.+)"$', re.DOTALL)
_VERBS: Final = frozenset({"select", "insert", "update", "delete", "merge", "with", "perform", "call"})
_PERFORM: Final = re.compile(r"^perform", re.IGNORECASE)
_SELECT: Final = "SELECT "
_ERROR_LEVEL: Final = 21
_QUERY_MODE: Final = 0
_VALUE_MODE: Final = 2

_KEYWORDS: Final = {
    "block": "begin",
    "if": "if",
    "case": "case",
    "loop": "loop",
    "while": "while",
    "fori": "for",
    "fors": "for",
    "forc": "for",
    "dynfors": "for",
    "foreach_a": "foreach",
    "exit": "",
    "return": "return",
    "return_next": "return",
    "return_query": "return",
    "raise": "raise",
    "assert": "assert",
    "dynexecute": "execute",
    "perform": "perform",
    "call": "",
    "getdiag": "get",
    "open": "open",
    "fetch": "",
    "close": "close",
    "commit": "commit",
    "rollback": "rollback",
}
_EXPRESSIONS: Final = (
    "sqlstmt",
    "cond",
    "t_expr",
    "lower",
    "upper",
    "step",
    "query",
    "argquery",
    "dynquery",
    "expr",
    "message_expr",
)
_LISTS: Final = ("params", "options")
_DYNAMIC: Final = {"dynexecute": "query", "dynfors": "query", "return_query": "dynquery", "open": "dynquery"}

Place = Callable[[int], int]


def read_body(routine: Routine, place: Place, returns: str) -> None:
    """Fills the statements and variables of a routine from its body; `place` turns offsets of it into the
    file's.
    """
    body = _PRAGMA.sub(lambda match: " " * len(match[0]), routine.body)
    try:
        tree = parse_body(routine, body, returns)
    except SqlError as error:
        routine.failures.append((place(_error_offset(error, body)), error.message))
        return
    reader = _Reader(routine, body, place, tree)
    reader.read()


def _error_offset(error: SqlError, body: str) -> int:
    """libpg_query does not say where a body is wrong, but often at which word: its only occurrence is the
    place.
    """
    match = _SYNTAX.search(error.message)
    if match:
        places = [token.start for token in tokens_of(body) if token.text == match[1]]
        if len(places) == 1:
            return places[0]
    return _failing_segment(error.message, body) or len(body) - len(body.lstrip())


def _failing_segment(message: str, body: str) -> int | None:
    """The place of an error that says none: between two semicolons stands a statement that fails alike."""
    begin = None
    for token in tokens_of(body):
        if begin is None and token.text.lower() in _VERBS:
            begin = token.start
        elif begin is not None and token.text == ";":
            text = _PERFORM.sub("select", body[begin : token.start])
            try:
                parse(text)
            except SqlError as error:
                if error.message == message:
                    return begin + (error.offset or 0)
            begin = None
    return None


# -- places --


class _Locator:
    """Finds statements and expressions in a body, going forward only."""

    def __init__(self, body: str) -> None:
        self.body = body
        self.cursor = 0
        self._lines = line_starts(body)
        self._tokens = tokens_of(body)
        self._token_starts = [token.start for token in self._tokens]

    def line(self, number: int) -> int:
        """The offset of a line, from 1."""
        return self._lines[max(0, min(number, len(self._lines)) - 1)]

    def keyword(self, word: str, number: int) -> int:
        """The first token that is the word (any token for an empty one) from here and its line onwards."""
        begin = max(self.cursor, self.line(number))
        for token in self._tokens[bisect_left(self._token_starts, begin) :]:
            if not word or token.text.lower() == word:
                return token.start
        return begin

    def find(self, text: str, number: int, *, has_gap: bool = False) -> int | None:
        """Where a text stands from here and its line onwards; has_gap: blanks stand for what was cut."""
        begin = max(self.cursor, self.line(number))
        if has_gap and _LONG_GAP.search(text):
            pattern = "".join(
                f"[\\s\\S]{{{len(part)}}}" if _LONG_GAP.fullmatch(part) else re.escape(part)
                for part in re.split(r"( {6,})", text)
            )
            match = re.compile(pattern).search(self.body, begin)
            return match.start() if match else None
        found = self.body.find(text, begin)
        return found if found >= 0 else None


# -- statements --


class _Reader:
    """Makes statements of libpg_query's tree."""

    def __init__(self, routine: Routine, body: str, place: Place, tree: dict[str, Any]) -> None:
        self._routine = routine
        self._place = place
        self._tree = tree
        self._locator = _Locator(body)
        self._names = [self._datum_name(datum) for datum in tree.get("datums", ())]

    def read(self) -> None:
        """Fills the routine."""
        for datum in self._tree.get("datums", ()):
            self._declare(datum)
        self._routine.statements = self._statements([self._tree["action"]])

    @staticmethod
    def _datum_name(datum: dict[str, Any]) -> str:
        data = next(iter(datum.values()))
        return str(data.get("refname", data.get("fieldname", "")))

    def _declare(self, datum: dict[str, Any]) -> None:
        (kind, data), *_ = datum.items()
        name = data.get("refname", "")
        if kind not in ("PLpgSQL_var", "PLpgSQL_rec") or not name or name.startswith("__Case__"):
            return
        given = data.get("datatype", {}).get("PLpgSQL_type", {}).get("typname", "record")
        argument = self._routine.argument(name)
        line = data.get("lineno", 1)
        is_argument = argument is not None and "lineno" not in data
        default = None
        for key in ("default_val", "cursor_explicit_expr"):
            if key in data:
                default = self._expr(data[key], line, is_moving=False)
        kind_of = argument.type if argument and is_argument else str(given)
        if name not in self._routine.variables or not is_argument:
            self._routine.variables[name] = Variable(name, kind_of, default, is_argument)

    def _statements(self, items: list[dict[str, Any]]) -> list[Stmt]:
        return [self._statement(kind, data) for item in items for kind, data in item.items()]

    def _statement(self, name: str, data: dict[str, Any]) -> Stmt:
        kind = name.removeprefix("PLpgSQL_stmt_")
        line = data.get("lineno", 1)
        offset = self._locator.keyword(_KEYWORDS.get(kind, ""), line)
        statement = Stmt(kind, self._place(offset))
        if kind not in ("execsql", "assign", "call"):
            self._locator.cursor = offset
        has_into = bool(data.get("into"))
        for key in _EXPRESSIONS:
            if key in data:
                statement.exprs += self._present(data[key], line, has_gap=has_into)
        for key in _LISTS:
            for one in data.get(key, ()):
                inner = one["PLpgSQL_raise_option"].get("expr") if "PLpgSQL_raise_option" in one else one
                statement.exprs += self._present(inner, line) if inner else []
        if kind in ("execsql", "assign", "call") and statement.exprs:
            statement.offset = statement.exprs[0].offset
        statement.targets = tuple(self._targets(kind, data))
        statement.is_error = kind == "raise" and data.get("elog_level", _ERROR_LEVEL) >= _ERROR_LEVEL
        statement.branches = list(self._branches(kind, data, line))
        if _DYNAMIC.get(kind) in data:
            statement.kind = f"dynamic_{kind}" if kind in ("return_query", "open") else kind
        return statement

    def _present(self, item: dict[str, Any], line: int, *, has_gap: bool = False) -> list[Expr]:
        expr = self._expr(item, line, has_gap=has_gap)
        return [expr] if expr is not None else []

    def _targets(self, kind: str, data: dict[str, Any]) -> Iterator[str]:
        if kind in ("assign", "foreach_a"):
            yield self._target_of(data.get("varno", 0))
        for item in data.get("diag_items", ()):
            yield self._target_of(next(iter(item.values())).get("target", 0))
        for key in ("target", "var"):
            for inner in data[key].values() if isinstance(data.get(key), dict) else ():
                fields = inner.get("fields")
                yield from (one["name"] for one in fields) if fields else [inner.get("refname", "")]

    def _target_of(self, number: int) -> str:
        """The variable behind a datum; for a field of a record, the record."""
        if number >= len(self._names):
            return ""
        datum = self._tree["datums"][number].get("PLpgSQL_recfield")
        return self._target_of(datum.get("recparentno", 0)) if datum else self._names[number]

    def _branches(self, kind: str, data: dict[str, Any], line: int) -> Iterator[Branch]:
        if kind == "if":
            yield Branch("then", self._statements(data.get("then_body", [])), None)
            for item in data.get("elsif_list", ()):
                one = item["PLpgSQL_if_elsif"]
                condition = self._expr(one["cond"], one.get("lineno", line))
                yield Branch("then", self._statements(one.get("stmts", [])), condition)
            if data.get("else_body"):
                yield Branch("else", self._statements(data["else_body"]))
        elif kind == "case":
            for item in data.get("case_when_list", ()):
                one = item["PLpgSQL_case_when"]
                condition = self._expr(one["expr"], one.get("lineno", line))
                yield Branch("when", self._statements(one.get("stmts", [])), condition)
            if data.get("have_else"):
                yield Branch("else", self._statements(data.get("else_stmts", [])))
        elif kind == "block":
            yield Branch("body", self._statements(data.get("body", [])))
            yield from self._handlers(data, line)
        elif "body" in data:
            yield Branch("loop", self._statements(data["body"]))

    def _handlers(self, data: dict[str, Any], line: int) -> Iterator[Branch]:
        for item in data.get("exceptions", {}).get("PLpgSQL_exception_block", {}).get("exc_list", ()):
            one = item["PLpgSQL_exception"]
            names = tuple(c["PLpgSQL_condition"]["condname"].lower() for c in one.get("conditions", ()))
            offset = self._locator.keyword("when", one.get("lineno", line))
            self._locator.cursor = min(offset + 1, len(self._locator.body))
            yield Branch("handler", self._statements(one.get("action", [])), None, names, self._place(offset))

    # -- expressions --

    def _expr(
        self, item: dict[str, Any], line: int, *, has_gap: bool = False, is_moving: bool = True
    ) -> Expr | None:
        """The parsed expression of a tree's node; None, and a failure of the routine, when it cannot be
        parsed.
        """
        data = item.get("PLpgSQL_expr")
        if data is None:
            return None
        text, mode = data["query"], data.get("parseMode", _QUERY_MODE)
        wanted, cut = self._wanted(text, mode)
        begin = self._locator.cursor
        if not is_moving:
            self._locator.cursor = 0
        found = self._locator.find(wanted, line, has_gap=has_gap)
        self._locator.cursor = begin
        if found is not None and is_moving:
            self._locator.cursor = found + len(wanted)
        at = found if found is not None else self._locator.line(line)
        return self._parsed(text, mode, at - cut, found is not None, cut)

    @staticmethod
    def _wanted(text: str, mode: int) -> tuple[str, int]:
        """What of an expression stands in the body as it is, and how far into the expression it begins."""
        case = _CASE.match(text)
        if case:
            return case[1], case.start(1)
        if mode == _QUERY_MODE and text.startswith(_SELECT.strip()):
            return text[len("SELECT") :], len("SELECT")
        return text, 0

    def _parsed(self, text: str, mode: int, at: int, is_located: bool, cut: int) -> Expr | None:
        target = _TARGET.match(text) if mode > _VALUE_MODE else None
        skipped = target.end() if target else 0
        prefix = "" if mode == _QUERY_MODE else _SELECT
        shift = at + skipped - len(prefix)
        first = self._place(max(0, at + cut)) if is_located else self._place(at)

        def place(location: int) -> int:
            return self._place(max(0, location + shift)) if is_located else first

        try:
            nodes = parse(prefix + text[skipped:])
        except SqlError as error:
            offset = place(error.offset) if error.offset is not None else first
            self._routine.failures.append((offset, error.message))
            return None
        return Expr(nodes[0].stmt, place, first) if nodes else None
