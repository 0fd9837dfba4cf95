"""Which statements an incremental run can reach: conditions on the mode and the window are evaluated, all
others may go either way.
"""

from __future__ import annotations

from typing import Any, Final

from b2s.lint.model import Branch, Expr, Routine, Stmt
from b2s.lint.parser import kind

UNKNOWN: Final = object()
GIVEN: Final = object()
"""A value that is not null, and no more is known of it."""
_COMPARED: Final = {"=": True, "<>": False, "!=": False}
_SAME: Final = frozenset({"lower", "upper", "btrim", "trim"})
_ENDS: Final = frozenset({"return"})

Values = dict[str, Any]


def incremental_values(mode: str, since: str, until: str) -> Values:
    """What the contract's arguments hold in an incremental run that is not the first."""
    return {mode: "incremental", since: GIVEN, until: GIVEN}


def reachable(routine: Routine, values: Values) -> set[int]:
    """The ids of the statements that can be reached while arguments hold these values."""
    known = dict(values)
    for variable in routine.variables.values():
        given = routine.assignments.get(variable.name, [])
        if (
            variable.name not in known
            and len(given) == 1
            and given[0] is not None
            and given[0].value is not None
        ):
            found = _value(given[0].value, known)
            if found is not UNKNOWN:
                known[variable.name] = found
    walker = _Walker(known)
    walker.block(routine.statements)
    return walker.reached


class _Walker:
    def __init__(self, values: Values) -> None:
        self._values = values
        self.reached: set[int] = set()

    def block(self, statements: list[Stmt]) -> bool:
        """Goes through statements; False when what follows them cannot be reached."""
        return all(self._goes_on(statement) for statement in statements)

    def _goes_on(self, statement: Stmt) -> bool:
        self.reached.add(id(statement))
        if statement.kind in _ENDS or statement.is_error:
            return False
        if statement.kind == "if":
            return self._if(statement)
        if statement.kind == "case":
            return self._case(statement)
        if statement.kind == "block":
            outcomes = [self.block(branch.body) for branch in statement.branches]
            return any(outcomes)
        if statement.kind == "while" and _truth(statement.exprs[0], self._values) is False:
            return True
        for branch in statement.branches:
            self.block(branch.body)
        return True

    def _if(self, statement: Stmt) -> bool:
        conditions = [statement.exprs[0] if statement.exprs else None]
        conditions += [branch.condition for branch in statement.branches[1:]]
        return self._first_of(statement.branches, conditions, is_exhaustive=False)

    def _case(self, statement: Stmt) -> bool:
        known = self._values
        if statement.exprs:
            subject = _value(statement.exprs[0].value, known)
            self._values = {**known, "__case__": subject}
        outcome = self._first_of(
            statement.branches, [branch.condition for branch in statement.branches], is_exhaustive=True
        )
        self._values = known
        return outcome

    def _first_of(
        self, branches: list[Branch], conditions: list[Expr | None], *, is_exhaustive: bool
    ) -> bool:
        """Takes the branches whose condition may hold, up to one that surely does."""
        goes_on = False
        for branch, condition in zip(branches, conditions, strict=False):
            truth = True if branch.role == "else" else _truth(condition, self._values)
            if truth is False:
                continue
            goes_on |= self.block(branch.body)
            if truth is True:
                return goes_on
        return goes_on or not is_exhaustive


def _truth(condition: Expr | None, values: Values) -> bool | None:
    found = _value(condition.value, values) if condition is not None else UNKNOWN
    return found if isinstance(found, bool) else None


def _value(node: Any, values: Values) -> Any:
    name = kind(node)
    if name == "A_Const":
        return _constant(node)
    if name == "ColumnRef":
        parts = [getattr(part, "sval", "*") for part in node.fields]
        key = "__case__" if parts[-1].startswith("__Case__") else parts[-1]
        return values.get(key, UNKNOWN) if len(parts) <= 2 else UNKNOWN
    if name == "NullTest":
        inner = _value(node.arg, values)
        is_null_test = node.nulltesttype.name == "IS_NULL"
        return UNKNOWN if inner is UNKNOWN else (inner is None) == is_null_test
    if name == "BoolExpr":
        return _logic(node, values)
    if name == "A_Expr":
        return _operation(node, values)
    if name == "TypeCast":
        return _value(node.arg, values)
    if name == "CoalesceExpr":
        found = (_value(one, values) for one in node.args)
        return next((one for one in found if one is not None), None)
    if name == "BooleanTest":
        return _tested(node, _value(node.arg, values))
    if name == "FuncCall" and node.funcname[-1].sval in _SAME and len(node.args or ()) == 1:
        inner = _value(node.args[0], values)
        return inner.upper() if isinstance(inner, str) and node.funcname[-1].sval == "upper" else inner
    return UNKNOWN


def _constant(node: Any) -> Any:
    if node.isnull:
        return None
    for field in ("sval", "boolval", "ival"):
        if hasattr(node.val, field):
            return getattr(node.val, field)
    return UNKNOWN


def _tested(node: Any, inner: Any) -> Any:
    if inner is UNKNOWN:
        return UNKNOWN
    outcomes = {"IS_TRUE": inner is True, "IS_NOT_TRUE": inner is not True, "IS_FALSE": inner is False}
    return outcomes.get(node.booltesttype.name, UNKNOWN)


def _logic(node: Any, values: Values) -> Any:
    found = [_value(one, values) for one in node.args]
    operator = node.boolop.name
    if operator == "NOT_EXPR":
        return not found[0] if isinstance(found[0], bool) else UNKNOWN
    decisive = operator == "OR_EXPR"
    if any(one is decisive for one in found):
        return decisive
    return (not decisive) if all(one is (not decisive) for one in found) else UNKNOWN


def _operation(node: Any, values: Values) -> Any:
    operator = node.name[-1].sval
    how = node.kind.name
    if how in ("AEXPR_DISTINCT", "AEXPR_NOT_DISTINCT"):
        operator = "<>" if how == "AEXPR_DISTINCT" else "="
    elif how not in ("AEXPR_OP", "AEXPR_IN"):
        return UNKNOWN
    if operator not in _COMPARED or node.lexpr is None:
        return UNKNOWN
    left = _value(node.lexpr, values)
    options = node.rexpr if isinstance(node.rexpr, tuple | list) else (node.rexpr,)
    found = [_value(one, values) for one in options]
    if not isinstance(left, str | bool | int) or any(not isinstance(one, str | bool | int) for one in found):
        return UNKNOWN
    return (left in found) == _COMPARED[operator]
