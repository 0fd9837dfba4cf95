"""What a rule is, and the register of all rules."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Final, Literal, NamedTuple

if TYPE_CHECKING:
    from b2s.lint.project import Project, Step

Severity = Literal["error", "warning", "info", "off"]
SEVERITIES: Final = ("error", "warning", "info", "off")


class Hit(NamedTuple):
    """What a rule found: where in the file of the routine, what is wrong, and what to do about this very
    one.
    """

    offset: int
    message: str
    hint: str | None = None


class Example(NamedTuple):
    """SQL, and the configuration it is judged under where the rule needs one."""

    sql: str
    config: str = ""
    target_version: int | None = None


Check = Callable[["Step", "Project"], Iterator[Hit]]


@dataclass(frozen=True, slots=True)
class Rule:
    """A rule: how it is called, how grave its findings are, what it looks at, and the examples that are its
    tests.

    Scope `step`: routines that a pipeline executes; `routine`: every function and procedure; `engine`:
    found by b2s itself while it reads.
    """

    code: str
    name: str
    severity: Severity
    scope: Literal["step", "routine", "engine"]
    check: Check | None
    documentation: str
    bad: tuple[Example, ...]
    good: tuple[Example, ...]

    @property
    def summary(self) -> str:
        """The first sentence of the documentation."""
        return self.documentation.split("\n\n")[0].replace("\n", " ")


_RULES: Final[dict[str, Rule]] = {}


def rule(
    code: str,
    name: str,
    severity: Severity,
    *,
    bad: Example | tuple[Example, ...] | str = (),
    good: Example | tuple[Example, ...] | str = (),
    scope: Literal["step", "routine", "engine"] = "step",
) -> Callable[[Check], Check]:
    """Registers a check under a code and a name; its docstring is the documentation.

    A rule of scope `engine` is applied by b2s while it reads: its function is there for the docstring only.
    """

    def add(check: Check) -> Check:
        applied = None if scope == "engine" else check
        register(
            Rule(code, name, severity, scope, applied, inspect.getdoc(check) or "", _all(bad), _all(good))
        )
        return check

    return add


def _all(examples: Example | tuple[Example, ...] | str) -> tuple[Example, ...]:
    if isinstance(examples, str):
        return (Example(examples),)
    return (examples,) if isinstance(examples, Example) else examples


def register(new: Rule) -> None:
    """Adds a rule. Raises ValueError when its code or its name is taken, or when it does not explain
    itself.
    """
    if any(new.code == one.code or new.name == one.name for one in _RULES.values()):
        raise ValueError(f"rule {new.code} {new.name} is registered twice")
    if not new.documentation:
        raise ValueError(f"rule {new.code} has no docstring, which is its documentation")
    _RULES[new.code] = new


@cache
def _load() -> None:
    from b2s.lint import rules

    for module in sorted(pkgutil.iter_modules(rules.__path__), key=lambda one: one.name):
        importlib.import_module(f"{rules.__name__}.{module.name}")


def all_rules() -> dict[str, Rule]:
    """Every rule by its code, in the order of the codes."""
    _load()
    return dict(sorted(_RULES.items()))
