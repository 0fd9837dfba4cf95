"""The HTTP API as its clients meet it: a process, a real server behind it, and what goes wrong."""

from __future__ import annotations

import http.client
import json
import re
import signal
import socket
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Final, cast

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from schemathesis.specs.openapi.checks import positive_data_acceptance
from starlette.routing import Route

from b2s.api.app import application
from tests.apis import ROOT, Api, front_end, serving
from tests.pipelines import Pipeline
from tests.processes import b2s
from tests.servers import Database, Server, wait_until
from tests.tokens import token

UNTIL_IT_WAITS = (
    "select count(*) > 0 from pg_stat_activity where wait_event_type = 'Lock' and usename like 'b2s\\_web%'"
)


@pytest.fixture(scope="module")
def pipeline(server: Server, template: str) -> Iterator[Pipeline]:
    database = server.create_database(template=template)
    with Pipeline(database) as pipeline:
        size = {"name": "size", "type": "integer", "minimum": 1, "maximum": 10, "default": 1}
        pipeline.add("load", arguments="size bigint", params=[size], allow_full_refresh=True, tags=["daily"])
        pipeline.add("other", dependencies=["load"])
        pipeline.apply()
        yield pipeline
    database.drop()


@pytest.fixture(scope="module")
def api(pipeline: Pipeline, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Api]:
    with serving(pipeline, tmp_path_factory.mktemp("api"), "--timeout", "20s") as api:
        yield api


@pytest.fixture
def own(db: Database) -> Iterator[Pipeline]:
    """A pipeline for tests that stop things, or change them for all."""
    with Pipeline(db) as pipeline:
        pipeline.add("load", allow_full_refresh=True)
        pipeline.apply()
        yield pipeline


# -- what it does --


def test_a_request_is_recorded_and_a_worker_executes_it(api: Api, pipeline: Pipeline) -> None:
    body = {"procedures": ["load"], "params": {"load": {"size": 3}}, "reason": "now", "with_upstream": None}
    answer = api.ask("POST", f"{ROOT}/runs", body, {"User-Agent": "portal/1.0 \xe9\t(x)"})
    assert answer.status == 202
    run_id = answer.document["run_id"]
    assert answer.document == {"run_id": run_id, "status": "queued", "is_new": True}
    assert answer.headers["location"] == f"{ROOT}/runs/{run_id}"
    run = pipeline.run(run_id)
    assert (run["requested_by"], run["subject"], run["requested_role"]) == ("ann", "ann", "etl_operator")
    assert run["session_user_name"].startswith("b2s_web_")
    assert run["application_name"] == "b2s api: portal/1.0 (x)"
    pipeline.value("call etl.work()")
    shown = api.ask("GET", answer.headers["location"], role="etl_reader")
    assert shown.status == 200
    document = shown.document
    assert (document["status"], document["steps"][0]["parameters"]) == ("succeeded", {"size": 3})
    assert document["requested_by"] == "ann"


def test_the_same_key_is_the_same_run_in_the_body_or_in_the_header(api: Api) -> None:
    first = api.submit({"idempotency_key": "k1", "procedures": ["load"]})
    again = api.ask("POST", f"{ROOT}/runs", {"procedures": ["load"]}, {"Idempotency-Key": "k1"})
    assert (first.status, again.status) == (202, 200)
    assert again.document == {"run_id": first.document["run_id"], "status": "queued", "is_new": False}
    other = api.submit({"idempotency_key": "k1"})
    assert (other.status, other.code) == (409, "idempotency_key.reused")
    differing = api.ask("POST", f"{ROOT}/runs", {"idempotency_key": "k2"}, {"Idempotency-Key": "k1"})
    assert (differing.status, differing.code) == (422, "request.invalid")


def test_clients_with_one_key_at_the_same_moment_get_one_run(api: Api, pipeline: Pipeline) -> None:
    count = "select count(*) from etl.runs where idempotency_key like 'race%%'"
    with ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(lambda n: api.submit({"idempotency_key": f"race {n % 4}"}), range(64)))
    assert sorted(answer.status for answer in answers) == [200] * 60 + [202] * 4
    assert len({answer.document["run_id"] for answer in answers}) == 4
    assert pipeline.value(count) == 4


