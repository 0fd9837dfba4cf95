"""The SQL that b2s installs: found inside the wheel, or in the checkout when b2s is installed as editable."""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from b2s.errors import UsageError

_FRAME: Final = ("install/begin.sql", "install/migration.sql", "install/finish.sql")
"""What stands around the migrations and the code."""


@dataclass(frozen=True, slots=True)
class Migration:
    """A file that is applied once and frozen. sha256 is what the manifest says the file must have."""

    name: str
    sha256: str
    sql: str


@dataclass(frozen=True, slots=True)
class Manifest:
    """What plpgsql/install.sql lists: where an install begins and ends, the migrations, the code."""

    begin: str
    migrations: tuple[Migration, ...]
    code: tuple[str, ...]
    finish: str


def sql_root() -> Path:
    """The folder that holds migrations/ and plpgsql/."""
    here = Path(__file__).resolve()
    for root in (here.parent / "sql", here.parents[2]):
        if (root / "plpgsql" / "install.sql").is_file():
            return root
    raise UsageError(
        "this installation of b2s has no SQL files", "install it again: pip install --force-reinstall b2s"
    )


def load_manifest(root: Path | None = None) -> Manifest:
    """Reads install.sql and every file it names. Raises UsageError when a frozen migration was edited."""
    root = root or sql_root()
    folder = root / "plpgsql"
    lines = (folder / "install.sql").read_text(encoding="utf-8").splitlines()
    migrations: list[Migration] = []
    code: list[str] = []
    name = ""
    for line in lines:
        if match := re.fullmatch(r"\\set migration (\w+)", line):
            name = match[1]
        elif match := re.fullmatch(r"\\set sha256 ([0-9a-f]{64})", line):
            migrations.append(_read_migration(root, name, match[1]))
        elif (match := re.fullmatch(r"\\ir (\S+)", line)) and match[1] not in _FRAME:
            code.append((folder / match[1]).read_text(encoding="utf-8"))
    begin, finish = (
        (folder / "install" / part).read_text(encoding="utf-8") for part in ("begin.sql", "finish.sql")
    )
    return Manifest(begin, tuple(migrations), tuple(code), finish)


def _read_migration(root: Path, name: str, sha256: str) -> Migration:
    content = (root / "migrations" / f"{name}.sql").read_bytes()
    if hashlib.sha256(content).hexdigest() != sha256:
        raise UsageError(
            f"migrations/{name}.sql differs from the sha256 that plpgsql/install.sql has for it",
            "a released migration is frozen: restore the file, and put the change into a new migration",
        )
    return Migration(name, sha256, content.decode("utf-8"))
