"""b2s exporter: what it serves, to whom, and what it says when the database is away."""

from __future__ import annotations

import base64
import gzip
import json
import shutil
import signal
import socket
import ssl
import subprocess
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

import pytest
from prometheus_client import Metric
from prometheus_client.openmetrics import parser as openmetrics_parser
from prometheus_client.parser import text_string_to_metric_families as parse_text
from psycopg.conninfo import conninfo_to_dict, make_conninfo

from b2s.cli import main
from b2s.exporter import App, Endpoint, Scraper, credentials_in, serving
from b2s.metricfamilies import Snapshot
from tests.pipelines import Background, Gate, Pipeline
from tests.processes import b2s
from tests.servers import Database, Server, wait_until

OPENMETRICS: Final = "application/openmetrics-text; version=1.0.0; charset=utf-8"
SEED: Final = {
    "transformation_duration_seconds": ("histogram", {"procedure", "mode", "status"}),
    "transformation_rows_affected": ("counter", {"procedure", "mode"}),
    "transformation_failures": ("counter", {"procedure"}),
    "transformation_active_runs": ("gauge", set()),
    "mv_refresh_duration_seconds": ("histogram", {"mv_name", "status"}),
}
"""The metrics that were agreed upon: type and labels, as a client parses them."""
EXPORTERS: Final = (
    "select from pg_stat_activity where application_name = 'b2s exporter' and datname = current_database()"
)


def parse_openmetrics(text: str) -> list[Metric]:
    """The families of an answer in OpenMetrics; the parser is strict."""
    return list(openmetrics_parser.text_string_to_metric_families(text))  # type: ignore[no-untyped-call]


class Lines:
    """A log that keeps what it was told."""

    def __init__(self) -> None:
        self.said: list[tuple[str, dict[str, Any]]] = []

    def info(self, event: str, **fields: Any) -> None:
        self.said.append((event, fields))

    warning = info


@pytest.fixture
def pipeline(db: Database) -> Iterator[Pipeline]:
    """A procedure that succeeds, one that fails, one that depends on it, and a view."""
    with Pipeline(db) as pipeline:
        pipeline.conn.execute("create schema mart authorization etl_owner")
        pipeline.sql("create materialized view mart.v as select 1")
        view = {"name": "mart.v", "after": "run", "on": "always", "concurrently": False}
        pipeline.add("silver.good", routine="silver.good", freshness_ms=7_200_000, mv_refresh=[view])
        pipeline.add("silver.bad", routine="silver.bad", allow_full_refresh=True)
        pipeline.add("silver.after", routine="silver.good", dependencies=["silver.bad"])
        pipeline.routine("good")
        pipeline.routine("bad", "raise exception 'no'")
        pipeline.apply()
        yield pipeline


class Answer:
    """What a client received."""

    def __init__(self, status: int, headers: Mapping[str, str], body: bytes) -> None:
        self.status, self.headers, self.body = status, headers, body

    @property
    def text(self) -> str:
        return self.body.decode()

    def samples(self) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
        """Every sample by name and labels."""
        is_open = self.headers["Content-Type"].startswith("application/openmetrics")
        families = (parse_openmetrics if is_open else parse_text)(self.text)
        found = [(s.name, tuple(sorted(s.labels.items())), s.value) for f in families for s in f.samples]
        assert len(found) == len({one[:2] for one in found}), "no label set occurs twice"
        return {(name, labels): value for name, labels, value in found}

    def value(self, name: str, **labels: str) -> float:
        return self.samples()[name, tuple(sorted(labels.items()))]

    def names(self) -> set[str]:
        return {name for name, _ in self.samples()}


def get(url: str, context: ssl.SSLContext | None = None, **headers: str) -> Answer:
    request = urllib.request.Request(url, headers={k.replace("_", "-"): v for k, v in headers.items()})
    try:
        with urllib.request.urlopen(request, timeout=20, context=context) as response:
            return Answer(response.status, dict(response.headers), response.read())
    except urllib.error.HTTPError as error:
        with error:
            return Answer(error.code, dict(error.headers), error.read())


