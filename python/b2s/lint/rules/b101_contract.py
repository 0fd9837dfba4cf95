from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from b2s.lint.model import NUMBERS
from b2s.lint.project import Project, Step
from b2s.lint.rule import Example, Hit, rule

_TEXT: Final = ("text", "varchar")
_WINDOW: Final = {"timestamp": ("timestamptz",), "id": ("int8", "numeric"), "xid": ("pg_snapshot",)}
_SHOWN: Final = {"int8": "bigint"}
_PIPELINE: Final = """\
version: 1
procedures:
  - name: silver.orders
    routine: silver.load_orders
    type: fact
    watermark: {strategy: timestamp, source: bronze.orders.ingested_at}
"""


@rule(
    "B101",
    "contract",
    "error",
    bad=Example(
        """\
create function silver.load_orders(p_since timestamp, p_until timestamptz, country text) returns bigint
language sql set search_path = '' as $$
  with new as (
    insert into silver.orders (id) select o.id from bronze.orders o
     where o.ingested_at >= p_since and o.ingested_at < p_until and o.country = load_orders.country
    on conflict (id) do nothing returning 1)
  select count(*) from new
$$;
""",
        _PIPELINE,
    ),
    good=Example(
        """\
create function silver.load_orders(p_since timestamptz, p_until timestamptz, country text default 'DE') returns bigint
language sql set search_path = '' as $$
  with new as (
    insert into silver.orders (id) select o.id from bronze.orders o
     where o.ingested_at >= p_since and o.ingested_at < p_until and o.country = load_orders.country
    on conflict (id) do nothing returning 1)
  select count(*) from new
$$;
""",
        _PIPELINE,
    ),
)
def contract(step: Step, project: Project) -> Iterator[Hit]:
    """An argument of the routine cannot be served: b2s does not know it, or passes a value of another type.

    b2s passes by name what a routine declares: `p_mode text`, `p_since` and `p_until` in the type of the
    watermark (`timestamptz`, `bigint` or `pg_snapshot`), `p_run_id bigint`, and the configured params. Any
    other argument needs a default. A param that no argument takes, and an entry of `args` that names no
    argument, are found here too.
    """
    routine, procedure = step.routine, step.procedure
    strategy = procedure.watermark.strategy if procedure and procedure.watermark else None
    window = _WINDOW[strategy] if strategy else ()
    wanted = {
        step.argument("p_mode"): _TEXT,
        step.argument("p_since"): window,
        step.argument("p_until"): window,
        step.argument("p_run_id"): ("int8",),
    }
    for argument in routine.arguments:
        types = wanted.get(argument.name)
        if types and argument.is_input and argument.type not in types:
            shown = _SHOWN.get(types[0], types[0])
            yield Hit(
                argument.offset,
                f"{argument.name} must be {shown}, not {argument.type}",
                f"declare it {shown}",
            )
    if procedure is None:
        return
    params = set(procedure.params)
    mapped = {inner for outer, inner in procedure.args.items()}
    known = {*wanted, *mapped, *params, *(f"p_{name}" for name in params)}
    for argument in routine.arguments:
        is_counter = argument.mode == "b" and argument.type in NUMBERS
        if argument.is_input and not argument.has_default and argument.name not in known and not is_counter:
            hint = "give it a default, or configure a param or an entry of args for it"
            yield Hit(argument.offset, f"nothing is passed for argument {argument.name or '(unnamed)'}", hint)
    names = {argument.name for argument in routine.arguments}
    for name in procedure.params:
        if not names & {name, f"p_{name}", procedure.args.get(name, name)}:
            yield Hit(routine.offset, f"param {name} reaches no argument of {routine.full_name}")
    for outer, inner in procedure.args.items():
        if inner not in names:
            yield Hit(
                routine.offset, f"args maps {outer} to {inner}, which is no argument of {routine.full_name}"
            )
