"""A procedure's entry in transformations.yaml: written into the text, so that comments and order stay."""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from b2s.config import load_config
from b2s.errors import UsageError
from b2s.names import parts_of, quoted
from b2s.scaffold.patterns import SNAPSHOT_ON, Design
from b2s.yamlsource import scalar

_LIST: Final = re.compile(r"^procedures:[ \t]*(\[\s*\])?[ \t]*(#.*)?$", re.MULTILINE)
_ITEM: Final = re.compile(r"^( *)- ", re.MULTILINE)
_TOP: Final = re.compile(r"^[^\s#-]", re.MULTILINE)
HEADER: Final = "# yaml-language-server: $schema=./transformations.schema.json\nversion: 1\n"


def entry_lines(
    design: Design, name: str, kind: str, dependencies: list[str], description: str | None
) -> Iterator[str]:
    """The lines of the entry, not indented."""
    yield f"- name: {name}"
    yield f"  routine: {scalar(design.routine)}"
    yield f"  type: {kind}"
    if description:
        yield f"  description: {scalar(description)}"
    if dependencies:
        yield f"  dependencies: [{', '.join(dependencies)}]"
    if design.takes_mode:
        yield "  allow_full_refresh: true"
    if design.watermark:
        source = f"{design.source}.{quoted(design.watermark)}"
        yield f"  watermark: {{strategy: {design.strategy}, source: {scalar(source)}}}"
    if design.pattern == "snapshot":
        yield "  params:"
        meaning = "the day it stands for; default: today, UTC"
        yield f"    {SNAPSHOT_ON}: {{type: string, format: date, description: '{meaning}'}}"


def with_entry(text: str, lines: list[str]) -> str | None:
    """The text of a configuration with one more procedure at the end of its list; None when the list is
    written in a way that text cannot be added to.
    """
    found = _LIST.search(text)
    if found is None:
        return None
    following = _TOP.search(text, found.end())
    end = following.start() if following else len(text)
    block = text[found.end() : end]
    item = _ITEM.search(block)
    indent = item[1] if item else "  "
    kept = re.sub(r"(\n[ \t]*(#[^\n]*)?)*\Z", "", block) if following else block.rstrip()
    rest = block[len(kept) :].lstrip("\n")
    added = "".join(f"{indent}{line}\n" for line in lines)
    head = text[: found.start()] + "procedures:" + (f" {found[2]}" if found[2] else "") + kept
    return head + "\n" + added + (f"\n{rest}" if rest.strip() else "\n" * bool(following)) + text[end:]


def add_entry(path: Path, lines: list[str]) -> None:
    """Adds an entry to a file, which is made when it is not there. Nothing is written that would not load.

    Raises ConfigError for a file that is broken already, UsageError where text cannot be added.
    """
    if path.exists():
        load_config(path)
        text = with_entry(path.read_text(encoding="utf-8"), lines)
    else:
        text = HEADER + "procedures:\n" + "".join(f"  {line}\n" for line in lines)
    problem = (
        "its list of procedures is not written one below the other" if text is None else _problem(path, text)
    )
    if text is None or problem:
        raise UsageError(
            f"{path} was left as it is: {problem}",
            "--stdout prints the SQL and the entry, to be added by hand",
        )
    _replace(path, text)


def _problem(path: Path, text: str) -> str | None:
    """What a configuration would say to its new text, or None."""
    from b2s.config import ConfigError

    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / path.name
        copy.write_text(text, encoding="utf-8")
        try:
            load_config(copy)
        except ConfigError as error:
            return error.problems[0].message
    return None


def _replace(path: Path, text: str) -> None:
    """Writes a file whole or not at all."""
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    partial.write_text(text, encoding="utf-8")
    if path.exists():
        partial.chmod(path.stat().st_mode)
    partial.replace(path)


def grants_sql(design: Design) -> str:
    """What etl_owner, as which steps run, needs."""
    schemas = dict.fromkeys(
        quoted(parts_of(one)[0]) for one in (design.source, design.target, design.routine)
    )
    return "\n".join(
        [
            f"grant usage on schema {', '.join(schemas)} to etl_owner;",
            f"grant select on {design.source} to etl_owner;",
            f"grant select, insert, update, delete on {design.target} to etl_owner;",
            f"grant execute on function {design.routine} to etl_owner;",
        ]
    )