@contextmanager
def exporter(dsn: str, **settings: Any) -> Iterator[str]:
    """An exporter in this process; its URL."""
    endpoint = Endpoint("127.0.0.1", 0, **settings)
    with serving(endpoint, Scraper(dsn, Lines())) as port:
        yield f"{'https' if endpoint.certificate else 'http'}://127.0.0.1:{port}/metrics"


def scrape(dsn: str, **headers: str) -> Answer:
    """What an exporter of its own answers."""
    with exporter(dsn) as url:
        return get(url, None, **headers)


# -- what is served --


def test_the_metrics_that_were_agreed_upon_have_their_names_types_and_labels(pipeline: Pipeline) -> None:
    pipeline.start()
    families = {
        family.name: family for family in parse_openmetrics(scrape(pipeline.db.dsn, Accept=OPENMETRICS).text)
    }
    for name, (kind, labels) in SEED.items():
        assert families[name].type == kind
        assert families[name].samples
        assert {frozenset(set(s.labels) - {"le"}) for s in families[name].samples} == {frozenset(labels)}


def test_every_family_explains_itself_and_is_named_by_the_rules(pipeline: Pipeline) -> None:
    for family in parse_openmetrics(scrape(pipeline.db.dsn, Accept=OPENMETRICS).text):
        assert family.documentation.endswith("."), family.name
        assert family.name.startswith(("transformation_", "mv_refresh_", "b2s_"))
        if "seconds" in family.name:
            assert family.name.endswith("_seconds")


def test_a_scrape_tells_what_happened(pipeline: Pipeline) -> None:
    for _ in range(2):
        pipeline.start()
    got = scrape(pipeline.db.dsn)
    step = {"procedure": "silver.good", "mode": "incremental", "status": "succeeded"}
    assert got.value("transformation_duration_seconds_count", **step) == 2
    assert got.value("transformation_duration_seconds_bucket", **step, le="+Inf") == 2
    seconds = pipeline.value(
        "select sum(duration_ms) / 1000 from etl.procedure_runs where procedure_name = 'silver.good'"
    )
    assert got.value("transformation_duration_seconds_sum", **step) == pytest.approx(float(seconds))
    assert got.value("transformation_rows_affected_total", procedure="silver.good", mode="incremental") == 2
    assert got.value("transformation_rows_affected_total", procedure="silver.bad", mode="full") == 0
    assert got.value("transformation_failures_total", procedure="silver.bad") == 2
    assert got.value("transformation_failures_total", procedure="silver.good") == 0
    assert got.value("transformation_skipped_total", procedure="silver.after") == 2
    assert got.value("mv_refresh_duration_seconds_count", mv_name="mart.v", status="succeeded") == 2
    assert (
        got.value("transformation_runs_total", pipeline="bronze_to_silver", kind="run", status="failed") == 2
    )
    assert got.value("transformation_active_runs") == 0
    assert (got.value("b2s_up"), got.value("b2s_schema_current")) == (1, 1)
    of_good = {"pipeline": "bronze_to_silver", "procedure": "silver.good"}
    assert got.value("transformation_freshness_objective_seconds", **of_good) == 7200
    (ended_at,) = pipeline.column(
        "select ended_at from etl.procedure_runs where run_id = 2 and procedure_name = 'silver.good'"
    )
    assert got.value("transformation_last_success_timestamp_seconds", **of_good) == pytest.approx(
        ended_at.timestamp()
    )
    assert "transformation_watermark_timestamp_seconds" not in got.names(), "none of them has a watermark"


def test_buckets_add_up_and_hold_each_duration(pipeline: Pipeline) -> None:
    pipeline.start()
    samples = scrape(pipeline.db.dsn).samples()
    step = (("mode", "incremental"), ("procedure", "silver.good"), ("status", "succeeded"))
    buckets = {
        float(dict(labels)["le"]): count for (name, labels), count in samples.items()
        if name == "transformation_duration_seconds_bucket" and set(step) <= set(labels)
    }  # fmt: skip
    (seconds,) = pipeline.column(
        "select duration_ms::float8 / 1000 from etl.procedure_runs where status = 'succeeded'"
    )
    assert len(buckets) == 12
    assert all(count == (seconds <= bound) for bound, count in buckets.items())


