"""Where events go: a file of JSON lines, or an HTTP endpoint. No error of a sink says a secret."""

from __future__ import annotations

import base64
import json
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterable
from http.client import HTTPException
from pathlib import Path
from typing import Any, Final, Protocol
from urllib.parse import SplitResult, parse_qsl, unquote, urlsplit, urlunsplit

from b2s import __version__
from b2s.errors import B2SError, UsageError

_PATH: Final = "/api/v1/lineage"
_TRANSIENT: Final = frozenset({408, 425, 429, 500, 502, 503, 504})
_LONGEST_PAUSE: Final = 30.0
_SHOWN_LENGTH: Final = 200


class DeliveryError(B2SError):
    """An endpoint is unreachable, or refused what was sent (exit code 3)."""

    exit_code = 3


class Sink(Protocol):
    """Takes events. Raises B2SError when it cannot; what was sent before is sent."""

    def send(self, events: Iterable[dict[str, Any]]) -> int:
        """Sends events and returns how many."""


class FileSink:
    """Appends events to a file, a line each; `-` is stdout."""

    def __init__(self, path: str) -> None:
        self._path = path

    def send(self, events: Iterable[dict[str, Any]]) -> int:
        """Writes events; all of them or, when the disk is full, an error."""
        lines = [json.dumps(event, ensure_ascii=False, separators=(",", ":")) + "\n" for event in events]
        if self._path == "-":
            sys.stdout.writelines(lines)
            return len(lines)
        try:
            with Path(self._path).open("a", encoding="utf-8") as file:
                file.write("".join(lines))
        except OSError as error:
            raise UsageError(f"{self._path} cannot be written: {error.strerror}") from None
        return len(lines)


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """A redirect would turn the POST into a GET, which loses the event and says that all is well."""

    def redirect_request(self, *_: Any) -> None:
        return None


class HttpSink:
    """Posts each event to an OpenLineage endpoint, again after a passing error."""

    def __init__(
        self,
        url: str,
        api_key: str | None = None,
        *,
        timeout: float = 10,
        attempts: int = 4,
        pause: Callable[[float], object] = time.sleep,
    ) -> None:
        parts = _checked(url)
        self.shown = urlunsplit((parts.scheme, _place(parts), parts.path, "", ""))
        self._url = urlunsplit((parts.scheme, _place(parts), parts.path, parts.query, ""))
        self._timeout, self._attempts, self._pause = timeout, attempts, pause
        given_query = [value for _, value in parse_qsl(parts.query)]
        self._secrets = [one for one in (api_key, unquote(parts.password or ""), *given_query) if one]
        self._headers = {"Content-Type": "application/json", "User-Agent": f"b2s/{__version__}"}
        if api_key:
            self._headers["Authorization"] = f"Bearer {api_key}"
        elif parts.username:
            given = f"{unquote(parts.username)}:{unquote(parts.password or '')}"
            self._headers["Authorization"] = "Basic " + base64.b64encode(given.encode()).decode()
        self._opener = urllib.request.build_opener(_NoRedirect)

    def send(self, events: Iterable[dict[str, Any]]) -> int:
        """Posts events one after the other. Raises DeliveryError at the first that is refused for good."""
        count = 0
        for event in events:
            self._deliver(json.dumps(event, ensure_ascii=False).encode())
            count += 1
        return count

    def _deliver(self, body: bytes) -> None:
        for attempt in range(1, self._attempts + 1):
            problem, is_transient, wait = self._post(body)
            if problem is None:
                return
            if not is_transient or attempt == self._attempts:
                tries = f" ({attempt} attempts)" if attempt > 1 else ""
                raise DeliveryError(
                    f"{self.shown} {problem}{tries}",
                    "what was sent stays sent; the same command sends the rest, and nothing is counted twice",
                )
            self._pause(min(_LONGEST_PAUSE, wait if wait is not None else 0.5 * 2 ** (attempt - 1)))

    def _post(self, body: bytes) -> tuple[str | None, bool, float | None]:
        """One attempt: what went wrong (None: nothing), whether it may pass, and how long to wait for it."""
        request = urllib.request.Request(self._url, body, self._headers, method="POST")  # noqa: S310 - scheme checked
        try:
            with self._opener.open(request, timeout=self._timeout) as answer:
                answer.read()
            return None, False, None
        except urllib.error.HTTPError as error:
            with error:
                said = self._clean(error.read(2000).decode("utf-8", "replace"))
            after = error.headers.get("Retry-After", "")
            wait = float(after) if after.isdigit() else None
            return f"answered {error.code}{': ' + said if said else ''}", error.code in _TRANSIENT, wait
        except urllib.error.URLError as error:
            is_certificate = "certificate" in str(error.reason).lower()
            return f"cannot be reached: {self._clean(str(error.reason))}", not is_certificate, None
        except TimeoutError:
            return f"did not answer within {self._timeout:g} s", True, None
        except (OSError, ValueError, HTTPException) as error:
            return f"cannot be reached: {self._clean(str(error) or type(error).__name__)}", True, None

    def _clean(self, text: str) -> str:
        """A text of somebody else in one line, without what must not be seen."""
        for secret in [*self._secrets, self._headers.get("Authorization", "")]:
            text = text.replace(secret, "***") if secret else text
        return " ".join(text.split())[:_SHOWN_LENGTH]


def sink_of(target: str, api_key: str | None, timeout: float) -> FileSink | HttpSink:
    """The sink that a target names: a URL, or a file."""
    if "://" in target:
        return HttpSink(target, api_key, timeout=timeout)
    return FileSink(target)


def _checked(url: str) -> SplitResult:
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError:
        parts, port = SplitResult("", "", "", "", ""), None
    if parts.scheme not in ("http", "https") or not parts.hostname or port == 0:
        raise UsageError(
            "the OpenLineage endpoint is no URL", "write http://host:port, https://host or a file"
        )
    if parts.path in ("", "/"):
        parts = parts._replace(path=_PATH)
    return parts


def _place(parts: SplitResult) -> str:
    """Host and port, without user and password."""
    return parts.netloc.rpartition("@")[2]
