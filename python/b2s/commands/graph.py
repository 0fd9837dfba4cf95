"""b2s graph: what depends on what, for the eye."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from b2s.lineage.graph import Graph

_FORMATS: Final = ("tree", "mermaid", "dot", "json")


def configure(parser: argparse.ArgumentParser) -> None:
    """The options of b2s graph."""
    parser.epilog = (
        "Shows what the database has; --file draws transformations.yaml without one.\n"
        "An arrow leads from what comes first to what comes after it."
    )
    parser.add_argument(
        "names", nargs="*", metavar="NAME", help="only these, and what hangs together with them"
    )
    parser.add_argument("--upstream", action="store_true", help="with NAME: only what comes before")
    parser.add_argument("--downstream", action="store_true", help="with NAME: only what comes after")
    parser.add_argument("--tables", action="store_true", help="and the tables that are read and written")
    parser.add_argument("--format", choices=_FORMATS, default="tree", help="default: tree")
    parser.add_argument("--pipeline", metavar="NAME", help="only this pipeline")
    parser.add_argument("--file", action="store_true", help="draw the configuration file, not the database")


def execute(arguments: argparse.Namespace) -> int:
    """Reads, narrows, draws."""
    from b2s.lineage import graph as graphs
    from b2s.output import print_json, print_lines, remark, style

    graph = _part(_read(arguments), arguments)
    if arguments.json or arguments.format == "json":
        print_json(graphs.document(graph))
    elif not graph.nodes:
        remark("no procedure is configured: write transformations.yaml, then: b2s sync-config")
    elif arguments.format == "mermaid":
        print_lines(graphs.mermaid(graph))
    elif arguments.format == "dot":
        print_lines(graphs.dot(graph))
    else:
        print_lines(graphs.tree(graph, style()))
    return 0


def _read(arguments: argparse.Namespace) -> Graph:
    from b2s.errors import UsageError
    from b2s.lineage.graph import graph_of_config, graph_of_database

    if arguments.file:
        from b2s.config import load_config

        if arguments.tables:
            raise UsageError("--tables is known by the database only", "leave --file out")
        return graph_of_config(load_config(Path(arguments.config)).config)
    from b2s.db import connect

    with connect(arguments.dsn) as connection:
        return graph_of_database(connection, arguments.pipeline, with_relations=arguments.tables)


def _part(graph: Graph, arguments: argparse.Namespace) -> Graph:
    from b2s.errors import UsageError

    if not arguments.names:
        if arguments.upstream or arguments.downstream:
            raise UsageError(
                "--upstream and --downstream need a name to start from", "b2s graph --upstream NAME"
            )
        return graph
    unknown = [name for name in arguments.names if name not in graph.nodes]
    if unknown:
        import difflib

        close = difflib.get_close_matches(unknown[0], graph.nodes, n=1)
        hint = f"did you mean {close[0]}" if close else "b2s graph shows what there is"
        raise UsageError(f"there is no {unknown[0]} in the graph", hint)
    is_both = arguments.upstream == arguments.downstream
    return graph.part(
        arguments.names, upstream=is_both or arguments.upstream, downstream=is_both or arguments.downstream
    )
