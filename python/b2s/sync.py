"""From transformations.yaml to the catalog: plan, then apply in one transaction."""

from __future__ import annotations

import getpass
import json
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psycopg

from b2s.config import ConfigError, LoadedConfig, load_config
from b2s.db import Connection
from b2s.errors import detail_of


@dataclass(frozen=True, slots=True)
class Change:
    """One line of a plan: + added, ~ changed (field: (old, new)), - removed."""

    action: str
    kind: str
    name: str
    fields: dict[str, tuple[Any, Any]]


@dataclass(frozen=True, slots=True)
class SyncPlan:
    """What a configuration would change, the digest it was planned against, how the catalog has drifted."""

    pipeline: str
    base_digest: str | None
    digest: str
    version: int | None
    changes: tuple[Change, ...]
    drift: tuple[Change, ...]

    @classmethod
    def of(cls, document: dict[str, Any]) -> SyncPlan:
        """The plan that etl.plan_config or etl.apply_config returned."""

        def changes(key: str) -> tuple[Change, ...]:
            return tuple(
                Change(
                    c["action"],
                    c["kind"],
                    c["name"],
                    {f: (old, new) for f, (old, new) in (c["fields"] or {}).items()},
                )
                for c in document[key]
            )

        return cls(
            document["pipeline"],
            document["base_digest"],
            document["digest"],
            document["version"],
            changes("changes"),
            changes("drift"),
        )


def plan_config(connection: Connection, loaded: LoadedConfig) -> SyncPlan:
    """What applying would change; writes nothing. Raises ConfigError with the place of every problem."""
    return SyncPlan.of(_call(connection, loaded, "select etl.plan_config(%s)", [json.dumps(loaded.spec())]))


def apply_config(connection: Connection, loaded: LoadedConfig, plan: SyncPlan) -> SyncPlan:
    """Applies exactly the plan shown. Raises DatabaseError config.stale when the catalog changed since."""
    arguments = [
        json.dumps(loaded.spec()),
        plan.base_digest or "",
        _author(),
        _git_revision(Path(loaded.source.path)),
        loaded.source.path,
    ]
    return SyncPlan.of(_call(connection, loaded, "select etl.apply_config(%s, %s, %s, %s, %s)", arguments))


def sync_config(connection: Connection, path: Path) -> SyncPlan:
    """Loads, plans and applies a file in one go."""
    loaded = load_config(path)
    return apply_config(connection, loaded, plan_config(connection, loaded))


def _call(
    connection: Connection, loaded: LoadedConfig, query: str, arguments: list[str | None]
) -> dict[str, Any]:
    try:
        row = connection.execute(query.encode(), arguments).fetchone()
    except psycopg.Error as error:
        found = detail_of(error)
        if found.get("code") == "config.invalid":
            source = loaded.source
            raise ConfigError(
                source, [source.problem(tuple(e["loc"]), e["message"], e["hint"]) for e in found["errors"]]
            ) from error
        raise
    assert row is not None  # noqa: S101
    document: dict[str, Any] = row[0]
    return document


def _author() -> str:
    try:
        return getpass.getuser()
    except (OSError, KeyError):
        return "unknown"


def _git_revision(path: Path) -> str | None:
    """The commit of the file's repository, with -dirty when the file differs from it; None outside one."""
    git = shutil.which("git")
    if git is None:
        return None

    def run(*arguments: str) -> str | None:
        done = subprocess.run(
            [git, "-C", str(path.resolve().parent), *arguments],
            capture_output=True,
            text=True,
            check=False,
            timeout=10,
        )
        return done.stdout.strip() if done.returncode == 0 else None

    revision = run("rev-parse", "HEAD")
    if revision and run("status", "--porcelain", "--", path.name):
        return f"{revision}-dirty"
    return revision