def test_the_first_failure_is_an_increase(pipeline: Pipeline) -> None:
    with exporter(pipeline.db.dsn) as url:
        before = get(url).value("transformation_failures_total", procedure="silver.bad")
    pipeline.start()
    assert (
        before,
        scrape(pipeline.db.dsn).value("transformation_failures_total", procedure="silver.bad"),
    ) == (0, 1)


def test_exemplars_name_the_run_to_look_at_where_the_client_understands_them(pipeline: Pipeline) -> None:
    pipeline.start()
    pipeline.start()
    text = scrape(pipeline.db.dsn, Accept=OPENMETRICS).text
    marked = [s for f in parse_openmetrics(text) for s in f.samples if s.exemplar]
    assert {s.exemplar.labels["run_id"] for s in marked if s.exemplar} == {"2"}
    assert {s.name for s in marked} >= {
        "transformation_duration_seconds_bucket",
        "transformation_failures_total",
    }
    for one in marked:
        if one.exemplar and one.name.endswith("_bucket"):
            assert one.exemplar.value <= float(one.labels["le"])
    plain = scrape(pipeline.db.dsn).text
    assert "run_id" not in plain
    assert "_created" not in plain
    assert "transformation_duration_seconds_created" in text


def test_the_answer_is_compressed_for_those_who_accept_it(pipeline: Pipeline) -> None:
    answer = scrape(pipeline.db.dsn, Accept_Encoding="gzip")
    assert answer.headers["Content-Encoding"] == "gzip"
    assert b"transformation_active_runs 0.0" in gzip.decompress(answer.body)


def test_what_goes_on_is_told_while_it_goes_on(pipeline: Pipeline) -> None:
    pipeline.routine("good", Gate.WAIT)
    with pipeline.gate() as gate:
        running = pipeline.start_in_background(procedures=["silver.good"])
        gate.wait_for_arrivals()
        got = scrape(pipeline.db.dsn)
        assert got.value("transformation_active_runs") == 1
        since = got.value(
            "transformation_running_since_timestamp_seconds",
            pipeline="bronze_to_silver",
            procedure="silver.good",
        )
        assert since == pytest.approx(pipeline.step(1, "silver.good")["started_at"].timestamp())
    running.result()


def test_names_with_quotes_and_backslashes_are_escaped(db: Database) -> None:
    name = 'a "quoted" \\ name\nof two lines'
    with Pipeline(db, name) as pipeline:
        pipeline.add("a")
        pipeline.apply()
        pipeline.start(pipeline=name)
        for accept in ("text/plain", OPENMETRICS):
            got = scrape(db.dsn, Accept=accept)
            assert got.value("transformation_runs_total", pipeline=name, kind="run", status="succeeded") == 1


def test_one_name_in_two_pipelines_is_one_series(db: Database) -> None:
    for name in ("one", "two"):
        with Pipeline(db, name) as pipeline:
            pipeline.add("a", freshness_ms=1000)
            pipeline.apply()
            pipeline.start(pipeline=name)
    got = scrape(db.dsn)
    assert got.value("transformation_rows_affected_total", procedure="a", mode="incremental") == 2
    assert got.value("transformation_freshness_objective_seconds", procedure="a", pipeline="two") == 1


def test_a_catalog_that_was_changed_by_other_means_shows(pipeline: Pipeline) -> None:
    assert scrape(pipeline.db.dsn).value("transformation_config_drift", pipeline="bronze_to_silver") == 0
    pipeline.conn.execute("update etl.procedures set on_failure = 'stop'")
    assert scrape(pipeline.db.dsn).value("transformation_config_drift", pipeline="bronze_to_silver") == 1


def test_a_clock_shows_since_when_it_has_been_silent(pipeline: Pipeline) -> None:
    got = scrape(pipeline.db.dsn)
    assert got.value("transformation_schedules") == 0
    assert "transformation_clock_timestamp_seconds" not in got.names(), "there was none yet"
    pipeline.sql(
        "insert into etl.heartbeats values ('clock', '2026-11-29 02:00+00', 'a', 'b')", role="etl_engine"
    )
    moment = scrape(pipeline.db.dsn).value("transformation_clock_timestamp_seconds")
    assert moment == datetime(2026, 11, 29, 2, tzinfo=UTC).timestamp()


