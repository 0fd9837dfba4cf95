"""What the HTTP API carries: requests at a steady rate, and whether each accepted run is executed once.

    python -m tests.bench.api [--rate 200] [--seconds 15] [--clients 16] [--key-share 0.25]

Clients send `POST /api/transformations/runs` over connections that stay, at the rate asked for; a share
repeats an idempotency key that another client may be sending just then. A `b2s worker` executes what is
queued meanwhile, and to the end. Everything shares the cores: server, API, worker and clients.
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import random
import statistics
import tempfile
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from b2s.embedded import EmbeddedServer
from b2s.migrate import migrate
from tests.apis import ROOT, serving
from tests.pipelines import Pipeline
from tests.processes import b2s
from tests.servers import SETTINGS, Database, Server
from tests.tokens import token


@dataclass(slots=True)
class Load:
    """What the clients saw."""

    durations_ms: list[float] = field(default_factory=list)
    late_ms: list[float] = field(default_factory=list)
    statuses: dict[int, int] = field(default_factory=dict)
    accepted: set[int] = field(default_factory=set)
    lock: threading.Lock = field(default_factory=threading.Lock)


def client(port: int, number: int, arguments: argparse.Namespace, start: float, load: Load) -> None:
    """One client: it sends its share of the requests, each when it is due."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    chance = random.Random(number)
    authorization = f"Bearer {token(sub=f'client {number}')}"
    headers = {"Authorization": authorization, "Content-Type": "application/json"}
    for one in range(number, int(arguments.rate * arguments.seconds), arguments.clients):
        due = start + one / arguments.rate
        time.sleep(max(0.0, due - time.monotonic()))
        is_shared = chance.random() < arguments.key_share
        key = f"shared {one // 8}" if is_shared else f"own {one}"
        sent = time.monotonic()
        connection.request("POST", f"{ROOT}/runs", json.dumps({"idempotency_key": key}), headers)
        response = connection.getresponse()
        body = json.loads(response.read())
        ended = time.monotonic()
        with load.lock:
            load.durations_ms.append((ended - sent) * 1000)
            load.late_ms.append((sent - due) * 1000)
            load.statuses[response.status] = load.statuses.get(response.status, 0) + 1
            if response.status in (200, 202):
                load.accepted.add(body["run_id"])
    connection.close()


def measure(pipeline: Pipeline, directory: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """The load, and then what the database says of it."""
    load = Load()
    with (
        b2s(directory, pipeline.db.dsn, "worker", "--log-format", "json"),
        serving(pipeline, directory, "--connections", str(arguments.connections)) as api,
    ):
        start = time.monotonic() + 0.5
        threads = [
            threading.Thread(target=client, args=(api.port, number, arguments, start, load))
            for number in range(arguments.clients)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        took = time.monotonic() - start
        left = "select count(*) from etl.runs where ended_at is null"
        while pipeline.value(left):
            time.sleep(0.2)
    executed = pipeline.rows(
        "select r.run_id, r.status, count(p.run_id) as attempts from etl.runs r"
        " left join etl.procedure_runs p using (run_id) group by r.run_id, r.status"
    )
    wrote = pipeline.value("select count(*) from silver.trace")
    once = [row for row in executed if row["status"] == "succeeded" and row["attempts"] == 1]
    found = {row["run_id"] for row in executed}
    assert found == load.accepted, "accepted and recorded runs differ"
    assert len(once) == len(executed) == wrote, "a run was not executed exactly once"
    centiles = statistics.quantiles(load.durations_ms, n=100)
    return {
        "rate": len(load.durations_ms) / took,
        "runs": len(executed),
        "statuses": dict(sorted(load.statuses.items())),
        "p50_ms": centiles[49],
        "p95_ms": centiles[94],
        "p99_ms": centiles[98],
        "late_ms": max(load.late_ms),
        "drained_s": time.monotonic() - start - took,
    }


def main() -> None:
    """Prints one line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rate", type=float, default=200)
    parser.add_argument("--seconds", type=float, default=15)
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--connections", type=int, default=10)
    parser.add_argument("--key-share", type=float, default=0.25)
    arguments = parser.parse_args()
    with (
        EmbeddedServer(settings={**SETTINGS, "fsync": True}) as embedded,
        tempfile.TemporaryDirectory() as place,
    ):
        server = Server("embedded", embedded.dsn, embedded.version, embedded.bindir, embedded)
        database: Database = server.create_database()
        migrate(database.dsn)
        with Pipeline(database) as pipeline:
            pipeline.add("load")
            pipeline.apply()
            found = measure(pipeline, Path(place), arguments)
        for connection in database.connections:
            connection.close()
    print(
        f"{found['rate']:.0f} requests/s, {found['runs']} runs, each executed once; {found['statuses']};"
        f" p50 {found['p50_ms']:.1f} ms, p95 {found['p95_ms']:.1f} ms, p99 {found['p99_ms']:.1f} ms;"
        f" sent at most {found['late_ms']:.0f} ms late; drained {found['drained_s']:.1f} s later;"
        f" {os.cpu_count()} cores"
    )


if __name__ == "__main__":
    main()
