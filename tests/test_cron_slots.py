"""When a cron time is due: computed in SQL, compared with a plain reading of the rules in Python."""

from __future__ import annotations

import random
from datetime import UTC, date, datetime, timedelta
from zoneinfo import ZoneInfo

import pytest

from tests.servers import Connection, Database

BERLIN = "Europe/Berlin"
ZONES = ("UTC", BERLIN, "America/New_York", "Asia/Kolkata", "Australia/Lord_Howe", "America/St_Johns")
LIMITS = ((0, 59), (0, 23), (1, 31), (1, 12), (0, 7))
MINUTE = timedelta(minutes=1)


@pytest.fixture
def conn(db: Database) -> Connection:
    return db.connect(options="-c timezone=Pacific/Chatham")


def moment(text: str) -> datetime:
    return datetime.fromisoformat(text).replace(tzinfo=UTC)


def next_slots(conn: Connection, cron: str, zone: str, after: str, count: int = 1) -> list[str]:
    """The next slots, in UTC."""
    found, now = [], moment(after)
    for _ in range(count):
        row = conn.execute("select etl._next_slot(%s, %s, %s)", [cron, zone, now]).fetchone()
        assert row is not None
        now = row[0].astimezone(UTC)
        found.append(now.strftime("%Y-%m-%d %H:%M"))
    return found


# -- the rules, read plainly: every minute of a stretch of time is looked at --


def numbers(field: str, low: int, high: int) -> set[int]:
    found: set[int] = set()
    for item in field.split(","):
        span, _, step = item.partition("/")
        first, _, last = ("", "", "") if span == "*" else span.partition("-")
        start = int(first) if first else low
        end = int(last) if last else (start if first else high)
        found |= set(range(start, end + 1, int(step) if step else 1))
    return found


def is_due(cron: str, wall: datetime) -> bool:
    fields = cron.split()
    sets = [numbers(field, *limits) for field, limits in zip(fields, LIMITS, strict=True)]
    by_month, by_week = wall.day in sets[2], bool({wall.isoweekday() % 7, wall.isoweekday()} & sets[4])
    is_star = fields[2].startswith("*") or fields[4].startswith("*")
    is_day = by_month and by_week if is_star else by_month or by_week
    return is_day and wall.minute in sets[0] and wall.hour in sets[1] and wall.month in sets[3]


def expected(cron: str, zone: str, since: datetime, until: datetime) -> list[datetime]:
    """Named hours: each wall time once, the second one of two. Any hour: every minute there is."""
    info = ZoneInfo(zone)
    if cron.split()[1].startswith("*"):
        every = (since + n * MINUTE for n in range(int((until - since) / MINUTE) + 1))
        return [at for at in every if is_due(cron, at.astimezone(info))]
    start = since.astimezone(info).replace(tzinfo=None) - timedelta(days=1)
    walls = (start + n * MINUTE for n in range(int((until - since) / MINUTE) + 2 * 24 * 60))
    due = {on_the_clock(wall, info) for wall in walls if is_due(cron, wall)}
    return sorted(at for at in due if since <= at <= until)


def on_the_clock(wall: datetime, info: ZoneInfo) -> datetime:
    """What a wall time means: of two the second; one that is left out counts on from before the change."""
    first, second = (wall.replace(tzinfo=info, fold=fold).astimezone(UTC) for fold in (0, 1))
    is_left_out = first.astimezone(info).replace(tzinfo=None) != wall
    return first if is_left_out else second


def random_cron(chance: random.Random) -> str:
    def field(low: int, high: int) -> str:
        kind = chance.random()
        if kind < 0.35:
            return "*"
        if kind < 0.5:
            return f"*/{chance.randint(1, high)}"
        items = []
        for _ in range(chance.randint(1, 3)):
            first = chance.randint(low, high)
            last = chance.randint(first, high)
            items.append(chance.choice([str(first), f"{first}-{last}", f"{first}-{last}/2"]))
        return ",".join(items)

    minute = chance.choice(["0", "30", "*/15", field(0, 59)])
    return " ".join([minute, field(0, 23), field(1, 31), "*", field(0, 7)])


@pytest.mark.parametrize("seed", range(8))
def test_slots_are_those_of_a_plain_reading_of_the_rules(conn: Connection, seed: int) -> None:
    """Around the two changes of the clocks in each zone, where mistakes live."""
    chance = random.Random(seed)
    for _ in range(6):
        cron, zone = random_cron(chance), chance.choice(ZONES)
        day = chance.choice(
            ["2026-03-07", "2026-03-28", "2026-10-24", "2026-10-31", "2026-04-04", "2026-10-03"]
        )
        since = moment(day) + timedelta(minutes=chance.randint(0, 600))
        until = since + timedelta(days=3)
        wanted = expected(cron, zone, since, until)
        found, now = [], since - timedelta(seconds=1)
        for _ in range(len(wanted) + 1):
            row = conn.execute(
                "select least(etl._next_slot(%s, %s, %s), '2100-01-01')", [cron, zone, now]
            ).fetchone()
            assert row is not None
            if row[0] > until:
                break
            now = row[0].astimezone(UTC)
            found.append(now)
        assert found == wanted, (cron, zone, since)
        if wanted:
            last = conn.execute(
                "select * from etl._due_slots(%s, %s, %s, %s)", [cron, zone, wanted[0], until]
            ).fetchone()
            assert last == (wanted[-1], len(wanted)), (cron, zone, since)