def test_a_dry_run_shows_the_plan_and_queues_nothing(api: Api, pipeline: Pipeline) -> None:
    before = pipeline.value("select count(*) from etl.runs")
    answer = api.submit({"dry_run": True, "tags": ["daily"], "idempotency_key": "x"}, role="etl_reader")
    assert answer.status == 200
    assert [row["name"] for row in answer.document["plan"]] == ["load"]
    assert pipeline.value("select count(*) from etl.runs") == before


def test_runs_come_in_pages_newest_first(api: Api) -> None:
    ids = [api.submit({"reason": "page"}, sub="pager").document["run_id"] for _ in range(5)]
    path: str | None = f"{ROOT}/runs?requested_by=pager&page_size=2&status=queued,failed&status=running"
    found = []
    while path:
        page = api.ask("GET", path, role="etl_reader")
        assert page.status == 200
        found += [run["run_id"] for run in page.document["runs"]]
        link = re.fullmatch(r'<(.*)>; rel="next"', page.headers.get("link", ""))
        path = link[1] if link else None
        assert (path is None) is (page.document["next_before"] is None)
    assert found == ids[::-1]
    assert api.ask("GET", f"{ROOT}/runs?status=cancelled&requested_by=pager").document["runs"] == []
    unknown = api.ask("GET", f"{ROOT}/runs?pipeline=nope")
    assert (unknown.status, unknown.code) == (404, "pipeline.unknown")


@pytest.mark.parametrize(
    "query",
    ["page_size=0", "page_size=501", "page_size=x", "page_size=1&page_size=2", "before=-1", "before=0",
     "before=99999999999999999999", "before=%D9%A1", "status=odd", "kind=x", "since=yesterday-ish",
     "until=9999999-1", "colour=red", "requested_by=%00", "dry_run=true"],
)  # fmt: skip
def test_a_query_that_cannot_be_meant_is_refused(api: Api, query: str) -> None:
    answer = api.ask("GET", f"{ROOT}/runs?{query}")
    assert (answer.status, answer.code) == (422, "request.invalid")


def test_a_run_is_cancelled_by_whoever_asked_for_it_or_an_admin(api: Api) -> None:
    runs = [api.submit({"reason": "x"}).document["run_id"] for _ in range(2)]
    cancel = [f"{ROOT}/runs/{run_id}/cancel" for run_id in runs]
    answer = api.ask("POST", cancel[0], sub="bob")
    assert (answer.status, answer.code) == (403, "run.not_yours")
    answer = api.ask("POST", cancel[0], {"reason": "mistake"})
    assert answer.status == 200
    assert answer.document == {"run_id": runs[0], "effect": "it was queued, and is not run"}
    answer = api.ask("POST", cancel[0], {"reason": "again"})
    assert (answer.status, answer.code) == (409, "run.ended")
    assert api.ask("POST", cancel[1], {"force": True}, sub="bob", role="etl_admin").status == 200
    answer = api.ask("POST", f"{ROOT}/runs/999999/cancel")
    assert (answer.status, answer.code) == (404, "run.unknown")


def test_a_full_refresh_needs_what_it_needs_everywhere(api: Api) -> None:
    body = {"mode": "full", "procedures": ["load"], "confirm_full_refresh": True, "reason": "new rule"}
    answer = api.submit(body)
    assert (answer.status, answer.code) == (403, "full_refresh.not_admin")
    answer = api.submit({"mode": "full", "procedures": ["load"]}, role="etl_admin")
    assert (answer.status, answer.code) == (403, "full_refresh.unconfirmed")
    assert [one["code"] for one in answer.document["errors"]] == [
        "full_refresh.unconfirmed",
        "full_refresh.no_reason",
    ]
    assert api.submit(body, role="etl_admin").status == 202


