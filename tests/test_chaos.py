"""Whatever happens to the sessions that execute a run, Silver ends as if nothing had happened."""

from contextlib import ExitStack

from tests.chaos import FAULTS, Chaos, Dag
from tests.servers import Server

ROUNDS = 20
SEED = 1


def test_silver_is_the_same_after_chaos(private_server: Server) -> None:
    template = private_server.migrated_template()
    with ExitStack() as stack:
        db, quiet = (private_server.create_database(template=template) for _ in range(2))
        stack.callback(db.drop)
        stack.callback(quiet.drop)
        chaos = Chaos(db, seed=SEED, can_crash=True)
        with chaos.watchdog():
            for number in range(ROUNDS):
                chaos.round()
                assert chaos.problems() == [], f"after round {number} of seed {SEED}: {dict(chaos.counts)}"
        assert chaos.differences(Dag(quiet)) == []
        assert {name for name in FAULTS if chaos.counts[f"fault {name}"] == 0} == set()