def test_a_schema_of_another_release_shows(pipeline: Pipeline) -> None:
    pipeline.conn.execute("update etl.installation set version = '0.0.1'")
    got = scrape(pipeline.db.dsn)
    assert got.value("b2s_schema_current") == 0
    assert got.value("b2s_schema_info", version="0.0.1") == 1


def test_two_exporters_and_one_that_was_restarted_tell_the_same(pipeline: Pipeline) -> None:
    pipeline.start()
    own = ("b2s_scrape", "transformation_horizon")
    first, second = (
        {k: v for k, v in scrape(pipeline.db.dsn).samples().items() if not k[0].startswith(own)}
        for _ in range(2)
    )
    assert first == second


# -- rights --


def test_a_reader_sees_everything_and_needs_nothing_else(pipeline: Pipeline) -> None:
    pipeline.start()
    reader = pipeline.login("etl_reader")
    dsn = make_conninfo(pipeline.db.dsn, user=reader.info.user, password=reader.info.password)
    assert scrape(dsn).names() == scrape(pipeline.db.dsn).names()


def test_whoever_may_not_read_gets_no_numbers(pipeline: Pipeline) -> None:
    nobody = pipeline.login()
    got = scrape(make_conninfo(pipeline.db.dsn, user=nobody.info.user, password=nobody.info.password))
    assert got.value("b2s_up") == 0
    assert got.value("b2s_scrape_errors_total", reason="refused") == 1
    assert not [name for name in got.names() if name.startswith("transformation_")]


# -- a database that is away --


def test_without_b2s_in_the_database_it_says_so(empty_db: Database) -> None:
    got = scrape(empty_db.dsn)
    assert (got.status, got.value("b2s_up")) == (200, 0)
    assert got.value("b2s_scrape_errors_total", reason="not_installed") == 1


def test_a_database_that_goes_and_comes_back_is_down_and_up_and_nothing_is_stale(
    private_server: Server,
) -> None:
    db = private_server.create_database(template=private_server.migrated_template())
    with Pipeline(db) as pipeline:
        pipeline.add("a")
        pipeline.apply()
        pipeline.start()
    log = Lines()
    scraper = Scraper(db.dsn, log)
    with serving(Endpoint("127.0.0.1", 0), scraper) as port:
        url = f"http://127.0.0.1:{port}/metrics"
        assert get(url).value("b2s_up") == 1
        assert private_server.embedded is not None
        private_server.embedded._halt("fast")
        scraper._read_at = float("-inf")
        got = get(url)
        assert (got.status, got.value("b2s_up")) == (200, 0)
        assert not [name for name in got.names() if name.startswith(("transformation_", "mv_", "b2s_schema"))]
        private_server.embedded._launch()
        scraper._read_at = float("-inf")
        assert get(url).value("transformation_rows_affected_total", procedure="a", mode="incremental") == 1
    assert [event for event, _ in log.said] == ["database_is_there", "database_is_away", "database_is_there"]
    db.drop()


def test_a_locked_table_is_waited_for_briefly(pipeline: Pipeline) -> None:
    with pipeline.db.connect(autocommit=False) as other:
        other.execute("lock table etl.metrics")
        got = scrape(pipeline.db.dsn)
        assert got.value("b2s_up") == 0
        assert got.value("b2s_scrape_errors_total", reason="timeout") == 1
        assert got.value("b2s_scrape_duration_seconds") < 5
        other.rollback()


def test_a_scrape_ends_before_prometheus_gives_up(pipeline: Pipeline) -> None:
    """The view is made slow; the header says how long Prometheus will wait."""
    pipeline.conn.execute("alter view etl.metrics_pipelines rename to metrics_pipelines_fast")
    pipeline.conn.execute(
        "create view etl.metrics_pipelines as select f.* from etl.metrics_pipelines_fast f, pg_sleep(5)"
    )
    pipeline.conn.execute("grant select on etl.metrics_pipelines to etl_reader")
    got = scrape(pipeline.db.dsn, X_Prometheus_Scrape_Timeout_Seconds="1.2")
    assert got.value("b2s_up") == 0
    assert got.value("b2s_scrape_errors_total", reason="timeout") == 1
    assert 0.5 < got.value("b2s_scrape_duration_seconds") < 1.2