def test_two_persons_approve_a_full_refresh(own: Pipeline, tmp_path: Path) -> None:
    own.apply(approvals="two_person")
    body = {"mode": "full", "confirm_full_refresh": True, "reason": "new rule"}
    with serving(own, tmp_path) as api:
        run_id = api.submit(body, role="etl_admin").document["run_id"]
        approve = f"{ROOT}/runs/{run_id}/approve"
        assert api.ask("GET", f"{ROOT}/runs/{run_id}").document["awaits_approval"] is True
        answer = api.ask("POST", approve, role="etl_admin")
        assert (answer.status, answer.code) == (403, "approval.own_request")
        answer = api.ask("POST", approve, sub="bob")
        assert (answer.status, answer.code) == (403, "role.not_granted")
        assert own.value("call etl.work()") == 0
        assert api.ask("POST", approve, {"reason": "fine"}, sub="bob", role="etl_admin").status == 200
        assert own.value("call etl.work()") == 1
        assert api.ask("GET", f"{ROOT}/runs/{run_id}").document["approved_by"] == "bob"


def test_procedures_are_listed(api: Api) -> None:
    answer = api.ask("GET", f"{ROOT}/procedures", role="etl_reader")
    assert [one["name"] for one in answer.document["procedures"]] == ["load", "other"]
    assert answer.document["procedures"][0]["parameters"]["size"]["maximum"] == 10


# -- what it refuses --


@pytest.mark.parametrize(
    ("body", "status", "code"),
    [
        (b"{", 400, "request.malformed"),
        (b"\xff\xfe", 400, "request.malformed"),
        (b'{"reason": NaN}', 400, "request.malformed"),
        (b'{"reason": "a", "reason": "b"}', 400, "request.malformed"),
        (b"[" * 60000, 400, "request.malformed"),
        (b'{"max_concurrency": ' + b"9" * 5000 + b"}", 400, "request.malformed"),
        (b"[]", 422, "request.invalid"),
        (b'"text"', 422, "request.invalid"),
        (b"null", 422, "request.invalid"),
        ({"colour": "red"}, 422, "request.invalid"),
        ({"mode": "sideways"}, 422, "request.invalid"),
        ({"mode": 1}, 422, "request.invalid"),
        ({"procedures": "load"}, 422, "request.invalid"),
        ({"procedures": [None]}, 422, "request.invalid"),
        ({"as_of": "yesterday-ish"}, 422, "request.invalid"),
        ({"as_of": "99999999-01-01"}, 422, "request.invalid"),
        ({"as_of": "infinity"}, 422, "request.invalid"),
        ({"max_concurrency": 65}, 422, "request.invalid"),
        ({"max_concurrency": True}, 422, "request.invalid"),
        ({"idempotency_key": ""}, 422, "request.invalid"),
        ({"idempotency_key": "k" * 256}, 422, "request.invalid"),
        ({"dry_run": "execute"}, 422, "request.invalid"),
        ({"params": {"load": {"size": 11}}}, 422, "params.invalid"),
        ({"params": {"load": 1}}, 422, "params.invalid"),
        ({"params": {"nope": {}}}, 422, "params.unused"),
        ({"reason": "a\x00b"}, 422, "request.invalid"),
        (b'{"reason": "\\ud800"}', 422, "request.invalid"),
        (b'{"params": {"\\u0000": {}}}', 422, "request.invalid"),
        ({"params": json.loads('{"load": ' + '{"a": ' * 40 + "1" + "}" * 41)}, 422, "request.invalid"),
        ({"procedures": ["nope"]}, 404, "procedure.unknown"),
        ({"pipeline": "nope"}, 404, "pipeline.unknown"),
        ({"tags": ["'; drop table etl.runs; --"]}, 404, "tag.unknown"),
        (b'{"reason": "' + b"x" * 70000 + b'"}', 413, "request.too_large"),
    ],
    ids=range(33),
)
def test_a_body_that_cannot_be_meant_is_refused(api: Api, body: Any, status: int, code: str) -> None:
    answer = api.submit(body)
    assert (answer.status, answer.code) == (status, code), answer.content


def test_every_problem_of_a_body_is_told_at_once(api: Api) -> None:
    answer = api.submit({"mode": 1, "tags": "x", "colour": "red"})
    assert [one["loc"] for one in answer.document["errors"]] == [["mode"], ["tags"], ["colour"]]


