"""What EXECUTE runs, as far as it can be known beforehand: the text with holes, and what may fill them
unquoted.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, Final

from b2s.lint.access import HOLE
from b2s.lint.frontend import fragment
from b2s.lint.model import HARMLESS, Expr, Routine
from b2s.lint.parser import kind

_SPEC: Final = re.compile(r"%(?:(\d+)\$)?-?(?:\d+|\*)?([sIL%])")
_QUOTING: Final = frozenset({"quote_ident", "quote_literal", "quote_nullable"})
_PASSING: Final = frozenset(
    [
        "btrim",
        "trim",
        "lower",
        "upper",
        "rtrim",
        "ltrim",
        "replace",
        "regexp_replace",
        "translate",
        "substr",
        "substring",
        "left",
        "right",
        "rpad",
        "lpad",
        "concat",
        "concat_ws",
        "string_agg",
        "array_to_string",
        "repeat",
        "reverse",
        "split_part",
        "initcap",
        "min",
        "max",
    ]
)
"""Functions whose result holds what their arguments hold."""
_ARITHMETIC: Final = frozenset(["+", "-", "*", "/", "%", "^", "=", "<>", "<", ">", "<=", ">="])


@dataclass(frozen=True, slots=True)
class Folded:
    """A text with holes, and the nodes whose value goes into it as it is."""

    text: str
    unsafe: tuple[Any, ...] = ()
    is_whole: bool = True

    def __add__(self, other: Folded) -> Folded:
        return Folded(self.text + other.text, self.unsafe + other.unsafe, self.is_whole and other.is_whole)


def fold_all(routine: Routine) -> dict[int, tuple[Expr, Folded]]:
    """For each EXECUTE of a routine (by id of the statement) its expression and what it amounts to.

    Where the text can be parsed, the statement gets it as its `dynamic` expression.
    """
    found: dict[int, tuple[Expr, Folded]] = {}
    for statement in routine.all_statements:
        if statement.kind not in ("dynexecute", "dynfors", "dynamic_return_query", "dynamic_open"):
            continue
        if not statement.exprs or statement.exprs[0].value is None:
            continue
        expr = statement.exprs[0]
        folded = _folded(expr.value, routine)
        found[id(statement)] = (expr, folded)
        statement.dynamic = fragment(folded.text, expr.offset)
    routine.__dict__.pop("exprs", None)
    return found


def _folded(node: Any, routine: Routine) -> Folded:
    try:
        return _fold(node, routine, frozenset())
    except RecursionError:
        return Folded(HOLE, (), False)


def _fold(node: Any, routine: Routine, seen: frozenset[str]) -> Folded:
    name = kind(node)
    if name == "A_Const":
        return Folded(_constant(node))
    if name == "A_Expr" and node.name[-1].sval == "||" and node.lexpr is not None:
        return _fold(node.lexpr, routine, seen) + _fold(node.rexpr, routine, seen)
    if name == "A_Expr" and node.name[-1].sval in _ARITHMETIC:
        return Folded(HOLE, (), False)
    if name == "FuncCall":
        return _call(node, routine, seen)
    if name == "CoalesceExpr":
        return _any(list(node.args), routine, seen)
    if name == "CaseExpr":
        results = [one.result for one in node.args] + ([node.defresult] if node.defresult else [])
        return _any(results, routine, seen)
    if name == "TypeCast":
        is_harmless = node.typeName.names[-1].sval in HARMLESS and not node.typeName.arrayBounds
        return Folded(HOLE, (), False) if is_harmless else _fold(node.arg, routine, seen)
    if name == "ColumnRef" and len(node.fields) == 1 and kind(node.fields[0]) == "String":
        return _variable(node, node.fields[0].sval, routine, seen)
    if name == "SubLink" and getattr(node.subselect, "targetList", None):
        return _any([node.subselect.targetList[0].val], routine, seen)
    if name in ("SQLValueFunction", "BoolExpr", "NullTest", "A_ArrayExpr"):
        return Folded(HOLE, (), False)
    return Folded(HOLE, (node,), False)


def _constant(node: Any) -> str:
    value = node.val
    for field in ("sval", "ival", "fval", "boolval"):
        if hasattr(value, field):
            return str(getattr(value, field))
    return ""


def _any(nodes: list[Any], routine: Routine, seen: frozenset[str]) -> Folded:
    """One of several: the text of the first, the dangers of all."""
    folded = [_fold(one, routine, seen) for one in nodes]
    unsafe = tuple(node for one in folded for node in one.unsafe)
    return Folded(folded[0].text if folded else "", unsafe, False)


def _call(node: Any, routine: Routine, seen: frozenset[str]) -> Folded:
    name = node.funcname[-1].sval
    args = list(node.args or ())
    if name == "format" and args and not node.func_variadic:
        return _format(args, routine, seen)
    if name in _QUOTING:
        return Folded(HOLE if name == "quote_ident" else "null", (), False)
    if name not in _PASSING:
        return Folded(HOLE, (), False)
    folded = [_fold(one, routine, seen) for one in args]
    if name == "concat":
        return sum(folded, Folded(""))
    return Folded(HOLE, tuple(one for part in folded for one in part.unsafe), False)


def _format(args: list[Any], routine: Routine, seen: frozenset[str]) -> Folded:
    template = _fold(args[0], routine, seen)
    whole = Folded("", template.unsafe, template.is_whole)
    done, position = 0, 0
    for match in _SPEC.finditer(template.text):
        whole += Folded(template.text[done : match.start()])
        done = match.end()
        if match[2] == "%":
            whole += Folded("%")
            continue
        position = int(match[1]) if match[1] else position + 1
        value = args[position] if position < len(args) else None
        if value is None or match[2] == "L":
            whole += Folded("null", (), False)
        elif match[2] == "I":
            text = _constant(value) if kind(value) == "A_Const" else HOLE
            whole += Folded(text, (), kind(value) == "A_Const")
        else:
            whole += _fold(value, routine, seen)
    return whole + Folded(template.text[done:])


def _variable(node: Any, name: str, routine: Routine, seen: frozenset[str]) -> Folded:
    variable = routine.variables.get(name)
    if name in seen:
        return Folded(HOLE, (), False)
    if variable is None:
        return Folded(HOLE, (node,), False)
    if variable.type.lower() in HARMLESS:
        return Folded(HOLE, (), False)
    given = routine.assignments.get(name, [])
    values = [one.value for one in given if one is not None and one.value is not None]
    if variable.is_argument or not given or len(values) < len(given):
        return Folded(HOLE, (node,), False)
    folded = [_fold(one, routine, seen | {name}) for one in values]
    unsafe = tuple(one for part in folded for one in part.unsafe)
    if len(folded) == 1:
        return Folded(folded[0].text, unsafe, folded[0].is_whole)
    return Folded(folded[0].text, unsafe, False)
