"""Silver equals Bronze, whatever writers and readers do; and the same comparison sees who loses rows."""

import pytest

from tests.servers import Database
from tests.soak import KINDS, NAIVE, SUBJECTS, Naive, Session, Soak, Subject

SECONDS = 5.0
SEED = 1


@pytest.mark.parametrize("subject", SUBJECTS, ids=lambda subject: subject.name)
def test_silver_equals_bronze_after_a_soak(db: Database, subject: Subject) -> None:
    soak = Soak(db, [subject], seed=SEED, longest=0.8)
    soak.run(SECONDS)
    outcome = soak.outcome(subject)
    assert outcome.is_exact, outcome
    assert outcome.written > 300
    assert outcome.meanwhile > 0


def interleave(soak: Soak, kind: str, reader: str) -> None:
    """A writer has written and not yet committed; another one commits; the reader comes by in between."""
    late, early = Session(soak, kind, 1), Session(soak, "single", 2)
    late.table = early.table = soak.tables[0]
    steps = KINDS[kind](late)
    while not soak.is_written(late.table):
        next(steps)
    list(KINDS["single"](early))
    soak.read(reader)
    list(steps)
    soak.settle()


@pytest.mark.parametrize("naive", NAIVE, ids=lambda naive: naive.name)
@pytest.mark.parametrize("kind", ["long", "copied", "serializable"])
def test_the_comparison_catches_a_reader_that_loses_rows(db: Database, naive: Naive, kind: str) -> None:
    soak = Soak(db, [], [naive], seed=SEED, longest=0)
    interleave(soak, kind, naive.name)
    assert soak.outcome(naive).lost.keys() == {kind}


@pytest.mark.parametrize("subject", [s for s in SUBJECTS if not s.is_mutable], ids=lambda s: s.name)
def test_the_interleaving_that_deceives_others_does_not_deceive_b2s(db: Database, subject: Subject) -> None:
    soak = Soak(db, [subject], seed=SEED, longest=0)
    interleave(soak, "long", subject.name)
    outcome = soak.outcome(subject)
    assert outcome.is_exact, outcome
    assert outcome.written == 2


@pytest.mark.parametrize("subject", SUBJECTS[:1], ids=lambda subject: subject.name)
def test_the_comparison_catches_rows_that_are_read_twice(db: Database, subject: Subject) -> None:
    soak = Soak(db, [subject], seed=SEED)
    list(KINDS["multi"](Session(soak, "multi", 1)))
    soak.settle()
    assert soak.outcome(subject).is_exact
    soak.control.execute("update etl.state set last_success_watermark = null")
    soak.settle()
    outcome = soak.outcome(subject)
    assert (outcome.twice, outcome.gaps) == (outcome.written, 1)
    assert outcome.written > 1
