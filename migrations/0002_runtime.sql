-- The runtime: what was asked, what was planned, what happened.

-- In a request, dry_run is false, true or 'execute': a boolean is accepted where this type is expected.
create type etl.dry_run as enum ('f', 't', 'false', 'true', 'execute');
comment on type etl.dry_run is
  'false: run. true: plan only. execute: run every scope, report true row counts, and roll everything back.';
create cast (boolean as etl.dry_run) with inout as implicit;

-- Domains and not checks of the tables: an update that leaves such a column alone does not pay for it.
create domain etl.attempt_status as text constraint attempt_status_is_known check (value in
  ('pending', 'running', 'succeeded', 'advanced', 'failed', 'retrying', 'rolled_back', 'skipped', 'cancelled', 'abandoned'));
comment on domain etl.attempt_status is
  'pending, running; ended: succeeded, advanced (a slice was committed, the next one follows), failed, retrying (failed, and tried again), rolled_back (with its group), skipped, cancelled, abandoned.';
create domain etl.skip_reason as text constraint skip_reason_is_known check (value in
  ('upstream_failed', 'cancelled', 'no_data', 'reused', 'stopped'));
comment on domain etl.skip_reason is 'Why something was not started.';
create domain etl.scope_kind as text constraint scope_kind_is_known check (value in ('steps', 'barrier', 'refresh'));
comment on domain etl.scope_kind is 'steps: one or more procedures; barrier: dimensions before facts; refresh: one materialized view.';
create domain etl.remaining_count as int constraint remaining_count_never_falls_below_zero check (value >= 0);
comment on domain etl.remaining_count is 'How many scopes are still waited for.';

create type etl.plan_item as (
  scope_index       int,
  kind              text,
  order_index       int,
  procedure_id      int,
  tx_scope          text,
  mode              text,
  parameters        jsonb,
  refresh_target_id int,
  mv_name           text,
  refresh_after     text,
  refresh_on        text,
  concurrency       text,
  feeders           int[],
  depends_on        int[],
  base              int,
  depth             int
);
comment on type etl.plan_item is
  'One entry of a plan: a step, a barrier between phases, or the refresh of a materialized view. base and depth place a refresh.';

create table etl.runs (
  run_id              bigint generated always as identity primary key,
  kind                text not null default 'run',
  pipeline_id         int not null references etl.pipelines,
  config_version_id   bigint not null references etl.config_versions,
  parent_run_id       bigint references etl.runs,
  mode                text,
  as_of               timestamptz,
  parameters          jsonb not null default '{}',
  request             jsonb not null,
  idempotency_key     text unique,
  fingerprint         text not null,
  requested_by        text not null,
  session_user_name   text not null default session_user,
  application_name    text not null default '',
  approved_by         text,
  reason              text,
  max_concurrency     int not null,
  pause_ms            int not null default 0,
  step_count          int not null,
  submitted_at        timestamptz not null default clock_timestamp(),
  started_at          timestamptz,
  status              text not null,
  worker_pid          int,
  cancel_requested_at timestamptz,
  cancel_requested_by text,
  cancel_reason       text,
  ended_at            timestamptz,
  duration_ms         numeric(16, 3) generated always as (extract(epoch from ended_at - started_at) * 1000) stored,
  error_code          text,
  error_message       text,
  constraint kind_is_run_or_backfill check (kind in ('run', 'backfill')),
  constraint mode_is_incremental_or_full check (mode in ('incremental', 'full')),
  constraint status_is_known check (status in
    ('queued', 'running', 'succeeded', 'completed_with_warnings', 'failed', 'cancelled', 'abandoned')),
  constraint an_ended_run_has_an_end check
    ((ended_at is not null) = (status not in ('queued', 'running'))),
  constraint a_failed_run_says_why check (status not in ('failed', 'abandoned') or error_code is not null),
  constraint a_full_refresh_has_a_reason check (mode is distinct from 'full' or reason is not null)
) with (fillfactor = 80);
create unique index one_run_per_pipeline_is_active on etl.runs (pipeline_id) where status = 'running' and kind = 'run';
create index runs_that_are_active on etl.runs (pipeline_id) where status = 'running';
create index runs_pipeline_id_run_id on etl.runs (pipeline_id, run_id desc);
comment on table etl.runs is 'One row per request to execute procedures. Immutable once ended. Source: etl.start_run.';
comment on column etl.runs.kind is
  'run: moves watermarks, one at a time per pipeline. backfill: reads a past range beside it and leaves the watermarks alone.';
