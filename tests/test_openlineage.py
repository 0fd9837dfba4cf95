"""`b2s lineage --openlineage`: events that the official client accepts, sent once and again, to files and over HTTP."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any, Final
from uuid import UUID

import pytest

pytest.importorskip("openlineage.client.event_v2", reason="openlineage-python is not installed")

from openlineage.client import event_v2, facet_v2
from openlineage.client.naming.dataset import Postgres
from openlineage.client.serde import Serde
from openlineage.client.uuid import generate_static_uuid

from b2s.errors import UsageError
from b2s.lineage.openlineage import static_uuid
from b2s.lineage.sinks import DeliveryError, HttpSink
from tests.pipelines import Pipeline
from tests.servers import Database
from tests.shell import Shell

Json = dict[str, Any]

FACETS: Final = {
    "parent": facet_v2.parent_run.ParentRunFacet,
    "processing_engine": facet_v2.processing_engine_run.ProcessingEngineRunFacet,
    "errorMessage": facet_v2.error_message_run.ErrorMessageRunFacet,
    "nominalTime": facet_v2.nominal_time_run.NominalTimeRunFacet,
    "jobType": facet_v2.job_type_job.JobTypeJobFacet,
    "sql": facet_v2.sql_job.SQLJobFacet,
    "documentation": facet_v2.documentation_job.DocumentationJobFacet,
    "schema": facet_v2.schema_dataset.SchemaDatasetFacet,
    "columnLineage": facet_v2.column_lineage_dataset.ColumnLineageDatasetFacet,
    "outputStatistics": facet_v2.output_statistics_output_dataset.OutputStatisticsOutputDatasetFacet,
}
OURS: Final = {"b2s_run", "b2s_step"}


def facet_of(name: str, given: Json) -> Any:
    """A facet as the client has it: an unknown or a missing field raises."""
    fields = {key: value for key, value in given.items() if not key.startswith("_")}
    if name in OURS:
        made = facet_v2.RunFacet(producer=given["_producer"])
        return made.with_additional_properties(**fields)
    if name == "parent":
        fields = {
            "run": facet_v2.parent_run.Run(**fields["run"]),
            "job": facet_v2.parent_run.Job(**fields["job"]),
        }
    elif name == "schema":
        fields = {
            "fields": [facet_v2.schema_dataset.SchemaDatasetFacetFields(**one) for one in fields["fields"]]
        }
    elif name == "columnLineage":
        lineage = facet_v2.column_lineage_dataset
        fields = {"fields": {
            column: lineage.Fields(inputFields=[lineage.InputField(**one) for one in value["inputFields"]])
            for column, value in fields["fields"].items()
        }}  # fmt: skip
    made = FACETS[name](**fields, producer=given["_producer"])
    assert made._schemaURL == given["_schemaURL"], "the version of the facet is not the client's"
    return made


def facets_of(given: Json) -> dict[str, Any]:
    return {name: facet_of(name, one) for name, one in given.items()}


def dataset_of(kind: Any, given: Json) -> Any:
    more = {"outputFacets": facets_of(given["outputFacets"])} if "outputFacets" in given else {}
    return kind(given["namespace"], given["name"], facets=facets_of(given["facets"]), **more)


def accepted(event: Json) -> Any:
    """The event as the official client has it. It says what we say: nothing is lost on the way."""
    made = event_v2.RunEvent(
        eventTime=event["eventTime"],
        eventType=event_v2.RunState(event["eventType"]),
        producer=event["producer"],
        run=event_v2.Run(event["run"]["runId"], facets=facets_of(event["run"]["facets"])),
        job=event_v2.Job(
            event["job"]["namespace"], event["job"]["name"], facets=facets_of(event["job"]["facets"])
        ),
        inputs=[dataset_of(event_v2.InputDataset, one) for one in event["inputs"]],
        outputs=[dataset_of(event_v2.OutputDataset, one) for one in event["outputs"]],
    )
    assert made.schemaURL == event["schemaURL"]
    assert without_nothing(Serde.to_dict(made)) == without_nothing(event)
    return made


def without_nothing(value: Any) -> Any:
    """A document without empty objects and lists, which the client leaves out, and without schemas of ours."""
    if isinstance(value, dict):
        found = {key: without_nothing(one) for key, one in value.items()}
        if set(value) >= {"_producer", "run_id"}:
            found.pop("_schemaURL")
        return {key: one for key, one in found.items() if one not in ({}, [], None)}
    return [without_nothing(one) for one in value] if isinstance(value, list) else value


@pytest.fixture
def pipeline(db: Database) -> Iterator[Pipeline]:
    """A dimension, a fact with a watermark and a materialized view; what they do is in two tables."""
    with Pipeline(db) as made:
        made.sql("""
            create table bronze.orders (id bigint primary key, amount numeric, at timestamptz not null default now() - interval '1 hour');
            insert into bronze.orders values (1, 10), (2, 20);
            create table silver.orders (id bigint primary key, amount numeric);
            comment on column silver.orders.amount is 'In euros.';
            create materialized view silver.mv as select amount from silver.orders;
        """)
        made.add(
            "orders",
            "insert into silver.orders as o (id, amount) select b.id, b.amount from bronze.orders b"
            " where (p_since is null or b.at >= p_since) and b.at < p_until"
            " on conflict (id) do update set amount = excluded.amount",
            arguments="p_since timestamptz, p_until timestamptz",
            description="What was sold.",
            watermark={"strategy": "timestamp", "source": ["bronze.orders.at"], "state_key": "orders", "delay_ms": 0, "on_empty": "run"},
            mv_refresh=[{"name": "silver.mv", "after": "run", "on": "success", "concurrently": "auto"}],
        )  # fmt: skip
        made.apply()
        yield made


@dataclass
class Cli:
    """`b2s lineage`, and the events that it prints."""

    shell: Shell
    err: str = ""

    def __call__(self, *words: str, code: int = 0) -> str:
        done = self.shell.result("lineage", *words)
        self.err = done.err
        assert done.code == code, done.err
        return done.out

    def events(self, *words: str) -> list[Json]:
        """The events sent, each of which the client accepts."""
        events = [json.loads(line) for line in self("--openlineage", "-", *words).splitlines()]
        for event in events:
            accepted(event)
        return events


@pytest.fixture
def cli(shell: Shell) -> Cli:
    return Cli(shell)


def kinds(events: list[Json]) -> list[tuple[str, str]]:
    return [(one["eventType"], one["job"]["name"].split(".", 1)[1]) for one in events]


# -- what is said --


def test_a_run_its_steps_and_its_refreshes_start_and_complete_in_order(pipeline: Pipeline, cli: Cli) -> None:
    pipeline.start()
    cli("--scan")
    events = cli.events()
    assert kinds(events) == [
        ("START", "bronze_to_silver"),
        ("START", "bronze_to_silver.orders"),
        ("COMPLETE", "bronze_to_silver.orders"),
        ("START", "bronze_to_silver.silver.mv"),
        ("COMPLETE", "bronze_to_silver.silver.mv"),
        ("COMPLETE", "bronze_to_silver"),
    ]
    assert [one["eventTime"] for one in events] == sorted(one["eventTime"] for one in events)
    parents = {one["run"]["facets"].get("parent", {}).get("run", {}).get("runId") for one in events}
    assert parents == {None, events[0]["run"]["runId"]}


def test_a_step_says_what_it_read_and_wrote_how_many_rows_and_from_which_columns(
    pipeline: Pipeline, cli: Cli
) -> None:
    pipeline.start()
    cli("--scan")
    step = cli.events()[2]
    (read,), (written,) = step["inputs"], step["outputs"]
    name = pipeline.db.name
    assert read["name"] == f"{name}.bronze.orders"
    assert written["name"] == f"{name}.silver.orders"
    assert written["outputFacets"]["outputStatistics"]["rowCount"] == 2
    assert written["facets"]["schema"]["fields"] == [
        {"name": "id", "type": "bigint", "ordinal_position": 1},
        {"name": "amount", "type": "numeric", "ordinal_position": 2, "description": "In euros."},
    ]
    derived = written["facets"]["columnLineage"]["fields"]
    assert {column: [one["field"] for one in value["inputFields"]] for column, value in derived.items()} == {
        "id": ["id"], "amount": ["amount"],
    }  # fmt: skip
    assert step["job"]["facets"]["jobType"]["jobType"] == "PROCEDURE"
    assert step["job"]["facets"]["documentation"]["description"] == "What was sold."
    assert "silver.orders(p_since => " in step["job"]["facets"]["sql"]["query"]
    view = cli.events()[4]
    assert [one["name"] for one in view["inputs"]] == [f"{name}.silver.orders"]
    assert [one["name"] for one in view["outputs"]] == [f"{name}.silver.mv"]


def test_the_window_of_a_timestamp_step_is_its_nominal_time(pipeline: Pipeline, cli: Cli) -> None:
    pipeline.start()
    assert "nominalTime" not in cli.events()[1]["run"]["facets"], "the first window has no beginning"
    pipeline.start()
    assert "nominalTime" in cli.events()[1]["run"]["facets"]


def test_a_failure_says_why_and_a_retry_is_a_run_of_its_own(pipeline: Pipeline, cli: Cli) -> None:
    pipeline.add("breaks", "raise exception using errcode = '40001', message = 'again', hint = 'wait'")
    pipeline.add("after", dependencies=["breaks"])
    pipeline.apply()
    pipeline.start()
    events = cli.events()
    failed = [one for one in events if one["job"]["name"].endswith(".breaks")]
    assert kinds(failed) == [(kind, "bronze_to_silver.breaks") for kind in ("START", "FAIL") * 3]
    assert len({one["run"]["runId"] for one in failed}) == 3
    message = failed[-1]["run"]["facets"]["errorMessage"]
    assert message["message"] == "again"
    assert message["stackTrace"].splitlines()[:2] == ["40001", "wait"]
    assert not [one for one in events if one["job"]["name"].endswith(".after")], "what was skipped never ran"
    assert events[-1]["eventType"] == "FAIL"
    assert "errorMessage" in events[-1]["run"]["facets"]


def test_a_group_that_was_rolled_back_is_aborted(pipeline: Pipeline, cli: Cli) -> None:
    pipeline.add("first", group="g", transaction_scope="per_group")
    pipeline.add("second", "raise 'no'", group="g", transaction_scope="per_group", dependencies=["first"])
    pipeline.apply()
    pipeline.start(groups=["g"])
    ends = {name: kind for kind, name in kinds(cli.events()) if kind != "START"}
    assert ends["bronze_to_silver.first"] == "ABORT"
    assert ends["bronze_to_silver.second"] == "FAIL"


def test_an_active_run_says_what_has_happened_so_far(pipeline: Pipeline, cli: Cli) -> None:
    pipeline.add("waits", "perform pg_advisory_xact_lock_shared(4242)", dependencies=["orders"])
    pipeline.apply()
    with pipeline.gate() as gate:
        running = pipeline.start_in_background()
        gate.wait_for_arrivals()
        assert kinds(cli.events())[-1] == ("START", "bronze_to_silver.waits")
        assert cli("--openlineage", "-", "--cursor", "c") == "", "a cursor sends what has ended"
        gate.open()
        running.result()
    assert kinds(cli.events("--cursor", "c"))[-1] == ("COMPLETE", "bronze_to_silver")


def test_rows_of_partitions_count_for_their_table(pipeline: Pipeline, cli: Cli) -> None:
    pipeline.sql("""
        create table silver.parts (id bigint) partition by range (id);
        create table silver.parts_1 partition of silver.parts for values from (0) to (2);
        create table silver.parts_2 partition of silver.parts for values from (2) to (9);
    """)
    pipeline.add("parts", "insert into silver.parts select id from bronze.orders")
    pipeline.apply()
    pipeline.start(procedures=["parts"])
    (written,) = cli.events()[2]["outputs"]
    assert written["name"].endswith(".silver.parts")
    assert written["outputFacets"]["outputStatistics"]["rowCount"] == 2


def test_names_are_those_of_the_official_naming(pipeline: Pipeline, cli: Cli) -> None:
    pipeline.start()
    dataset = cli.events()[1]["outputs"][0]
    official = Postgres("localhost", "5432", pipeline.db.name, "silver", "orders")
    assert (dataset["namespace"], dataset["name"]) == (official.get_namespace(), official.get_name())
    event = cli.events("--namespace", "postgres://db:1", "--job-namespace", "shop")[1]
    assert (event["job"]["namespace"], event["inputs"][0]["namespace"]) == ("shop", "postgres://db:1")


def test_ids_are_those_a_run_had_before_and_no_two_are_the_same(pipeline: Pipeline, cli: Cli) -> None:
    pipeline.start()
    pipeline.start()
    first, again, other = cli.events("--run", "1"), cli.events("--run", "1"), cli.events("--run", "2")
    ids = [one["run"]["runId"] for one in first]
    assert ids == [one["run"]["runId"] for one in again]
    assert not set(ids) & {one["run"]["runId"] for one in other}
    assert {UUID(one).version for one in ids} == {7}


def test_an_id_has_the_form_of_the_official_static_uuid() -> None:
    from datetime import UTC, datetime

    instant = datetime(2026, 11, 21, 7, 58, 4, 123456, tzinfo=UTC)
    ours, official = UUID(static_uuid(instant, "x")), generate_static_uuid(instant, b"x")
    assert (ours.version, ours.variant, ours.int >> 80) == (
        official.version,
        official.variant,
        official.int >> 80,
    )


# -- which runs --


def test_since_and_run_choose(pipeline: Pipeline, cli: Cli) -> None:
    pipeline.start()
    middle = pipeline.value("select clock_timestamp()::text")
    pipeline.start()
    assert len(cli.events("--since", middle)) == 6
    assert len(cli.events("--since", "2020-01-01")) == 12
    assert cli.events("--run", "latest") == cli.events("--run", "2")


def test_a_cursor_sends_each_run_once(pipeline: Pipeline, cli: Cli, tmp_path: Path) -> None:
    target = str(tmp_path / "events.jsonl")
    pipeline.start()
    cli("--openlineage", target, "--cursor", "x")
    assert cli.err == "6 events of 1 run sent\n"
    cli("--openlineage", target, "--cursor", "x")
    assert cli.err == "0 events of 0 runs sent\n"
    pipeline.start()
    cli("--openlineage", target, "--cursor", "x")
    assert len(Path(target).read_text(encoding="utf-8").splitlines()) == 12
    cli("--openlineage", target, "--cursor", "other")
    assert cli.err == "12 events of 2 runs sent\n"


def test_a_new_cursor_may_begin_at_a_time(pipeline: Pipeline, cli: Cli) -> None:
    pipeline.start()
    middle = pipeline.value("select clock_timestamp()::text")
    pipeline.start()
    assert len(cli.events("--cursor", "x", "--since", middle)) == 6
    assert cli.events("--cursor", "x", "--since", middle) == []
    assert pipeline.value("select floor_run_id from etl.lineage_cursors") == 1


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--run", "1"], "--run says which runs to send"),
        (["--openlineage"], "--openlineage needs a target"),
        (["--openlineage", "-", "--run", "1", "--since", "2020-01-01"], "--run names one run"),
        (["--openlineage", "ftp://x/y"], "the OpenLineage endpoint is no URL"),
        (["--openlineage", "http://"], "the OpenLineage endpoint is no URL"),
        (["--openlineage", "-", "--timeout", "0"], "--timeout must be longer"),
        (["--openlineage", "-", "--run", "soon"], "'soon' is not the number of a run"),
        (["--openlineage", "/no/such/folder/x.jsonl"], "/no/such/folder/x.jsonl cannot be written"),
    ],
)
def test_what_cannot_be_meant_is_said(pipeline: Pipeline, cli: Cli, words: list[str], message: str) -> None:
    pipeline.start()
    cli(*words, code=2)
    assert message in cli.err


def test_an_unknown_run_is_said(pipeline: Pipeline, cli: Cli) -> None:
    cli("--openlineage", "-", "--run", "99", code=3)
    assert "there is no run 99" in cli.err


# -- over HTTP --


@dataclass
class Endpoint:
    """An HTTP server that answers as it is told, and remembers what it got."""

    answers: list[tuple[int, dict[str, str], str]] = field(default_factory=list)
    received: list[tuple[str, dict[str, str], Json]] = field(default_factory=list)
    url: str = ""


@pytest.fixture
def endpoint() -> Iterator[Endpoint]:
    made = Endpoint()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            made.received.append((self.path, dict(self.headers), json.loads(body)))
            code, headers, text = made.answers.pop(0) if made.answers else (201, {}, "")
            self.send_response(code)
            for name, value in {"Content-Length": str(len(text.encode())), **headers}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(text.encode())

        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: Any) -> None:
            """Quiet."""

    server = HTTPServer(("127.0.0.1", 0), Handler)
    made.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield made
    server.shutdown()
    server.server_close()
    thread.join()


def sink(endpoint: Endpoint, url: str = "", api_key: str | None = None) -> tuple[HttpSink, list[float]]:
    """A sink that does not wait; and how long it would have waited."""
    pauses: list[float] = []
    return HttpSink(url or endpoint.url, api_key, timeout=5, pause=pauses.append), pauses


def test_events_are_posted_to_the_usual_path_with_the_key(
    pipeline: Pipeline, cli: Cli, endpoint: Endpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("B2S_OPENLINEAGE_API_KEY", "sesame-open")
    pipeline.start()
    out = cli("--openlineage", endpoint.url, "--json")
    assert json.loads(out) == {"runs": [1], "events": 6}
    path, headers, event = endpoint.received[0]
    assert (path, headers["Authorization"]) == ("/api/v1/lineage", "Bearer sesame-open")
    assert headers["Content-Type"] == "application/json"
    accepted(event)


def test_a_path_and_a_user_of_the_url_are_used(endpoint: Endpoint) -> None:
    url = endpoint.url.replace("http://", "http://ada:lov%40lace@") + "/own/path?team=data"
    assert sink(endpoint, url)[0].send([{"a": 1}]) == 1
    path, headers, _ = endpoint.received[0]
    assert (path, headers["Authorization"]) == ("/own/path?team=data", "Basic YWRhOmxvdkBsYWNl")


@pytest.mark.parametrize("code", [429, 500, 503])
def test_a_passing_error_is_tried_again_with_growing_pauses(endpoint: Endpoint, code: int) -> None:
    endpoint.answers = [(code, {}, ""), (code, {}, ""), (201, {}, "")]
    made, pauses = sink(endpoint)
    assert made.send([{"a": 1}]) == 1
    assert pauses == [0.5, 1.0]
    assert [body for *_, body in endpoint.received] == [{"a": 1}] * 3


def test_the_endpoint_may_say_how_long_to_wait_within_bounds(endpoint: Endpoint) -> None:
    endpoint.answers = [(503, {"Retry-After": "7"}, ""), (503, {"Retry-After": "9999"}, "")]
    made, pauses = sink(endpoint)
    made.send([{"a": 1}])
    assert pauses == [7.0, 30.0]


@pytest.mark.parametrize("code", [400, 401, 404, 422])
def test_a_refusal_is_final_and_says_what_the_endpoint_said(endpoint: Endpoint, code: int) -> None:
    endpoint.answers = [(201, {}, ""), (code, {}, '{"error": "no\n such thing"}')]
    made, pauses = sink(endpoint)
    with pytest.raises(DeliveryError) as caught:
        made.send([{"a": 1}, {"a": 2}, {"a": 3}])
    assert str(caught.value) == f'{endpoint.url}/api/v1/lineage answered {code}: {{"error": "no such thing"}}'
    assert pauses == []
    assert len(endpoint.received) == 2


def test_a_redirect_is_not_followed_because_it_would_lose_the_event(endpoint: Endpoint) -> None:
    endpoint.answers = [(302, {"Location": f"{endpoint.url}/elsewhere"}, "")]
    with pytest.raises(DeliveryError, match="answered 302"):
        sink(endpoint)[0].send([{"a": 1}])


def test_no_secret_is_in_an_error(endpoint: Endpoint) -> None:
    def message(url: str, key: str | None, text: str) -> str:
        endpoint.answers = [(403, {}, text)]
        with pytest.raises(DeliveryError) as caught:
            sink(endpoint, url, key)[0].send([{}])
        return str(caught.value)

    place = endpoint.url.removeprefix("http://")
    shown = [
        message(endpoint.url, "hunter22", "you sent Bearer hunter22, which is no key"),
        message(f"http://me:hunter22@{place}/x?key=hunter22", None, "hunter22 is wrong"),
        message(endpoint.url, "hunter22", "x" * 196 + "hunter22"),
    ]
    assert [one for one in shown if "hunter" in one] == []


def test_an_endpoint_that_is_not_there_is_an_error_with_exit_code_3(
    pipeline: Pipeline, cli: Cli, endpoint: Endpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("b2s.lineage.sinks.time.sleep", lambda _: None)
    pipeline.start()
    endpoint.answers = [(201, {}, ""), *[(500, {}, "down")] * 4]
    cli("--openlineage", endpoint.url, "--cursor", "x", code=3)
    assert f"{endpoint.url}/api/v1/lineage answered 500: down (4 attempts)" in cli.err
    cli("--openlineage", endpoint.url, "--cursor", "x")
    assert cli.err == "6 events of 1 run sent\n", "the run was not noted as sent, so all of it is sent again"


def test_an_endpoint_that_does_not_answer_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    import socket

    with socket.create_server(("127.0.0.1", 0)) as silent:
        port = silent.getsockname()[1]
        made = HttpSink(f"http://127.0.0.1:{port}", timeout=0.1, attempts=2, pause=lambda _: None)
        with pytest.raises(DeliveryError, match=r"(did not answer|cannot be reached: timed out).*2 attempts"):
            made.send([{"a": 1}])


@pytest.mark.parametrize("url", ["", "file:///etc/passwd", "http:///x", "http://h:99999", "http://h:0"])
def test_only_http_urls_are_endpoints(url: str) -> None:
    with pytest.raises(UsageError):
        HttpSink(url)