def test_scrapes_at_the_same_moment_read_the_database_once(pipeline: Pipeline) -> None:
    with exporter(pipeline.db.dsn) as url, pipeline.db.connect(autocommit=False) as other:
        other.execute("lock table etl.metrics")
        answers = [Background(lambda: get(url)) for _ in range(8)]
        wait_until(
            pipeline.conn,
            f"select exists ({EXPORTERS} and wait_event_type = 'Lock')",
        )
        sessions = pipeline.value(f"select count(*) from ({EXPORTERS}) q")
        other.rollback()
        assert {one.result().value("b2s_up") for one in answers} == {1}
    assert sessions == 1


def test_it_keeps_one_session_and_ends_it_with_itself(pipeline: Pipeline) -> None:
    with exporter(pipeline.db.dsn) as url:
        for _ in range(3):
            get(url)
        idle = pipeline.column(f"select state from ({EXPORTERS.replace('select', 'select state', 1)}) q")
        assert idle == ["idle"], "no transaction is left open"
    wait_until(pipeline.conn, f"select not exists ({EXPORTERS})")


def test_a_session_that_somebody_ended_is_opened_again_within_the_scrape(pipeline: Pipeline) -> None:
    scraper = Scraper(pipeline.db.dsn, Lines())
    assert scraper.read().error is None
    pids = pipeline.column(f"select pid from ({EXPORTERS.replace('select', 'select pid', 1)}) q")
    pipeline.conn.execute("select pg_terminate_backend(%s)", pids)
    wait_until(pipeline.conn, f"select not exists ({EXPORTERS})")
    scraper._read_at = float("-inf")
    assert scraper.read().error is None
    scraper.close()


# -- who may ask --


def test_basic_authentication_lets_in_who_knows_the_password(pipeline: Pipeline, tmp_path: Path) -> None:
    file = tmp_path / "auth"
    file.write_text("prometheus:s3cret:ü\n", encoding="utf-8")
    with exporter(pipeline.db.dsn, credentials=credentials_in(str(file))) as url:

        def status(given: str | None) -> int:
            return get(url, None, **({} if given is None else {"Authorization": given})).status

        def basic(text: str) -> str:
            return "Basic " + base64.b64encode(text.encode()).decode()

        assert status(basic("prometheus:s3cret:ü")) == 200
        wrong = (
            None,
            "",
            basic("prometheus:"),
            basic("prometheus:s3cret"),
            basic("x:s3cret:ü"),
            "Bearer x",
            "Basic",
        )
        assert {status(one) for one in wrong} == {401}
        refused = get(url)
        assert refused.headers["WWW-Authenticate"].startswith("Basic ")
        assert "transformation" not in refused.text
        assert get(url.replace("/metrics", "/-/healthy")).status == 200


