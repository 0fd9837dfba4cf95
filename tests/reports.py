"""Reports without a database: as many procedures as a test needs, with everything that can happen to them."""

from __future__ import annotations

import random
from datetime import UTC, datetime, timedelta
from typing import Any, Final

from b2s.report.data import Report

NASTY: Final = (
    '</script><script>window.hacked = 1</script><img src=x onerror="window.hacked = 2">&amp;\x1b[31m'
)
"""What a name or a message must not do to a page."""
_BEGAN: Final = datetime(2026, 11, 29, 2, 0, tzinfo=UTC)


def synthetic(count: int, *, since: str | None = None, seed: int = 1) -> Report:
    """A run of so many procedures: one fails and takes along what needs it, one is slow, one is empty."""
    rng = random.Random(seed)
    names = [f"silver.{'dim' if n < count * 0.4 else 'fact'}_{n:03}" for n in range(count)]
    needs = {
        name: sorted(set(rng.sample(names[max(0, n - 40) : n], min(n, rng.choice((0, 1, 1, 2)), 40))))
        for n, name in enumerate(names)
    }
    failed = names[count // 3]
    outcomes: dict[str, str] = {}
    for name in names:
        broken = any(outcomes[one] in ("failed", "upstream_failed") for one in needs[name])
        outcomes[name] = "failed" if name == failed else "upstream_failed" if broken else "succeeded"
    steps = _steps(names, needs, outcomes, rng)
    procedures = [
        {
            "procedure_id": n,
            "procedure": name,
            "type": "dimension" if ".dim_" in name else "fact",
            "description": NASTY,
            "group_name": None,
            "outcome": outcomes[name],
            "needs": needs[name],
            "freshness_ms": 3_600_000 if n % 4 == 0 else None,
            "is_late": n % 8 == 0,
            "complete_at": _at(-600),
            "last_success_at": _at(-300),
            "watermark": "2026-11-29T01:50:00+00:00",
            "strategy": "timestamp",
            "held_back_by": None,
            "last_status": outcomes[name],
            "last_run_id": 9,
        }
        for n, name in enumerate(names)
    ]
    tallies = {
        n: {
            "succeeded": int(outcomes[name] == "succeeded"),
            "failed": int(outcomes[name] == "failed"),
            "retried": 0,
            "other": 0,
            "duration_ms": 10,
            "rows_affected": 100,
        }
        for n, name in enumerate(names)
    }
    return Report(
        pipeline="bronze_to_silver",
        description=NASTY,
        database="shop",
        at=_at(3600),
        since=since,
        run_count=12,
        run={
            "run_id": 9,
            "pipeline": "bronze_to_silver",
            "status": "failed",
            "is_dead": False,
            "started_at": _at(0),
            "ended_at": _at(60),
            "duration_ms": 60_000.0,
            "requested_by": "alice",
            "reason": None,
            "steps": steps,
            "mv_refreshes": [],
            "error_message": NASTY,
        },
        days=[
            {"day": f"2026-11-{day}", "status": "succeeded", "count": 6, "duration_ms": 1} for day in (28, 29)
        ],
        procedures=procedures,
        tallies=tallies,
        trends={n: _trend(n, rng) for n in range(count)},
        failures=[
            {
                "procedure": failed,
                "error_code": "23514",
                "error_class": "data_quality",
                "count": 3,
                "first_run": 2,
                "last_run": 9,
                "error_message": NASTY,
                "error_hint": NASTY,
            }
        ],
        lines=[
            {
                "logged_at": _at(1),
                "run_id": 9,
                "procedure": failed,
                "level": "error",
                "message": NASTY,
                "is_rolled_back": True,
            }
        ],
    )


def _at(seconds: float) -> str:
    return (_BEGAN + timedelta(seconds=seconds)).isoformat()


def _trend(n: int, rng: random.Random) -> list[dict[str, Any]]:
    """Twenty successes; the last of procedure 1 is slow, that of procedure 2 brings nothing."""
    trend = [
        {
            "run_id": run,
            "status": "succeeded",
            "mode": "incremental",
            "duration_ms": rng.uniform(900, 1100),
            "rows_affected": rng.randint(50, 150),
        }
        for run in range(1, 21)
    ]
    if n == 1:
        trend[-1]["duration_ms"] = 9000.0
    if n == 2:
        trend[-1]["rows_affected"] = 0
    return trend


def _steps(
    names: list[str], needs: dict[str, list[str]], outcomes: dict[str, str], rng: random.Random
) -> list[dict[str, Any]]:
    """Two sessions that take what is ready."""
    free, ended, steps = [0.0, 0.0], dict[str, float](), []
    for n, name in enumerate(names):
        is_run = outcomes[name] != "upstream_failed"
        worker = free.index(min(free))
        begin = max([free[worker], *(ended.get(one, 0.0) for one in needs[name])])
        end = begin + rng.uniform(0.01, 0.2)
        if is_run:
            free[worker] = ended[name] = end
        is_failed = outcomes[name] == "failed"
        steps.append(
            {
                "order_index": n + 1,
                "procedure": name,
                "attempt": 1,
                "slice_index": 1,
                "group_name": None,
                "tx_scope": "per_procedure",
                "status": outcomes[name] if is_run else "skipped",
                "skip_reason": None if is_run else "upstream_failed",
                "started_at": _at(begin) if is_run else None,
                "ended_at": _at(end),
                "duration_ms": 1000 * (end - begin) if is_run else None,
                "dependencies": [{"procedure": one, "in_run": True} for one in needs[name]],
                "error_class": "data_quality" if is_failed else None,
                "error_code": "23514" if is_failed else None,
                "error_message": NASTY if is_failed else None,
                "error_hint": NASTY if is_failed else None,
                "error_detail": NASTY if is_failed else None,
                "error_context": NASTY if is_failed else None,
                "places": [{"routine": f"{name}()", "line": 1, "source": {"1": NASTY}}] if is_failed else [],
            }
        )
    return steps
