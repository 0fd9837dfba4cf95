"""The graph of a pipeline as text, Mermaid, DOT or JSON."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

from b2s.render import Style, visible

if TYPE_CHECKING:
    from b2s.configmodel import Config
    from b2s.db import Connection

PROCEDURE: Final = "procedure"
VIEW: Final = "materialized view"
RELATION: Final = "relation"
_PROCEDURES: Final = """
select l.name, p.name, p.type, g.name,
       array(select q.name from etl.dependencies d join etl.procedures q on q.procedure_id = d.depends_on_id
              where d.procedure_id = p.procedure_id order by q.name),
       array(select t.name from etl.procedure_refresh_targets x
               join etl.refresh_targets t using (refresh_target_id)
              where x.procedure_id = p.procedure_id order by t.name)
  from etl.procedures p
  join etl.pipelines l using (pipeline_id)
  left join etl.group_members m on m.procedure_id = p.procedure_id
  left join etl.groups g using (group_id)
 where p.is_active and (%(pipeline)s::text is null or l.name = %(pipeline)s)
 order by 1, p.type, 2"""
_LINEAGE: Final = """
select distinct l.name, l.kind, l.relation, l.access from etl.lineage l
 where l.is_current and l.access in ('read', 'write')
   and (%(pipeline)s::text is null or l.pipeline = %(pipeline)s)
 order by 1, 3, 4"""


@dataclass(frozen=True, slots=True)
class Node:
    """A procedure, a materialized view that it refreshes, or a relation that it reads or writes."""

    name: str
    kind: str
    type: str | None = None
    group: str | None = None
    pipeline: str | None = None


@dataclass(frozen=True, slots=True, order=True)
class Edge:
    """From what comes first to what comes after it. kind: depends, refreshes, reads or writes."""

    source: str
    target: str
    kind: str


@dataclass(slots=True)
class Graph:
    """Nodes by name, in order, and the edges between them."""

    nodes: dict[str, Node] = field(default_factory=dict)
    edges: list[Edge] = field(default_factory=list)

    def add(self, node: Node) -> None:
        """Adds a node unless there is one of its name."""
        self.nodes.setdefault(node.name, node)

    def after(self) -> dict[str, list[str]]:
        """For each node what comes right after it."""
        found: dict[str, set[str]] = {}
        for edge in self.edges:
            found.setdefault(edge.source, set()).add(edge.target)
        return {name: sorted(targets) for name, targets in found.items()}

    def before(self) -> dict[str, list[str]]:
        """For each node what comes right before it."""
        found: dict[str, set[str]] = {}
        for edge in self.edges:
            found.setdefault(edge.target, set()).add(edge.source)
        return {name: sorted(sources) for name, sources in found.items()}

    def part(self, names: Collection[str], *, upstream: bool, downstream: bool) -> Graph:
        """The nodes named, and all before and after them as asked for."""
        kept = set(names)
        for is_wanted, neighbours in ((upstream, self.before()), (downstream, self.after())):
            waiting = list(names) if is_wanted else []
            seen = set(waiting)
            while waiting:
                found = [one for one in neighbours.get(waiting.pop(), ()) if one not in seen]
                seen.update(found)
                waiting += found
            kept |= seen
        nodes = {name: node for name, node in self.nodes.items() if name in kept}
        return Graph(nodes, [one for one in self.edges if one.source in kept and one.target in kept])


# -- where it comes from --


def graph_of_config(config: Config) -> Graph:
    """The graph that a configuration file declares."""
    graph = Graph()
    for one in sorted(config.procedures, key=lambda procedure: (procedure.type, procedure.name)):
        graph.add(Node(one.name, PROCEDURE, one.type, one.group, config.pipeline))
    for one in config.procedures:
        graph.edges += [Edge(needed, one.name, "depends") for needed in one.dependencies]
        for view in one.mv_refresh:
            graph.add(Node(view.name, VIEW, pipeline=config.pipeline))
            graph.edges.append(Edge(one.name, view.name, "refreshes"))
    return graph


def graph_of_database(connection: Connection, pipeline: str | None, *, with_relations: bool = False) -> Graph:
    """The graph of the configured procedures; with_relations: and of what they read and write."""
    graph = Graph()
    rows = connection.execute(_PROCEDURES.encode(), {"pipeline": pipeline}).fetchall()
    for of, name, type_, group, _, _ in rows:
        graph.add(Node(name, PROCEDURE, type_, group, of))
    for of, name, _, _, needed, views in rows:
        graph.edges += [Edge(one, name, "depends") for one in needed]
        for view in views:
            graph.add(Node(view, VIEW, pipeline=of))
            graph.edges.append(Edge(name, view, "refreshes"))
    if with_relations:
        for name, _, relation, access in connection.execute(_LINEAGE.encode(), {"pipeline": pipeline}):
            _add_access(graph, name, relation, access)
    return graph


def _add_access(graph: Graph, name: str, relation: str, access: str) -> None:
    """A procedure and the table of its name are two things: the table then gets a name of its own."""
    existing = graph.nodes.get(relation)
    key = relation if existing is None or existing.kind != PROCEDURE else f"table {relation}"
    graph.add(Node(key, RELATION))
    is_read = access == "read"
    graph.edges.append(Edge(key, name, "reads") if is_read else Edge(name, key, "writes"))


# -- how it is shown --


def tree(graph: Graph, style: Style) -> Iterator[str]:
    """A tree from what needs nothing to what needs it; what hangs on several is shown in full once."""
    after, before = graph.after(), graph.before()
    shown: set[str] = set()
    roots = [name for name in graph.nodes if name not in before]
    for root in roots or list(graph.nodes):
        if root in shown:
            continue
        # What is to be shown, the next one last: name, what stands before it, what before those below it.
        waiting = [(root, "", "")]
        while waiting:
            name, prefix, indent = waiting.pop()
            following = after.get(name, [])
            is_repeated = name in shown and bool(following)
            yield prefix + _label(graph.nodes[name], style) + ("  (see above)" if is_repeated else "")
            if is_repeated:
                continue
            shown.add(name)
            for number, one in enumerate(reversed(following)):
                corner, line = ("└── ", "    ") if number == 0 else ("├── ", "│   ")
                waiting.append((one, indent + corner, indent + line))


def _label(node: Node, style: Style) -> str:
    notes = [one for one in (node.type or node.kind, node.group and f"group {node.group}") if one]
    return f"{visible(node.name)}  {style.paint(', '.join(notes), 'dim')}"


def mermaid(graph: Graph) -> Iterator[str]:
    """A Mermaid flowchart, as Markdown on most forges shows it."""
    keys = {name: f"n{number}" for number, name in enumerate(graph.nodes, 1)}
    shapes = {PROCEDURE: ("[", "]"), VIEW: ("[[", "]]"), RELATION: ("[(", ")]")}
    yield "flowchart LR"
    for group, nodes in _grouped(graph.nodes.values()):
        indent = "  "
        if group is not None:
            yield f'  subgraph {_key(group)}["{_mermaid_text(group)}"]'
            indent = "    "
        for node in nodes:
            begin, end = shapes[node.kind]
            style = f":::{node.type}" if node.type else ""
            yield f'{indent}{keys[node.name]}{begin}"{_mermaid_text(node.name)}"{end}{style}'
        if group is not None:
            yield "  end"
    for edge in graph.edges:
        arrow = "-->" if edge.kind in ("depends", "writes") else "-.->"
        yield f"  {keys[edge.source]} {arrow} {keys[edge.target]}"
    yield "  classDef dimension fill:#e8f1fa,stroke:#4a7fb5,color:#10324f"
    yield "  classDef fact fill:#fdf0e1,stroke:#c77f2a,color:#4f2f0a"


def dot(graph: Graph) -> Iterator[str]:
    """A digraph for Graphviz."""
    shapes = {PROCEDURE: "box", VIEW: "component", RELATION: "cylinder"}
    colours = {"dimension": "#e8f1fa", "fact": "#fdf0e1"}
    yield "digraph pipeline {"
    yield '  rankdir=LR; node [fontname="Helvetica", style=filled, fillcolor=white];'
    for group, nodes in _grouped(graph.nodes.values()):
        indent = "  "
        if group is not None:
            yield f"  subgraph {_dot_text('cluster_' + group)} {{ label={_dot_text(group)};"
            indent = "    "
        for node in nodes:
            colour = f', fillcolor="{colours[node.type]}"' if node.type else ""
            yield f"{indent}{_dot_text(node.name)} [shape={shapes[node.kind]}{colour}];"
        if group is not None:
            yield "  }"
    for edge in graph.edges:
        style = "" if edge.kind in ("depends", "writes") else " [style=dashed]"
        yield f"  {_dot_text(edge.source)} -> {_dot_text(edge.target)}{style};"
    yield "}"


def document(graph: Graph) -> dict[str, Any]:
    """The graph for programs."""
    nodes = [
        {"name": one.name, "kind": one.kind, "type": one.type, "group": one.group, "pipeline": one.pipeline}
        for one in graph.nodes.values()
    ]
    edges = [{"from": one.source, "to": one.target, "kind": one.kind} for one in graph.edges]
    return {"nodes": nodes, "edges": edges}


def _grouped(nodes: Iterable[Node]) -> Iterator[tuple[str | None, list[Node]]]:
    found: dict[str | None, list[Node]] = {}
    for node in nodes:
        found.setdefault(node.group, []).append(node)
    yield from found.items()


def _key(group: str) -> str:
    return "g_" + "".join(one if one.isalnum() else "_" for one in group)


def _mermaid_text(text: str) -> str:
    return text.replace("&", "#amp;").replace('"', "#quot;").replace("<", "#lt;").replace(">", "#gt;")


def _dot_text(text: str) -> str:
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'
