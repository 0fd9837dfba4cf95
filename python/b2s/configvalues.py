"""The small languages of a configuration: names, durations, cron times, time zones, patterns, params."""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Mapping, Sequence
from datetime import date, datetime
from typing import Any, Final
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError, available_timezones

MAX_MILLISECONDS: Final = 2**31 - 1
MAX_FRESHNESS: Final = 3650 * 86_400_000
MAX_BIGINT: Final = 2**63 - 1
MAX_NAME_LENGTH: Final = 63

_PART: Final = r"[a-z_][a-z0-9_]*"
IDENTIFIER: Final = rf"{_PART}"
QUALIFIED: Final = rf"{_PART}(\.{_PART})?"
_QUOTABLE: Final = rf'({_PART}|"[^"]+")'
RELATION: Final = rf"{_QUOTABLE}(\.{_QUOTABLE})?"
TABLE_COLUMN: Final = rf"{_QUOTABLE}\.{_QUOTABLE}\.{_QUOTABLE}"
QUERY: Final = r"\s*([Ss][Ee][Ll][Ee][Cc][Tt]|[Ww][Ii][Tt][Hh])\s[\s\S]+"
ROUTINE: Final = rf"{_QUOTABLE}(\.{_QUOTABLE})?(\([^()]*\))?"

_UNITS: Final = {
    "ms": 1,
    "s": 1000,
    "sec": 1000,
    "second": 1000,
    "seconds": 1000,
    "min": 60_000,
    "minute": 60_000,
    "minutes": 60_000,
    "h": 3_600_000,
    "hour": 3_600_000,
    "hours": 3_600_000,
    "d": 86_400_000,
    "day": 86_400_000,
    "days": 86_400_000,
}
DURATION: Final = rf"[0-9]{{1,9}} ?({'|'.join(sorted(_UNITS, key=len, reverse=True))})"
_DURATION: Final = re.compile(DURATION)
DURATION_EXAMPLES: Final = "500ms, 30s, 5min, 2h or 1 day"

DAYS: Final = r"([0-9]{1,5}) ?d(?:ays?)?"
_DAYS: Final = re.compile(DAYS)
MAX_DAYS: Final = 36_500

_SECONDS_CRON: Final = re.compile(r"([0-9]{1,2}) seconds?")
_CRON_FIELDS: Final = (
    ("minute", 0, 59),
    ("hour", 0, 23),
    ("day of month", 1, 31),
    ("month", 1, 12),
    ("day of week", 0, 7),
)
_CRON_MACROS: Final = {
    "@hourly": "0 * * * *",
    "@daily": "0 0 * * *",
    "@midnight": "0 0 * * *",
    "@weekly": "0 0 * * 0",
    "@monthly": "0 0 1 * *",
    "@yearly": "0 0 1 1 *",
    "@annually": "0 0 1 1 *",
}
_CRON_ITEM: Final = re.compile(r"(?:\*|([0-9]{1,2})(?:-([0-9]{1,2}))?)(?:/([0-9]{1,2}))?")

_DATE: Final = re.compile(r"[0-9]{4}-[0-9]{2}-[0-9]{2}")
_DATE_TIME: Final = re.compile(
    r"[0-9]{4}-[0-9]{2}-[0-9]{2}[T ][0-9]{2}:[0-9]{2}:[0-9]{2}(\.[0-9]{1,6})?(Z|[+-][0-9]{2}:[0-9]{2})"
)
_UUID: Final = re.compile(r"[0-9a-fA-F]{8}(-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}")
_MAX_REPEAT: Final = 255


class Refused(ValueError):
    """A value outside its language: the message completes `<value> ...`; `hint` is the remedy."""

    def __init__(self, message: str, hint: str | None = None) -> None:
        super().__init__(message)
        self.hint = hint


def shown(value: object) -> str:
    """A value as a message quotes it: YAML words for YAML values, cut when long."""
    if value is None:
        return "nothing"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, dict):
        return "a mapping"
    if isinstance(value, list | tuple):
        return "a list"
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:60]}...{text[-1]}"


