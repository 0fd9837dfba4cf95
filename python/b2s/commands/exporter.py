"""b2s exporter: metrics for Prometheus."""

from __future__ import annotations

import argparse
import os
import signal
import sys
import threading
from typing import Any, Final

_DEFAULT: Final = "127.0.0.1:9843"


def configure(parser: argparse.ArgumentParser) -> None:
    """The options of b2s exporter."""
    parser.epilog = (
        "The role needs etl_reader, nothing else. When the database is away the answer is b2s_up 0, and\n"
        "nothing else about the database. SIGTERM or Ctrl-C ends it."
    )
    serve = parser.add_argument_group("where to serve")
    serve.add_argument(
        "--listen",
        metavar="HOST:PORT",
        default=os.environ.get("B2S_EXPORTER_LISTEN") or _DEFAULT,
        help=f"address and port (B2S_EXPORTER_LISTEN; default {_DEFAULT})",
    )
    serve.add_argument("--once", action="store_true", help="print the metrics once, and end")
    access = parser.add_argument_group("who may read")
    for name, variable, what in (
        ("--auth-file", "B2S_EXPORTER_AUTH_FILE", "file with user:password for basic authentication"),
        ("--tls-cert", "B2S_EXPORTER_TLS_CERT", "certificate (PEM): serve https"),
        ("--tls-key", "B2S_EXPORTER_TLS_KEY", "its private key (PEM)"),
        (
            "--tls-client-ca",
            "B2S_EXPORTER_TLS_CLIENT_CA",
            "accept only clients with a certificate of it",
        ),
    ):
        access.add_argument(
            name, metavar="FILE", default=os.environ.get(variable) or None, help=f"{what} ({variable})"
        )
    parser.add_argument_group("what to show").add_argument(
        "--log-format",
        choices=("json", "console"),
        default=os.environ.get("B2S_LOG_FORMAT") or "json",
        help="what the log on stderr looks like (B2S_LOG_FORMAT; default json)",
    )


def execute(arguments: argparse.Namespace) -> int:
    """Serves until it is told to stop; with --once prints the metrics, exit code 3 without a database."""
    from dataclasses import replace

    from b2s.exporter import Scraper, serving
    from b2s.progress import logger

    log = logger(arguments.log_format, sys.stderr)
    endpoint = _endpoint(arguments)
    scraper = Scraper(arguments.dsn, log)
    if arguments.once:
        return _print_once(scraper)
    stop = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stop.set())
    with serving(endpoint, scraper) as port:
        if endpoint.credentials and not endpoint.certificate and not endpoint.host.startswith("127."):
            log.warning("password_in_the_clear", hint="add --tls-cert and --tls-key")
        log.info("exporter_started", url=replace(endpoint, port=port).url)
        scraper.read()
        stop.wait()
    log.info("exporter_stopped")
    return 0


def _endpoint(arguments: argparse.Namespace) -> Any:
    from b2s.errors import UsageError
    from b2s.exporter import Endpoint, credentials_in

    host, _, port = arguments.listen.rpartition(":")
    if not host or not port.isdecimal() or int(port) > 65535:
        raise UsageError(f"--listen {arguments.listen} is not HOST:PORT", f"such as --listen {_DEFAULT}")
    if (arguments.tls_cert is None) != (arguments.tls_key is None):
        raise UsageError(
            "a certificate needs its key, and a key its certificate", "--tls-cert FILE --tls-key FILE"
        )
    if arguments.tls_client_ca and not arguments.tls_cert:
        raise UsageError("--tls-client-ca needs TLS", "add --tls-cert FILE --tls-key FILE")
    return Endpoint(
        host.strip("[]"),
        int(port),
        arguments.tls_cert,
        arguments.tls_key,
        arguments.tls_client_ca,
        credentials_in(arguments.auth_file) if arguments.auth_file else None,
    )


def _print_once(scraper: Any) -> int:
    from prometheus_client import generate_latest

    from b2s.exporter import registry_of

    snapshot = scraper.read()
    scraper.close()
    print(generate_latest(registry_of(snapshot, is_openmetrics=False)).decode(), end="")
    return 0 if snapshot.error is None else 3
