"""How to cut a routine that loads many tables: a piece per table, with the statements that load it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Final

from b2s.importer.classify import Judged
from b2s.importer.inventory import Found
from b2s.lint.access import Access, is_temporary, mentions_of
from b2s.lint.model import Stmt, Variable
from b2s.lint.parser import tokens_of
from b2s.lint.sources import Source
from b2s.names import parts_of, quoted

_EMPTY: Final = "''"
_WORDS: Final = {"fors": "for", "fori": "for", "forc": "for", "dynfors": "for", "foreach_a": "foreach"}
_DEEPER: Final = ("(", "[")
_HIGHER: Final = (")", "]")


@dataclass(frozen=True, slots=True)
class Cut:
    """A statement of the routine: its lines, its text, the conditions around it, what it reads and writes."""

    first_line: int
    last_line: int
    text: str
    conditions: tuple[str, ...]
    reads: frozenset[str]
    writes: frozenset[str]
    names: frozenset[str]


@dataclass(slots=True)
class Piece:
    """What loads one table: its statements in order, the pieces that it needs, and what to look at."""

    table: str
    routine: str
    cuts: list[Cut] = field(default_factory=list)
    needs: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    skeleton: str = ""


def split(one: Judged, taken: Iterable[str]) -> list[Piece]:
    """The pieces of a routine with several targets, in the order in which it loads them. `taken`: names of
    routines that are not free.
    """
    cuts = list(_cuts(one.found))
    names = set(taken)
    pieces: list[Piece] = []
    for table in one.targets:
        piece = Piece(table, _routine_name(table, names))
        piece.cuts = _with_stages(cuts, [cut for cut in cuts if table in cut.writes], one.targets)
        pieces.append(piece)
    for piece in pieces:
        _relate(piece, pieces, cuts)
        piece.notes += _computed(piece, one.found)
        piece.skeleton = _skeleton(piece, one.found)
    return pieces


def _routine_name(table: str, taken: set[str]) -> str:
    parts = parts_of(table)
    schema = f"{quoted(parts[0])}." if len(parts) > 1 else ""
    base = f"{schema}{quoted('load_' + parts[-1])}"
    name, number = base, 2
    while name in taken:
        name, number = f"{schema}{quoted(f'load_{parts[-1]}_{number}')}", number + 1
    taken.add(name)
    return name


def _with_stages(cuts: list[Cut], chosen: list[Cut], targets: list[str]) -> list[Cut]:
    """The statements of a table and those that fill what they read and what is no table of its own."""
    found = {id(cut) for cut in chosen}
    waiting = list(chosen)
    while waiting:
        cut = waiting.pop()
        for other in cuts:
            if id(other) not in found and (other.writes & cut.reads) - set(targets):
                found.add(id(other))
                waiting.append(other)
    return [cut for cut in cuts if id(cut) in found]


def _relate(piece: Piece, pieces: list[Piece], cuts: list[Cut]) -> None:
    own = {id(cut) for cut in piece.cuts}
    reads = {table for cut in piece.cuts for table in cut.reads}
    for other in pieces:
        if other is piece or other.table not in reads:
            continue
        first_read = min(cuts.index(cut) for cut in piece.cuts if other.table in cut.reads)
        first_write = min((cuts.index(cut) for cut in other.cuts if other.table in cut.writes), default=0)
        if first_write < first_read:
            piece.needs.append(other.table)
        else:
            piece.notes.append(
                f"reads {other.table} before the routine loads it: the rows of the last run, which is a cycle"
            )
    shared = sorted(
        {
            table
            for other in pieces
            if other is not piece
            for cut in other.cuts
            if id(cut) in own
            for table in cut.writes
            if table not in {one.table for one in pieces}
        }
    )
    if shared:
        piece.notes.append(f"{', '.join(shared)} is made in several pieces: each makes its own")
    for condition in sorted({one for cut in piece.cuts for one in cut.conditions}):
        piece.notes.append(f"a statement stood under: {condition}")
    if not piece.cuts:
        piece.notes.append("its statements are in routines that are called: cut those first")


def _computed(piece: Piece, found: Found) -> Iterator[str]:
    """Variables that statements which are not part of the piece give a value."""
    for variable in _variables(piece, found):
        given = found.routine.assignments.get(variable.name, [])
        if len(given) > (variable.default is not None):
            yield f"variable {variable.name} is computed elsewhere in the routine: compute it here as well"


def _variables(piece: Piece, found: Found) -> list[Variable]:
    used = {name for cut in piece.cuts for name in cut.names}
    return [
        one
        for one in found.routine.variables.values()
        if one.name in used and not one.is_argument and one.name != "v_rows"
    ]


# -- statements with their text --


def _cuts(found: Found) -> Iterator[Cut]:
    accesses: dict[int, list[Access]] = {}
    for access in mentions_of(found.routine):
        if access.statement is not None:
            accesses.setdefault(id(access.statement), []).append(access)
    text = _Text(found)
    temporary = {access.name for one in accesses.values() for access in one if is_temporary(access)}
    for statement, conditions in _leaves(found.routine.statements, found.routine.source):
        mentioned = accesses.get(id(statement), [])
        if not mentioned or statement.kind in ("raise", "assert", "getdiag"):
            continue
        reads = {_table(found, one, temporary) for one in mentioned if not one.is_write}
        writes = {_table(found, one, temporary) for one in mentioned if one.is_write}
        for table in sorted(writes) if _is_truncate(mentioned) else [""]:
            first, last, body = text.of(statement.offset)
            shown = f"truncate {table};" if table and len(writes) > 1 else body
            mine = frozenset({table}) if table else frozenset(writes)
            yield Cut(first, last, shown, conditions, frozenset(reads), mine, _names(statement))


def _is_truncate(mentioned: list[Access]) -> bool:
    return all(one.verb == "truncate" for one in mentioned)


def _table(found: Found, access: Access, temporary: set[str]) -> str:
    if access.schema and access.schema != "pg_temp":
        return f"{quoted(access.schema)}.{quoted(access.name)}"
    if access.name in temporary:
        return quoted(access.name)
    known = [
        one for one in {**found.own.reads, **found.own.writes} if one.endswith(f".{quoted(access.name)}")
    ]
    return known[0] if len(known) == 1 else quoted(access.name)


def _leaves(
    statements: list[Stmt], source: Source, around: tuple[str, ...] = ()
) -> Iterator[tuple[Stmt, tuple[str, ...]]]:
    """Every statement that holds no others, with what it stands under; error handlers are left out."""
    for statement in statements:
        yield statement, around
        inside = around
        if statement.branches and statement.kind != "block":
            word = _WORDS.get(statement.kind, statement.kind)
            inside = (*around, f"{word} of line {source.place(statement.offset)[0]}")
        for branch in statement.branches:
            if branch.role != "handler":
                yield from _leaves(branch.body, source, inside)


def _names(statement: Stmt) -> frozenset[str]:
    """The variables and columns that a statement mentions by one name."""
    return frozenset(
        parts[-1].sval
        for expr in statement.exprs
        for visit in expr.find("ColumnRef")
        for parts in [visit.node.fields]
        if hasattr(parts[-1], "sval")
    )


class _Text:
    """The text of statements, up to their semicolons."""

    def __init__(self, found: Found) -> None:
        self._source = found.routine.source
        self._begin = (
            self._source.text.find(found.routine.body, found.routine.offset) if found.routine.body else -1
        )
        self._tokens = tokens_of(found.routine.body) if self._begin >= 0 else []

    def of(self, offset: int) -> tuple[int, int, str]:
        """First line, last line and text of a statement; of a body in quotes the line alone."""
        first = self._source.place(offset)[0]
        at = offset - self._begin
        depth, begin = 0, None
        for token in self._tokens:
            if token.end <= at:
                continue
            begin = token.start if begin is None else begin
            depth += (token.text in _DEEPER) - (token.text in _HIGHER)
            if token.text == ";" and depth == 0:
                last = self._source.place(self._begin + token.end)[0]
                text = self._source.text[self._begin + begin : self._begin + token.end]
                return first, last, text
        return first, first, f"-- the statement of line {first}"


# -- the routine of a piece --


def _skeleton(piece: Piece, found: Found) -> str:
    used = {name for cut in piece.cuts for name in cut.names}
    routine = found.routine
    arguments = [one for one in routine.arguments if one.is_input and one.name in used]
    declared = ", ".join(
        f"{one.name} {one.type}{' default null' if one.has_default else ''}" for one in arguments
    )
    path = ""
    if routine.search_path is not None:
        path = f" set search_path = {', '.join(map(quoted, routine.search_path)) or _EMPTY}"
    lines = [
        f"create or replace function {piece.routine}({declared}) returns bigint language plpgsql{path} as $$",
        "declare",
        "  v_rows bigint;",
        *(f"  {one}" for one in _declarations(piece, found)),
        "begin",
    ]
    for cut in piece.cuts:
        if cut.conditions:
            lines.append(f"  -- stood under: {', '.join(cut.conditions)}")
        lines.append(_indented(cut.text))
        if piece.table in cut.writes and cut is [one for one in piece.cuts if piece.table in one.writes][-1]:
            lines.append("  get diagnostics v_rows = row_count;")
    return "\n".join([*lines, "  return v_rows;", "end $$;"])


def _declarations(piece: Piece, found: Found) -> Iterator[str]:
    """The variables of the routine that a piece uses, with their defaults."""
    text = _Text(found)
    for one in _variables(piece, found):
        default = f" := {text.of(one.default.offset)[2]}" if one.default is not None else ";"
        yield f"{one.name} {one.type}{default}   -- of {found.routine.full_name}"


def _indented(text: str) -> str:
    """A statement two columns in, its own indentation kept."""
    lines = text.expandtabs(4).splitlines()
    margins = [len(line) - len(line.lstrip()) for line in lines[1:] if line.strip()]
    margin = min(margins, default=0)
    rest = [("    " + line[margin:]).rstrip() for line in lines[1:]]
    return "\n".join(["  " + lines[0], *rest])