def check_name(value: str, pattern: str, shape: str) -> str:
    """Returns the name, or raises Refused: `shape` says what was expected, such as `schema.name`."""
    if re.fullmatch(pattern, value):
        for part in value.partition("(")[0].split("."):
            if len(part) > MAX_NAME_LENGTH:
                raise Refused(
                    f"is longer than {MAX_NAME_LENGTH} characters, the most Postgres keeps of a name"
                )
        return value
    lower = value.strip().lower().replace("-", "_")
    hint = f"write {lower!r}" if lower != value and re.fullmatch(pattern, lower) else None
    raise Refused(f"is not of the form {shape}, in lower case letters, digits and underscores", hint)


def is_query(source: str) -> bool:
    """Whether the source of a watermark is a query and not a column."""
    return re.fullmatch(QUERY, source) is not None


def check_source(value: str) -> str:
    """Returns the source of a watermark, or raises Refused."""
    if is_query(value):
        return value
    return check_name(value, TABLE_COLUMN, "schema.table.column, or a query")


def parse_duration(value: object) -> int:
    """A duration such as `5min` in milliseconds. Raises Refused."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        raise Refused(
            "is not a duration: it has no unit", f"write {value}s for seconds, or {value}min for minutes"
        )
    if not isinstance(value, str) or not (match := _DURATION.fullmatch(value)):
        raise Refused("is not a duration", f"write a whole number and a unit: {DURATION_EXAMPLES}")
    return int(value[: match.start(1)]) * _UNITS[match.group(1)]


def bounded_duration(value: object) -> int:
    """A duration that fits the integer milliseconds of the database. Raises Refused."""
    milliseconds = parse_duration(value)
    if milliseconds > MAX_MILLISECONDS:
        raise Refused("is longer than 24 days, the most a duration may be here")
    return milliseconds


def parse_days(value: object) -> int | str:
    """`400 days` as a number, `forever` as it is. Raises Refused."""
    if value == "forever":
        return "forever"
    match = _DAYS.fullmatch(value) if isinstance(value, str) else None
    if match is None or not 1 <= int(match.group(1)) <= MAX_DAYS:
        hint = f"write {value} days" if isinstance(value, int) and not isinstance(value, bool) else None
        raise Refused("is not a number of days, nor forever", hint or "write 400 days, or forever")
    return int(match.group(1))


def check_cron(value: str) -> str:
    """Returns a cron time of five fields, or `N seconds`. Raises Refused."""
    if match := _SECONDS_CRON.fullmatch(value):
        if not 1 <= int(match.group(1)) <= 59:
            raise Refused("is not a time: seconds go from 1 to 59", "write a cron time of five fields")
        return value
    if value in _CRON_MACROS:
        raise Refused("is not a cron time of five fields", f"write {_CRON_MACROS[value]!r}")
    fields = value.split()
    if len(fields) != len(_CRON_FIELDS):
        hint = "minute, hour, day of month, month, day of week, such as '0 2 * * *'; or '30 seconds'"
        raise Refused(f"has {len(fields)} fields; a cron time has five", hint)
    for text, (name, low, high) in zip(fields, _CRON_FIELDS, strict=True):
        for item in text.split(","):
            _check_cron_item(item, name, low, high)
    return value


def _check_cron_item(item: str, name: str, low: int, high: int) -> None:
    match = _CRON_ITEM.fullmatch(item)
    if match is None:
        hint = f"{name} takes numbers from {low} to {high}: *, 5, 1-5, */10, 1,15"
        raise Refused(f"has {item!r} as its {name}", hint)
    first, last, step = match.groups()
    for number in (first, last):
        if number is not None and not low <= int(number) <= high:
            raise Refused(f"has {number} as its {name}, which goes from {low} to {high}")
    if first is not None and last is not None and int(first) > int(last):
        raise Refused(f"has the range {first}-{last} as its {name}, which runs backwards")
    if step is not None and first is not None and last is None:
        raise Refused(f"has a step without a range as its {name}", f"write {first}-{high}/{step}")
    if step is not None and not 1 <= int(step) <= high:
        raise Refused(f"has the step {step} as its {name}, which goes from 1 to {high}")


def check_timezone(value: str) -> str:
    """Returns a time zone name known to the time zone database. Raises Refused."""
    if value == "UTC":
        return value
    try:
        ZoneInfo(value)
    except (ZoneInfoNotFoundError, ValueError, OSError):
        names = available_timezones()
        if not names:
            return value
        same = [name for name in sorted(names) if name.lower() == value.lower()]
        hint = f"did you mean {same[0]!r}?" if same else "write a name such as 'UTC' or 'Europe/Berlin'"
        raise Refused("is not a known time zone", hint) from None
    return value


def check_pattern(pattern: str) -> str:
    """Returns a regular expression that means the same to Postgres and to Python. Raises Refused."""
    _scan_pattern(pattern)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            _compiled(pattern)
    except (re.error, RecursionError, OverflowError, Warning) as error:
        raise Refused(f"is not a usable pattern: {error}") from None
    return pattern


def _compiled(pattern: str) -> re.Pattern[str]:
    """The pattern for Python, with Postgres' meaning of `$` (the very end) and `.` (newline included)."""
    pieces: list[str] = []
    in_set, index = False, 0
    while index < len(pattern):
        char = pattern[index]
        if char == "\\":
            pieces.append(pattern[index : index + 2])
            index += 2
            continue
        if in_set:
            in_set = char != "]"
        elif char == "[":
            in_set = True
        pieces.append(r"\Z" if char == "$" and not in_set else char)
        index += 1
    return re.compile("".join(pieces), re.DOTALL | re.ASCII)


