from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final

from b2s.lint.parser import Visit, kind
from b2s.lint.project import Project, Step
from b2s.lint.rule import Example, Hit, rule

_NODES: Final = {
    "JsonObjectConstructor": (16, "JSON_OBJECT"),
    "JsonArrayConstructor": (16, "JSON_ARRAY"),
    "JsonArrayQueryConstructor": (16, "JSON_ARRAY"),
    "JsonObjectAgg": (16, "JSON_OBJECTAGG"),
    "JsonArrayAgg": (16, "JSON_ARRAYAGG"),
    "JsonIsPredicate": (16, "IS JSON"),
    "JsonTable": (17, "JSON_TABLE"),
    "JsonFuncExpr": (17, "JSON_QUERY, JSON_VALUE and JSON_EXISTS"),
    "JsonParseExpr": (17, "JSON()"),
    "JsonScalarExpr": (17, "JSON_SCALAR"),
    "JsonSerializeExpr": (17, "JSON_SERIALIZE"),
}
_FUNCTIONS: Final = {
    "any_value": 16,
    "random_normal": 16,
    "array_shuffle": 16,
    "array_sample": 16,
    "uuidv7": 18,
    "uuidv4": 18,
    "array_sort": 18,
    "array_reverse": 18,
    "casefold": 18,
}
_RETURNING: Final = frozenset({"InsertStmt", "UpdateStmt", "DeleteStmt", "MergeStmt"})
_SQL: Final = """\
create function silver.archive_orders() returns bigint language plpgsql set search_path = '' as $$
begin
  merge into silver.orders t using bronze.orders o on o.id = t.id
   when matched then update set amount = o.amount
   when not matched%s then %s;
  return 1;
end $$;
"""


@rule(
    "B506",
    "newer-syntax",
    "error",
    scope="routine",
    bad=Example(_SQL % (" by source", "delete"), target_version=15),
    good=Example(_SQL % ("", "insert (id, amount) values (o.id, o.amount)"), target_version=15),
)
def newer_syntax(step: Step, project: Project) -> Iterator[Hit]:
    """The SQL needs a newer PostgreSQL than the one it is for.

    The oldest server that must understand it is `--target-version`, else `lint: {target_version: 16}` in
    transformations.yaml, else the server of `--db`, else 15, the oldest that b2s runs on. Found are MERGE
    with RETURNING or BY SOURCE (17), SQL/JSON (16, 17), RETURNING old and new (18), and functions that came
    later.
    """
    target = project.target_version
    for _, expr in step.routine.exprs:
        for visit in expr.visits:
            for version, what in _needs(visit):
                if version > target:
                    yield Hit(
                        expr.offset_of(visit.node), f"{what} needs PostgreSQL {version}; this is for {target}"
                    )


def _needs(visit: Visit) -> Iterator[tuple[int, str]]:
    name, node = visit.kind, visit.node
    if name in _NODES:
        yield _NODES[name]
    elif name == "FuncCall" and len(node.funcname) == 1 and node.funcname[0].sval in _FUNCTIONS:
        yield _FUNCTIONS[node.funcname[0].sval], f"{node.funcname[0].sval}()"
    elif name == "RangeSubselect" and node.alias is None:
        yield 16, "a subquery in FROM without an alias"
    elif name == "MergeWhenClause" and node.matchKind.name == "MERGE_WHEN_NOT_MATCHED_BY_SOURCE":
        yield 17, "MERGE ... NOT MATCHED BY SOURCE"
    if name in _RETURNING:
        yield from _returning(name, node)


def _returning(name: str, node: Any) -> Iterator[tuple[int, str]]:
    clause = getattr(node, "returningClause", None)
    if clause is None:
        return
    if name == "MergeStmt":
        yield 17, "MERGE ... RETURNING"
    fields = [target.val.fields for target in clause.exprs or () if kind(target.val) == "ColumnRef"]
    known = {getattr(getattr(node.relation, "alias", None), "aliasname", None), node.relation.relname}
    for parts in fields:
        if len(parts) > 1 and getattr(parts[0], "sval", "") in ("old", "new") and parts[0].sval not in known:
            yield 18, f"RETURNING {parts[0].sval}"