comment on column etl.runs.pause_ms is 'How long to wait after each scope, milliseconds.';
comment on column etl.runs.mode is 'The mode asked for; null when each procedure runs in its own default mode.';
comment on column etl.runs.parameters is 'The parameters as they were used, by procedure, defaults included.';
comment on column etl.runs.fingerprint is 'Digest of the request: the same idempotency key with another request is refused.';
comment on column etl.runs.requested_by is 'The role that asked: the SET ROLE in force, else the login.';
comment on column etl.runs.started_at is 'When a session took it up; null while it is queued.';
comment on column etl.runs.worker_pid is 'Backend that took the run up. It, and every session that helps (etl.run_workers), holds its advisory lock: (6435443, pipeline_id), or (6435443, -run_id) for a backfill.';
comment on column etl.runs.duration_ms is 'From started_at to ended_at, milliseconds.';
comment on column etl.runs.error_code is 'Stable code of the first failure, e.g. full_refresh.frozen, or its SQLSTATE.';

create table etl.run_workers (
  run_id    bigint not null references etl.runs,
  pid       int not null,
  joined_at timestamptz not null default clock_timestamp(),
  primary key (run_id, pid)
);
comment on table etl.run_workers is 'Sessions that help to execute a run, beside the one that took it up (etl.runs.worker_pid). Source: etl.work.';
comment on column etl.run_workers.pid is 'Backend; alive as long as it holds the advisory lock of the run.';

-- The engine's small scheduling state. A scope is a transaction: some steps, one refresh, or a barrier between phases.
create table etl.run_scopes (
  run_id                 bigint not null,
  scope_index            int not null,
  kind                   etl.scope_kind not null,
  isolation              text not null default 'read committed',
  first_order_index      int,
  last_order_index       int,
  required_by            int[] not null default '{}',
  precedes               int[] not null default '{}',
  attempt                int not null default 1,
  slice_width            numeric,
  remaining_dependencies etl.remaining_count not null,
  is_passed              boolean not null default false,
  ready_at               timestamptz,
  primary key (run_id, scope_index)
) with (fillfactor = 50);
comment on table etl.run_scopes is
  'The units of transaction of a run, in topological order, each with the number of scopes it still waits for.';
comment on column etl.run_scopes.required_by is 'Scopes that need this one to succeed.';
comment on column etl.run_scopes.slice_width is
  'How much one slice reads: milliseconds, ids or transactions. Set when a slice ran out of a resource; null: max_window.';
comment on column etl.run_scopes.attempt is 'The attempt at its steps that is pending or running.';
comment on column etl.run_scopes.is_passed is 'It has ended, and what waits for it was told. A barrier: all that comes before it has ended.';
comment on column etl.run_scopes.ready_at is 'Not to be tried again before.';
comment on column etl.run_scopes.precedes is 'Scopes that only have to come later (dimensions before facts).';