_COMMON_ESCAPES: Final = frozenset("dDwWsSnrtfv")


def _scan_pattern(pattern: str) -> None:
    """Refuses what only one of Postgres and Python knows, or what they read differently."""
    index, in_set, after_quantifier = 0, False, False
    while index < len(pattern):
        char, rest = pattern[index], pattern[index:]
        if char == "\\":
            _check_escape(rest[1:2])
            index, after_quantifier = index + 2, False
            continue
        if in_set:
            if char == "[":
                raise Refused("has a [ inside a set", r"write \[ there")
            in_set = char != "]"
            index, after_quantifier = index + 1, False
            continue
        if char == "[":
            in_set = True
            index += 2 if rest.startswith("[^") else 1
            if pattern[index : index + 1] == "]":
                raise Refused("has a set that begins with ]", r"write \] there")
            continue
        if rest.startswith("(?") and not rest.startswith("(?:"):
            raise Refused(
                f"uses {_group_name(rest)}, which not every engine knows", "use only ( ) and (?: ) groups"
            )
        if rest.startswith("(?:"):
            index, after_quantifier = index + 3, False
            continue
        quantifier = re.match(r"[*+?]|\{[0-9]+(?:,[0-9]*)?\}", rest)
        if quantifier:
            _check_quantifier(quantifier.group(), after_quantifier)
            after_quantifier = not (after_quantifier and char == "?")
            index += quantifier.end()
            continue
        if char in "{}":
            raise Refused(
                f"has a {char} that is no repeat such as {{2}}, {{2,}} or {{2,5}}", rf"write \{char}"
            )
        index, after_quantifier = index + 1, False


def _check_escape(char: str) -> None:
    if char.isalnum() and char not in _COMMON_ESCAPES:
        raise Refused(
            f"uses \\{char}, which Postgres and Python read differently",
            r"of the escapes with a letter or digit, use only \d \w \s \D \W \S \n \r \t \f \v",
        )


def _check_quantifier(text: str, after_quantifier: bool) -> None:
    if after_quantifier and text != "?":
        raise Refused(f"repeats a repeat with {text}", "put the first repeat into a (?: ) group")
    if any(int(number) > _MAX_REPEAT for number in re.findall(r"[0-9]{1,9}", text)):
        raise Refused(f"repeats {text}; Postgres repeats at most {_MAX_REPEAT} times")