def test_a_body_of_another_kind_and_one_without_end_are_refused(api: Api) -> None:
    answer = api.ask("POST", f"{ROOT}/runs", b"mode=full", {"Content-Type": "text/plain"})
    assert (answer.status, answer.code) == (415, "request.media_type")
    chunks = iter([b'{"reason": "'] + [b"x" * 10000] * 10)
    connection = http.client.HTTPConnection("127.0.0.1", api.port, timeout=60)
    headers = {"Authorization": f"Bearer {token()}", "Content-Type": "application/json"}
    connection.request("POST", f"{ROOT}/runs", chunks, headers, encode_chunked=True)
    assert connection.getresponse().status == 413
    connection.close()


@pytest.mark.parametrize(
    ("authorization", "status", "code"),
    [
        ("", 401, "auth.missing"),
        ("Bearer x", 401, "auth.invalid"),
        (f"Bearer {token(role='postgres')}", 403, "auth.no_role"),
    ],
    ids=range(3),
)
def test_without_a_good_token_nothing_is_looked_at(
    api: Api, authorization: str, status: int, code: str
) -> None:
    for method, path in (
        ("POST", f"{ROOT}/runs"),
        ("GET", f"{ROOT}/runs?page_size=x"),
        ("GET", f"{ROOT}/runs/x"),
        ("POST", f"{ROOT}/runs/1/cancel"),
        ("POST", f"{ROOT}/runs/1/approve"),
        ("GET", f"{ROOT}/procedures"),
    ):
        answer = api.ask(method, path, b"{" if method == "POST" else None, {"Authorization": authorization})
        assert (answer.status, answer.code) == (status, code), path


def test_what_a_role_is_not_granted_is_refused(api: Api) -> None:
    run_id = api.submit({"reason": "x"}).document["run_id"]
    for method, path in (("POST", f"{ROOT}/runs"), ("POST", f"{ROOT}/runs/{run_id}/cancel")):
        answer = api.ask(method, path, {}, role="etl_reader")
        assert (answer.status, answer.code) == (403, "role.not_granted"), path


@pytest.mark.parametrize(
    ("method", "path", "status", "code"),
    [
        ("GET", "/nowhere", 404, "request.not_found"),
        ("GET", f"{ROOT}/runs/", 404, "request.not_found"),
        ("DELETE", f"{ROOT}/runs", 405, "request.method"),
        ("PUT", f"{ROOT}/runs/1", 405, "request.method"),
        ("GET", f"{ROOT}/runs/abc", 404, "run.unknown"),
        ("GET", f"{ROOT}/runs/-1", 404, "run.unknown"),
        ("GET", f"{ROOT}/runs/99999999999999999999", 404, "run.unknown"),
        ("GET", f"{ROOT}/runs/9223372036854775807", 404, "run.unknown"),
        ("GET", f"{ROOT}/runs/%D9%A1", 404, "run.unknown"),
    ],
)
def test_what_is_not_there_is_said_not_to_be(
    api: Api, method: str, path: str, status: int, code: str
) -> None:
    answer = api.ask(method, path)
    assert (answer.status, answer.code) == (status, code)


def test_every_answer_has_its_number_is_not_kept_and_has_a_line_in_the_log(api: Api) -> None:
    given = api.ask("GET", "/health", headers={"X-Request-ID": "abc-1"})
    assert given.headers["x-request-id"] == "abc-1"
    odd = api.ask("GET", "/nowhere", headers={"X-Request-ID": "a b"})
    assert re.fullmatch("[0-9a-f]{32}", odd.headers["x-request-id"])
    assert (odd.headers["cache-control"], odd.headers["x-content-type-options"]) == ("no-store", "nosniff")
    assert "server" not in odd.headers
    number = api.ask("GET", f"{ROOT}/procedures").headers["x-request-id"]
    api.command.wait_for(number)
    (line,) = (one for one in api.command.events("request") if one["request_id"] == number)
    wanted = {"method": "GET", "path": f"{ROOT}/procedures", "status": 200, "subject": "ann"}
    assert {name: line[name] for name in wanted} == wanted


# -- the description --


