"""What a PromQL expression yields, as far as its text tells: its labels, and whether it fits together.

No Prometheus is at hand where these tests run. What most often goes wrong without being a syntax error can
be told from the text: a metric or label that does not exist, and operands whose labels do not match, so that
an alert would never fire.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Final

import promql_parser

Labels = frozenset[str]
SCALAR: Final = None
TARGET: Final = frozenset({"job", "instance", "database"})
"""What Prometheus adds to each series: the configuration of the scrape sets `database`."""
_SAME: Final = (
    "rate", "increase", "changes", "delta", "deriv", "max_over_time", "min_over_time", "avg_over_time", "abs",
    "clamp_min", "clamp_max", "round",
)  # fmt: skip


class Unsound(AssertionError):
    """An expression that cannot mean what it says."""


def labels_of(query: str, known: Mapping[str, Labels]) -> Labels | None:
    """The labels that the series of an expression have; None: it is a number. Raises Unsound."""
    return _labels(promql_parser.parse(query), known)


def selectors(query: str) -> Iterator[Any]:
    """Every selector in an expression."""
    yield from _selectors(promql_parser.parse(query))


def _selectors(node: Any) -> Iterator[Any]:
    if type(node).__name__ == "VectorSelector":
        yield node
    for name in ("lhs", "rhs", "expr", "vector_selector", "param"):
        child = getattr(node, name, None)
        if child is not None:
            yield from _selectors(child)
    for child in getattr(node, "args", ()):
        yield from _selectors(child)


def _labels(node: Any, known: Mapping[str, Labels]) -> Labels | None:
    kind = type(node).__name__
    if kind == "VectorSelector":
        return _selected(node, known)
    if kind == "MatrixSelector":
        return _labels(node.vector_selector, known)
    if kind in ("ParenExpr", "UnaryExpr", "SubqueryExpr"):
        return _labels(node.expr, known)
    if kind in ("NumberLiteral", "StringLiteral"):
        return SCALAR
    if kind == "AggregateExpr":
        return _aggregated(node, known)
    if kind == "BinaryExpr":
        return _combined(node, known)
    assert kind == "Call", kind
    return _called(node, known)


def _selected(node: Any, known: Mapping[str, Labels]) -> Labels:
    if node.name not in known:
        raise Unsound(f"there is no metric {node.name}")
    labels = known[node.name]
    for matcher in node.matchers.matchers:
        if matcher.name not in labels:
            raise Unsound(f"{node.name} has no label {matcher.name}")
    return labels


def _aggregated(node: Any, known: Mapping[str, Labels]) -> Labels:
    inner = _labels(node.expr, known)
    if inner is SCALAR:
        raise Unsound("a number cannot be aggregated")
    if str(node.op) == "sum" and "instance" in inner:
        raise Unsound(f"a sum over instances counts each exporter: {node.prettify()}")
    if node.modifier is None:
        return frozenset()
    named = frozenset(node.modifier.labels)
    if not named <= inner:
        raise Unsound(f"{sorted(named - inner)} are no labels of {node.expr.prettify()}")
    return named if "By" in str(node.modifier.type) else inner - named


def _combined(node: Any, known: Mapping[str, Labels]) -> Labels | None:
    left, right = _labels(node.lhs, known), _labels(node.rhs, known)
    if left is SCALAR or right is SCALAR:
        return right if left is SCALAR else left
    is_default = "vector(" in node.rhs.prettify()
    is_plain = node.modifier is None or node.modifier.matching is None
    if is_plain and left != right and not is_default:
        raise Unsound(f"{sorted(left)} never match {sorted(right)}: {node.prettify()}")
    return left


def _called(node: Any, known: Mapping[str, Labels]) -> Labels | None:
    name = node.func.name
    arguments = [_labels(one, known) for one in node.args]
    if name == "time":
        return SCALAR
    if name in ("vector", "absent"):
        return frozenset()
    if name == "histogram_quantile":
        (inner,) = (one for one in arguments if one is not SCALAR)
        if "le" not in inner:
            raise Unsound("histogram_quantile needs the label le")
        return inner - {"le"}
    if name in _SAME:
        return next(one for one in arguments if one is not SCALAR)
    raise Unsound(f"{name} is not known to these tests")
