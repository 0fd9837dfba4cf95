"""Starting a backfill and staying with it, as `b2s.runner` does with a run."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, Final

from b2s.runner import Runner

_CASTS: Final = {
    "procedures": "text[]", "from_": "text", "until": "text", "chunk": "text", "params": "jsonb",
    "pause": "interval", "reason": "text", "resume": "bigint", "idempotency_key": "text", "pipeline": "text",
}  # fmt: skip
"""The arguments of etl.backfill, each with its type."""


def arguments_of(request: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """A request as named SQL arguments and their values."""
    named = ", ".join(f"{name} => %({name})s::{_CASTS[name]}" for name in request)
    return named, {
        name: json.dumps(value) if _CASTS[name] == "jsonb" else value for name, value in request.items()
    }


class BackfillRunner(Runner):
    """One CALL of etl.backfill, watched."""

    def _statement(self) -> tuple[str, dict[str, Any]]:
        named, values = arguments_of(self._request)
        return f"call etl.backfill({named})", values