OPENAPI: Final = Path(__file__).parents[1] / "python" / "b2s" / "api" / "openapi.json"
DESCRIPTION: Final = json.loads(OPENAPI.read_text(encoding="utf-8"))
OPERATIONS: Final = [
    (method.upper(), path)
    for path, item in DESCRIPTION["paths"].items()
    for method in item
    if method != "parameters"
]


def test_the_description_has_every_route_and_no_other() -> None:
    around: Any = application(cast("Any", _Routes()), None)
    routes = [route for route in around._app.routes if isinstance(route, Route)]
    served = [(method, route.path) for route in routes for method in route.methods or () if method != "HEAD"]
    assert sorted(OPERATIONS) == sorted(served)


class _Routes:
    """Stands for the application's state where only its routes matter."""

    limits = None

    def __getattr__(self, name: str) -> Any:
        async def never(request: Any) -> None: ...

        return never


@pytest.mark.parametrize(
    ("method", "path", "mode"),
    [
        (method, path, mode)
        for method, path in OPERATIONS
        for mode in schemathesis.GenerationMode
        # Nothing about a request without anything in it can be wrong.
        if path.startswith(ROOT) or mode == schemathesis.GenerationMode.POSITIVE
    ],
)
def test_what_the_description_says_holds(
    api: Api, method: str, path: str, mode: schemathesis.GenerationMode
) -> None:
    """Requests made from the description, good ones and bad ones, and what each answer has to be."""
    cases = schemathesis.openapi.from_dict(DESCRIPTION)[path][method].as_strategy(generation_mode=mode)

    @settings(
        max_examples=30,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(case=cases)
    def holds(case: Any) -> None:
        authorization = f"Bearer {token(role='etl_admin')}"
        address = f"http://127.0.0.1:{api.port}"
        response = case.call(address, headers={"Authorization": authorization}, timeout=60)
        # What the description cannot say: which parameters a procedure takes, how far from UTC places may be.
        found = response.json() if response.status_code == 422 else {"code": "", "detail": ""}
        told = ("(22009)", "the header Idempotency-Key and the field")
        is_beyond = found["code"].startswith("params.") or any(words in found["detail"] for words in told)
        excluded = [positive_data_acceptance] if is_beyond else []
        case.validate_response(response, excluded_checks=excluded)

    holds()


# -- when things go wrong around it --


def test_readiness_says_what_is_missing(own: Pipeline, tmp_path: Path) -> None:
    with serving(own, tmp_path) as api:
        assert api.ask("GET", "/health").document == {"status": "ok"}
        assert api.ask("GET", "/ready").document == {"status": "ready", "findings": {}}
    with front_end(own, "etl_operator") as lesser, serving(own, tmp_path, dsn=lesser) as api:
        answer = api.ask("GET", "/ready")
        assert (answer.status, answer.document["status"]) == (503, "unavailable")
        assert answer.document["findings"] == {
            "front_end": "the login was not granted etl_frontend",
            "roles": "the login was not granted etl_admin",
        }
        answer = api.ask("GET", f"{ROOT}/procedures", role="etl_admin")
        assert (answer.status, answer.code) == (503, "auth.role_unavailable")


def test_the_database_goes_away_and_comes_back(private_server: Server, tmp_path: Path) -> None:
    database = private_server.create_database(template=private_server.migrated_template())
    with Pipeline(database) as pipeline:
        pipeline.add("load")
        pipeline.apply()
        with serving(pipeline, tmp_path, "--timeout", "5s") as api:
            assert api.submit().status == 202
            embedded = private_server.embedded
            assert embedded is not None
            embedded._halt("fast")
            answer = api.submit()
            assert (answer.status, answer.code) == (503, "database.unavailable")
            assert answer.headers["retry-after"] == "1"
            assert api.ask("GET", "/health").status == 200
            ready = api.ask("GET", "/ready")
            assert (ready.status, ready.document["findings"]) == (503, {"database": "it cannot be reached"})
            embedded._launch()
            pipeline.conn.close()
            assert any(api.ask("GET", "/ready").status == 200 for _ in range(2000))
            assert any(api.submit().status == 202 for _ in range(200))


def test_a_request_that_waits_too_long_is_given_up_and_leaves_nothing(own: Pipeline, tmp_path: Path) -> None:
    blocker = own.db.connect()
    with serving(own, tmp_path, "--timeout", "1s", "--connections", "1", "--waiting", "1") as api:
        assert api.submit().status == 202
        with blocker.transaction(force_rollback=True):
            blocker.execute("lock table etl.runs in access exclusive mode")
            with ThreadPoolExecutor(4) as pool:
                answers = list(pool.map(lambda _: api.submit({"reason": "x"}), range(4)))
        assert {answer.status for answer in answers} <= {503, 504}
        assert {answer.code for answer in answers} <= {"api.timeout", "api.busy", "database.unavailable"}
        assert own.value("select count(*) from etl.runs") == 1
        assert api.submit().status == 202


def test_told_to_stop_it_finishes_what_is_under_way(own: Pipeline, tmp_path: Path) -> None:
    blocker = own.db.connect()
    answers = []
    with serving(own, tmp_path) as api:
        with blocker.transaction(force_rollback=True):
            blocker.execute("lock table etl.runs in access exclusive mode")
            thread = threading.Thread(target=lambda: answers.append(api.submit()))
            thread.start()
            wait_until(own.conn, UNTIL_IT_WAITS)
            api.command.send(signal.SIGTERM)
            wait_until_closed(api.port)
        thread.join(30)
        assert [answer.status for answer in answers] == [202]
        assert api.command.end() == 0
        assert api.command.events("api_stopped")[0]["signal"] == "SIGTERM"


def wait_until_closed(port: int) -> None:
    for _ in range(10000):
        try:
            socket.create_connection(("127.0.0.1", port), timeout=5).close()
        except OSError:
            return
    raise AssertionError("it goes on taking connections")


def test_ctrl_c_is_a_clean_end_too(own: Pipeline, tmp_path: Path) -> None:
    with serving(own, tmp_path) as api:
        api.command.send(signal.SIGINT)
        assert api.command.end() == 0


@pytest.mark.parametrize(
    ("words", "environ", "message"),
    [
        ((), {}, "--audience is missing"),
        (("--audience", "b2s"), {}, "there is no key to verify tokens with"),
        (("--audience", "b2s"), {"B2S_API_JWT_SECRET": "short"}, "B2S_API_JWT_SECRET has 5 bytes"),
        (("--audience", "b2s", "--jwt-key", "/nowhere.pem"), {}, "/nowhere.pem: No such file"),
        (("--audience", "b2s", "--jwks", "http://example.com"), {}, "not safe from change"),
        (("--audience", "b2s", "--roles", "a="), {"B2S_API_JWT_SECRET": "x" * 32}, "names no role"),
        (
            ("--audience", "b2s", "--connections", "0"),
            {"B2S_API_JWT_SECRET": "x" * 32},
            "--connections is at least 1",
        ),
        (("--audience", "b2s", "--timeout", "x"), {"B2S_API_JWT_SECRET": "x" * 32}, "--timeout x"),
        (("--audience", "b2s", "--tls-cert", "x"), {"B2S_API_JWT_SECRET": "x" * 32}, "belong together"),
        (
            ("--audience", "b2s", "--dsn", "no dsn"),
            {"B2S_API_JWT_SECRET": "x" * 32},
            "connection string is malformed",
        ),
    ],
    ids=range(10),
)
def test_it_does_not_start_with_what_cannot_work(
    own: Pipeline, tmp_path: Path, words: tuple[str, ...], environ: dict[str, str], message: str
) -> None:
    with b2s(tmp_path, own.db.dsn, "api", *words, environ=environ) as command:
        assert command.end() == 2
        assert message in command.err


def test_an_address_in_use_is_told(own: Pipeline, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        secret = {"B2S_API_JWT_SECRET": "x" * 32}
        with b2s(tmp_path, own.db.dsn, "api", "--audience", "b2s", "--port", port, environ=secret) as command:
            assert command.end() == 2
            assert f"127.0.0.1 port {port} cannot be listened on" in command.err
