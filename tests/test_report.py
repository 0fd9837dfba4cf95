"""b2s report: true to the tables, whole without a server, harmless whatever names and messages hold."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from b2s.cli import main
from b2s.report.data import read
from b2s.report.graph import Node, draw, outcomes
from b2s.report.html import Html, join, tag
from b2s.report.page import render
from b2s.report.timeline import Bar, critical_path
from b2s.report.trends import trend_of
from tests.pipelines import Gate, Pipeline, Row
from tests.reports import NASTY, synthetic
from tests.servers import Database


@pytest.fixture
def pipeline(db: Database) -> Iterator[Pipeline]:
    with Pipeline(db) as pipeline:
        yield pipeline


class Page(HTMLParser):
    """What a page holds: elements with their attributes, and the text of each element that has an id."""

    VOID = frozenset({"meta", "link", "br", "col", "input"})

    def __init__(self, html: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text: dict[str, str] = {}
        self._open: list[tuple[str, str | None]] = []
        self.feed(html)
        self.close()
        assert self._open == [], "every element is closed"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        self.elements.append((tag, given))
        if tag not in self.VOID:
            self._open.append((tag, given.get("id")))

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop()[0] == tag

    def handle_data(self, data: str) -> None:
        for _, name in self._open:
            if name:
                self.text[name] = self.text.get(name, "") + data

    def all(self, name: str) -> list[dict[str, str | None]]:
        return [given for kind, given in self.elements if kind == name]


def page_of(pipeline: Pipeline, **what: Any) -> Page:
    return Page(render(read(pipeline.conn, **{"run_id": None, "since": None, "pipeline": None, **what})))


def history(pipeline: Pipeline) -> None:
    """Six good runs, then one in which `b` fails, `c` is skipped and `a` is slow."""
    pipeline.conn.execute("create schema mart authorization etl_owner")
    pipeline.sql("create table silver.pace (seconds float); create materialized view mart.v as select 1")
    view: Row = {"name": "mart.v", "after": "run", "on": "success", "concurrently": False}
    pipeline.add("silver.a", "perform pg_sleep(seconds) from silver.pace", routine="silver.a", freshness_ms=1)
    pipeline.add("silver.b", routine="silver.b", dependencies=["silver.a"], freshness_ms=86_400_000)
    pipeline.add("silver.c", routine="silver.c", dependencies=["silver.b"], mv_refresh=[view])
    pipeline.routine("a", "perform pg_sleep(seconds) from silver.pace")
    for name in "bc":
        pipeline.routine(name, f"insert into silver.trace (step) values ('{name}')")
    pipeline.apply()
    for _ in range(6):
        pipeline.start()
    pipeline.sql("insert into silver.pace values (0.3)")
    pipeline.routine(
        "b",
        "perform etl.log('error', 'it is <i>bad</i>');"
        " raise exception 'a <b>bold</b> failure' using hint = 'try & see'",
    )
    pipeline.start()


# -- what it tells --


def test_a_report_of_a_run_tells_what_failed_and_what_it_took_along(pipeline: Pipeline) -> None:
    history(pipeline)
    page = page_of(pipeline)
    assert "a <b>bold</b> failure" in page.text["failures"]
    assert "try & see" in page.text["failures"]
    assert "silver.b() line 1" in page.text["failures"]
    assert re.search(r"Skipped because of it\s*silver\.c", page.text["failures"])
    assert "b2s resume 7" in page.text["failures"]
    assert "it is <i>bad</i>" in page.text["logs"]
    nodes = {
        given["href"]: given["class"]
        for given in page.all("a")
        if str(given.get("class", "")).startswith("node")
    }
    rows = {
        row["procedure"]: f"#p-{row['procedure_id']}"
        for row in pipeline.rows("select name as procedure, procedure_id from etl.procedures")
    }
    assert nodes == {
        rows["silver.a"]: "node s-succeeded",
        rows["silver.b"]: "node s-failed",
        rows["silver.c"]: "node s-upstream_failed",
    }


def test_a_step_that_is_slower_than_usual_is_flagged_against_the_median(pipeline: Pipeline) -> None:
    history(pipeline)
    report = read(pipeline.conn, run_id=7, since=None, pipeline=None)
    by_name = {one["procedure"]: trend_of(report.trends[one["procedure_id"]]) for one in report.procedures}
    slow = by_name["silver.a"]
    durations = sorted(
        pipeline.column(
            "select duration_ms::float8 from etl.procedure_runs"
            " where procedure_name = 'silver.a' and run_id < 7"
        )
    )
    assert slow.usual_ms == pytest.approx((durations[2] + durations[3]) / 2)
    assert slow.is_slow
    assert not by_name["silver.b"].is_slow, "it did not succeed, and what came before was as usual"
    assert "slower" in page_of(pipeline).text["procedures"]


def test_late_procedures_and_watermark_lags_are_in_the_table(pipeline: Pipeline) -> None:
    history(pipeline)
    text = page_of(pipeline).text["freshness"]
    assert re.search(r"silver\.a\s*late", text)
    assert re.search(r"silver\.b\s*fresh", text)


def test_views_that_were_not_refreshed_are_told(pipeline: Pipeline) -> None:
    history(pipeline)
    assert re.search(r"mart\.v\s*upstream failed", page_of(pipeline).text["views"])
    assert re.search(r"mart\.v\s*succeeded", page_of(pipeline, run_id=6).text["views"])


def test_a_report_of_a_period_counts_its_runs(pipeline: Pipeline) -> None:
    history(pipeline)
    page = page_of(pipeline, since="1 hour")
    assert [given["id"] for given in page.all("section")] == [
        "failures", "graph", "timeline", "procedures", "freshness", "views", "logs", "runs",
    ]  # fmt: skip
    report = read(pipeline.conn, run_id=None, since="1 hour", pipeline=None)
    assert (report.run_count, len(report.runs), report.failures[0]["count"]) == (7, 7, 1)
    later = page_of(pipeline, since="2100-01-01")
    assert "Nothing failed." in later.text["failures"]


def test_runs_before_the_period_and_of_other_pipelines_do_not_count(pipeline: Pipeline) -> None:
    history(pipeline)
    with Pipeline(pipeline.db, "other") as other:
        other.add("x")
        other.apply()
        other.start(pipeline="other")
        assert read(pipeline.conn, run_id=None, since=None, pipeline=None).pipeline == "other"
    moment = pipeline.run(6)["started_at"].isoformat()
    report = read(pipeline.conn, run_id=None, since=moment, pipeline="bronze_to_silver")
    assert (report.run_count, [run["run_id"] for run in report.runs]) == (2, [7, 6])
    tallied = sum(
        tally["succeeded"]
        for key, tally in report.tallies.items()
        if key in {p["procedure_id"] for p in report.procedures}
    )
    assert tallied == 4


def test_a_run_that_goes_on_has_a_report_too(pipeline: Pipeline) -> None:
    pipeline.add("a")
    pipeline.add("b", Gate.WAIT, dependencies=["a"])
    pipeline.apply()
    with pipeline.gate() as gate:
        running = pipeline.start_in_background()
        gate.wait_for_arrivals()
        page = page_of(pipeline)
        assert any("s-running" in str(given.get("class")) for given in page.all("g"))
    running.result()


def test_slices_and_retries_are_one_row_of_the_timeline(pipeline: Pipeline) -> None:
    pipeline.sql("create sequence silver.tries")
    pipeline.add("a", "if nextval('silver.tries') < 3 then raise sqlstate '40001'; end if")
    pipeline.apply()
    pipeline.start()
    page = page_of(pipeline)
    bars = [given["class"] for given in page.all("g")]
    assert sorted(str(bar).replace(" critical", "") for bar in bars) == [
        "bar s-retrying",
        "bar s-retrying",
        "bar s-succeeded",
    ]
    assert len([given for given in page.all("text") if given.get("class") == "label"]) == 1


def test_a_reader_may_make_a_report(pipeline: Pipeline) -> None:
    history(pipeline)
    reader = pipeline.login("etl_reader")
    report = read(reader, run_id=None, since="1 day", pipeline=None)
    assert report.run_count == 7
    assert "silver.c" in render(report)


def test_parameters_and_statements_are_left_out(pipeline: Pipeline) -> None:
    pipeline.add(
        "a", "raise exception 'no'", arguments="token text", params=[{"name": "token", "type": "string"}]
    )
    pipeline.apply()
    pipeline.start(params={"a": {"token": "s3cret"}})
    assert "s3cret" not in render(read(pipeline.conn, run_id=None, since=None, pipeline=None))


# -- what it is made of --


@pytest.mark.parametrize("since", [None, "2026-11-28"])
@pytest.mark.parametrize("count", [1, 5, 500])
def test_nothing_that_is_told_becomes_markup(count: int, since: str | None) -> None:
    html = render(synthetic(count, since=since))
    page = Page(html)
    assert len(page.all("script")) == 1
    assert page.all("img") == []
    assert not [name for _, given in page.elements for name in given if name.startswith("on")]
    assert "\x1b" not in html
    assert NASTY[:40] in page.text["failures"].replace("\ufffd", "\x1b")


@pytest.mark.parametrize("count", [1, 5, 500])
def test_the_page_needs_nothing_from_anywhere_and_every_link_leads_somewhere(count: int) -> None:
    html = render(synthetic(count))
    page = Page(html)
    ids = [given["id"] for _, given in page.elements if "id" in given]
    assert len(ids) == len(set(ids))
    links = {given["href"] for given in page.all("a")}
    assert links <= {f"#{name}" for name in ids}
    assert {given.get("src") for _, given in page.elements} == {None}
    assert not re.search(r"https?://|url\(|@import", html)
    (policy,) = [given["content"] for given in page.all("meta") if given.get("http-equiv")]
    assert policy is not None
    assert policy.startswith("default-src 'none'")


def test_the_same_data_give_the_same_page() -> None:
    assert render(synthetic(50)) == render(synthetic(50))


def test_text_is_escaped_and_markup_is_not() -> None:
    assert tag("p", "<&", Html("<i>x</i>"), None, title='"<') == '<p title="&quot;&lt;">&lt;&amp;<i>x</i></p>'
    assert tag("td", 0, False, hidden=True, data_value=None) == "<td hidden>0</td>"
    assert join(["a\x07", 1]) == "a\ufffd1"
    assert tag("rect", x=1, class_="a") == '<rect x="1" class="a"/>'


def test_a_node_stands_right_of_all_it_needs() -> None:
    nodes = [
        Node("c", "succeeded", ("a", "b", "gone"), "c"),
        Node("b", "succeeded", ("a",), "b"),
        Node("a", "failed", (), "a"),
    ]
    boxes = {given["x"]: None for given in Page(str(draw(nodes))).all("rect") if given["class"] == "box"}
    assert len(boxes) == 3
    assert outcomes(nodes) == [("failed", 1, "na"), ("succeeded", 2, "nc")]


def test_a_very_deep_graph_is_drawn() -> None:
    nodes = [Node(str(n), "succeeded", (str(n - 1),) if n else (), str(n)) for n in range(3000)]
    assert draw(nodes).count('class="box"') == 3000


def bar(name: str, begin: float, end: float, *needs: str) -> Bar:
    return Bar(name, 1, "succeeded", begin, end, 1, needs)


def test_the_critical_path_is_the_chain_that_determined_the_end() -> None:
    bars = [
        bar("a", 0, 5),
        bar("b", 0, 1),
        bar("c", 1.001, 3, "b"),
        bar("d", 5.001, 6, "a"),
        bar("e", 5.2, 9, "a", "c"),
    ]
    assert [one.name for one in critical_path(bars)] == ["a", "e"]
    assert critical_path([]) == []
    waiting = [bar("a", 0, 5), bar("x", 0, 5.0004), bar("b", 5.001, 6, "a")]
    assert [one.name for one in critical_path(waiting)] == ["a", "b"], (
        "what was needed counts, not what ended by chance"
    )


def outcome(ms: float, rows: int = 10, status: str = "succeeded", mode: str = "incremental") -> Row:
    return {"duration_ms": ms, "rows_affected": rows, "status": status, "mode": mode}


@pytest.mark.parametrize(
    ("outcomes", "is_slow", "is_empty"),
    [
        ([outcome(1000)] * 5 + [outcome(1600)], True, False),
        ([outcome(1000)] * 5 + [outcome(1400)], False, False),
        ([outcome(1000)] * 4 + [outcome(9000)], False, False),
        ([outcome(10)] * 9 + [outcome(90)], False, False),
        ([outcome(ms) for ms in (500, 1500, 400, 1600, 1000, 1000)] + [outcome(2400)], False, False),
        ([outcome(1000)] * 5 + [outcome(1000, 0)], False, True),
        ([outcome(1000, rows) for rows in (5, 0, 5, 5, 5)] + [outcome(1000, 0)], False, False),
        ([outcome(1000)] * 5 + [outcome(9000, mode="full")], False, False),
        ([outcome(1000)] * 6 + [outcome(50, status="failed")], False, False),
        ([], False, False),
    ],
)
def test_what_is_slower_or_emptier_than_usual(outcomes: list[Row], is_slow: bool, is_empty: bool) -> None:
    trend = trend_of(outcomes)
    assert (trend.is_slow, trend.is_empty) == (is_slow, is_empty)


# -- the command --


def test_the_command_writes_a_file_and_prints_its_name(
    pipeline: Pipeline, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pipeline.add("a")
    pipeline.apply()
    pipeline.start()
    monkeypatch.chdir(tmp_path)
    assert main(["report", "--dsn", pipeline.db.dsn]) == 0
    assert capsys.readouterr().out == "b2s-report.html\n"
    assert "<!doctype html>" in (tmp_path / "b2s-report.html").read_text(encoding="utf-8")
    assert main(["report", "1", "-o", "-", "--dsn", pipeline.db.dsn]) == 0
    assert capsys.readouterr().out.endswith("</html>\n")


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        ([], 2, "there is no run yet"),
        (["latest"], 2, "there is no run yet"),
        (["7"], 2, "there is no run 7"),
        (["x"], 2, "is not the number of a run"),
        (["7", "--since", "1 day"], 2, "a report is about a run or a period"),
        (["--pipeline", "nope"], 2, "there is no run of a pipeline nope"),
    ],
)
def test_what_cannot_be_reported_is_said(
    pipeline: Pipeline, words: list[str], code: int, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["report", *words, "--dsn", pipeline.db.dsn]) == code
    assert said in capsys.readouterr().err


def test_a_bad_time_a_backfill_and_a_queued_run_are_named(
    pipeline: Pipeline, capsys: pytest.CaptureFixture[str]
) -> None:
    pipeline.sql("create table bronze.t (id bigint); insert into bronze.t values (1)")
    pipeline.add("a", arguments="p_since bigint, p_until bigint",
                 watermark={"strategy": "id", "source": ["bronze.t.id"], "state_key": "a"})  # fmt: skip
    pipeline.apply()
    pipeline.conn.execute("call etl.backfill(procedures => '{a}', from_ => '1', until => '11', chunk => '5')")
    queued = pipeline.value("select run_id from etl.submit_run()")
    for words, said in ((["1"], "is a backfill"), ([str(queued)], "has not begun")):
        assert main(["report", *words, "--dsn", pipeline.db.dsn]) == 2
        assert said in capsys.readouterr().err
    pipeline.start()
    assert main(["report", "--since", "soon", "--dsn", pipeline.db.dsn, "--json"]) == 2
    assert "write a time as" in json.loads(capsys.readouterr().out)["error"]["hint"]


def test_a_file_that_cannot_be_written_is_named(
    pipeline: Pipeline, capsys: pytest.CaptureFixture[str]
) -> None:
    pipeline.add("a")
    pipeline.apply()
    pipeline.start()
    assert main(["report", "-o", "/no/such/place.html", "--dsn", pipeline.db.dsn]) == 2
    assert "/no/such/place.html" in capsys.readouterr().err
