-- The clock: when schedules are due, what became of each slot, and how long history is kept.

alter table etl.pipelines add column clock jsonb not null default '{}';
alter table etl.pipelines add column retention jsonb not null default '{}';
comment on column etl.pipelines.clock is
  'Who runs what is due: {"executor": "auto", "pg_cron" or "worker", "workers": jobs that execute runs, "role": owner of the jobs}. See etl.list_jobs.';
comment on column etl.pipelines.retention is
  'For how many days history is kept: {"runs", "logs", "ticks"}; a number, or "forever"; a key that is missing has its default. See etl.purge.';

alter table etl.schedules add column next_at timestamptz;
create index schedules_that_are_active on etl.schedules (next_at) where is_active;
comment on column etl.schedules.definition is
  'The schedule as it was configured: cron, timezone, the request, on_conflict, catch_up, late_after_ms.';
comment on column etl.schedules.next_at is 'The first slot that is not decided yet; null: no clock has looked at it since it was configured by a release without one.';

-- No foreign key to the run: runs are purged, and what became of a slot can be kept for longer or for shorter than its run.
create table etl.schedule_slots (
  schedule_id       int not null references etl.schedules,
  slot_at           timestamptz not null,
  decided_at        timestamptz not null default clock_timestamp(),
  outcome           text not null,
  run_id            bigint,
  passed_over_count int not null default 0,
  reason            text,
  primary key (schedule_id, slot_at),
  constraint outcome_is_known check (outcome in ('submitted', 'skipped', 'missed', 'failed')),
  constraint a_submitted_slot_has_a_run check (outcome <> 'submitted' or run_id is not null),
  constraint a_slot_without_its_run_says_why check (outcome = 'submitted' or reason is not null),
  constraint passed_over_count_is_not_negative check (passed_over_count >= 0)
);
create index schedule_slots_run_id on etl.schedule_slots (run_id);
comment on table etl.schedule_slots is
  'What became of each time at which a schedule was due. One row a slot, so that however many clocks there are, a slot is decided once. Source: etl.fire_schedules.';
comment on column etl.schedule_slots.slot_at is 'The time for which the run was scheduled, whenever it was noticed.';
comment on column etl.schedule_slots.outcome is
  'submitted: run_id was queued; skipped: a run was in the way; missed: noticed too late; failed: refused, run_id says why.';
comment on column etl.schedule_slots.passed_over_count is 'How many earlier slots had passed as well when this one was noticed: the clock had stood still.';

create table etl.heartbeats (
  name              text primary key,
  beat_at           timestamptz not null,
  session_user_name text not null,
  application_name  text not null,
  detail            text
);
comment on table etl.heartbeats is
  'When a clock last asked what is due (clock), and when history was last purged (purge), by whom. Source: etl.fire_schedules, etl.purge.';
comment on column etl.heartbeats.beat_at is 'Noted at most every ten seconds.';

-- Purging looks for the runs that go on with one. What moved a watermark is remembered when its run is gone, so that
-- etl.state_history keeps the number of a run and not a reference to it.
create index runs_parent_run_id on etl.runs (parent_run_id) where parent_run_id is not null;
alter table etl.state_history drop constraint state_history_run_id_fkey;
