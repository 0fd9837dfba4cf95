"""The dependencies as a picture: layers from left to right, coloured by outcome."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from graphlib import TopologicalSorter
from typing import Final

from b2s.report.html import Html, tag

_WIDTH: Final = 190
_HEIGHT: Final = 26
_GAP_X: Final = 46
_GAP_Y: Final = 8
_TALLEST: Final = 40
_LONGEST_NAME: Final = 27
_SWEEPS: Final = 4


@dataclass(frozen=True, slots=True)
class Node:
    """A procedure in the picture."""

    name: str
    outcome: str
    needs: tuple[str, ...]
    anchor: str

    @property
    def id(self) -> str:
        """Its own place in the page; `anchor` is that of its row."""
        return f"n{self.anchor}"


@dataclass(frozen=True, slots=True)
class _Place:
    column: int
    row: int

    @property
    def x(self) -> int:
        return 8 + self.column * (_WIDTH + _GAP_X)

    @property
    def y(self) -> int:
        return 8 + self.row * (_HEIGHT + _GAP_Y)


def outcomes(nodes: Sequence[Node]) -> list[tuple[str, int, str]]:
    """Which outcomes there are, how often, and where the first of each is; the rarest first."""
    counts = Counter(node.outcome for node in nodes)
    first = {node.outcome: node.id for node in reversed(nodes)}
    return [(kind, count, first[kind]) for kind, count in sorted(counts.items(), key=lambda one: one[1])]


def draw(nodes: Sequence[Node]) -> Html:
    """The graph as SVG. Every node is a link to its procedure, so the keyboard reaches it."""
    places = _places(nodes)
    by_name = {node.name: node for node in nodes}
    width = max(place.x for place in places.values()) + _WIDTH + 8
    height = max(place.y for place in places.values()) + _HEIGHT + 8
    edges = [
        _edge(places[needed], places[node.name], by_name[needed], node)
        for node in nodes
        for needed in node.needs
        if needed in places
    ]
    boxes = [_box(node, places[node.name]) for node in nodes]
    return tag(
        "svg",
        tag("title", "Dependencies, coloured by outcome"),
        *edges,
        *boxes,
        viewBox=f"0 0 {width} {height}",
        width=width,
        height=height,
        role="group",
        class_="graph",
    )


def _box(node: Node, place: _Place) -> Html:
    name = node.name if len(node.name) <= _LONGEST_NAME else f"{node.name[: _LONGEST_NAME - 1]}…"
    return tag(
        "a",
        tag("title", f"{node.name}: {node.outcome.replace('_', ' ')}"),
        tag("rect", x=place.x, y=place.y, width=_WIDTH, height=_HEIGHT, rx=4, class_="box"),
        tag("rect", x=place.x, y=place.y, width=6, height=_HEIGHT, rx=2, class_="mark"),
        tag("text", name, x=place.x + 13, y=place.y + 17),
        id=node.id,
        href=f"#{node.anchor}",
        class_=f"node s-{node.outcome}",
    )


def _edge(start: _Place, end: _Place, needed: Node, node: Node) -> Html:
    """Fat where a failure went along."""
    x1, y1 = start.x + _WIDTH, start.y + _HEIGHT // 2
    x2, y2 = end.x, end.y + _HEIGHT // 2
    bend = max(20, abs(x2 - x1) // 2)
    is_broken = needed.outcome in ("failed", "upstream_failed") and node.outcome == "upstream_failed"
    return tag(
        "path",
        d=f"M{x1} {y1}C{x1 + bend} {y1} {x2 - bend} {y2} {x2} {y2}",
        class_="edge broken" if is_broken else "edge",
    )


def _places(nodes: Sequence[Node]) -> dict[str, _Place]:
    """Each node right of all it needs; a layer that would be too tall takes several columns."""
    names = {node.name for node in nodes}
    needs = {node.name: [one for one in node.needs if one in names] for node in nodes}
    depth: dict[str, int] = {}
    for name in TopologicalSorter(needs).static_order():
        depth[name] = max((depth[one] + 1 for one in needs[name]), default=0)
    layers: list[list[str]] = [[] for _ in range(max(depth.values()) + 1)]
    for name in needs:
        layers[depth[name]].append(name)
    _untangle(layers, needs)
    places: dict[str, _Place] = {}
    column = 0
    for layer in layers:
        for index, name in enumerate(layer):
            places[name] = _Place(column + index // _TALLEST, index % _TALLEST)
        column += (len(layer) - 1) // _TALLEST + 1
    return places


def _untangle(layers: list[list[str]], needs: Mapping[str, Sequence[str]]) -> None:
    """Orders each layer by where its neighbours stand, to and fro, so that few edges cross."""
    users: dict[str, list[str]] = {}
    for name, needed in needs.items():
        for one in needed:
            users.setdefault(one, []).append(name)
    for sweep in range(_SWEEPS):
        neighbours: Mapping[str, Sequence[str]] = needs if sweep % 2 == 0 else users
        for layer in layers if sweep % 2 == 0 else reversed(layers):
            place = {name: index for one in layers for index, name in enumerate(one)}
            keys = {name: [place[one] for one in neighbours.get(name, ()) if one in place] for name in layer}
            order = {name: sum(found) / len(found) if found else place[name] for name, found in keys.items()}
            layer.sort(key=lambda name: order[name])
