from __future__ import annotations

from collections.abc import Iterator

from b2s.lint.project import Project, Step
from b2s.lint.rule import Hit, rule


@rule("B002", "plpgsql-check", "warning", scope="engine")
def plpgsql_check(step: Step, project: Project) -> Iterator[Hit]:
    """What the extension plpgsql_check says about a routine, where `--db` finds that extension installed.

    It knows the tables and the types, which no reader of files can: columns that are not there, values of
    the wrong type, variables nobody uses. Its own level decides about the severity. It does not know
    temporary tables: say so in the routine with `perform plpgsql_check_pragma('table: changed (id
    bigint)')`, or suppress the finding.
    """
    raise NotImplementedError
