"""`b2s` called in this process, as a person calls it in a folder of their own."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from b2s.cli import main


@dataclass(frozen=True, slots=True)
class Result:
    """How a command ended, and what it printed."""

    code: int
    out: str
    err: str


@dataclass(frozen=True, slots=True)
class Shell:
    """Commands against one database. No command may end with a traceback."""

    dsn: str
    capsys: pytest.CaptureFixture[str]

    def result(self, *words: str) -> Result:
        """Runs a command."""
        self.capsys.readouterr()
        code = main(["--dsn", self.dsn, *words])
        captured = self.capsys.readouterr()
        assert "Traceback" not in captured.err
        return Result(code, captured.out, captured.err)

    def __call__(self, *words: str, code: int = 0) -> str:
        """What a command prints, stderr last; it must end with this code."""
        done = self.result(*words)
        assert done.code == code, done.out + done.err
        return done.out + done.err