@pytest.mark.parametrize("text", ["", "\n", "name", "name:", ":password"])
def test_a_file_without_a_name_and_a_password_is_refused(
    text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "auth"
    file.write_text(text, encoding="utf-8")
    assert main(["exporter", "--auth-file", str(file)]) == 2
    assert "user:password" in capsys.readouterr().err


def certificate(folder: Path) -> tuple[Path, Path]:
    """A private key, and a certificate for it that it has signed itself."""
    if shutil.which("openssl") is None:
        pytest.skip("there is no openssl to make a certificate with")
    key, cert = folder / "key.pem", folder / "cert.pem"
    what = "req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2 -subj /CN=localhost"
    where = ["-addext", "subjectAltName=IP:127.0.0.1", "-keyout", str(key), "-out", str(cert)]
    subprocess.run(["openssl", *what.split(), *where], check=True, capture_output=True)
    return key, cert


def test_tls_and_client_certificates(pipeline: Pipeline, tmp_path: Path) -> None:
    key, cert = certificate(tmp_path)
    trusting = ssl.create_default_context(cafile=str(cert))
    with exporter(pipeline.db.dsn, certificate=str(cert), key=str(key)) as url:
        with closing(socket.create_connection(("127.0.0.1", int(url.split(":")[2].split("/")[0])))):
            assert get(url, trusting).value("b2s_up") == 1, "a client that never shakes hands holds up nobody"
        with pytest.raises(urllib.error.URLError):
            get(url)
    known = ssl.create_default_context(cafile=str(cert))
    known.load_cert_chain(cert, key)
    with exporter(pipeline.db.dsn, certificate=str(cert), key=str(key), client_ca=str(cert)) as url:
        assert get(url, known).value("b2s_up") == 1
        with pytest.raises((urllib.error.URLError, ssl.SSLError, ConnectionError)):
            get(url, trusting)


def test_other_paths_lead_to_the_metrics(pipeline: Pipeline) -> None:
    with exporter(pipeline.db.dsn) as url:
        base = url.removesuffix("/metrics")
        assert "/metrics" in get(f"{base}/").text
        assert get(f"{base}/x").status == 404


def test_a_timeout_that_is_none_is_ten_seconds() -> None:
    seen: list[float] = []

    class Patient(Scraper):
        def __init__(self) -> None:
            """Without a database."""

        def read(self, timeout: float = 0) -> Snapshot:
            seen.append(timeout)
            return Snapshot(error="none")

    for given in ("x", "-1", "nan", "1e9", "4.5"):
        environ = {
            "PATH_INFO": "/metrics",
            "REQUEST_METHOD": "GET",
            "HTTP_X_PROMETHEUS_SCRAPE_TIMEOUT_SECONDS": given,
        }
        list(App(Patient())(environ, lambda *_: None))
    assert seen == [10, 10, 10, 10, 4.5]


# -- the command --


def test_once_prints_the_metrics(pipeline: Pipeline, capsys: pytest.CaptureFixture[str]) -> None:
    pipeline.start()
    assert main(["exporter", "--once", "--dsn", pipeline.db.dsn]) == 0
    assert 'transformation_failures_total{procedure="silver.bad"} 1.0' in capsys.readouterr().out


def test_once_without_a_database_prints_that_and_no_secret(capsys: pytest.CaptureFixture[str]) -> None:
    dsn = "host=127.0.0.1 port=1 user=u password=s3cret dbname=d"
    assert main(["exporter", "--once", "--dsn", dsn]) == 3
    captured = capsys.readouterr()
    assert "b2s_up 0.0" in captured.out
    assert 'b2s_scrape_errors_total{reason="unreachable"} 1.0' in captured.out
    assert json.loads(captured.err)["event"] == "database_is_away"
    assert "s3cret" not in captured.out + captured.err


def test_the_command_serves_until_it_is_told_to_stop(pipeline: Pipeline, tmp_path: Path) -> None:
    with b2s(tmp_path, pipeline.db.dsn, "exporter", "--listen", "127.0.0.1:0") as command:
        command.wait_for("exporter_started")
        command.wait_for("database_is_there")
        (started,) = command.events("exporter_started")
        assert get(started["url"]).value("b2s_up") == 1
        command.send(signal.SIGTERM)
        assert command.end() == 0
        assert command.events("exporter_stopped")
        secret = conninfo_to_dict(pipeline.db.dsn).get("password")
        assert secret is None or str(secret) not in command.err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--listen", "9843"], "is not HOST:PORT"),
        (["--listen", "127.0.0.1:99999"], "is not HOST:PORT"),
        (["--listen", "256.0.0.1:0"], "cannot listen on"),
        (["--tls-cert", "x"], "a certificate needs its key"),
        (["--tls-client-ca", "x"], "needs TLS"),
        (["--auth-file", "/does/not/exist"], "No such file"),
        (["--tls-cert", "/no", "--tls-key", "/no"], "cannot listen on"),
    ],
)
def test_what_cannot_be_served_is_said_in_words(
    words: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["exporter", *words]) == 2
    assert said in capsys.readouterr().err


def test_a_port_that_is_taken_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    with closing(socket.create_server(("127.0.0.1", 0))) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        assert main(["exporter", "--listen", address]) == 2
    assert address in capsys.readouterr().err