-- No foreign key: rows are written together with their run, and runs and procedures are never deleted under them.
-- No check constraint and no generated column here: this table is updated twice per step, and each update parses every
-- one of them anew (48 us for four, more than the update itself). A trigger holds the invariants and names them:
-- plpgsql/engine/_protect_history.sql.
create table etl.procedure_runs (
  run_id             bigint not null,
  order_index        int not null,
  attempt            int not null default 1,
  scope_index        int not null,
  procedure_id       int not null,
  procedure_name     text not null,
  procedure_type     text not null,
  group_name         text,
  mode               text not null,
  tx_scope           text not null,
  isolation          text not null,
  parameters         jsonb not null,
  dependencies       jsonb not null,
  statement          text not null,
  rows_column        text,
  lock_key           int not null,
  settings           jsonb,
  watermark_strategy text,
  state_key          text,
  window_since       text,
  window_until       text,
  window_goal        text,
  slice_index        int not null default 1,
  held_back_by       text,
  status             etl.attempt_status not null default 'pending',
  skip_reason        etl.skip_reason,
  worker_pid         int,
  started_at         timestamptz,
  ended_at           timestamptz,
  duration_ms        numeric(16, 3),
  rows_affected      bigint,
  table_counts       jsonb,
  warnings           jsonb,
  error_class        text,
  error_code         text,
  sqlstate           text,
  error_message      text,
  error_detail       text,
  error_hint         text,
  error_context      text,
  blocked_by         jsonb,
  timed_out_at       timestamptz,
  definition         text,
  primary key (run_id, order_index, attempt)
) with (fillfactor = 50);
create index procedure_runs_procedure_id_run_id on etl.procedure_runs (procedure_id, run_id desc);
comment on table etl.procedure_runs is
  'One row per attempt of a step, from plan to outcome. Immutable once ended. Source: etl.start_run.';
comment on column etl.procedure_runs.order_index is 'Position of the step in the run, from 1.';
comment on column etl.procedure_runs.scope_index is 'The transaction it belongs to, see etl.run_scopes.';
comment on column etl.procedure_runs.dependencies is 'What the step depended on: name, whether it was part of the run, last success.';
comment on column etl.procedure_runs.statement is
  'The statement executed: $1 mode, $2 window_since, $3 window_until, $4 run_id, $5 parameters. etl.step_history shows it with its values.';
comment on column etl.procedure_runs.settings is 'lock_timeout_ms, search_path and checks of the step, as configured when the run was planned; null when it has none.';
comment on column etl.procedure_runs.worker_pid is 'Backend that executes or executed the attempt.';
comment on column etl.procedure_runs.window_since is 'Start of the window read, inclusive; null: from the beginning.';
comment on column etl.procedure_runs.window_until is 'End of the window read, exclusive.';
comment on column etl.procedure_runs.window_goal is
  'Up to where the step reads in all, exclusive, when its window is read in slices (max_window); else null.';
comment on column etl.procedure_runs.slice_index is 'Which slice of the window the attempt reads, from 1.';
comment on column etl.procedure_runs.held_back_by is 'What kept the end of the window from being newer, when it was older than usual.';
comment on column etl.procedure_runs.lock_key is 'The advisory lock of its run is (6435443, lock_key).';
comment on column etl.procedure_runs.duration_ms is 'From started_at to ended_at, milliseconds.';
comment on column etl.procedure_runs.rows_affected is
  'Rows as the routine returned them; when it returns none, rows inserted, updated and deleted in all tables.';
comment on column etl.procedure_runs.table_counts is
  'Rows inserted, updated and deleted per table: {"silver.t": {"inserted": 1, "updated": 0, "deleted": 0}}.';
comment on column etl.procedure_runs.warnings is 'Checks of severity warn that did not hold.';
comment on column etl.procedure_runs.error_class is
  'transient, data_quality, schema_mismatch, resource, timeout, cancelled or code.';
comment on column etl.procedure_runs.blocked_by is
  'After a deadlock or a lock timeout: sessions that held locks which the step may have waited for.';
comment on column etl.procedure_runs.timed_out_at is 'When etl.watchdog cancelled the statement because the timeout of the procedure had passed.';
comment on column etl.procedure_runs.definition is 'Digest of the routine and of how it is called, when the run was planned: tells whether it has changed since.';
comment on column etl.procedure_runs.error_code is 'Stable code (check.failed, ...) or, for an error of the server, its SQLSTATE.';