def _group_name(rest: str) -> str:
    if rest.startswith(("(?=", "(?!", "(?<=", "(?<!")):
        return "look-around"
    if rest.startswith(("(?P", "(?<")):
        return "a named group"
    return f"the group {rest[:3]}"


def why_not(declaration: Mapping[str, Any], value: object) -> str | None:
    """Why `value` is not allowed by a param's declaration (the keys of the YAML); None if it is.

    The answer completes the sentence `<value> ...`.
    """
    reason = _wrong_type(declaration["type"], value)
    if reason is not None:
        return reason
    if isinstance(value, list | tuple):
        return _wrong_list(declaration, value)
    if isinstance(value, str):
        reason = _wrong_text(declaration, value)
    elif isinstance(value, int | float) and not isinstance(value, bool):
        reason = _wrong_number(declaration, value)
    choices = declaration.get("enum")
    if reason is None and choices is not None and value not in choices:
        return f"is not one of {', '.join(shown(choice) for choice in choices)}"
    return reason


def _wrong_type(kind: str, value: object) -> str | None:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if kind == "string":
        return None if isinstance(value, str) else "is not a string"
    if kind == "boolean":
        return None if isinstance(value, bool) else "is not a boolean"
    if kind == "array":
        return None if isinstance(value, list | tuple) else "is not a list"
    if kind == "integer":
        if not is_number or not isinstance(value, int):
            return "is not an integer"
        return None if -MAX_BIGINT - 1 <= value <= MAX_BIGINT else "does not fit a bigint"
    return None if is_number and math.isfinite(_as_float(value)) else "is not a finite number"


def _as_float(value: object) -> float:
    return float(value) if isinstance(value, int | float) and abs(value) < 10**300 else math.inf


def _wrong_number(declaration: Mapping[str, Any], value: float) -> str | None:
    minimum, maximum = declaration.get("minimum"), declaration.get("maximum")
    if minimum is not None and value < minimum:
        return f"is below the minimum of {minimum}"
    if maximum is not None and value > maximum:
        return f"is above the maximum of {maximum}"
    return None


def _wrong_text(declaration: Mapping[str, Any], value: str) -> str | None:
    shortest, longest = declaration.get("minLength"), declaration.get("maxLength")
    if shortest is not None and len(value) < shortest:
        return f"is shorter than minLength {shortest}"
    if longest is not None and len(value) > longest:
        return f"is longer than maxLength {longest}"
    pattern = declaration.get("pattern")
    if pattern is not None and not _compiled(pattern).search(value):
        return f"does not match the pattern {shown(pattern)}"
    text_format = declaration.get("format")
    if text_format is not None and not _has_format(text_format, value):
        return f"is not a {_FORMATS[text_format]}"
    return None


_FORMATS: Final = {
    "date": "date such as 2026-01-31",
    "date-time": "date-time such as 2026-01-31T12:00:00Z",
    "uuid": "uuid",
}


def _has_format(text_format: str, value: str) -> bool:
    if text_format == "uuid":
        return _UUID.fullmatch(value) is not None
    try:
        if text_format == "date":
            return _DATE.fullmatch(value) is not None and date.fromisoformat(value) is not None
        return _DATE_TIME.fullmatch(value) is not None and datetime.fromisoformat(value) is not None
    except ValueError:
        return False


def _wrong_list(declaration: Mapping[str, Any], value: Sequence[object]) -> str | None:
    fewest, most = declaration.get("minItems"), declaration.get("maxItems")
    if fewest is not None and len(value) < fewest:
        return f"has fewer items than minItems {fewest}"
    if most is not None and len(value) > most:
        return f"has more items than maxItems {most}"
    for item in value:
        reason = _wrong_type(declaration["items"]["type"], item)
        if reason is not None:
            return f"holds {shown(item)}, which {reason}"
    return None
