"""Commands of b2s in processes of their own: what they print can be waited for, signals can be sent."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

B2S: Final = (sys.executable, "-m", "b2s.cli")
SECONDS: Final = 60


class Command:
    """A running command; its output goes to files, so that it never waits for a reader."""

    def __init__(
        self, directory: Path, dsn: str, words: tuple[str, ...], environ: Mapping[str, str] | None = None
    ) -> None:
        self._out, self._err = directory / "out", directory / "err"
        environment = {**os.environ, "B2S_DSN": dsn, **(environ or {})}
        with self._out.open("wb") as out, self._err.open("wb") as err:
            self._process = subprocess.Popen([*B2S, *words], env=environment, stdout=out, stderr=err)

    @property
    def out(self) -> str:
        return self._out.read_text(encoding="utf-8")

    @property
    def err(self) -> str:
        return self._err.read_text(encoding="utf-8")

    def events(self, name: str) -> list[dict[str, Any]]:
        """The lines of a JSON log that are about one kind of event."""
        lines = [json.loads(line) for line in self.err.splitlines() if line.startswith("{")]
        return [line for line in lines if line.get("event") == name]

    def wait_for(self, text: str, count: int = 1) -> None:
        """Wait until stderr has the text so often."""
        end = time.monotonic() + SECONDS
        while self.err.count(text) < count:
            assert self._process.poll() is None, f"ended with {self._process.returncode}: {self.err}"
            assert time.monotonic() < end, f"never said {text!r}: {self.err}"
            time.sleep(0.005)

    def wait_for_output(self, text: str, count: int = 1) -> None:
        """Wait until stdout has the text so often."""
        end = time.monotonic() + SECONDS
        while self.out.count(text) < count:
            assert self._process.poll() is None, f"ended with {self._process.returncode}: {self.err}"
            assert time.monotonic() < end, f"never printed {text!r}: {self.out}"
            time.sleep(0.005)

    def send(self, number: signal.Signals) -> None:
        self._process.send_signal(number)

    def end(self) -> int:
        """Wait for its end; the exit code."""
        code = self._process.wait(SECONDS)
        assert "Traceback" not in self.err, self.err
        return code

    def close(self) -> None:
        if self._process.poll() is None:
            self._process.kill()
            self._process.wait()


@contextmanager
def b2s(
    directory: Path, dsn: str, *words: str, environ: Mapping[str, str] | None = None
) -> Iterator[Command]:
    """A command while the block lasts; what is then still running is killed."""
    place = directory / f"command{len(list(directory.glob('command*')))}"
    place.mkdir()
    command = Command(place, dsn, words, environ)
    try:
        yield command
    finally:
        command.close()
