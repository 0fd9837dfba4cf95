"""The tour that `b2s demo` gives: real commands with their real output, in the order a user meets them."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from psycopg import conninfo, sql

from b2s import demo, sqlfiles
from b2s.db import Connection, connect
from b2s.demo import generate
from b2s.errors import B2SError, UsageError
from b2s.output import print_json, print_lines, style
from b2s.render import Column, plural, table

DATABASE: Final = "b2s_demo"
_SCHEMAS: Final = ("bronze", "silver", "mart")
_PATIENCE: Final = 15.0
_CONTENTS: Final = (
    "silver.dim_categories", "silver.dim_locations", "silver.dim_customers", "silver.dim_products",
    "silver.fact_sales", "silver.fact_orders", "mart.sales_by_month", "mart.sales_trend",
)  # fmt: skip


def configuration() -> Path:
    """The worked transformations.yaml: in the wheel, else the checkout. UsageError: there is none."""
    for place in (Path(demo.__file__).parent, sqlfiles.sql_root()):
        if (place / "transformations.yaml").is_file():
            return place / "transformations.yaml"
    raise UsageError(
        "this installation of b2s has no demo", "install it again: pip install --force-reinstall b2s"
    )


def check_is_free(dsn: str) -> None:
    """Raises UsageError when a database has something where the tour puts its own."""
    with connect(dsn) as connection:
        taken = [name for (name,) in connection.execute(
            "select nspname from pg_namespace where nspname = any (%s) order by 1", [list(_SCHEMAS)]
        )]  # fmt: skip
        if taken:
            raise UsageError(
                f"database {connection.info.dbname} has schema {', '.join(taken)}; the demo makes its own",
                f"give it an empty database: createdb {DATABASE}",
            )


def new_database(dsn: str) -> None:
    """Makes the database of the tour in a private server, in place of an earlier one."""
    with connect(dsn) as connection:
        name = sql.Identifier(DATABASE)
        connection.execute(sql.SQL("drop database if exists {} with (force)").format(name))
        connection.execute(sql.SQL("create database {}").format(name))


class TourError(B2SError):
    """A command of the tour did not end as it should (exit code 1)."""

    exit_code = 1


class Tour:
    """One tour through one database."""

    def __init__(self, dsn: str, *, is_json: bool = False) -> None:
        self._dsn = dsn
        self._is_json = is_json
        self._config = configuration()
        self._style = style()

    def give(self) -> None:
        """Gives the whole tour. Raises TourError where a command does not end as it should."""
        before = {name: os.environ.get(name) for name in ("B2S_DSN", "B2S_CONFIG")}
        os.environ.update(B2S_DSN=self._dsn, B2S_CONFIG=str(self._config))
        try:
            with connect(self._dsn) as connection:
                self._prepare(connection)
                self._move_what_is_new(connection)
                self._refresh_fully()
                self._fail_and_repair(connection)
                self._conclude(connection)
        finally:
            for name, value in before.items():
                os.environ.pop(name, None)
                if value is not None:
                    os.environ[name] = value

    def _prepare(self, connection: Connection) -> None:
        self._chapter("1. Install b2s: one schema, etl, and no daemon")
        shown = {
            name: value for name, value in conninfo.conninfo_to_dict(self._dsn).items() if name != "password"
        }
        self._type_shell(f"export B2S_DSN='{conninfo.make_conninfo('', **shown)}'")
        self._type_shell(f"export B2S_CONFIG={self._config}")
        self._b2s("migrate")
        self._chapter(
            "2. Bronze as a CRM and an ERP sent it, and Silver as a team wrote it: a routine per table"
        )
        demo.install(connection)
        sent = generate.generate(connection)
        self._say(f"{plural(sum(sent.values()), 'row')} in {plural(len(sent), 'table')} of schema bronze")
        self._b2s("sync-config")
        self._b2s("plan")

    def _move_what_is_new(self, connection: Connection) -> None:
        self._chapter("3. The first run reads everything")
        self._wait_until_readable(connection)
        self._b2s("run")
        self._chapter("4. New rows and corrections arrive; the second run reads only those")
        arrived = generate.arrive(connection)
        self._say(", ".join(f"{count} {name.replace('_', ' ')}" for name, count in arrived.items()))
        self._wait_until_readable(connection)
        self._b2s("run")

    def _refresh_fully(self) -> None:
        self._chapter("5. A full refresh is refused until it is confirmed, with a reason that is kept")
        self._b2s("run", "silver.fact_sales", "--mode", "full", expected=3)
        self._b2s(
            "run", "silver.fact_sales", "--mode", "full", "--confirm-full-refresh", "--reason", "for the demo"
        )  # fmt: skip

    def _fail_and_repair(self, connection: Connection) -> None:
        self._chapter(
            "6. A bad row arrives: the step that trips over it is rolled back alone, all others stay"
        )
        generate.break_it(connection)
        self._wait_until_readable(connection)
        self._b2s("run", expected=1)
        self._b2s("show", "latest")
        self._chapter("7. The source corrects the row; the next run is whole again")
        generate.repair(connection)
        self._wait_until_readable(connection)
        self._b2s("run")

    def _conclude(self, connection: Connection) -> None:
        self._chapter("8. What is in Silver now")
        rows: list[tuple[str, int, str]] = []
        for name in _CONTENTS:
            schema, relation = name.split(".")
            count = sql.SQL("select count(*) from {}").format(sql.Identifier(schema, relation))
            description = "select obj_description(%s::regclass, 'pg_class')"
            counted, described = (
                connection.execute(query, arguments).fetchone() or (None,)
                for query, arguments in ((count, None), (description, [name]))
            )
            rows.append((name, counted[0] or 0, described[0] or ""))
        if self._is_json:
            print_json({name: count for name, count, _ in rows})
            return
        columns = (Column("table"), Column("rows", is_number=True), Column("what it is", may_wrap=True))
        print_lines(table(columns, rows, self._style))
        self._b2s("status")
        self._chapter("Where to go next")
        self._say(
            "write your own transformations.yaml; b2s schema gives an editor what it needs to help with it"
        )
        self._say("b2s --help lists the commands, b2s doctor checks an installation")

    # -- showing --

    def _chapter(self, title: str) -> None:
        if not self._is_json:
            print(f"\n{self._style.paint(title, 'bold')}", flush=True)

    def _say(self, text: str) -> None:
        if not self._is_json:
            print(self._style.paint(f"# {text}", "dim"), flush=True)

    def _type_shell(self, command: str) -> None:
        if not self._is_json:
            print(f"{self._style.paint('$', 'green')} {self._style.paint(command, 'bold')}", flush=True)

    def _b2s(self, *words: str, expected: int = 0) -> None:
        """Runs a command in this process, output included. Raises TourError for a surprising exit code."""
        from b2s.cli import main

        self._type_shell("b2s " + " ".join(_quoted(words)))
        stdout = sys.stdout
        if self._is_json:
            sys.stdout = sys.stderr
        try:
            code = main(words)
        finally:
            sys.stdout = stdout
        sys.stdout.flush()
        if code == 130:
            raise SystemExit(code)
        if code != expected:
            raise TourError(
                f"b2s {words[0]} ended with exit code {code}, not {expected}; the demo stops here",
                "b2s doctor looks for what is wrong with the server",
            )

    def _wait_until_readable(self, connection: Connection) -> None:
        """Waits until the next run may read the newest row: its safe bound follows the clock.

        The bound is what b2s plan shows as the end of the window. Raises UsageError when it is held back.
        """
        newest = "select to_jsonb(max(ingested_at)) #>> '{}' from bronze.crm_sales_details"
        readable = (
            "select count(*) = 0 from etl.plan_run() p where p.name = 'silver.fact_sales'"
            " and p.window_until::timestamptz <= %s::timestamptz"
        )
        (row,) = connection.execute(newest.encode()).fetchall()
        end = time.monotonic() + _PATIENCE
        while connection.execute(readable.encode(), row).fetchone() != (True,):
            if time.monotonic() > end:
                raise UsageError(
                    "an open transaction in this database keeps new rows from being read",
                    "end it, then start again: select * from pg_stat_activity where xact_start is not null",
                )
            time.sleep(0.05)


def _quoted(words: Sequence[str]) -> list[str]:
    return [f"'{word}'" if " " in word else word for word in words]