create table etl.mv_refreshes (
  run_id            bigint not null references etl.runs,
  scope_index       int not null,
  refresh_target_id int not null references etl.refresh_targets,
  mv_name           text not null,
  refresh_after     text not null,
  refresh_on        text not null,
  concurrency       text not null,
  feeders           int[] not null,
  depends_on        int[] not null,
  status            etl.attempt_status not null default 'pending',
  skip_reason       etl.skip_reason,
  worker_pid        int,
  is_concurrent     boolean,
  started_at        timestamptz,
  ended_at          timestamptz,
  duration_ms       numeric(16, 3) generated always as (extract(epoch from ended_at - started_at) * 1000) stored,
  warning           text,
  error_code        text,
  error_message     text,
  error_hint        text,
  primary key (run_id, scope_index),
  constraint an_ended_refresh_has_an_end check ((ended_at is not null) = (status not in ('pending', 'running'))),
  constraint a_failed_refresh_says_why check (status <> 'failed' or error_code is not null)
) with (fillfactor = 50);
comment on table etl.mv_refreshes is
  'One row per refresh of a materialized view in a run. Immutable once ended. Source: etl.start_run.';
comment on column etl.mv_refreshes.feeders is 'order_index of the steps because of which it is refreshed.';
comment on column etl.mv_refreshes.depends_on is 'scope_index of the refreshes it reads from.';
comment on column etl.mv_refreshes.is_concurrent is 'Whether it was refreshed CONCURRENTLY, so that readers were not blocked.';
comment on column etl.mv_refreshes.warning is 'Why it was refreshed in another way than asked for.';
comment on column etl.mv_refreshes.duration_ms is 'From started_at to ended_at, milliseconds.';

create table etl.state (
  state_key              text primary key,
  strategy               text not null,
  last_success_watermark text,
  procedure_ids          int[] not null default '{}',
  last_run_id            bigint references etl.runs,
  last_run_at            timestamptz,
  last_rowcount          bigint,
  fence                  jsonb,
  server_id              bigint
) with (fillfactor = 50);
comment on table etl.state is
  'Up to where each state_key is known complete. Moves only in the transaction that wrote the data.';
comment on column etl.state.last_success_watermark is
  'A timestamptz, bigint or pg_snapshot as text, by strategy; null: nothing was read yet.';
comment on column etl.state.fence is
  'For ids: a bound read earlier and the writers that must end before it is safe: {"bound", "stage", "writers"}.';
comment on column etl.state.server_id is
  'For snapshots: system_identifier of the cluster whose transactions the watermark counts.';
comment on column etl.state.procedure_ids is
  'The procedures that have read up to the watermark. Another one must not take over the key: it would skip what lies before.';

create table etl.state_history (
  state_history_id bigint generated always as identity primary key,
  state_key        text not null,
  old_watermark    text,
  new_watermark    text,
  run_id           bigint references etl.runs,
  cause            text not null,
  reason           text,
  changed_by       text not null,
  changed_at       timestamptz not null default clock_timestamp(),
  constraint cause_is_known check (cause in ('incremental', 'full', 'set'))
);
create index state_history_state_key on etl.state_history (state_key, state_history_id desc);
comment on table etl.state_history is 'Every move of every watermark. Append-only. Source: the engine and etl.set_watermark.';

create table etl.watermark_ticks (
  state_key text not null,
  ticked_at timestamptz not null default clock_timestamp(),
  bound     text not null,
  primary key (state_key, ticked_at)
);
comment on table etl.watermark_ticks is
  'What was safe to read, and when: so as_of can mean a moment for ids and snapshots too. Source: each run, and etl.tick_watermarks.';
comment on column etl.watermark_ticks.bound is 'Exclusive end of what was safe to read at ticked_at.';

create table etl.full_refresh_freezes (
  freeze_id  bigint generated always as identity primary key,
  is_frozen  boolean not null,
  reason     text not null,
  changed_by text not null,
  changed_at timestamptz not null default clock_timestamp()
);
comment on table etl.full_refresh_freezes is
  'The global freeze of full refreshes, thrown and lifted: the newest row is in force. Append-only. Source: etl.freeze_full_refresh.';

-- Reading a tuple makes a serializable transaction notice that it was chosen as the victim. Nobody writes here.
create table etl.serialization_probe (is_only_row boolean primary key default true check (is_only_row));
insert into etl.serialization_probe default values;
comment on table etl.serialization_probe is
  'One row, read at the end of a serializable step so that a doomed transaction fails there and not in its COMMIT.';
