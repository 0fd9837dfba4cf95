"""Values of options that are written as the file writes them."""

from __future__ import annotations

from b2s.configvalues import Refused, bounded_duration
from b2s.errors import UsageError


def seconds(option: str, text: str) -> float:
    """A duration such as `10s` in seconds. Raises UsageError that names the option."""
    try:
        return bounded_duration(text) / 1000
    except Refused as refusal:
        raise UsageError(f"{option} {text} {refusal}", f"for example: {option} 10s") from None
