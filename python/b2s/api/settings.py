"""What the API is told when it starts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final

DEFAULT_ROLES: Final[Mapping[str, str]] = {
    "etl_admin": "etl_admin",
    "etl_operator": "etl_operator",
    "etl_reader": "etl_reader",
}
"""The accepted values of the role claim, each with the database role it stands for; the first one counts."""


@dataclass(frozen=True, slots=True)
class TokenRules:
    """What a token must say."""

    audience: str
    issuer: str | None = None
    leeway_s: float = 30.0
    subject_claim: str = "sub"
    role_claim: str = "role"
    roles: Mapping[str, str] = field(default_factory=lambda: dict(DEFAULT_ROLES))


@dataclass(frozen=True, slots=True)
class Limits:
    """How much of everything there may be."""

    connections: int = 10
    waiting: int = 100
    """Requests that may wait for a connection; further ones are refused."""
    body_bytes: int = 64 * 1024
    request_s: float = 10.0
    """How long a request may take in all, its body and the database included."""
    acquire_s: float = 2.0
    """How long a request waits for a connection."""
