"""b2s demo: the worked pipeline from an empty server to a repaired failure."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def configure(parser: argparse.ArgumentParser) -> None:
    """The options of b2s demo."""
    parser.epilog = (
        "Without --dsn a private Postgres is started (pip install 'b2s[embedded]') and removed at the end.\n"
        "With --dsn the tour takes place in that database, which must have no schema bronze, silver or mart."
    )
    parser.add_argument("--keep", action="store_true", help="leave the server running, to look around in it")
    parser.add_argument(
        "--data-dir", type=Path, metavar="DIR", help="where the private server keeps its data; it stays there"
    )
    parser.add_argument("--stop", action="store_true", help="stop the server that --keep left in --data-dir")


def execute(arguments: argparse.Namespace) -> int:
    """Gives the tour, and removes its server whatever ends it."""
    from b2s.errors import UsageError
    from b2s.tour import Tour

    if arguments.stop:
        return _stop(arguments.data_dir)
    if arguments.dsn and (arguments.keep or arguments.data_dir):
        raise UsageError(
            "--keep and --data-dir are for the private server", "leave them out, or leave out --dsn"
        )
    with _database(arguments) as dsn:
        Tour(dsn, is_json=arguments.json).give()
    return 0


@contextmanager
def _database(arguments: argparse.Namespace) -> Iterator[str]:
    """Where the tour takes place: the database of --dsn, or a new one in a private server."""
    from b2s.tour import check_is_free, new_database

    if arguments.dsn:
        check_is_free(arguments.dsn)
        yield arguments.dsn
        return
    from b2s.embedded import EmbeddedServer
    from b2s.output import remark

    directory = arguments.data_dir or (_new_directory() if arguments.keep else None)
    remark("starting a private Postgres")
    server = EmbeddedServer(directory)
    _end_on_sigterm()
    server.start()
    try:
        new_database(server.dsn)
        yield server.dsn_of("b2s_demo")
    finally:
        if arguments.keep:
            home = server.directory
            where = f"export B2S_DSN='{server.dsn_of('b2s_demo')}'"
            remark(
                f'\nthe server goes on:\n  {where}\n  psql "$B2S_DSN"\n  b2s demo --stop --data-dir {home}'
            )
        else:
            server.stop()


def _end_on_sigterm() -> None:
    """SIGTERM ends the demo as Ctrl-C does, so that the server does not stay behind."""
    import signal
    import threading

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, interrupt)


def _new_directory() -> Path:
    import secrets
    import tempfile

    return Path(tempfile.gettempdir()) / f"b2s-demo-{secrets.token_hex(4)}"


def _stop(directory: Path | None) -> int:
    from b2s.embedded import EmbeddedServer
    from b2s.errors import UsageError

    if directory is None or not directory.is_dir():
        raise UsageError(
            "--stop needs the --data-dir of the server", "it was printed when the server was left running"
        )
    EmbeddedServer(directory).stop()
    print(f"stopped; {directory} can be deleted", file=sys.stderr)
    return 0
