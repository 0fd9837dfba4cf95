"""`b2s graph`: the same graph as tree, Mermaid, DOT and JSON, from the database and from the file."""

from __future__ import annotations

import json
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any, Final

import pytest

from b2s.cli import main
from b2s.lineage.graph import Edge, Graph, Node, dot, mermaid, tree
from b2s.render import Style
from tests.pipelines import Pipeline
from tests.servers import Database

Run = Callable[..., str]

CONFIG: Final = """
version: 1
procedures:
  - {name: silver.customers, type: dimension, group: crm}
  - {name: silver.orders, type: fact, dependencies: [silver.customers], mv_refresh: [mart.sales]}
  - {name: silver.totals, type: fact, dependencies: [silver.orders, silver.customers]}
  - {name: silver.alone, type: fact}
"""


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """`b2s graph --file` in a folder with a configuration."""
    monkeypatch.chdir(tmp_path)
    Path("transformations.yaml").write_text(CONFIG, encoding="utf-8")

    def graph(*words: str, code: int = 0) -> str:
        capsys.readouterr()
        assert main(["graph", *words]) == code
        captured = capsys.readouterr()
        return captured.err if code else captured.out

    return graph


def test_a_tree_shows_what_hangs_on_what_and_nothing_in_full_twice(run: Run) -> None:
    assert run("--file").splitlines() == [
        "silver.customers  dimension, group crm",
        "├── silver.orders  fact",
        "│   ├── mart.sales  materialized view",
        "│   └── silver.totals  fact",
        "└── silver.totals  fact",
        "silver.alone  fact",
    ]


def test_what_is_shown_a_second_time_is_not_spread_again() -> None:
    graph = Graph({name: Node(name, "procedure") for name in "abcd"})
    graph.edges = [
        Edge("a", "b", "depends"),
        Edge("a", "c", "depends"),
        Edge("b", "c", "depends"),
        Edge("c", "d", "depends"),
    ]
    assert list(tree(graph, Style())) == [
        "a  procedure",
        "├── b  procedure",
        "│   └── c  procedure",
        "│       └── d  procedure",
        "└── c  procedure  (see above)",
    ]


def test_a_circle_of_reads_and_writes_ends() -> None:
    graph = Graph({name: Node(name, "relation") for name in "ab"})
    graph.edges = [Edge("a", "b", "reads"), Edge("b", "a", "writes")]
    assert list(tree(graph, Style())) == [
        "a  relation",
        "└── b  relation",
        "    └── a  relation  (see above)",
    ]


def test_a_chain_of_thousands_is_drawn_and_cut_in_a_moment() -> None:
    names = [f"p{number:05}" for number in range(5000)]
    graph = Graph({name: Node(name, "procedure") for name in names})
    graph.edges = [Edge(one, other, "depends") for one, other in pairwise(names)]
    assert sum(1 for _ in tree(graph, Style())) == 5000
    assert len(graph.part(["p02500"], upstream=True, downstream=False).nodes) == 2501


def test_mermaid(run: Run) -> None:
    assert run("--file", "--format", "mermaid").splitlines()[:9] == [
        "flowchart LR",
        '  subgraph g_crm["crm"]',
        '    n1["silver.customers"]:::dimension',
        "  end",
        '  n2["silver.alone"]:::fact',
        '  n3["silver.orders"]:::fact',
        '  n4["silver.totals"]:::fact',
        '  n5[["mart.sales"]]',
        "  n1 --> n3",
    ]


def test_dot(run: Run) -> None:
    lines = run("--file", "--format", "dot").splitlines()
    assert lines[0] == "digraph pipeline {"
    assert lines[-1] == "}"
    assert '  "silver.orders" -> "mart.sales" [style=dashed];' in lines
    assert '  "silver.customers" -> "silver.orders";' in lines


def test_names_cannot_break_out_of_mermaid_and_dot() -> None:
    name = 'a"]; x\\<b>'
    graph = Graph({name: Node(name, "relation", group='g"')})
    assert 'n1[("a#quot;]; x\\#lt;b#gt;")]' in "\n".join(mermaid(graph))
    assert '"a\\"]; x\\\\<b>" [shape=cylinder];' in "\n".join(dot(graph))


def test_json(run: Run) -> None:
    document = json.loads(run("--file", "--json"))
    assert document == json.loads(run("--file", "--format", "json"))
    assert document["nodes"][0] == {
        "name": "silver.customers", "kind": "procedure", "type": "dimension", "group": "crm", "pipeline": "bronze_to_silver",
    }  # fmt: skip
    assert {"from": "silver.orders", "to": "mart.sales", "kind": "refreshes"} in document["edges"]


@pytest.mark.parametrize(
    ("words", "names"),
    [
        (["silver.orders"], {"silver.customers", "silver.orders", "silver.totals", "mart.sales"}),
        (["silver.orders", "--upstream"], {"silver.customers", "silver.orders"}),
        (["silver.orders", "--downstream"], {"silver.orders", "silver.totals", "mart.sales"}),
        (["silver.alone"], {"silver.alone"}),
    ],
)
def test_a_part_of_it(run: Run, words: list[str], names: set[str]) -> None:
    document = json.loads(run("--file", "--json", *words))
    assert {one["name"] for one in document["nodes"]} == names
    assert {end for one in document["edges"] for end in (one["from"], one["to"])} <= names


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["silver.order"], "there is no silver.order in the graph\nhint: did you mean silver.orders"),
        (["--upstream"], "--upstream and --downstream need a name"),
        (["--tables"], "--tables is known by the database only"),
    ],
)
def test_what_cannot_be_drawn(run: Run, words: list[str], message: str) -> None:
    assert message in run("--file", *words, code=2)


def test_the_database_shows_the_tables_too(db: Database, capsys: pytest.CaptureFixture[str]) -> None:
    def graph(*words: str) -> Any:
        capsys.readouterr()
        assert main(["--dsn", db.dsn, "graph", "--json", *words]) == 0
        return json.loads(capsys.readouterr().out)

    with Pipeline(db) as pipeline:
        pipeline.sql("create table bronze.orders (id int); create table silver.orders (id int)")
        pipeline.add("silver.orders", routine="silver.load")
        pipeline.routine("load", "insert into silver.orders select * from bronze.orders")
        assert graph() == {"nodes": [], "edges": []}
        pipeline.apply()
        pipeline.start()
        assert [one["name"] for one in graph()["nodes"]] == ["silver.orders"]
        edges = {(one["from"], one["to"], one["kind"]) for one in graph("--tables")["edges"]}
        assert edges == {
            ("bronze.orders", "silver.orders", "reads"),
            ("silver.orders", "table silver.orders", "writes"),
        }