def test_a_named_hour_that_comes_twice_is_due_once_its_second_time(conn: Connection) -> None:
    found = next_slots(conn, "30 2 * * *", BERLIN, "2026-10-24 12:00", 2)
    assert found == ["2026-10-25 01:30", "2026-10-26 01:30"]


def test_a_named_hour_that_is_left_out_is_due_an_hour_later(conn: Connection) -> None:
    found = next_slots(conn, "30 2 * * *", BERLIN, "2026-03-28 12:00", 2)
    assert found == ["2026-03-29 01:30", "2026-03-30 00:30"]


def test_every_hour_means_every_hour_there_is(conn: Connection) -> None:
    found = next_slots(conn, "0 * * * *", BERLIN, "2026-10-24 23:30", 4)
    assert found == ["2026-10-25 00:00", "2026-10-25 01:00", "2026-10-25 02:00", "2026-10-25 03:00"]
    assert next_slots(conn, "0 */2 * * *", "UTC", "2026-10-24 23:30", 2) == [
        "2026-10-25 00:00",
        "2026-10-25 02:00",
    ]


def test_either_of_two_days_will_do_where_none_begins_with_a_star(conn: Connection) -> None:
    found = next_slots(conn, "0 0 13 * 5", "UTC", "2026-11-01 00:00", 4)
    assert found == ["2026-11-06 00:00", "2026-11-13 00:00", "2026-11-20 00:00", "2026-11-27 00:00"]
    assert next_slots(conn, "0 0 13 * *", "UTC", "2026-11-01 00:00") == ["2026-11-13 00:00"]


def test_sunday_is_0_and_7(conn: Connection) -> None:
    assert next_slots(conn, "0 0 * * 0", "UTC", "2026-11-28 12:00") == ["2026-11-29 00:00"]
    assert next_slots(conn, "0 0 * * 7", "UTC", "2026-11-28 12:00") == ["2026-11-29 00:00"]
    assert next_slots(conn, "0 0 * * 6-7", "UTC", "2026-11-28 12:00") == ["2026-11-29 00:00"]


def test_a_rare_day_is_found_and_one_that_never_comes_is_not(conn: Connection) -> None:
    assert next_slots(conn, "0 0 29 2 *", "UTC", "2026-11-28 12:00") == ["2028-02-29 00:00"]
    assert next_slots(conn, "0 0 29 2 */7", "UTC", "2026-11-28 12:00") == ["2032-02-29 00:00"]
    assert conn.execute("select etl._next_slot('0 0 30 2 *', 'UTC', now()) = 'infinity'").fetchone() == (
        True,
    )


def test_seconds_are_multiples_whatever_the_zone(conn: Connection) -> None:
    row = conn.execute(
        "select etl._next_slot('20 seconds', 'Asia/Kolkata', '2026-11-28 12:00:20Z')"
    ).fetchone()
    assert row == (moment("2026-11-28 12:00:40"),)
    due = conn.execute(
        "select * from etl._due_slots('20 seconds', 'UTC', '2026-11-28 12:00:20Z', '2026-11-28 12:01:59Z')"
    ).fetchone()
    assert due == (moment("2026-11-28 12:01:40"), 5)


def test_a_clock_that_stood_still_for_years_finds_the_last_slot(conn: Connection) -> None:
    arguments = ["2020-03-01 02:00Z", "2026-11-28 12:00Z"]
    due = conn.execute("select * from etl._due_slots('0 2 * * *', 'UTC', %s, %s)", arguments).fetchone()
    assert due == (moment("2026-11-28 02:00"), 365)
    rare = conn.execute("select * from etl._due_slots('0 0 29 2 *', 'UTC', '2024-02-29Z', now())").fetchone()
    assert rare is not None
    assert rare[0].date() == date(2024, 2, 29)


@pytest.mark.parametrize(
    ("cron", "problem"),
    [
        ("* * * *", "not a cron time of five fields"),
        ("60 * * * *", "60 is not a minute"),
        ("0 24 * * *", "24 is not a hour"),
        ("0 0 0 * *", "0 is not a day of month"),
        ("0 0 * 13 *", "13 is not a month"),
        ("0 0 * * 8", "8 is not a day of week"),
        ("5-1 * * * *", "5-1 is not a minute"),
        ("*/0 * * * *", "*/0 is not a minute"),
        ("5/10 * * * *", "5/10 is not a minute"),
        ("a * * * *", "a is not a minute"),
        ("1, * * * *", "1, is not a minute"),
        ("0 seconds", "not a cron time"),
        ("60 seconds", "not a cron time"),
    ],
)
def test_what_is_no_cron_time_is_told_from_what_is(conn: Connection, cron: str, problem: str) -> None:
    row = conn.execute("select etl._cron_problem(%s)", [cron]).fetchone()
    assert row is not None
    assert problem in row[0]


def test_a_cron_time_has_no_problem(conn: Connection) -> None:
    for cron in ("* * * * *", "*/5 0-6/2,12 1 * 7", "1 seconds", "59 seconds", " 0  2 * * 1-5 "):
        assert conn.execute("select etl._cron_problem(%s)", [cron]).fetchone() == (None,)
