-- b2s 0.1.0, for psql. One transaction: everything or nothing.
\set ON_ERROR_STOP on
\set ON_ERROR_ROLLBACK off
\set QUIET on
begin;
do $$ begin perform pg_catalog.set_config('b2s.version', '0.1.0', true); end $$;
-- First part of every install and upgrade, inside its one transaction: lock, refusals, roles, schema, ledger.
--
-- Re-runnable. The caller has set b2s.version (the release being installed) for this transaction.

set local client_min_messages = warning;

-- One installer at a time; runs that are being started right now finish starting first, later ones are told to wait.
do $$ begin perform pg_advisory_xact_lock(6435443, 0); end $$;

do $$
begin
  if current_setting('server_version_num')::int < 150000 then
    raise exception using errcode = 'PT400',
      message = format('b2s needs PostgreSQL 15 or newer, this server is %s', current_setting('server_version')),
      hint = 'upgrade the server, or install into a database of a newer one';
  end if;
end $$;

-- Roles are shared by all databases of a server: another database may create them at the same moment.
do $$
declare
  v_role text;
begin
  foreach v_role in array array['etl_owner', 'etl_admin', 'etl_operator', 'etl_reader'] loop
    if not exists (select from pg_catalog.pg_roles where rolname = v_role) then
      begin
        execute format('create role %I nologin', v_role);
      exception
        when duplicate_object or unique_violation then null;
        when insufficient_privilege then
          raise exception using errcode = 'PT403',
            message = format('role %I does not exist and %I may not create it', v_role, current_user),
            hint = 'let a role with CREATEROLE run: create role etl_owner nologin; create role etl_admin nologin; '
                   'create role etl_operator nologin; create role etl_reader nologin; '
                   'grant etl_reader to etl_operator; grant etl_operator to etl_admin; grant pg_read_all_stats to etl_owner; '
                || format('grant etl_owner to %I;', current_user);
      end;
    end if;
  end loop;
  if not pg_has_role('etl_operator', 'etl_reader', 'member') then grant etl_reader to etl_operator; end if;
  if not pg_has_role('etl_admin', 'etl_operator', 'member') then grant etl_operator to etl_admin; end if;
  -- From 16 on, whoever creates a role administers it but may not SET ROLE to it before granting it to itself.
  if not pg_has_role(current_user, 'etl_owner', case when current_setting('server_version_num')::int >= 160000 then 'set' else 'member' end) then
    begin
      execute format('grant etl_owner to %I', current_user);
    exception when insufficient_privilege then
      raise exception using errcode = 'PT403',
        message = format('%I is not a member of role etl_owner, which owns schema etl', current_user),
        hint = format('let an administrator run: grant etl_owner to %I', current_user);
    end;
  end if;
  begin
    create schema if not exists etl authorization etl_owner;
  exception when insufficient_privilege then
    raise exception using errcode = 'PT403',
      message = format('%I may not create schema etl in database %I', current_user, current_database()),
      hint = format('let the owner of the database run: grant create on database %I to %I', current_database(), current_user);
  end;
  if (select nspowner::regrole::text from pg_catalog.pg_namespace where nspname = 'etl') <> 'etl_owner' then
    raise exception using errcode = 'PT409',
      message = 'this database has a schema etl that is not b2s''s',
      detail = (select format('schema etl belongs to role %s', nspowner::regrole) from pg_catalog.pg_namespace where nspname = 'etl'),
      hint = 'rename that schema, or install b2s into another database';
  end if;
end $$;

-- Windows of timestamps end where the oldest open transaction began, which the server shows to members of pg_read_all_stats
-- only. Not everybody may grant that (from 16 on: superusers and whoever was given it with admin option), and without
-- timestamps nothing needs it, so an install does without; b2s doctor reminds of it.
do $$
begin
  if pg_has_role('etl_owner', 'pg_read_all_stats', 'usage') then return; end if;
  grant pg_read_all_stats to etl_owner;
exception
  when unique_violation then null;
  when insufficient_privilege then
    raise warning using
      message = format('%I may not grant pg_read_all_stats to etl_owner: windows of timestamps are refused while somebody else is in a transaction', current_user),
      hint = 'let an administrator run: grant pg_read_all_stats to etl_owner';
end $$;

set local role etl_owner;
-- Routines may name others that a later file creates.
set local check_function_bodies = off;


create table if not exists etl.migrations (
  name        text primary key,
  sha256      text not null,
  version     text not null,
  applied_at  timestamptz not null default clock_timestamp(),
  applied_by  text not null default session_user
);
comment on table etl.migrations is
  'The migrations applied to this database, each with the sha256 of the file as it was then. Source: b2s migrate.';

create table if not exists etl.installation (
  is_only_row  boolean primary key default true check (is_only_row),
  version      text not null,
  installed_at timestamptz not null default clock_timestamp(),
  installed_by text not null default session_user
);
comment on table etl.installation is 'The release of b2s whose routines are installed here. One row. Source: b2s migrate.';

create or replace function etl._begin_migration(name text, sha256 text) returns boolean
language plpgsql volatile set search_path = pg_catalog, pg_temp as $$
declare
  v_sha256 text := (select m.sha256 from etl.migrations m where m.name = _begin_migration.name);
begin
  if v_sha256 is null then
    insert into etl.migrations (name, sha256, version)
    values (_begin_migration.name, _begin_migration.sha256, pg_catalog.current_setting('b2s.version'));
    return true;
  elsif v_sha256 <> _begin_migration.sha256 then
    raise exception using errcode = 'PT409',
      message = pg_catalog.format('migration %s was changed after it had been applied to this database', name),
      detail = pg_catalog.format('applied with sha256 %s, the file now has %s', v_sha256, sha256),
      hint = 'a released migration is frozen: restore the file, and put the change into a new migration';
  end if;
  return false;
end $$;
comment on function etl._begin_migration(text, text) is
  'Records a migration as applied and says whether its file must be run now. Raises PT409 if the file differs from the one applied.';
revoke all on function etl._begin_migration(text, text) from public;

do $$
declare
  v_version text := (select version from etl.installation);
  v_active  text;
begin
  if string_to_array(v_version, '.')::int[] > string_to_array(current_setting('b2s.version'), '.')::int[] then
    raise exception using errcode = 'PT409',
      message = format('this database has b2s %s, newer than the %s being installed', v_version, current_setting('b2s.version')),
      hint = 'upgrade the b2s package instead: pip install --upgrade b2s';
  end if;
  if to_regclass('etl.runs') is not null then
    -- A run whose advisory lock nobody holds is dead and does not stand in the way.
    execute $q$
      select string_agg(format('%s (backend %s)', r.run_id, l.pid), ', ')
        from etl.runs r
        join pg_catalog.pg_locks l on l.locktype = 'advisory' and l.classid = 6435443
         and l.objid = (case r.kind when 'backfill' then -(r.run_id % 2147483647)::int else r.pipeline_id end)::oid
         and l.objsubid = 2 and l.granted and l.database = (select oid from pg_catalog.pg_database where datname = current_database())
       where r.status = 'running' $q$ into v_active;
    if v_active is not null then
      raise exception using errcode = 'PT409',
        message = format('run %s is active: its routines cannot be replaced under it', v_active),
        hint = 'wait until it has ended, or stop it: select etl.cancel_run(run_id, reason => ''upgrade'')';
    end if;
  end if;
end $$;

select etl._begin_migration('0001_catalog', 'b3ef4dd9ca6aa0ba6fd39b8b60507b3fddd2e39114f4efa8e3db0b49db4ca832') as is_pending \gset
\if :is_pending
-- The catalog: what a team has configured. Written only by etl.apply_config, in one transaction per change.

create table etl.pipelines (
  pipeline_id      int generated always as identity primary key,
  name             text not null unique,
  description      text,
  max_concurrency  int not null default 2,
  search_path      text[] not null default '{}',
  constraint max_concurrency_is_between_1_and_64 check (max_concurrency between 1 and 64)
);
comment on table etl.pipelines is
  'A pipeline: a named set of procedures that share one run lock. Source: transformations.yaml.';
comment on column etl.pipelines.max_concurrency is 'How many scopes of one run may execute at a time.';
comment on column etl.pipelines.search_path is
  'Schemas put on the search_path while a step runs, after pg_catalog. Empty: routines must qualify their names.';

create table etl.config_versions (
  config_version_id bigint generated always as identity primary key,
  pipeline_id       int not null references etl.pipelines,
  version           int not null,
  digest            text not null,
  config            jsonb not null,
  changes           jsonb not null,
  source            text,
  git_revision      text,
  author            text not null,
  applied_by        text not null default session_user,
  applied_at        timestamptz not null default clock_timestamp(),
  constraint versions_of_a_pipeline_are_numbered_once unique (pipeline_id, version)
);
comment on table etl.config_versions is
  'Every configuration that was applied, whole, with its digest, author and git revision. Append-only. Source: etl.apply_config.';
comment on column etl.config_versions.digest is 'sha256 of the configuration as jsonb text.';

create table etl.groups (
  group_id     int generated always as identity primary key,
  pipeline_id  int not null references etl.pipelines,
  name         text not null,
  description  text,
  is_active    boolean not null default true,
  constraint a_group_name_is_unique_in_its_pipeline unique (pipeline_id, name)
);
comment on table etl.groups is 'Named groups of procedures; with transaction_scope per_group the group is one transaction.';

create table etl.procedures (
  procedure_id          int generated always as identity primary key,
  pipeline_id           int not null references etl.pipelines,
  name                  text not null,
  type                  text not null,
  description           text,
  routine               text not null,
  routine_signature     text not null,
  call_sql              text not null,
  rows_column           text,
  default_mode          text not null,
  allow_full_refresh    boolean not null,
  allow_fact_dependency boolean not null,
  transaction_scope     text not null,
  isolation             text not null,
  args                  jsonb not null,
  watermark_strategy    text,
  watermark_sources     text[],
  state_key             text,
  delay_ms              int not null,
  on_empty              text not null default 'run',
  watermark_time_zone   text,
  max_attempts          int not null,
  backoff_ms            int not null,
  max_backoff_ms        int not null,
  timeout_ms            int,
  lock_timeout_ms       int,
  on_failure            text not null,
  max_window            jsonb,
  checks                jsonb not null,
  is_active             boolean not null default true,
  constraint a_procedure_name_is_unique_in_its_pipeline unique (pipeline_id, name),
  constraint type_is_dimension_or_fact check (type in ('dimension', 'fact')),
  constraint default_mode_is_incremental_or_full check (default_mode in ('incremental', 'full')),
  constraint transaction_scope_is_known check (transaction_scope in ('per_procedure', 'per_group')),
  constraint isolation_is_known check (isolation in ('read committed', 'repeatable read', 'serializable')),
  constraint watermark_strategy_is_known check (watermark_strategy in ('timestamp', 'id', 'xid')),
  constraint a_watermark_has_a_state_key check ((watermark_strategy is null) = (state_key is null)),
  constraint on_empty_is_run_or_skip check (on_empty in ('run', 'skip')),
  constraint on_failure_is_continue_or_stop check (on_failure in ('continue', 'stop')),
  constraint there_is_at_least_one_attempt check (max_attempts >= 1)
);
create index procedures_state_key on etl.procedures (state_key) where is_active;
comment on table etl.procedures is
  'A configured transformation: a name, the routine that does it, and how it is to be run. Removed ones are deactivated, never deleted.';
comment on column etl.procedures.routine_signature is 'The routine as the server resolved it when the configuration was applied.';
comment on column etl.procedures.call_sql is
  'The statement that runs the routine: $1 mode, $2 since, $3 until (text), $4 run id, $5 parameters (jsonb).';
comment on column etl.procedures.rows_column is
  'The output column of call_sql that holds the number of rows, or null when the routine does not report one.';
comment on column etl.procedures.watermark_sources is
  'Columns (schema.table.column) by which new rows are told, or one query that returns the newest value to read.';
comment on column etl.procedures.delay_ms is 'How far the end of a window of timestamps stays behind the safe bound, milliseconds.';
comment on column etl.procedures.watermark_time_zone is
  'For a source of type timestamp without time zone: the zone in which its values are read, whoever runs; that of the session which first configured it.';
comment on column etl.procedures.on_empty is 'What a step does whose window holds no row: run, or skip.';
comment on column etl.procedures.max_window is
  'The longest window one transaction reads: a duration such as "1 day", a number of ids, or a number of transactions, by strategy. Null: all of it.';
comment on column etl.procedures.checks is 'Checks with the compiled query of each: it returns the number of violations.';

create table etl.dependencies (
  procedure_id  int not null references etl.procedures,
  depends_on_id int not null references etl.procedures,
  primary key (procedure_id, depends_on_id),
  constraint a_procedure_does_not_depend_on_itself check (procedure_id <> depends_on_id)
);
create index dependencies_depends_on_id on etl.dependencies (depends_on_id);
comment on table etl.dependencies is 'What a procedure needs before it can run.';

create table etl.parameters (
  procedure_id  int not null references etl.procedures,
  name          text not null,
  ordinal       int not null,
  declaration   jsonb not null,
  primary key (procedure_id, name)
);
comment on table etl.parameters is 'The parameters a procedure takes.';
comment on column etl.parameters.declaration is
  'Subset of JSON Schema: type, required, default, enum, minimum, maximum, minLength, maxLength, pattern, format, items, minItems, maxItems.';

create table etl.group_members (
  group_id     int not null references etl.groups,
  procedure_id int not null references etl.procedures,
  primary key (group_id, procedure_id)
);
create unique index a_procedure_is_in_one_group on etl.group_members (procedure_id);
comment on table etl.group_members is 'Which procedures form a group.';

create table etl.tags (
  tag_id  int generated always as identity primary key,
  name    text not null unique
);
comment on table etl.tags is 'Labels by which a run can select procedures.';

create table etl.procedure_tags (
  procedure_id int not null references etl.procedures,
  tag_id       int not null references etl.tags,
  primary key (procedure_id, tag_id)
);
comment on table etl.procedure_tags is 'Which procedures carry which tag.';

create table etl.refresh_targets (
  refresh_target_id int generated always as identity primary key,
  pipeline_id       int not null references etl.pipelines,
  name              text not null,
  constraint a_refresh_target_is_named_once_in_its_pipeline unique (pipeline_id, name)
);
comment on table etl.refresh_targets is 'Materialized views that runs refresh.';

create table etl.procedure_refresh_targets (
  procedure_id      int not null references etl.procedures,
  refresh_target_id int not null references etl.refresh_targets,
  refresh_after     text not null,
  refresh_on        text not null,
  concurrency       text not null,
  primary key (procedure_id, refresh_target_id),
  constraint refresh_after_is_known check (refresh_after in ('procedure', 'group', 'run')),
  constraint refresh_on_is_known check (refresh_on in ('success', 'always')),
  constraint concurrency_is_known check (concurrency in ('auto', 'true', 'false'))
);
comment on table etl.procedure_refresh_targets is
  'Which materialized views are refreshed because of a procedure, after what, and whether only on success.';

create table etl.schedules (
  schedule_id  int generated always as identity primary key,
  pipeline_id  int not null references etl.pipelines,
  name         text not null,
  definition   jsonb not null,
  is_active    boolean not null default true,
  constraint a_schedule_name_is_unique_in_its_pipeline unique (pipeline_id, name)
);
comment on table etl.schedules is 'When runs are to be started, and with which request.';
\endif
select etl._begin_migration('0002_runtime', 'c2718a5cfbb8e856c6a964d5e6bd7dd7c28a80b01f382442bc71373c7fe10cea') as is_pending \gset
\if :is_pending
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
\endif
-- The one way in which b2s refuses something.
--
-- SQLSTATE PTnnn becomes HTTP status nnn in PostgREST and in our own API; DETAIL is one JSON object with a stable
-- code and every problem found, so that a client never has to parse prose.
create or replace function etl._fail(sqlstate_ text, code text, message text, hint text, data jsonb default '{}')
returns void
language plpgsql volatile set search_path = pg_catalog, pg_temp as $$
begin
  raise exception using errcode = sqlstate_, message = _fail.message, hint = _fail.hint,
    detail = (jsonb_build_object('code', code) || data)::text;
end $$;
comment on function etl._fail(text, text, text, text, jsonb) is
  'Raises an error with SQLSTATE PTnnn, a message, a hint and {"code": ...} in DETAIL.';
revoke all on function etl._fail(text, text, text, text, jsonb) from public;
grant execute on function etl._fail(text, text, text, text, jsonb) to etl_reader;

-- Who asks: inside a security definer function current_user is the owner, so it takes the SET ROLE in force or the login.
create or replace function etl._requester() returns text
language sql stable set search_path = pg_catalog, pg_temp as $$
  select coalesce(nullif(current_setting('role'), 'none'), session_user::text)
$$;
comment on function etl._requester() is 'The role that makes the request: the SET ROLE in force, else the login.';
revoke all on function etl._requester() from public;
grant execute on function etl._requester() to etl_reader;

-- What COMMIT says in a context that can never commit. A function is always such a context, so its text is
-- what etl.start_run compares its own probe with, in whatever language the server speaks.
create or replace function etl._atomic_message() returns text
language plpgsql volatile set search_path = pg_catalog, pg_temp as $$
begin
  begin
    commit;
  exception when invalid_transaction_termination then
    return sqlerrm;
  end;
end $$;
comment on function etl._atomic_message() is 'The text of the error that COMMIT raises inside a transaction block or a function.';
revoke all on function etl._atomic_message() from public;
grant execute on function etl._atomic_message() to etl_reader;

-- Explains why a verb that manages transactions cannot run where it was called.
create or replace function etl._fail_in_transaction(verb text) returns void
language plpgsql volatile set search_path = pg_catalog, pg_temp as $$
begin
  raise exception using errcode = '25001',
    message = format('%s manages its own transactions and cannot run inside one', verb),
    detail = jsonb_build_object('code', 'call.in_transaction')::text,
    hint = format('send CALL %s(...) as one statement with autocommit on: not after BEGIN, not from a function, a trigger or EXECUTE, '
                  'not together with other statements; psycopg: connect(..., autocommit=True); pg_cron: the CALL alone', verb);
end $$;
comment on function etl._fail_in_transaction(text) is 'Raises 25001, with what to do, for a CALL inside a transaction block.';
revoke all on function etl._fail_in_transaction(text) from public;
grant execute on function etl._fail_in_transaction(text) to etl_reader;

-- The run lock: advisory lock (6435443, pipeline_id), or (6435443, -run_id) for a backfill; hand over hand.
--
-- Who begins a run takes it exclusively, once: that succeeds only where nobody is at work. Who executes the run shares it.
-- It is held at transaction level while code runs, so that any error releases it, and at session level only across
-- a COMMIT or ROLLBACK, so that nobody slips in between. Whoever dies leaves no lock: a run in status 'running'
-- whose lock is free is dead now, not after a timeout. The one leak there is, a COMMIT that itself fails, is
-- healed by the same session's next start and named to everybody else's.
--
-- Both are expressions that the planner inlines: they stand around every COMMIT, where a statement each would cost 10 us.
-- Whoever calls them holds the lock already, so trying succeeds.
create or replace function etl._hold(lock_key int) returns boolean
language sql volatile
return pg_try_advisory_lock_shared(6435443, lock_key);
comment on function etl._hold(int) is 'Takes the run lock at session level too, just before a COMMIT or ROLLBACK.';
revoke all on function etl._hold(int) from public;
grant execute on function etl._hold(int) to etl_operator;

create or replace function etl._rehold(lock_key int) returns boolean
language sql volatile
return pg_try_advisory_xact_lock_shared(6435443, lock_key) and pg_advisory_unlock_shared(6435443, lock_key);
comment on function etl._rehold(int) is 'Takes the run lock at transaction level only, just after a COMMIT or ROLLBACK.';
revoke all on function etl._rehold(int) from public;
grant execute on function etl._rehold(int) to etl_operator;

create or replace function etl._lock_key(run etl.runs) returns int
language sql immutable
return case run.kind when 'backfill' then -(run.run_id % 2147483647)::int else run.pipeline_id end;
comment on function etl._lock_key(etl.runs) is 'The second key of the advisory lock of a run: its pipeline; for a backfill its own number, negative.';
revoke all on function etl._lock_key(etl.runs) from public;
grant execute on function etl._lock_key(etl.runs) to etl_reader;

-- Holds of our own at session level were left by an earlier CALL of this session that was interrupted, or whose COMMIT failed:
-- as long as they are there, its run passes for alive.
create or replace function etl._drop_holds(lock_key int) returns void
language plpgsql volatile set search_path = pg_catalog, pg_temp as $$
begin
  while exists (select from pg_catalog.pg_locks l
                 where l.locktype = 'advisory' and l.pid = pg_backend_pid() and l.classid = 6435443
                   and l.objid = lock_key::oid and l.objsubid = 2 and l.granted) loop
    exit when not (pg_advisory_unlock_shared(6435443, lock_key) or pg_advisory_unlock(6435443, lock_key));
  end loop;
end $$;
comment on function etl._drop_holds(int) is 'Lets go of a run lock that an earlier CALL of this session has left behind.';
revoke all on function etl._drop_holds(int) from public;

create or replace function etl._acquire(pipeline_id int) returns void
language plpgsql volatile set search_path = pg_catalog, pg_temp as $$
declare
  v_holder record;
begin
  perform etl._drop_holds(pipeline_id);
  if not pg_try_advisory_xact_lock_shared(6435443, 0) then
    perform etl._fail('PT409', 'install.active', 'b2s is being upgraded in this database', 'try again in a moment');
  end if;
  if pg_try_advisory_xact_lock(6435443, pipeline_id) then return; end if;
  select l.pid, a.usename, a.application_name, r.run_id,
         exists (select from pg_catalog.pg_locks v where v.pid = l.pid and v.locktype = 'virtualxid') as is_busy
    into v_holder
    from pg_catalog.pg_locks l
    left join pg_catalog.pg_stat_activity a on a.pid = l.pid
    left join etl.runs r on r.pipeline_id = _acquire.pipeline_id and r.status = 'running' and r.kind = 'run'
   where l.locktype = 'advisory' and l.classid = 6435443 and l.objid = _acquire.pipeline_id::oid and l.objsubid = 2 and l.granted
     and l.database = (select d.oid from pg_catalog.pg_database d where d.datname = current_database());
  perform etl._fail('PT409', 'run.active',
    format('run %s of this pipeline is active', coalesce(v_holder.run_id::text, '(being started)')),
    case when v_holder.is_busy is false
      then format('backend %s holds the run lock but is idle: its CALL failed in COMMIT; end that session: select pg_terminate_backend(%s)',
                  v_holder.pid, v_holder.pid)
      else format('wait for it, or stop it: select etl.cancel_run(%s, reason => ''...'')', coalesce(v_holder.run_id::text, 'run_id'))
    end,
    jsonb_build_object('run_id', v_holder.run_id, 'pid', v_holder.pid, 'user', v_holder.usename,
                       'application_name', v_holder.application_name));
end $$;
comment on function etl._acquire(int) is
  'Takes the run lock of a pipeline for this transaction. Raises PT409 run.active, naming the run and the session that hold it.';
revoke all on function etl._acquire(int) from public;

create or replace function etl._fail_not_owned(run_id bigint) returns void
language plpgsql volatile set search_path = pg_catalog, pg_temp as $$
begin
  raise exception using errcode = '42501',
    message = format('this session does not execute run %s', run_id),
    detail = jsonb_build_object('code', 'run.not_owned')::text,
    hint = 'engine helpers are called by etl.start_run only: call etl.start_run(...)';
end $$;
comment on function etl._fail_not_owned(bigint) is 'Raises 42501 run.not_owned.';
revoke all on function etl._fail_not_owned(bigint) from public;

create or replace function etl._is_owner(run etl.runs) returns boolean
language sql volatile
return run.status = 'running' and run.worker_pid = pg_backend_pid() and pg_try_advisory_xact_lock_shared(6435443, etl._lock_key(run));
comment on function etl._is_owner(etl.runs) is 'Whether this very session took a run up and executes it: it is the recorded worker and holds the run lock.';
revoke all on function etl._is_owner(etl.runs) from public;

create or replace function etl._is_helper(run etl.runs) returns boolean
language plpgsql volatile set search_path = pg_catalog, pg_temp as $$
begin
  return coalesce(run.status = 'running', false) and exists (select from etl.run_workers w where w.run_id = run.run_id and w.pid = pg_backend_pid())
     and pg_try_advisory_xact_lock_shared(6435443, etl._lock_key(run));
end $$;
comment on function etl._is_helper(etl.runs) is 'Whether this very session has joined a run that another one took up.';
revoke all on function etl._is_helper(etl.runs) from public;

-- Without a statistics view: whoever holds the run lock is alive.
create or replace function etl._living_workers(run etl.runs) returns int[]
language sql volatile set search_path = pg_catalog, pg_temp as $$
  select coalesce(array_agg(distinct l.pid), '{}') from pg_catalog.pg_locks l
   where l.locktype = 'advisory' and l.classid = 6435443 and l.objid = etl._lock_key(run)::oid and l.objsubid = 2 and l.granted
     and l.database = (select d.oid from pg_catalog.pg_database d where d.datname = current_database())
     and (l.pid = run.worker_pid or l.pid in (select w.pid from etl.run_workers w where w.run_id = run.run_id))
$$;
comment on function etl._living_workers(etl.runs) is 'The backends that execute a run.';
revoke all on function etl._living_workers(etl.runs) from public;

create or replace function etl._check_owner(run_id bigint) returns etl.runs
language plpgsql volatile set search_path = pg_catalog, pg_temp set plan_cache_mode = force_generic_plan as $$
declare
  v_run etl.runs;
begin
  select * into v_run from etl.runs r where r.run_id = _check_owner.run_id;
  if etl._is_owner(v_run) is not true and etl._is_helper(v_run) is not true then perform etl._fail_not_owned(run_id); end if;
  return v_run;
end $$;
comment on function etl._check_owner(bigint) is
  'The run, if this very session executes it: it holds the run lock and is the recorded worker. Else raises 42501.';
revoke all on function etl._check_owner(bigint) from public;

-- Ended runs and attempts, and everything append-only, cannot be changed or deleted by any role, the owner included.
create or replace function etl._refuse_change() returns trigger
language plpgsql volatile set search_path = pg_catalog, pg_temp as $$
begin
  perform etl._fail('PT409', 'history.immutable',
    format('%s refused: what etl.%s says has ended and cannot be changed', tg_op, tg_table_name),
    'history is kept as it happened; to correct data, start another run',
    jsonb_build_object('table', 'etl.' || tg_table_name));
end $$;
comment on function etl._refuse_change() is 'Trigger: refuses to change history. Raises PT409 history.immutable.';
revoke all on function etl._refuse_change() from public;

-- The invariants of an attempt, by name. In a trigger because that costs a third of what check constraints do, or of a
-- condition of the trigger that says as much: the server parses those anew for every update (migrations/0002_runtime.sql).
create or replace function etl._guard_attempt() returns trigger
language plpgsql volatile set search_path = pg_catalog, pg_temp as $$
declare
  v_broken text := case
    when (new.ended_at is null) <> (new.status in ('pending', 'running')) then 'an_ended_attempt_has_an_end'
    when new.status in ('failed', 'retrying') and new.error_code is null then 'a_failed_attempt_says_why'
    when (new.status = 'skipped') <> (new.skip_reason is not null) then 'a_skipped_attempt_says_why' end;
begin
  if old.ended_at is not null then
    perform etl._fail('PT409', 'history.immutable', 'UPDATE refused: what etl.procedure_runs says has ended and cannot be changed',
      'history is kept as it happened; to correct data, start another run', '{"table": "etl.procedure_runs"}');
  elsif v_broken is not null then
    raise exception using errcode = 'check_violation', schema = 'etl', table = 'procedure_runs', constraint = v_broken,
      message = format('new row for table etl.procedure_runs violates %s', v_broken);
  end if;
  return new;
end $$;
comment on function etl._guard_attempt() is
  'Trigger: an ended attempt cannot be changed (PT409 history.immutable), and an attempt is consistent in itself (23514).';
revoke all on function etl._guard_attempt() from public;

create or replace trigger an_ended_run_is_immutable before update or delete on etl.runs
  for each row when (old.ended_at is not null) execute function etl._refuse_change();
create or replace trigger an_ended_attempt_is_immutable before update on etl.procedure_runs
  for each row execute function etl._guard_attempt();
create or replace trigger an_attempt_is_not_deleted before delete on etl.procedure_runs
  for each row when (old.ended_at is not null) execute function etl._refuse_change();
create or replace trigger an_ended_refresh_is_immutable before update or delete on etl.mv_refreshes
  for each row when (old.ended_at is not null) execute function etl._refuse_change();
create or replace trigger config_versions_are_append_only before update or delete on etl.config_versions
  for each row execute function etl._refuse_change();
create or replace trigger state_history_is_append_only before update or delete on etl.state_history
  for each row execute function etl._refuse_change();
create or replace trigger freezes_are_append_only before update or delete on etl.full_refresh_freezes
  for each row execute function etl._refuse_change();

create or replace trigger runs_are_not_truncated before truncate on etl.runs execute function etl._refuse_change();
create or replace trigger attempts_are_not_truncated before truncate on etl.procedure_runs execute function etl._refuse_change();
create or replace trigger refreshes_are_not_truncated before truncate on etl.mv_refreshes execute function etl._refuse_change();
create or replace trigger config_versions_are_not_truncated before truncate on etl.config_versions execute function etl._refuse_change();
create or replace trigger state_history_is_not_truncated before truncate on etl.state_history execute function etl._refuse_change();
create or replace trigger freezes_are_not_truncated before truncate on etl.full_refresh_freezes execute function etl._refuse_change();

-- Parameters: declared in a subset of JSON Schema, validated here and nowhere else, because requests come from any client.
create or replace function etl._is_a(value text, type_name text) returns boolean
language plpgsql stable strict set search_path = pg_catalog, pg_temp as $$
begin
  case type_name
    when 'date' then perform value::date;
    when 'date-time' then perform value::timestamptz;
    when 'bigint' then perform value::bigint;
  end case;
  return true;
exception when data_exception then
  return false;
end $$;
comment on function etl._is_a(text, text) is 'Whether a text is a date, a date-time (timestamptz) or a bigint.';
revoke all on function etl._is_a(text, text) from public;

-- What is wrong with a string, given its declaration; null when nothing is.
create or replace function etl._string_problem(declaration jsonb, value text) returns text
language sql stable set search_path = pg_catalog, pg_temp as $$
  select case
    when length(value) < (declaration->>'minLength')::int then format('is shorter than %s characters', declaration->>'minLength')
    when length(value) > (declaration->>'maxLength')::int then format('is longer than %s characters', declaration->>'maxLength')
    when value !~ (declaration->>'pattern') then format('does not match the pattern %s', declaration->>'pattern')
    when declaration->>'format' = 'date' and not (value ~ '^[0-9]{4}-[0-9]{2}-[0-9]{2}$' and etl._is_a(value, 'date'))
      then 'is not a date (YYYY-MM-DD)'
    when declaration->>'format' = 'date-time'
         and not (value ~* '^[0-9]{4}-[0-9]{2}-[0-9]{2}[t ][0-9]{2}:[0-9]{2}(:[0-9]{2}([.][0-9]+)?)?(z|[+-][0-9]{2}(:?[0-9]{2})?)$' and etl._is_a(value, 'date-time'))
      then 'is not a date-time with a time zone (YYYY-MM-DDThh:mm:ssZ)'
    when declaration->>'format' = 'uuid' and value !~* '^[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}$' then 'is not a UUID'
  end
$$;
comment on function etl._string_problem(jsonb, text) is 'What is wrong with a string parameter, or null.';
revoke all on function etl._string_problem(jsonb, text) from public;

create or replace function etl._parameter_problem(declaration jsonb, value jsonb) returns text
language plpgsql stable set search_path = pg_catalog, pg_temp as $$
declare
  v_type    text := declaration->>'type';
  v_found   text := jsonb_typeof(value);
  v_element record;
  v_problem text;
begin
  if v_type = 'integer' then
    if v_found <> 'number' or (value #>> '{}')::numeric % 1 <> 0 then return format('must be an integer, not %s', value); end if;
    if not etl._is_a(trunc((value #>> '{}')::numeric)::text, 'bigint') then return 'is outside the range of bigint'; end if;
  elsif v_found <> v_type then
    return format('must be %s %s, not %s', case when v_type = 'array' then 'an' else 'a' end, v_type, value);
  end if;
  if declaration ? 'enum' and not declaration->'enum' @> jsonb_build_array(value) then
    return format('must be one of %s, not %s', declaration->'enum', value);
  end if;
  if v_type in ('integer', 'number') then
    if (value #>> '{}')::numeric < (declaration->>'minimum')::numeric then return format('is below the minimum of %s', declaration->>'minimum'); end if;
    if (value #>> '{}')::numeric > (declaration->>'maximum')::numeric then return format('is above the maximum of %s', declaration->>'maximum'); end if;
  elsif v_type = 'string' then
    return etl._string_problem(declaration, value #>> '{}');
  elsif v_type = 'array' then
    if jsonb_array_length(value) < (declaration->>'minItems')::int then return format('has fewer than %s items', declaration->>'minItems'); end if;
    if jsonb_array_length(value) > (declaration->>'maxItems')::int then return format('has more than %s items', declaration->>'maxItems'); end if;
    for v_element in select e.item, e.n from jsonb_array_elements(value) with ordinality e(item, n) loop
      v_problem := etl._parameter_problem(declaration->'items', v_element.item);
      if v_problem is not null then return format('item %s %s', v_element.n, v_problem); end if;
    end loop;
  end if;
  return null;
end $$;
comment on function etl._parameter_problem(jsonb, jsonb) is 'What is wrong with the value of a parameter, given its declaration, or null.';
revoke all on function etl._parameter_problem(jsonb, jsonb) from public;

-- 1.0 is an integer in JSON and none in SQL.
create or replace function etl._normal_value(declaration jsonb, value jsonb) returns jsonb
language sql immutable set search_path = pg_catalog, pg_temp as $$
  select case
    when declaration->>'type' = 'integer' then to_jsonb(trunc((value #>> '{}')::numeric))
    when declaration#>>'{items,type}' = 'integer'
      then (select coalesce(jsonb_agg(trunc(e.item::numeric) order by e.n), '[]') from jsonb_array_elements(value) with ordinality e(item, n))
    else value end
$$;
comment on function etl._normal_value(jsonb, jsonb) is 'A valid value of a parameter, integers without a decimal point.';
revoke all on function etl._normal_value(jsonb, jsonb) from public;

-- A null counts as not given. Returns the values to use, defaults included, and all problems.
create or replace function etl._check_parameters(
  procedure_id int, procedure_name text, given jsonb, out parameters jsonb, out problems jsonb)
language plpgsql stable set search_path = pg_catalog, pg_temp as $$
declare
  v_declared jsonb := (select jsonb_object_agg(p.name, p.declaration) from etl.parameters p where p.procedure_id = _check_parameters.procedure_id);
begin
  if given is not null and jsonb_typeof(given) <> 'object' then
    parameters := '{}';
    problems := jsonb_build_array(jsonb_build_object('loc', jsonb_build_array('params', procedure_name), 'code', 'params.invalid',
      'message', format('params of %s must be an object like {"name": value}, not %s', procedure_name, given)));
    return;
  end if;
  given := jsonb_strip_nulls(coalesce(given, '{}'));
  select coalesce(jsonb_object_agg(d.key, etl._normal_value(d.value, coalesce(given->d.key, d.value->'default')))
           filter (where given ? d.key or d.value ? 'default'), '{}')
    into parameters
    from jsonb_each(v_declared) d
   where given->d.key is null or etl._parameter_problem(d.value, given->d.key) is null;
  select jsonb_agg(jsonb_build_object('loc', jsonb_build_array('params', procedure_name, q.name), 'code', 'params.invalid',
                                      'message', format('param %s of %s %s', q.name, procedure_name, q.problem)) order by q.name)
    into problems
    from (select g.key as name,
                 case when v_declared ? g.key then etl._parameter_problem(v_declared->g.key, g.value)
                      else coalesce('is unknown; it takes ' || (select string_agg(k, ', ' order by k) from jsonb_object_keys(v_declared) k),
                                    'is unknown; it takes none') end as problem
            from jsonb_each(given) g
          union all
          select d.key, 'is required' from jsonb_each(v_declared) d
           where (d.value->>'required')::boolean and not d.value ? 'default' and not given ? d.key) q
   where q.problem is not null;
end $$;
comment on function etl._check_parameters(int, text, jsonb) is
  'Validates the parameters given for one procedure: the values to use, and every problem found.';
revoke all on function etl._check_parameters(int, text, jsonb) from public;

-- Order in a graph of numbered nodes (1..n): linear in nodes and edges, so that ten thousand procedures plan at once.
--
-- Edges run from what comes first to what comes later and must be sorted by edge_from.
-- levels: the longest way to a node; null for a node in a cycle or behind one.
-- phases: 0 for what comes before every fact, 1 for a scope that mixes dimensions and facts, 2 for facts and
-- whatever depends on one. Given as 0, 1, 2 by what a node itself contains.
create or replace function etl._graph_order(phases int[], edge_from int[], edge_to int[], out levels int[], out phase_of int[])
language plpgsql immutable set search_path = pg_catalog, pg_temp as $$
declare
  v_nodes   int := coalesce(array_length(phases, 1), 0);
  v_edges   int := coalesce(array_length(edge_from, 1), 0);
  v_waiting int[] := array_fill(0, array[greatest(v_nodes, 1)]);
  v_first   int[] := array_fill(0, array[greatest(v_nodes, 1)]);
  v_queue   int[] := '{}';
  v_head    int := 1;
  v_tail    int := 0;
  v_node    int;
  v_next    int;
begin
  levels := array_fill(null::int, array[greatest(v_nodes, 1)]);
  phase_of := phases;
  for e in 1 .. v_edges loop
    v_waiting[edge_to[e]] := v_waiting[edge_to[e]] + 1;
    if v_first[edge_from[e]] = 0 then v_first[edge_from[e]] := e; end if;
  end loop;
  for n in 1 .. v_nodes loop
    if v_waiting[n] = 0 then v_tail := v_tail + 1; v_queue[v_tail] := n; end if;
  end loop;
  while v_head <= v_tail loop
    v_node := v_queue[v_head];
    v_head := v_head + 1;
    levels[v_node] := coalesce(levels[v_node], 0);
    continue when v_first[v_node] = 0;
    for e in v_first[v_node] .. v_edges loop
      exit when edge_from[e] <> v_node;
      v_next := edge_to[e];
      levels[v_next] := greatest(levels[v_next], levels[v_node] + 1);
      if phase_of[v_node] > 0 then phase_of[v_next] := 2; end if;
      v_waiting[v_next] := v_waiting[v_next] - 1;
      if v_waiting[v_next] = 0 then v_tail := v_tail + 1; v_queue[v_tail] := v_next; end if;
    end loop;
  end loop;
  for n in 1 .. v_nodes loop
    if v_waiting[n] > 0 then levels[n] := null; end if;
  end loop;
end $$;
comment on function etl._graph_order(int[], int[], int[]) is
  'Levels and phases of a graph; a level is null for nodes in or behind a cycle.';
revoke all on function etl._graph_order(int[], int[], int[]) from public;

-- One cycle, as node numbers, each depending on the next, the first repeated at the end; null when there is none.
create or replace function etl._graph_cycle(levels int[], edge_from int[], edge_to int[]) returns int[]
language plpgsql immutable set search_path = pg_catalog, pg_temp as $$
declare
  v_path int[] := '{}';
  v_node int := (select min(n) from unnest(levels) with ordinality l(level, n) where l.level is null);
begin
  while v_node is not null loop
    if array_position(v_path, v_node) is not null then
      return v_path[array_position(v_path, v_node):] || v_node;
    end if;
    v_path := v_path || v_node;
    select min(e.f) into v_node from unnest(edge_from, edge_to) e(f, t) where e.t = v_node and levels[e.f] is null;
  end loop;
  return null;
end $$;
comment on function etl._graph_cycle(int[], int[], int[]) is 'The nodes of one cycle of a graph, or null.';
revoke all on function etl._graph_cycle(int[], int[], int[]) from public;

-- What must come before what among the selected procedures. A path through procedures that are not selected is an
-- order but not a requirement: what lies between is not run.
create or replace function etl._selected_edges(selected int[])
returns table (from_id int, to_id int, is_required boolean)
language sql stable set search_path = pg_catalog, pg_temp as $$
  with recursive reach(consumer, source, is_direct) as (
    select d.procedure_id, d.depends_on_id, true
      from unnest(selected) s(id) join etl.dependencies d on d.procedure_id = s.id
    union
    select r.consumer, d.depends_on_id, false
      from reach r
      join etl.procedures p on p.procedure_id = r.source and p.is_active
      join etl.dependencies d on d.procedure_id = r.source
     where r.source <> all (selected)
  )
  select r.source, r.consumer, bool_or(r.is_direct)
    from reach r join unnest(selected) s(id) on s.id = r.source
   where r.source <> r.consumer
   group by r.source, r.consumer
$$;
comment on function etl._selected_edges(int[]) is 'Edges among the selected procedures, direct (required) or through others (order only).';
revoke all on function etl._selected_edges(int[]) from public;

-- Raises the error for a cycle. Procedures alone: the YAML is wrong. Scopes: the grouping is.
create or replace function etl._fail_cycle(names text[], is_contracted boolean) returns void
language plpgsql volatile set search_path = pg_catalog, pg_temp as $$
begin
  if is_contracted then
    perform etl._fail('PT400', 'plan.group_cycle',
      format('the groups that run as one transaction depend on each other in a circle: %s', array_to_string(names, ' -> ')),
      'move a procedure of the circle out of its group, or give the group transaction_scope: per_procedure',
      jsonb_build_object('cycle', names));
  end if;
  perform etl._fail('PT400', 'plan.cycle', format('dependencies form a cycle: %s', array_to_string(names, ' -> ')),
    'remove one of these dependencies', jsonb_build_object('cycle', names));
end $$;
comment on function etl._fail_cycle(text[], boolean) is 'Raises PT400 plan.cycle or plan.group_cycle, naming the whole cycle.';
revoke all on function etl._fail_cycle(text[], boolean) from public;

-- Topological order of numbered nodes and of the scopes they form. Sorted by (phase, scope_level, scope_number, position)
-- the result is the order of execution for one worker.
create or replace function etl._order_nodes(names text[], phases int[], scopes int[], edge_from int[], edge_to int[])
returns table (n int, scope_number int, phase int, scope_level int, "position" int)
language plpgsql stable set search_path = pg_catalog, pg_temp as $$
declare
  v_order    record := etl._graph_order(phases, edge_from, edge_to);
  v_contract record;
begin
  if array_position(v_order.levels, null) is not null then
    perform etl._fail_cycle((select array_agg(names[c.n] order by c.i)
      from unnest(etl._graph_cycle(v_order.levels, edge_from, edge_to)) with ordinality c(n, i)), false);
  end if;
  if (select count(distinct s) from unnest(scopes) s) = cardinality(names) then
    return query select g.n, g.n, v_order.phase_of[g.n], v_order.levels[g.n], 1 from generate_series(1, cardinality(names)) g(n);
    return;
  end if;
  v_contract := etl._contract_scopes(scopes, phases, edge_from, edge_to, names);
  return query
    select g.n, v_contract.number_of[g.n], v_contract.phase_of[v_contract.number_of[g.n]], v_contract.levels[v_contract.number_of[g.n]],
           (row_number() over (partition by v_contract.number_of[g.n] order by v_order.phase_of[g.n], v_order.levels[g.n], g.n))::int
      from generate_series(1, cardinality(names)) g(n);
end $$;
comment on function etl._order_nodes(text[], int[], int[], int[], int[]) is
  'Order of execution of a graph, dimensions before facts, scopes together. Raises PT400 plan.cycle or plan.group_cycle.';
revoke all on function etl._order_nodes(text[], int[], int[], int[], int[]) from public;

create or replace function etl._order_procedures(selected int[], transaction_scope text)
returns table (procedure_id int, tx_scope text, scope_number int, phase int, scope_level int, "position" int)
language plpgsql stable set search_path = pg_catalog, pg_temp as $$
declare
  v_ids    int[];
  v_names  text[];
  v_phases int[];
  v_scopes int[];
  v_from   int[];
  v_to     int[];
begin
  select array_agg(q.procedure_id order by q.name), array_agg(q.name order by q.name), array_agg(q.phase order by q.name),
         array_agg(q.scope order by q.name)
    into v_ids, v_names, v_phases, v_scopes
    from (select p.procedure_id, p.name, case p.type when 'fact' then 2 else 0 end as phase,
                 coalesce(case when coalesce(_order_procedures.transaction_scope, p.transaction_scope) = 'per_group' then -m.group_id end,
                          p.procedure_id) as scope
            from unnest(selected) s(id)
            join etl.procedures p on p.procedure_id = s.id
            left join etl.group_members m on m.procedure_id = p.procedure_id) q;
  select array_agg(f.n order by f.n, t.n), array_agg(t.n order by f.n, t.n)
    into v_from, v_to
    from etl._selected_edges(selected) e
    join unnest(v_ids) with ordinality f(id, n) on f.id = e.from_id
    join unnest(v_ids) with ordinality t(id, n) on t.id = e.to_id;
  return query
    select v_ids[o.n], case when v_scopes[o.n] < 0 then 'per_group' else 'per_procedure' end, o.scope_number, o.phase, o.scope_level, o."position"
      from etl._order_nodes(v_names, v_phases, v_scopes, v_from, v_to) o;
end $$;
comment on function etl._order_procedures(int[], text) is
  'Topological order of the selected procedures and the scopes they form. Raises PT400 for a cycle.';
revoke all on function etl._order_procedures(int[], text) from public;

-- The graph of scopes that results when the steps of a group become one node.
create or replace function etl._contract_scopes(scopes int[], phases int[], edge_from int[], edge_to int[], names text[],
  out number_of int[], out levels int[], out phase_of int[])
language plpgsql stable set search_path = pg_catalog, pg_temp as $$
declare
  v_phases int[];
  v_from   int[];
  v_to     int[];
  v_order  record;
begin
  select array_agg(q.number order by q.n) into number_of
    from (select s.n, dense_rank() over (order by s.first_n)::int as number
            from (select n, min(n) over (partition by scope) as first_n from unnest(scopes) with ordinality u(scope, n)) s) q;
  select array_agg(q.phase order by q.number) into v_phases
    from (select s.number, case when min(s.phase) = max(s.phase) then min(s.phase) else 1 end as phase
            from unnest(number_of, phases) s(number, phase) group by s.number) q;
  select array_agg(q.f order by q.f, q.t), array_agg(q.t order by q.f, q.t) into v_from, v_to
    from (select distinct number_of[e.f] as f, number_of[e.t] as t
            from unnest(edge_from, edge_to) e(f, t) where number_of[e.f] <> number_of[e.t]) q;
  v_order := etl._graph_order(v_phases, v_from, v_to);
  if array_position(v_order.levels, null) is not null then
    perform etl._fail_cycle((
      select array_agg((select string_agg(names[s.n], ' + ' order by s.n) from unnest(number_of) with ordinality s(number, n)
                         where s.number = c.number) order by c.i)
        from unnest(etl._graph_cycle(v_order.levels, v_from, v_to)) with ordinality c(number, i)), true);
  end if;
  levels := v_order.levels;
  phase_of := v_order.phase_of;
end $$;
comment on function etl._contract_scopes(int[], int[], int[], int[], text[]) is
  'Numbers the scopes and orders them. Raises PT400 plan.group_cycle, naming procedures of the circle.';
revoke all on function etl._contract_scopes(int[], int[], int[], int[], text[]) from public;

-- The pipeline a request means: the one it names, else the only one there is.
create or replace function etl._pipeline(name text) returns etl.pipelines
language plpgsql stable set search_path = pg_catalog, pg_temp as $$
declare
  v_pipeline etl.pipelines;
  v_names    text[] := (select array_agg(p.name order by p.name) from etl.pipelines p);
begin
  select * into v_pipeline from etl.pipelines p
   where p.name = coalesce(_pipeline.name, case when cardinality(v_names) = 1 then v_names[1] else 'bronze_to_silver' end);
  if v_pipeline.pipeline_id is not null then return v_pipeline; end if;
  if v_names is null then
    perform etl._fail('PT404', 'pipeline.unknown', 'no pipeline is configured in this database', 'apply a configuration: b2s sync-config');
  end if;
  perform etl._fail('PT404', 'pipeline.unknown', format('there is no pipeline %s', coalesce(name, 'bronze_to_silver')),
    format('name one of: pipeline => ''%s''', array_to_string(v_names, ''', ''')), jsonb_build_object('pipelines', v_names));
end $$;
comment on function etl._pipeline(text) is 'The pipeline of that name, or the only one. Raises PT404 pipeline.unknown.';
revoke all on function etl._pipeline(text) from public;

-- Names that a request mentions and the catalog does not have.
create or replace function etl._unknown_names(kind text, given jsonb, known text[]) returns jsonb
language sql stable set search_path = pg_catalog, pg_temp as $$
  select jsonb_agg(jsonb_build_object('loc', jsonb_build_array(kind || 's', g.name), 'code', kind || '.unknown',
           'message', format('there is no %s %s', kind, g.name)) order by g.name)
    from jsonb_array_elements_text(given) g(name)
   where g.name <> all (coalesce(known, '{}'))
$$;
comment on function etl._unknown_names(text, jsonb, text[]) is 'Problems for the names of a request that are not configured.';
revoke all on function etl._unknown_names(text, jsonb, text[]) from public;

create or replace function etl._select_procedures(pipeline_id int, request jsonb, out selected int[], out problems jsonb)
language plpgsql stable set search_path = pg_catalog, pg_temp as $$
begin
  problems := coalesce(etl._unknown_names('procedure', request->'procedures',
      (select array_agg(p.name) from etl.procedures p where p.pipeline_id = _select_procedures.pipeline_id and p.is_active)), '[]')
    || coalesce(etl._unknown_names('group', request->'groups',
      (select array_agg(g.name) from etl.groups g where g.pipeline_id = _select_procedures.pipeline_id and g.is_active)), '[]')
    || coalesce(etl._unknown_names('tag', request->'tags',
      (select array_agg(distinct t.name) from etl.tags t join etl.procedure_tags pt using (tag_id)
         join etl.procedures p using (procedure_id) where p.pipeline_id = _select_procedures.pipeline_id and p.is_active)), '[]');
  select array_agg(p.procedure_id) into selected
    from etl.procedures p
   where p.pipeline_id = _select_procedures.pipeline_id and p.is_active
     and (not (request ?| array['procedures', 'groups', 'tags'])
          or request->'procedures' ? p.name
          or exists (select from etl.group_members m join etl.groups g using (group_id)
                      where m.procedure_id = p.procedure_id and request->'groups' ? g.name)
          or exists (select from etl.procedure_tags pt join etl.tags t using (tag_id)
                      where pt.procedure_id = p.procedure_id and request->'tags' ? t.name));
  if request->'with_upstream' = 'true' then
    with recursive up(id) as (
      select unnest(selected) union select d.depends_on_id from up join etl.dependencies d on d.procedure_id = up.id)
    select array_agg(up.id) into selected from up join etl.procedures p on p.procedure_id = up.id and p.is_active;
  end if;
  if request->'with_downstream' = 'true' then
    with recursive down(id) as (
      select unnest(selected) union select d.procedure_id from down join etl.dependencies d on d.depends_on_id = down.id)
    select array_agg(down.id) into selected from down join etl.procedures p on p.procedure_id = down.id and p.is_active;
  end if;
  if selected is null and problems = '[]' then
    problems := jsonb_build_array(jsonb_build_object('loc', jsonb_build_array('procedures'), 'code', 'selection.empty',
      'message', 'the request selects no procedure'));
  end if;
end $$;
comment on function etl._select_procedures(int, jsonb) is
  'The procedures that a request selects by name, group and tag, and the names it has that do not exist.';
revoke all on function etl._select_procedures(int, jsonb) from public;

-- Guardrails of a full refresh. A request for mode full needs everything; a procedure whose own default mode is full
-- was allowed by whoever configured it, and is only stopped by the freeze.
create or replace function etl._check_full_refresh(items etl.plan_item[], request jsonb, requester text) returns void
language plpgsql stable set search_path = pg_catalog, pg_temp as $$
declare
  v_full      text[] := (select array_agg(p.name order by p.name) from unnest(items) i join etl.procedures p using (procedure_id)
                          where i.kind = 'steps' and i.mode = 'full');
  v_forbidden text[] := (select array_agg(p.name order by p.name) from unnest(items) i join etl.procedures p using (procedure_id)
                          where i.kind = 'steps' and i.mode = 'full' and not p.allow_full_refresh);
  v_freeze    etl.full_refresh_freezes;
  v_problems  jsonb := '[]';
begin
  if v_full is null then return; end if;
  select * into v_freeze from etl.full_refresh_freezes f order by f.freeze_id desc limit 1;
  if v_freeze.is_frozen then
    v_problems := v_problems || jsonb_build_object('code', 'full_refresh.frozen',
      'message', format('full refreshes are frozen since %s by %s: %s', v_freeze.changed_at, v_freeze.changed_by, v_freeze.reason),
      'hint', 'an admin lifts it: select etl.freeze_full_refresh(false, reason => ''...'')');
  end if;
  if request->>'mode' = 'full' then
    if v_forbidden is not null then
      v_problems := v_problems || jsonb_build_object('code', 'full_refresh.not_allowed',
        'message', format('full refresh is not allowed for %s', array_to_string(v_forbidden, ', ')),
        'hint', 'select other procedures, or set allow_full_refresh: true for them and run b2s sync-config', 'procedures', to_jsonb(v_forbidden));
    end if;
    if not pg_has_role(requester, 'etl_admin', 'usage') then
      v_problems := v_problems || jsonb_build_object('code', 'full_refresh.not_admin',
        'message', format('%s may not start a full refresh', requester),
        'hint', format('ask a member of etl_admin, or: grant etl_admin to %I', requester));
    end if;
    if request->'confirm_full_refresh' is distinct from 'true' then
      v_problems := v_problems || jsonb_build_object('code', 'full_refresh.unconfirmed',
        'message', format('a full refresh rebuilds %s and was not confirmed', array_to_string(v_full, ', ')),
        'hint', 'repeat the call with confirm_full_refresh => true', 'procedures', to_jsonb(v_full));
    end if;
    if coalesce(btrim(request->>'reason'), '') = '' then
      v_problems := v_problems || jsonb_build_object('code', 'full_refresh.no_reason',
        'message', 'a full refresh needs a reason', 'hint', 'repeat the call with reason => ''...''');
    end if;
  end if;
  if v_problems <> '[]' then
    perform etl._fail('PT403', v_problems->0->>'code', v_problems->0->>'message', v_problems->0->>'hint',
                      jsonb_build_object('errors', v_problems));
  end if;
end $$;
comment on function etl._check_full_refresh(etl.plan_item[], jsonb, text) is
  'Raises PT403 with the code of the first guardrail a full refresh violates and all of them in DETAIL: full_refresh.frozen, '
  'full_refresh.not_allowed, full_refresh.not_admin, full_refresh.unconfirmed, full_refresh.no_reason.';
revoke all on function etl._check_full_refresh(etl.plan_item[], jsonb, text) from public;

-- Materialized views that a materialized view reads, directly, through views, or through each other.
create or replace function etl._mv_reads(mv oid) returns oid[]
language sql stable set search_path = pg_catalog, pg_temp as $$
  with recursive reads(oid) as (
    select mv
    union
    select d.refobjid
      from reads r
      join pg_catalog.pg_rewrite w on w.ev_class = r.oid
      join pg_catalog.pg_depend d on d.classid = 'pg_rewrite'::regclass and d.objid = w.oid and d.refclassid = 'pg_class'::regclass
      join pg_catalog.pg_class c on c.oid = d.refobjid and c.relkind in ('v', 'm')
  )
  select coalesce(array_agg(c.oid), '{}') from reads join pg_catalog.pg_class c using (oid) where c.relkind = 'm' and c.oid <> mv
$$;
comment on function etl._mv_reads(oid) is 'The materialized views that one reads, transitively, from pg_depend.';
revoke all on function etl._mv_reads(oid) from public;

-- The refreshes that a plan's steps lead to. base is the scope they follow; run-level ones follow the barrier at the end.
-- choice: null or true: as configured; false: none; a list: those only.
create or replace function etl._plan_refreshes(pipeline_id int, steps etl.plan_item[], choice jsonb)
returns setof etl.plan_item
language sql stable set search_path = pg_catalog, pg_temp as $$
  with fed as (
    select t.refresh_target_id, t.name, prt.refresh_after, prt.refresh_on, prt.concurrency, s.order_index, s.scope_index,
           case prt.refresh_after when 'procedure' then s.scope_index when 'group' then -m.group_id else 0 end as trigger
      from unnest(steps) s
      join etl.procedure_refresh_targets prt on prt.procedure_id = s.procedure_id
      join etl.refresh_targets t on t.refresh_target_id = prt.refresh_target_id
      left join etl.group_members m on m.procedure_id = s.procedure_id
     where coalesce(choice, 'true') = 'true' or choice ? t.name
    union all
    select t.refresh_target_id, t.name, 'run', 'success', 'auto', s.order_index, s.scope_index, 0
      from etl.refresh_targets t cross join unnest(steps) s
     where t.pipeline_id = _plan_refreshes.pipeline_id and s.kind = 'steps' and choice ? t.name
       and not exists (select from etl.procedure_refresh_targets prt join unnest(steps) u on u.procedure_id = prt.procedure_id
                        where prt.refresh_target_id = t.refresh_target_id)
  )
  select row(null, 'refresh', null, null, null, null, null, f.refresh_target_id, f.name, f.refresh_after,
         case when 'always' = any (array_agg(f.refresh_on)) then 'always' else 'success' end,
         case when 'false' = any (array_agg(f.concurrency)) then 'false' when 'true' = any (array_agg(f.concurrency)) then 'true' else 'auto' end,
         array_agg(f.order_index order by f.order_index), null,
         case when f.refresh_after = 'run' then (select max(s.scope_index) + 2 from unnest(steps) s) else max(f.scope_index) end,
         (select count(distinct o.name)::int from fed o where to_regclass(o.name) = any (etl._mv_reads(to_regclass(f.name)))))::etl.plan_item
    from fed f
   where choice is distinct from 'false'
   group by f.refresh_target_id, f.name, f.refresh_after, f.trigger
$$;
comment on function etl._plan_refreshes(int, etl.plan_item[], jsonb) is 'The refreshes that the steps of a plan lead to, not yet numbered.';
revoke all on function etl._plan_refreshes(int, etl.plan_item[], jsonb) from public;

create or replace function etl._place_refreshes(pipeline_id int, steps etl.plan_item[], choice jsonb) returns etl.plan_item[]
language plpgsql stable set search_path = pg_catalog, pg_temp as $$
declare
  v_items etl.plan_item[] := (select array_agg(r) from etl._plan_refreshes(pipeline_id, steps, choice) r);
  v_end   int := (select max(s.scope_index) + 1 from unnest(steps) s);
begin
  if v_items is null then return steps; end if;
  if exists (select from unnest(v_items) i where i.refresh_after = 'run') then
    v_items := v_items || row(v_end, 'barrier', null, null, null, null, null, null, null, null, null, null, null, null, v_end, 0)::etl.plan_item;
  end if;
  select array_agg(row(q.number, (q.i).kind, (q.i).order_index, (q.i).procedure_id, (q.i).tx_scope, (q.i).mode, (q.i).parameters,
           (q.i).refresh_target_id, (q.i).mv_name, (q.i).refresh_after, (q.i).refresh_on, (q.i).concurrency, (q.i).feeders,
           null, (q.i).base, (q.i).depth)::etl.plan_item order by q.number, (q.i).order_index)
    into v_items
    from (select u.i, dense_rank() over (order by (u.i).base, (u.i).kind = 'refresh', (u.i).depth, (u.i).mv_name, (u.i).refresh_after) as number
            from (select s as i from unnest(steps || v_items) s) u) q;
  -- A refresh waits for the latest refresh before it of each view that it reads from.
  return (
    select array_agg(case when i.kind <> 'refresh' then i else
             row(i.scope_index, i.kind, i.order_index, i.procedure_id, i.tx_scope, i.mode, i.parameters, i.refresh_target_id, i.mv_name,
                 i.refresh_after, i.refresh_on, i.concurrency, i.feeders,
                 (select coalesce(array_agg(q.scope_index), '{}')
                    from (select max(o.scope_index) as scope_index from unnest(v_items) o
                           where o.kind = 'refresh' and o.scope_index < i.scope_index
                             and to_regclass(o.mv_name) = any (etl._mv_reads(to_regclass(i.mv_name)))
                           group by o.mv_name) q),
                 i.base, i.depth)::etl.plan_item end order by i.scope_index, i.order_index)
      from unnest(v_items) i);
end $$;
comment on function etl._place_refreshes(int, etl.plan_item[], jsonb) is
  'Adds the refreshes of materialized views to a plan, each after what it waits for, and numbers all scopes anew.';
revoke all on function etl._place_refreshes(int, etl.plan_item[], jsonb) from public;

-- From a request to a plan, writing nothing: etl.plan_run shows what it returns, etl._create_run stores it.

-- Problems of the request itself: values that its SQL types do not rule out.
create or replace function etl._request_problems(request jsonb) returns jsonb
language sql stable set search_path = pg_catalog, pg_temp as $$
  select coalesce(jsonb_agg(jsonb_build_object('loc', jsonb_build_array(q.field), 'code', 'request.invalid', 'message', q.message)), '[]')
    from (values
      ('mode', case when request->>'mode' not in ('incremental', 'full')
                 then format('mode is incremental or full, not %s', request->>'mode') end),
      ('transaction_scope', case when request->>'transaction_scope' not in ('per_procedure', 'per_group')
                 then format('transaction_scope is per_procedure or per_group, not %s', request->>'transaction_scope') end),
      ('max_concurrency', case when (request->>'max_concurrency')::int not between 1 and 64
                 then format('max_concurrency is 1 to 64, not %s', request->>'max_concurrency') end),
      ('params', case when jsonb_typeof(request->'params') <> 'object'
                 then 'params is an object like {"silver.fact_sales": {"country": "DE"}}' end),
      ('mv_refresh', case when jsonb_typeof(request->'mv_refresh') not in ('boolean', 'array')
                 then 'mv_refresh is true, false or a list of materialized views' end)
    ) q(field, message)
   where q.message is not null
$$;
comment on function etl._request_problems(jsonb) is 'Problems of the scalar fields of a request.';
revoke all on function etl._request_problems(jsonb) from public;

-- Parameters of all selected procedures: {procedure_id: {name: value}}, and every problem found.
create or replace function etl._plan_parameters(selected int[], given jsonb, out parameters jsonb, out problems jsonb)
language sql stable set search_path = pg_catalog, pg_temp as $$
  select coalesce(jsonb_object_agg(p.procedure_id, c.parameters) filter (where c.parameters <> '{}'), '{}'),
         coalesce((select jsonb_agg(e.problem) from jsonb_path_query(jsonb_agg(c.problems order by p.name) filter (where c.problems is not null), '$[*][*]') e(problem)), '[]')
         || coalesce((select jsonb_agg(jsonb_build_object('loc', jsonb_build_array('params', k.name), 'code', 'params.unused',
              'message', format('params are given for %s, which the request does not select', k.name)) order by k.name)
            from jsonb_object_keys(given) k(name)
           where k.name not in (select s.name from etl.procedures s where s.procedure_id = any (selected))), '[]')
    from unnest(selected) u(id)
    join etl.procedures p on p.procedure_id = u.id
    cross join lateral etl._check_parameters(p.procedure_id, p.name, given->p.name) c
   where given ? p.name or exists (select from etl.parameters d where d.procedure_id = p.procedure_id)
$$;
comment on function etl._plan_parameters(int[], jsonb) is 'Validated parameters by procedure, and every problem found.';
revoke all on function etl._plan_parameters(int[], jsonb) from public;

-- The steps in order, in numbered scopes, with a barrier between dimensions and facts.
create or replace function etl._plan_steps(selected int[], request jsonb, parameters jsonb) returns etl.plan_item[]
language sql stable set search_path = pg_catalog, pg_temp as $$
  with ordered as (
    select o.*, dense_rank() over (order by o.phase, o.scope_level, o.scope_number)
                + dense_rank() over (order by o.phase) - 1 as scope_index,
           row_number() over (order by o.phase, o.scope_level, o.scope_number, o."position") as order_index
      from etl._order_procedures(selected, request->>'transaction_scope') o
  ), items as (
    select row(o.scope_index, 'steps', o.order_index, o.procedure_id, o.tx_scope, coalesce(request->>'mode', p.default_mode),
               coalesce(parameters->o.procedure_id::text, '{}'), null, null, null, null, null, null, null, o.scope_index, 0)::etl.plan_item as item
      from ordered o join etl.procedures p using (procedure_id)
    union all
    select row(max(o.scope_index) + 1, 'barrier', null, null, null, null, null, null, null, null, null, null, null, null,
               max(o.scope_index) + 1, 0)::etl.plan_item
      from ordered o
     where o.phase < (select max(phase) from ordered)
     group by o.phase
  )
  select array_agg(item order by (item).scope_index, (item).order_index) from items
$$;
comment on function etl._plan_steps(int[], jsonb, jsonb) is 'The steps of a plan in order, and the barriers between their phases.';
revoke all on function etl._plan_steps(int[], jsonb, jsonb) from public;

-- Procedures that share a watermark move it for each other: one of them alone, or each in a transaction of its own,
-- would take rows from the others that they have not read.
create or replace function etl._shared_watermark_problems(selected int[], transaction_scope text) returns jsonb
language sql stable set search_path = pg_catalog, pg_temp as $$
  select coalesce(jsonb_agg(jsonb_build_object('loc', jsonb_build_array(q.loc), 'code', 'selection.splits_watermark',
           'message', format('%s share the watermark %s and run together, in one transaction', q.names, q.state_key)) order by q.state_key), '[]')
    from (select p.state_key, string_agg(p.name, ', ' order by p.name) as names,
                 case when bool_and(p.procedure_id = any (selected)) then 'transaction_scope' else 'procedures' end as loc
            from etl.procedures p
           where p.is_active and p.state_key in (select s.state_key from etl.procedures s where s.procedure_id = any (selected))
           group by p.state_key
          having count(*) > 1 and (not bool_and(p.procedure_id = any (selected)) or _shared_watermark_problems.transaction_scope = 'per_procedure')) q
$$;
comment on function etl._shared_watermark_problems(int[], text) is 'Problems of a request that would run procedures apart which share a watermark.';
revoke all on function etl._shared_watermark_problems(int[], text) from public;

-- Everything a request leads to. Raises PT404 for unknown names, PT422 for invalid values, PT403 for guardrails, PT400 for cycles.
create or replace function etl._plan(request jsonb, requester text default null, out pipeline_id int, out max_concurrency int, out items etl.plan_item[])
language plpgsql stable set search_path = pg_catalog, pg_temp as $$
declare
  v_pipeline  etl.pipelines := etl._pipeline(request->>'pipeline');
  v_problems  jsonb := etl._request_problems(request);
  v_selection record;
  v_params    record;
begin
  v_selection := etl._select_procedures(v_pipeline.pipeline_id, request);
  v_problems := v_problems || v_selection.problems || etl._shared_watermark_problems(v_selection.selected, request->>'transaction_scope');
  if jsonb_typeof(coalesce(request->'params', '{}')) = 'object' then
    v_params := etl._plan_parameters(v_selection.selected, coalesce(request->'params', '{}'));
    v_problems := v_problems || v_params.problems;
  end if;
  if jsonb_typeof(request->'mv_refresh') = 'array' then
    v_problems := v_problems || coalesce(etl._unknown_names('mv_refresh', request->'mv_refresh',
      (select array_agg(t.name) from etl.refresh_targets t where t.pipeline_id = v_pipeline.pipeline_id)), '[]');
  end if;
  if v_problems <> '[]' then
    perform etl._fail(
      case when v_problems->0->>'code' like '%.unknown' then 'PT404' else 'PT422' end, v_problems->0->>'code',
      (select string_agg(p->>'message', '; ') from jsonb_array_elements(v_problems) p),
      'what there is: select * from etl.list_procedures()', jsonb_build_object('errors', v_problems));
  end if;
  items := etl._plan_steps(v_selection.selected, request, v_params.parameters);
  perform etl._check_full_refresh(items, request, coalesce(requester, etl._requester()));
  items := etl._place_refreshes(v_pipeline.pipeline_id, items, request->'mv_refresh');
  pipeline_id := v_pipeline.pipeline_id;
  max_concurrency := coalesce((request->>'max_concurrency')::int, v_pipeline.max_concurrency);
end $$;
comment on function etl._plan(jsonb, text) is
  'The plan of a request: steps, barriers and refreshes, numbered in topological order. Writes nothing.';
revoke all on function etl._plan(jsonb, text) from public;

-- A request as one jsonb document: what was asked for, defaults left out, so that equal requests have equal
-- fingerprints, in whatever time zone they are made.
create or replace function etl._request(
  mode text, procedures text[], groups text[], tags text[], with_upstream boolean, with_downstream boolean, as_of timestamptz,
  params jsonb, transaction_scope text, mv_refresh jsonb, idempotency_key text, confirm_full_refresh boolean, approved_by text,
  reason text, max_concurrency int, pipeline text) returns jsonb
language sql stable set search_path = pg_catalog, pg_temp set timezone = 'UTC' as $$
  select jsonb_strip_nulls(jsonb_build_object('mode', mode, 'procedures', procedures, 'groups', groups, 'tags', tags,
      'with_upstream', nullif(with_upstream, false), 'with_downstream', nullif(with_downstream, false), 'as_of', as_of,
      'transaction_scope', transaction_scope, 'mv_refresh', mv_refresh, 'idempotency_key', idempotency_key,
      'confirm_full_refresh', nullif(confirm_full_refresh, false), 'approved_by', approved_by, 'reason', reason,
      'max_concurrency', max_concurrency, 'pipeline', pipeline))
    || case when params is null or params = '{}' then '{}' else jsonb_build_object('params', params) end
$$;
comment on function etl._request(text, text[], text[], text[], boolean, boolean, timestamptz, jsonb, text, jsonb, text, boolean, text, text, int, text) is
  'The arguments of etl.start_run as one jsonb request.';
revoke all on function etl._request(text, text[], text[], text[], boolean, boolean, timestamptz, jsonb, text, jsonb, text, boolean, text, text, int, text) from public;
grant execute on function etl._request(text, text[], text[], text[], boolean, boolean, timestamptz, jsonb, text, jsonb, text, boolean, text, text, int, text) to etl_reader;

create or replace function etl._run_status(run_id bigint) returns text
language sql stable security definer set search_path = pg_catalog, pg_temp as $$
  select r.status from etl.runs r where r.run_id = _run_status.run_id
$$;
comment on function etl._run_status(bigint) is 'The status of a run.';
revoke all on function etl._run_status(bigint) from public;
grant execute on function etl._run_status(bigint) to etl_operator;

-- The statement of a step with its values in place of $1..$5, as one could type it.
create or replace function etl._render_call(statement text, mode text, since text, until text, run_id bigint, parameters jsonb) returns text
language plpgsql stable set search_path = pg_catalog, pg_temp as $$
declare
  v_values text[] := array[quote_nullable(mode), quote_nullable(since), quote_nullable(until), coalesce(run_id::text, 'null'),
                           format('%L::jsonb', parameters)];
  v_result text := '';
  v_rest   text := statement;
  v_match  text[];
begin
  -- A $n directly after a letter, digit or quote belongs to an identifier.
  loop
    v_match := regexp_match(v_rest, '^(.*?[^a-zA-Z0-9_$"])[$]([1-5])(.*)$');
    exit when v_match is null;
    v_result := v_result || v_match[1] || v_values[v_match[2]::int];
    v_rest := v_match[3];
  end loop;
  return v_result || v_rest;
end $$;
comment on function etl._render_call(text, text, text, text, bigint, jsonb) is 'A compiled call with its values written in.';
revoke all on function etl._render_call(text, text, text, text, bigint, jsonb) from public;
grant execute on function etl._render_call(text, text, text, text, bigint, jsonb) to etl_reader;

-- Storing a plan as a run.

-- What waits for what among the scopes of a plan. Steps of one phase come before the next barrier and after the last one.
create or replace function etl._plan_edges(items etl.plan_item[])
returns table (from_scope int, to_scope int, is_required boolean)
language plpgsql stable set search_path = pg_catalog, pg_temp as $$
declare
  v_steps    int[] := (select array_agg(distinct i.scope_index) from unnest(items) i where i.kind = 'steps');
  v_barriers int[] := (select array_agg(i.scope_index) from unnest(items) i where i.kind = 'barrier');
begin
  return query
  select f.scope_index, t.scope_index, bool_or(e.is_required)
    from etl._selected_edges((select array_agg(i.procedure_id) from unnest(items) i where i.kind = 'steps')) e
    join unnest(items) f on f.procedure_id = e.from_id
    join unnest(items) t on t.procedure_id = e.to_id
   where f.scope_index <> t.scope_index
   group by f.scope_index, t.scope_index
  union all
  select s.scope_index, min(b.scope_index), false
    from unnest(v_barriers) b(scope_index) join unnest(v_steps) s(scope_index) on s.scope_index < b.scope_index
   group by s.scope_index
  union all
  select max(b.scope_index), s.scope_index, false
    from unnest(v_barriers) b(scope_index)
    join unnest(v_steps || array(select i.scope_index from unnest(items) i where i.refresh_after = 'run')) s(scope_index)
      on s.scope_index > b.scope_index
   group by s.scope_index
  union
  select s.scope_index, r.scope_index, false
    from unnest(items) r
    join unnest(items) s on s.order_index = any (r.feeders) or s.scope_index = any (r.depends_on)
   where r.kind = 'refresh' and (r.refresh_after <> 'run' or s.kind = 'refresh');
end $$;
comment on function etl._plan_edges(etl.plan_item[]) is 'Edges among the scopes of a plan: requirements, and mere order.';
revoke all on function etl._plan_edges(etl.plan_item[]) from public;

create or replace function etl._insert_scopes(run_id bigint, items etl.plan_item[]) returns void
language sql volatile set search_path = pg_catalog, pg_temp set enable_nestloop = off set jit = off as $$
  with edges as materialized (
    select * from etl._plan_edges(items)
  ), outgoing as (
    select from_scope, array_agg(to_scope order by to_scope) filter (where is_required) as required_by,
           array_agg(to_scope order by to_scope) filter (where not is_required) as precedes
      from edges group by from_scope
  )
  insert into etl.run_scopes (run_id, scope_index, kind, isolation, first_order_index, last_order_index, required_by, precedes,
                              remaining_dependencies)
  select _insert_scopes.run_id, s.scope_index, s.kind, s.isolation, s.first_order_index, s.last_order_index,
         coalesce(o.required_by, '{}'), coalesce(o.precedes, '{}'), coalesce(w.waits_for, 0)
    from (select i.scope_index, i.kind, min(i.order_index) as first_order_index, max(i.order_index) as last_order_index,
                 case when bool_or(p.isolation = 'serializable') then 'serializable'
                      when bool_or(p.isolation = 'repeatable read') then 'repeatable read'
                      else 'read committed' end as isolation
            from unnest(items) i left join etl.procedures p using (procedure_id)
           group by i.scope_index, i.kind) s
    left join outgoing o on o.from_scope = s.scope_index
    left join (select e.to_scope, count(*) as waits_for from edges e group by e.to_scope) w on w.to_scope = s.scope_index
$$;
comment on function etl._insert_scopes(bigint, etl.plan_item[]) is 'Stores the scopes of a plan with their dependency counters.';
revoke all on function etl._insert_scopes(bigint, etl.plan_item[]) from public;

-- What each selected procedure depends on, whether the run includes it, and if not, how old it is.
create or replace function etl._dependency_snapshots(selected int[])
returns table (procedure_id int, dependencies jsonb)
language sql stable set search_path = pg_catalog, pg_temp as $$
  select d.procedure_id, jsonb_agg(
           case when i.id is not null then jsonb_build_object('procedure', p.name, 'in_run', true)
                else jsonb_build_object('procedure', p.name, 'in_run', false, 'last_success_at', etl._last_success_at(p.procedure_id)) end
           order by p.name)
    from unnest(selected) s(id)
    join etl.dependencies d on d.procedure_id = s.id
    join etl.procedures p on p.procedure_id = d.depends_on_id
    left join unnest(selected) i(id) on i.id = d.depends_on_id
   group by d.procedure_id
$$;
comment on function etl._dependency_snapshots(int[]) is 'The dependencies of the selected procedures as they stand when a run is planned.';
revoke all on function etl._dependency_snapshots(int[]) from public;

-- Chunks of a backfill do not count, they read the past: the lock of their run has a negative key.
create or replace function etl._last_success_at(procedure_id int) returns timestamptz
language sql stable set search_path = pg_catalog, pg_temp as $$
  select r.ended_at from etl.procedure_runs r
   where r.procedure_id = _last_success_at.procedure_id and r.status = 'succeeded' and r.lock_key > 0 order by r.run_id desc limit 1
$$;
comment on function etl._last_success_at(int) is 'When a procedure last succeeded in a run, backfills apart, or null.';
revoke all on function etl._last_success_at(int) from public;
grant execute on function etl._last_success_at(int) to etl_reader;

create or replace function etl._step_settings(procedure etl.procedures, search_path text[]) returns jsonb
language sql stable
return nullif(jsonb_strip_nulls(jsonb_build_object('timeout_ms', procedure.timeout_ms, 'lock_timeout_ms', procedure.lock_timeout_ms,
                                                   'time_zone', procedure.watermark_time_zone, 'search_path', nullif(search_path, '{}'),
                                                   'checks', nullif(procedure.checks, '[]'))), '{}');
comment on function etl._step_settings(etl.procedures, text[]) is 'What the steps of a procedure set for themselves, as it is configured now; null for nothing.';
revoke all on function etl._step_settings(etl.procedures, text[]) from public;

-- Bodies in the SQL standard's form are stored parsed; prosrc is empty then.
create or replace function etl._definition(procedure etl.procedures) returns text
language plpgsql stable set search_path = pg_catalog, pg_temp as $$
begin
  return md5(concat_ws(E'\n', procedure.call_sql, procedure.isolation, procedure.checks::text,
    (select coalesce(p.prosqlbody::text, p.prosrc) from pg_catalog.pg_proc p where p.oid = to_regprocedure(procedure.routine_signature))));
exception when insufficient_privilege then
  return null;
end $$;
comment on function etl._definition(etl.procedures) is 'Digest of a routine and of how it is called; null when it cannot be looked at.';
revoke all on function etl._definition(etl.procedures) from public;
grant execute on function etl._definition(etl.procedures) to etl_reader;

-- Without nested loops: the server takes the items for a handful, whatever their number.
create or replace function etl._insert_steps(run_id bigint, items etl.plan_item[]) returns void
language plpgsql volatile set search_path = pg_catalog, pg_temp set enable_nestloop = off set jit = off as $$
begin
  insert into etl.procedure_runs (run_id, order_index, scope_index, procedure_id, procedure_name, procedure_type, group_name, mode,
    tx_scope, isolation, parameters, dependencies, statement, rows_column, lock_key, settings, watermark_strategy, state_key, definition)
  select _insert_steps.run_id, i.order_index, i.scope_index, p.procedure_id, p.name, p.type, g.name, i.mode, i.tx_scope, s.isolation,
         i.parameters, coalesce(d.dependencies, '[]'), p.call_sql, p.rows_column, r.lock_key,
         etl._step_settings(p, l.search_path),
         p.watermark_strategy, p.state_key, etl._definition(p)
    from unnest(items) i
    join etl.procedures p using (procedure_id)
    join etl.pipelines l using (pipeline_id)
    join etl.run_scopes s on s.run_id = _insert_steps.run_id and s.scope_index = i.scope_index
    cross join lateral (select etl._lock_key(x) as lock_key from etl.runs x where x.run_id = _insert_steps.run_id) r
    left join etl.group_members m on m.procedure_id = p.procedure_id
    left join etl.groups g using (group_id)
    left join etl._dependency_snapshots((select array_agg(x.procedure_id) from unnest(items) x where x.kind = 'steps')) d
      on d.procedure_id = p.procedure_id
   where i.kind = 'steps'
   order by i.order_index;
  insert into etl.mv_refreshes (run_id, scope_index, refresh_target_id, mv_name, refresh_after, refresh_on, concurrency, feeders, depends_on)
  select _insert_steps.run_id, i.scope_index, i.refresh_target_id, i.mv_name, i.refresh_after, i.refresh_on, i.concurrency, i.feeders, i.depends_on
    from unnest(items) i
   where i.kind = 'refresh';
end $$;
comment on function etl._insert_steps(bigint, etl.plan_item[]) is 'Stores the steps and refreshes of a plan.';
revoke all on function etl._insert_steps(bigint, etl.plan_item[]) from public;

-- The caller holds the run's lock, so a run still 'running' has no living worker: what it did is recorded, what it did not is over.
create or replace function etl._abandon_run(run_id bigint) returns void
language plpgsql volatile set search_path = pg_catalog, pg_temp as $$
declare
  v_run etl.runs;
begin
  select * into v_run from etl.runs r where r.run_id = _abandon_run.run_id and r.status = 'running' for update;
  if not found then return; end if;
  update etl.procedure_runs p
     set status = 'abandoned', ended_at = clock_timestamp(), duration_ms = extract(epoch from clock_timestamp() - p.started_at) * 1000
   where p.run_id = v_run.run_id and p.ended_at is null;
  update etl.mv_refreshes m set status = 'abandoned', ended_at = clock_timestamp()
   where m.run_id = v_run.run_id and m.ended_at is null;
  update etl.runs r
     set status = 'abandoned', ended_at = clock_timestamp(), error_code = 'run.abandoned',
         error_message = format('the session that executed the run (backend %s) is gone: it was ended, or the server stopped', v_run.worker_pid)
   where r.run_id = v_run.run_id;
  if v_run.kind = 'backfill' then
    raise warning 'backfill % was abandoned: its session is gone; what it committed stays, the rest was rolled back', v_run.run_id
      using hint = format('go on with what is left: call etl.backfill(resume => %s)', v_run.run_id);
  else
    raise warning 'run % was abandoned: its session is gone; what it committed stays, the rest was rolled back', v_run.run_id;
  end if;
end $$;
comment on function etl._abandon_run(bigint) is 'Marks a run whose worker died as abandoned. The caller holds its lock.';
revoke all on function etl._abandon_run(bigint) from public;

-- The caller holds the run lock of the pipeline. A backfill has a lock of its own: one that can be taken is dead, or has just ended.
create or replace function etl._abandon_orphans(pipeline_id int) returns void
language plpgsql volatile set search_path = pg_catalog, pg_temp as $$
declare
  v_run etl.runs;
begin
  for v_run in select * from etl.runs r where r.pipeline_id = _abandon_orphans.pipeline_id and r.status = 'running' and r.kind = 'run' loop
    perform etl._abandon_run(v_run.run_id);
  end loop;
  perform etl._abandon_backfills(pipeline_id);
end $$;
comment on function etl._abandon_orphans(int) is 'Marks runs and backfills whose worker died as abandoned. The caller holds the run lock of the pipeline.';
revoke all on function etl._abandon_orphans(int) from public;

create or replace function etl._abandon_backfills(pipeline_id int) returns void
language plpgsql volatile set search_path = pg_catalog, pg_temp as $$
declare
  v_run etl.runs;
begin
  for v_run in select * from etl.runs r where r.pipeline_id = _abandon_backfills.pipeline_id and r.status = 'running' and r.kind = 'backfill' loop
    if pg_try_advisory_xact_lock(6435443, etl._lock_key(v_run)) then perform etl._abandon_run(v_run.run_id); end if;
  end loop;
end $$;
comment on function etl._abandon_backfills(int) is 'Marks backfills of a pipeline whose worker died as abandoned.';
revoke all on function etl._abandon_backfills(int) from public;

-- Queued: only what was asked for. It is planned again when a worker takes it up.
create or replace function etl._create_run(request jsonb, pipeline_id int, max_concurrency int, items etl.plan_item[], is_queued boolean default false)
returns bigint
language plpgsql volatile set search_path = pg_catalog, pg_temp as $$
declare
  v_run_id bigint;
begin
  insert into etl.runs (pipeline_id, config_version_id, mode, as_of, parameters, request, idempotency_key, fingerprint, requested_by,
    application_name, approved_by, reason, max_concurrency, step_count, started_at, status, worker_pid)
  select _create_run.pipeline_id, (select max(v.config_version_id) from etl.config_versions v where v.pipeline_id = _create_run.pipeline_id),
         request->>'mode', (request->>'as_of')::timestamptz,
         (select coalesce(jsonb_object_agg(p.name, i.parameters) filter (where i.parameters <> '{}'), '{}')
            from unnest(items) i join etl.procedures p using (procedure_id)),
         request, request->>'idempotency_key', etl._fingerprint(request), etl._requester(), current_setting('application_name'),
         coalesce(request->>'approved_by', case when request->>'mode' = 'full' then etl._requester() end), request->>'reason',
         _create_run.max_concurrency, (select count(*) from unnest(items) i where i.kind = 'steps'),
         case when not is_queued then clock_timestamp() end, case when is_queued then 'queued' else 'running' end,
         case when not is_queued then pg_backend_pid() end
  returning run_id into v_run_id;
  if is_queued then return v_run_id; end if;
  perform etl._insert_scopes(v_run_id, items);
  perform etl._insert_steps(v_run_id, items);
  return v_run_id;
end $$;
comment on function etl._create_run(jsonb, int, int, etl.plan_item[], boolean) is 'Stores a planned request as a run that this session executes, or that waits for a session.';
revoke all on function etl._create_run(jsonb, int, int, etl.plan_item[], boolean) from public;

create or replace function etl._fingerprint(request jsonb) returns text
language sql immutable set search_path = pg_catalog, pg_temp as $$
  select encode(sha256(convert_to((request - 'idempotency_key')::text, 'UTF8')), 'hex')
$$;
comment on function etl._fingerprint(jsonb) is 'sha256 of a request without its idempotency key.';
revoke all on function etl._fingerprint(jsonb) from public;

-- Requests with the same key pass one at a time: the second one sees what the first committed.
create or replace function etl._known_run(request jsonb) returns etl.runs
language plpgsql volatile set search_path = pg_catalog, pg_temp as $$
declare
  v_known etl.runs;
begin
  if not request ? 'idempotency_key' then return null; end if;
  perform pg_advisory_xact_lock(hashtextextended('b2s idempotency key ' || (request->>'idempotency_key'), 0));
  select * into v_known from etl.runs r where r.idempotency_key = _known_run.request->>'idempotency_key';
  if not found then return null; end if;
  if v_known.fingerprint <> etl._fingerprint(request) then
    perform etl._fail('PT409', 'idempotency_key.reused',
      format('idempotency key %s belongs to run %s, which was asked for something else', v_known.idempotency_key, v_known.run_id),
      'use a new key for a new request', jsonb_build_object('run_id', v_known.run_id, 'request', v_known.request));
  end if;
  -- Who asks again because the session died learns that it did.
  if v_known.status = 'running' and not etl._is_alive(v_known) and pg_try_advisory_xact_lock(6435443, etl._lock_key(v_known)) then
    perform etl._abandon_run(v_known.run_id);
  end if;
  return v_known;
end $$;
comment on function etl._known_run(jsonb) is 'The run that the idempotency key of a request already has, or null. Raises PT409 idempotency_key.reused.';
revoke all on function etl._known_run(jsonb) from public;

-- From a request to a run that this session owns, or to the run that the same idempotency key already has.
create or replace function etl._begin_run(request jsonb, out run_id bigint, out pipeline_id int, out status text, out is_new boolean)
language plpgsql volatile security definer set search_path = pg_catalog, pg_temp as $$
declare
  v_known etl.runs := etl._known_run(request);
  v_plan  record;
begin
  if v_known.run_id is not null then
    run_id := v_known.run_id; pipeline_id := v_known.pipeline_id; status := etl._run_status(v_known.run_id); is_new := false;
    return;
  end if;
  v_plan := etl._plan(request);
  perform etl._acquire(v_plan.pipeline_id);
  perform etl._abandon_orphans(v_plan.pipeline_id);
  run_id := etl._create_run(request, v_plan.pipeline_id, v_plan.max_concurrency, v_plan.items); pipeline_id := v_plan.pipeline_id; status := 'running'; is_new := true;
end $$;
comment on function etl._begin_run(jsonb) is
  'Plans a request and stores it as a run owned by this session. Raises PT409 idempotency_key.reused or run.active.';
revoke all on function etl._begin_run(jsonb) from public;
grant execute on function etl._begin_run(jsonb) to etl_operator;

-- Backfills: a past range of some procedures, read again beside the live watermark.
--
-- A backfill is a run whose steps are chunks: attempts with a window of their own and without a state_key, all planned before
-- the first one starts. etl._walk executes them like any step and finds no watermark to move. It holds a lock of its own
-- (etl._lock_key) and not that of the pipeline, so runs go on beside it. A chunk and a step of a run that read windows of
-- the same procedure exclude each other (etl._execute_step): a chunk must not write a row as it read it over the newer one
-- that the run has written since.

create or replace function etl._backfill_request(
  procedures text[], from_ text, until text, chunk text, params jsonb, pause interval, reason text, resume bigint, idempotency_key text,
  pipeline text) returns jsonb
language sql stable set search_path = pg_catalog, pg_temp as $$
  select jsonb_strip_nulls(jsonb_build_object('procedures', procedures, 'from', from_, 'until', until, 'chunk', chunk,
      'pause_ms', nullif(round(extract(epoch from pause) * 1000), case when resume is null then 0 end), 'reason', reason, 'resume', resume,
      'idempotency_key', idempotency_key, 'pipeline', pipeline,
      -- What a bound without an offset means, and where a day begins.
      'time_zone', case when concat(from_, until, chunk) ~ '[^0-9-]' then current_setting('timezone') end))
    || case when params is null or params = '{}' then '{}' else jsonb_build_object('params', params) end
$$;
comment on function etl._backfill_request(text[], text, text, text, jsonb, interval, text, bigint, text, text) is 'The arguments of etl.backfill as one jsonb request.';
revoke all on function etl._backfill_request(text[], text, text, text, jsonb, interval, text, bigint, text, text) from public;
grant execute on function etl._backfill_request(text[], text, text, text, jsonb, interval, text, bigint, text, text) to etl_reader;

create or replace function etl._backfill_problem(field text, code text, message text, hint text) returns jsonb
language sql immutable
return jsonb_build_object('loc', jsonb_build_array(field), 'code', code, 'message', message, 'hint', hint);
comment on function etl._backfill_problem(text, text, text, text) is 'One problem of a request for a backfill.';
revoke all on function etl._backfill_problem(text, text, text, text) from public;

create or replace function etl._fail_backfill(problems jsonb) returns void
language plpgsql volatile set search_path = pg_catalog, pg_temp as $$
begin
  if problems = '[]' then return; end if;
  perform etl._fail(case when problems->0->>'code' like '%.unknown' then 'PT404' else 'PT422' end, problems->0->>'code',
    (select string_agg(p->>'message', '; ') from jsonb_array_elements(problems) p),
    coalesce(problems->0->>'hint', 'what there is: select * from etl.list_procedures()'), jsonb_build_object('errors', problems));
end $$;
comment on function etl._fail_backfill(jsonb) is 'Raises PT404 or PT422 with the code of the first problem and all of them in DETAIL; nothing when there is none.';
revoke all on function etl._fail_backfill(jsonb) from public;

-- An id of a transaction begins at 1: a snapshot can hold no less. The year 10000 leaves room for one more chunk after the end.
create or replace function etl._bound(strategy text, value text) returns text
language plpgsql stable strict set search_path = pg_catalog, pg_temp as $$
begin
  return case strategy
    when 'timestamp' then case when isfinite(value::timestamptz) and value::timestamptz < '10000-01-01Z' then to_jsonb(value::timestamptz) #>> '{}' end
    when 'id' then (value::bigint)::text
    else greatest(value::bigint, 1)::text end;
exception when data_exception then
  return null;
end $$;
comment on function etl._bound(text, text) is 'A bound of a backfill in one spelling: a timestamptz, or a bigint for ids and transactions; null when it is not one.';
revoke all on function etl._bound(text, text) from public;

create or replace function etl._chunk_problem(strategy text, chunk text) returns text
language plpgsql stable set search_path = pg_catalog, pg_temp set intervalstyle = 'postgres' as $$
begin
  if strategy <> 'timestamp' then
    return case when chunk::bigint <= 0 then format('chunk is a number above 0, not %s', chunk) end;
  elsif chunk ~ '^\s*[-+0-9.]+\s*$' then
    return format('chunk %s has no unit', chunk);
  end if;
  return case when chunk::interval <= interval '0' or chunk::interval::text ~ '-' then format('chunk is longer than nothing, not %s', chunk)
              when chunk::interval > interval '1000 years' then format('chunk is at most 1000 years, not %s', chunk) end;
exception when data_exception then
  return format(case strategy when 'timestamp' then '%s is not an interval' else '%s is not a number' end, chunk);
end $$;
comment on function etl._chunk_problem(text, text) is 'What is wrong with the size of a chunk, or null.';
revoke all on function etl._chunk_problem(text, text) from public;

-- The query for the least value in the sources, from $1 on when has_start. Null: it would have to read a whole source each
-- time, for want of an index, or the source is a query; then nothing can be skipped.
create or replace function etl._least_value_sql(procedure etl.procedures, has_start boolean) returns text
language sql stable set search_path = pg_catalog, pg_temp as $$
  select case when bool_and(not has_start or exists (
           select from pg_catalog.pg_index i
             join pg_catalog.pg_class x on x.oid = i.indexrelid
             join pg_catalog.pg_am m on m.oid = x.relam and m.amname = 'btree'
             join pg_catalog.pg_attribute a on a.attrelid = i.indrelid and a.attnum = i.indkey[0]
             join pg_catalog.pg_class c on c.oid = i.indrelid
             join pg_catalog.pg_namespace n on n.oid = c.relnamespace
            where i.indisvalid and i.indpred is null and (n.nspname, c.relname, a.attname) = (s.parts[1], s.parts[2], s.parts[3])))
         then format('select least(%s)::%s', string_agg(format('(select min(%I) from %I.%I%s)', s.parts[3], s.parts[1], s.parts[2],
                case when has_start then format(' where %I >= $1::%s', s.parts[3], t.column_type) end), ', '), min(t.result_type)) end
    from (select parse_ident(u.source) as parts from unnest(procedure.watermark_sources) u(source)) s
    cross join (select case procedure.watermark_strategy when 'timestamp' then 'timestamptz' when 'id' then 'bigint' else 'text::xid8' end as column_type,
                       case procedure.watermark_strategy when 'timestamp' then 'timestamptz' when 'id' then 'bigint' else 'text::bigint' end as result_type) t
$$;
comment on function etl._least_value_sql(etl.procedures, boolean) is 'The query for the least value in the sources of a procedure, from $1 on; null when it cannot use an index.';
revoke all on function etl._least_value_sql(etl.procedures, boolean) from public;

-- Chunk n is [start + n * width, start + (n + 1) * width): months keep their day, and days their hour of the clock. The number of
-- the chunk that holds a value is estimated by length and then corrected, as months and days differ in theirs.
create or replace function etl._time_chunks(least_value_sql text, start timestamptz, until timestamptz, width interval, max_count int)
returns table (window_since text, window_until text)
language plpgsql stable set search_path = pg_catalog, pg_temp as $$
declare
  v_value timestamptz;
  v_n     bigint := 0;
  v_count int := 0;
begin
  while start + v_n * width < until and v_count < max_count loop
    if least_value_sql is not null then
      execute least_value_sql into v_value using start + v_n * width;
      exit when v_value is null or v_value >= until;
      v_n := greatest(v_n, floor(extract(epoch from v_value - start) / extract(epoch from width)));
      while start + v_n * width > v_value loop v_n := v_n - 1; end loop;
      while start + (v_n + 1) * width <= v_value loop v_n := v_n + 1; end loop;
    end if;
    window_since := to_jsonb(start + v_n * width) #>> '{}';
    window_until := to_jsonb(least(start + (v_n + 1) * width, until)) #>> '{}';
    return next;
    v_n := v_n + 1;
    v_count := v_count + 1;
  end loop;
end $$;
comment on function etl._time_chunks(text, timestamptz, timestamptz, interval, int) is
  'The chunks of a range of time; with a query for the least value from $1 on, those that hold none are left out.';
revoke all on function etl._time_chunks(text, timestamptz, timestamptz, interval, int) from public;

create or replace function etl._number_chunks(least_value_sql text, start bigint, until bigint, width bigint, max_count int)
returns table (window_since text, window_until text)
language plpgsql stable set search_path = pg_catalog, pg_temp as $$
declare
  v_since numeric := start;
  v_value bigint;
  v_count int := 0;
begin
  while v_since < until and v_count < max_count loop
    if least_value_sql is not null then
      execute least_value_sql into v_value using v_since::bigint;
      exit when v_value is null or v_value >= until;
      v_since := start + div(v_value::numeric - start, width) * width;
    end if;
    window_since := v_since::text;
    window_until := least(v_since + width, until)::text;
    return next;
    v_since := v_since + width;
    v_count := v_count + 1;
  end loop;
end $$;
comment on function etl._number_chunks(text, bigint, bigint, bigint, int) is
  'The chunks of a range of numbers; with a query for the least value from $1 on, those that hold none are left out.';
revoke all on function etl._number_chunks(text, bigint, bigint, bigint, int) from public;

-- The snapshot 'N:N:' sees what is below N and nothing else: between two of them etl.arrived finds the ids from one to the other.
create or replace function etl._procedure_chunks(procedure etl.procedures, start text, until text, chunk text, max_count int)
returns table (window_since text, window_until text)
language plpgsql stable set search_path = pg_catalog, pg_temp as $$
declare
  v_least_sql text := case when not etl._is_query(procedure.watermark_sources) then etl._least_value_sql(procedure, true) end;
begin
  if procedure.watermark_strategy = 'timestamp' then
    return query select * from etl._time_chunks(v_least_sql, start::timestamptz, until::timestamptz, chunk::interval, max_count);
  elsif procedure.watermark_strategy = 'id' then
    return query select * from etl._number_chunks(v_least_sql, start::bigint, until::bigint, chunk::bigint, max_count);
  else
    return query select format('%s:%s:', c.window_since, c.window_since), format('%s:%s:', c.window_until, c.window_until)
      from etl._number_chunks(v_least_sql, start::bigint, until::bigint, chunk::bigint, max_count) c;
  end if;
end $$;
comment on function etl._procedure_chunks(etl.procedures, text, text, text, int) is 'The windows into which a backfill of one procedure is cut, at most so many.';
revoke all on function etl._procedure_chunks(etl.procedures, text, text, text, int) from public;

-- The range of one procedure: what the request says, else from the first row there is to the watermark of the runs.
create or replace function etl._backfill_range(procedure etl.procedures, request jsonb, out start text, out until text, out problems jsonb)
language plpgsql stable set search_path = pg_catalog, pg_temp set datestyle = 'ISO' as $$
declare
  v_watermark text := (select s.last_success_watermark from etl.state s where s.state_key = procedure.state_key);
begin
  problems := '[]';
  start := etl._bound(procedure.watermark_strategy, request->>'from');
  until := etl._bound(procedure.watermark_strategy, request->>'until');
  if not request ? 'until' then
    if v_watermark is null then
      problems := problems || etl._backfill_problem('until', 'backfill.no_until', format('%s has no watermark up to which it could be backfilled', procedure.name),
        'say where to end: until => ''...''; without a watermark, a plain run reads everything: call etl.start_run()');
    elsif procedure.watermark_strategy = 'xid' then
      until := pg_snapshot_xmin(v_watermark::pg_snapshot)::text;
    else
      until := etl._bound(procedure.watermark_strategy, v_watermark);
    end if;
  end if;
  if not request ? 'from' then
    if etl._is_query(procedure.watermark_sources) then
      problems := problems || etl._backfill_problem('from_', 'backfill.no_from', format('the source of %s is a query, which does not tell where its rows begin', procedure.name),
        'say where to begin: from_ => ''...''');
    elsif problems = '[]' then
      execute etl._least_value_sql(procedure, false) into start;
      start := coalesce(etl._bound(procedure.watermark_strategy, start), until);
    end if;
  elsif (case procedure.watermark_strategy when 'timestamp' then start::timestamptz >= until::timestamptz else start::bigint >= until::bigint end) then
    problems := problems || etl._backfill_problem('from_', 'backfill.invalid',
      format('from_ %s is not before %s %s', start, case when request ? 'until' then 'until' else format('the watermark of %s,', procedure.name) end, until),
      'a backfill reads from from_, inclusive, to until, exclusive');
  end if;
end $$;
comment on function etl._backfill_range(etl.procedures, jsonb) is 'From where to where a procedure is to be backfilled, and what is wrong with that.';
revoke all on function etl._backfill_range(etl.procedures, jsonb) from public;

-- What is wrong with a request, as far as it can be told before the range of each procedure is known.
create or replace function etl._backfill_problems(request jsonb, selected int[]) returns jsonb
language sql stable set search_path = pg_catalog, pg_temp as $$
  with strategy as (
    select min(p.watermark_strategy) as name from etl.procedures p where p.procedure_id = any (selected) having count(distinct p.watermark_strategy) = 1
  ), found(field, code, message, hint) as (
    select 'procedures', 'selection.empty', 'a backfill needs the names of procedures', 'call etl.backfill(procedures => ''{silver.orders}'', ...)'
     where not request ? 'procedures'
    union all
    select 'procedures', 'backfill.no_watermark', format('%s has no watermark, so it has no range to read again', p.name),
           'run it: call etl.start_run(procedures => ...)'
      from etl.procedures p where p.procedure_id = any (selected) and p.watermark_strategy is null
    union all
    select 'procedures', 'backfill.mixed_strategies', format('the procedures have watermarks of different kinds: %s', string_agg(p.name || ' ' || p.watermark_strategy, ', ' order by p.name)),
           'one backfill for each kind: bounds and chunks are times for one, numbers for the other'
      from etl.procedures p where p.procedure_id = any (selected) having count(distinct p.watermark_strategy) > 1
    union all
    select b.field, 'backfill.invalid', format('%s is not %s: %s', b.field,
             case s.name when 'timestamp' then 'a time' when 'id' then 'an id' else 'the number of a transaction' end, b.value),
           case s.name when 'timestamp' then 'write a time as 2026-11-21 02:00+00' else 'write a whole number' end
      from strategy s cross join (values ('from_', request->>'from'), ('until', request->>'until')) b(field, value)
     where b.value is not null and etl._bound(s.name, b.value) is null
    union all
    select 'chunk', 'backfill.invalid', coalesce(etl._chunk_problem(s.name, request->>'chunk'), 'a backfill needs the size of a chunk'),
           case s.name when 'timestamp' then 'chunk => ''1 day''' else 'chunk => ''100000''' end
      from strategy s where not request ? 'chunk' or etl._chunk_problem(s.name, request->>'chunk') is not null
    union all
    select 'pause', 'backfill.invalid', 'pause is between nothing and 24 days', 'pause => ''1 second'''
     where (request->>'pause_ms')::numeric not between 0 and 2073600000
    union all
    select 'params', 'backfill.invalid', 'params is an object like {"silver.fact_sales": {"country": "DE"}}', null
     where jsonb_typeof(request->'params') <> 'object'
  )
  select coalesce(jsonb_agg(etl._backfill_problem(f.field, f.code, f.message, f.hint)), '[]') from found f
$$;
comment on function etl._backfill_problems(jsonb, int[]) is 'Problems of a request for a backfill that do not depend on the data.';
revoke all on function etl._backfill_problems(jsonb, int[]) from public;

create or replace function etl._fail_too_many_chunks(procedure etl.procedures, start text, until text, chunk text) returns void
language plpgsql volatile set search_path = pg_catalog, pg_temp set intervalstyle = 'postgres' as $$
declare
  v_is_time boolean := procedure.watermark_strategy = 'timestamp';
  v_length  numeric := case when v_is_time then extract(epoch from until::timestamptz - start::timestamptz) else until::numeric - start::numeric end;
  v_width   numeric := case when v_is_time then extract(epoch from chunk::interval) else chunk::numeric end;
begin
  perform etl._fail('PT422', 'backfill.too_many_chunks', format('a backfill has at most 100000 chunks; chunks of %s would make %s of the range of %s',
      chunk, ceil(v_length / v_width), procedure.name),
    format('larger chunks, at least: chunk => ''%s''; or a part of the range at a time',
      case when v_is_time then make_interval(secs => ceil(v_length / 100000)::float8)::text else ceil(v_length / 100000)::text end));
end $$;
comment on function etl._fail_too_many_chunks(etl.procedures, text, text, text) is 'Raises PT422 backfill.too_many_chunks with the size that would do.';
revoke all on function etl._fail_too_many_chunks(etl.procedures, text, text, text) from public;

-- All chunks of the first procedure come first, then those of the next, in the order of dependencies. Writes nothing.
create or replace function etl._plan_backfill(request jsonb)
returns table (order_index int, procedure_id int, window_since text, window_until text, parameters jsonb)
language plpgsql stable set search_path = pg_catalog, pg_temp as $$
declare
  v_pipeline  etl.pipelines := etl._pipeline(request->>'pipeline');
  v_selection record := etl._select_procedures(v_pipeline.pipeline_id, request);
  v_problems  jsonb;
  v_params    record;
  v_procedure etl.procedures;
  v_range     record;
  v_count     int := 0;
  v_rows      int;
begin
  -- Nothing named is not everything: nobody backfills by accident.
  if not request ? 'procedures' then select null::int[] as selected, '[]'::jsonb as problems into v_selection; end if;
  v_problems := v_selection.problems || etl._backfill_problems(request, v_selection.selected);
  if jsonb_typeof(coalesce(request->'params', '{}')) = 'object' then
    v_params := etl._plan_parameters(v_selection.selected, coalesce(request->'params', '{}'));
    v_problems := v_problems || v_params.problems;
  end if;
  if v_problems = '[]' then
    select coalesce(jsonb_agg(e.problem order by p.name), '[]') into v_problems
      from etl.procedures p cross join lateral jsonb_array_elements((etl._backfill_range(p, request)).problems) e(problem)
     where p.procedure_id = any (v_selection.selected);
  end if;
  perform etl._fail_backfill(v_problems);
  for v_procedure in
    select p.* from etl._order_procedures(v_selection.selected, 'per_procedure') o join etl.procedures p using (procedure_id)
     order by o.phase, o.scope_level, o.scope_number, o."position"
  loop
    v_range := etl._backfill_range(v_procedure, request);
    return query
      select v_count + c.n::int, v_procedure.procedure_id, c.window_since, c.window_until, coalesce(v_params.parameters->v_procedure.procedure_id::text, '{}')
        from etl._procedure_chunks(v_procedure, v_range.start, v_range.until, request->>'chunk', 100001 - v_count)
             with ordinality c(window_since, window_until, n);
    get diagnostics v_rows = row_count;
    v_count := v_count + v_rows;
    if v_count > 100000 then perform etl._fail_too_many_chunks(v_procedure, v_range.start, v_range.until, request->>'chunk'); end if;
  end loop;
end $$;
comment on function etl._plan_backfill(jsonb) is
  'The chunks of a new backfill. Raises PT404 for unknown names, PT422 for everything else that is wrong with the request, all at once.';
revoke all on function etl._plan_backfill(jsonb) from public;

-- From a request to a backfill that this session executes: a new one, or what is left of an earlier one.

-- A backfill, those it goes on with, and those that went on with any of them: what one of them has done need not be done again.
create or replace function etl._backfill_family(run etl.runs) returns setof etl.runs
language sql stable set search_path = pg_catalog, pg_temp as $$
  with recursive up(run_id, parent_run_id) as (
    select run.run_id, run.parent_run_id
    union all
    select r.run_id, r.parent_run_id from up join etl.runs r on r.run_id = up.parent_run_id
  ), family(run_id) as (
    select min(up.run_id) from up
    union
    select r.run_id from family f join etl.runs r on r.pipeline_id = run.pipeline_id and r.run_id > f.run_id and r.parent_run_id = f.run_id
  )
  select r.* from family f join etl.runs r using (run_id)
$$;
comment on function etl._backfill_family(etl.runs) is 'A backfill with everything that it resumes and that resumes it.';
revoke all on function etl._backfill_family(etl.runs) from public;

-- The backfill that a request wants to go on with. Raises what stands against that.
create or replace function etl._resumable(request jsonb) returns etl.runs
language plpgsql stable set search_path = pg_catalog, pg_temp as $$
declare
  v_id     bigint := (request->>'resume')::bigint;
  v_run    etl.runs;
  v_active etl.runs;
begin
  perform etl._fail_backfill(coalesce(jsonb_agg(etl._backfill_problem(k.name, 'backfill.invalid',
      format('%s is that of backfill %s, which is resumed', k.name, v_id), format('call etl.backfill(resume => %s)', v_id))), '[]'))
    from jsonb_object_keys(request - '{resume,pause_ms,reason,idempotency_key,pipeline,time_zone}'::text[]) k(name);
  select * into v_run from etl.runs r where r.run_id = v_id;
  if v_run.run_id is null then
    perform etl._fail('PT404', 'run.unknown', format('there is no run %s', v_id), 'which there are: select * from etl.backfill_progress');
  elsif v_run.kind <> 'backfill' then
    perform etl._fail('PT422', 'backfill.not_a_backfill', format('run %s is not a backfill', v_id),
      'a run needs no resume: call etl.start_run() begins at the watermarks, as they were committed');
  end if;
  -- One whose lock this session itself holds has died in a COMMIT that failed: here it asks for the next one.
  select * into v_active from etl._backfill_family(v_run) f where etl._is_alive(f) and f.worker_pid <> pg_backend_pid() limit 1;
  if v_active.run_id is not null then
    perform etl._fail('PT409', 'run.active', format('backfill %s is active', v_active.run_id),
      format('wait for it, or stop it: select etl.cancel_run(%s, reason => ''...'')', v_active.run_id),
      jsonb_build_object('run_id', v_active.run_id, 'pid', v_active.worker_pid, 'user', v_active.session_user_name));
  end if;
  return v_run;
end $$;
comment on function etl._resumable(jsonb) is
  'The backfill to resume. Raises PT404 run.unknown, PT422 backfill.not_a_backfill or backfill.invalid, PT409 run.active.';
revoke all on function etl._resumable(jsonb) from public;

create or replace function etl._backfill_left(parent etl.runs) returns setof etl.procedure_runs
language sql stable set search_path = pg_catalog, pg_temp set enable_nestloop = off set jit = off as $$
  select c.* from etl.procedure_runs c
   where c.run_id = parent.run_id and c.attempt = 1
     and not exists (select from etl.procedure_runs d
                      where d.run_id = any (array(select f.run_id from etl._backfill_family(parent) f)) and d.status = 'succeeded'
                        and d.procedure_id = c.procedure_id and d.window_until = c.window_until)
$$;
comment on function etl._backfill_left(etl.runs) is 'The chunks of a backfill that have not succeeded, neither in it nor in one that resumed it.';
revoke all on function etl._backfill_left(etl.runs) from public;

-- Statement and parameters are those of the configuration as it is now, the windows stay.
create or replace function etl._plan_resume(parent etl.runs)
returns table (order_index int, procedure_id int, window_since text, window_until text, parameters jsonb)
language plpgsql stable set search_path = pg_catalog, pg_temp as $$
declare
  v_selected int[];
  v_gone     jsonb;
  v_params   record;
begin
  select array_agg(q.procedure_id), coalesce(jsonb_agg(etl._backfill_problem('procedures', 'procedure.unknown',
           format('%s, of which backfill %s has chunks left, is no longer configured with a watermark of the %s strategy', q.procedure_name, parent.run_id,
                  parent.request->>'strategy'), 'start another backfill: call etl.backfill(procedures => ...)')) filter (where p.procedure_id is null), '[]')
    into v_selected, v_gone
    from (select distinct c.procedure_id, c.procedure_name from etl._backfill_left(parent) c) q
    left join etl.procedures p on p.procedure_id = q.procedure_id and p.is_active and p.watermark_strategy = parent.request->>'strategy';
  if v_selected is null then
    perform etl._fail('PT409', 'backfill.nothing_left', format('nothing is left of backfill %s: every chunk has succeeded', parent.run_id),
      'to read the range again, start another backfill: call etl.backfill(procedures => ...)');
  end if;
  v_params := etl._plan_parameters(v_selected, coalesce(parent.request->'params', '{}'));
  perform etl._fail_backfill(v_gone || coalesce((select jsonb_agg(x) from jsonb_array_elements(v_params.problems) x where x->>'code' <> 'params.unused'), '[]'));
  return query
    select row_number() over (order by c.order_index)::int, c.procedure_id, c.window_since, c.window_until,
           coalesce(v_params.parameters->c.procedure_id::text, '{}')
      from etl._backfill_left(parent) c;
end $$;
comment on function etl._plan_resume(etl.runs) is 'The chunks that are left of a backfill. Raises PT409 backfill.nothing_left, PT404 procedure.unknown.';
revoke all on function etl._plan_resume(etl.runs) from public;

-- What was asked for, completed: bounds as they were understood, or found.
create or replace function etl._resolved_request(request jsonb, run_id bigint) returns jsonb
language plpgsql stable set search_path = pg_catalog, pg_temp as $$
declare
  v_strategy text := (select p.watermark_strategy from etl.procedures p join etl.pipelines l using (pipeline_id)
                       where p.is_active and l.pipeline_id = (etl._pipeline(request->>'pipeline')).pipeline_id and request->'procedures' ? p.name limit 1);
  v_found    record;
begin
  select case v_strategy when 'timestamp' then to_jsonb(min(p.window_since::timestamptz)) #>> '{}' when 'id' then min(p.window_since::bigint)::text
                         else min(pg_snapshot_xmin(p.window_since::pg_snapshot))::text end as start,
         case v_strategy when 'timestamp' then to_jsonb(max(p.window_until::timestamptz)) #>> '{}' when 'id' then max(p.window_until::bigint)::text
                         else max(pg_snapshot_xmin(p.window_until::pg_snapshot))::text end as until
    into v_found
    from etl.procedure_runs p where p.run_id = _resolved_request.run_id;
  return request || jsonb_strip_nulls(jsonb_build_object('strategy', v_strategy,
    'from', coalesce(etl._bound(v_strategy, request->>'from'), v_found.start), 'until', coalesce(etl._bound(v_strategy, request->>'until'), v_found.until)));
end $$;
comment on function etl._resolved_request(jsonb, bigint) is 'The request of a new backfill with its strategy and its bounds: those given, else those of its chunks.';
revoke all on function etl._resolved_request(jsonb, bigint) from public;

-- Chunks wait for nothing but their turn: one that fails leaves the others alone, unless its procedure says on_failure: stop.
create or replace function etl._insert_chunks(run etl.runs, request jsonb, parent etl.runs) returns int
language plpgsql volatile set search_path = pg_catalog, pg_temp set enable_nestloop = off set jit = off as $$
declare
  v_count int;
begin
  insert into etl.procedure_runs (run_id, order_index, scope_index, procedure_id, procedure_name, procedure_type, group_name, mode, tx_scope, isolation,
    parameters, dependencies, statement, rows_column, lock_key, settings, window_since, window_until)
  with procedure as materialized (
    select p.procedure_id, p.name, p.type, g.name as group_name, p.isolation, p.call_sql, p.rows_column, etl._step_settings(p, l.search_path) as settings
      from etl.procedures p
      join etl.pipelines l using (pipeline_id)
      left join etl.group_members m using (procedure_id)
      left join etl.groups g using (group_id)
     where p.pipeline_id = run.pipeline_id
  ), chunk as materialized (
    select * from etl._plan_backfill(request) where parent.run_id is null
    union all
    select * from etl._plan_resume(parent) where parent.run_id is not null
  )
  select run.run_id, c.order_index, c.order_index, p.procedure_id, p.name, p.type, p.group_name, 'incremental', 'per_procedure', p.isolation,
         c.parameters, '[]', p.call_sql, p.rows_column, etl._lock_key(run), p.settings, c.window_since, c.window_until
    from chunk c join procedure p using (procedure_id)
   order by c.order_index;
  get diagnostics v_count = row_count;
  insert into etl.run_scopes (run_id, scope_index, kind, isolation, first_order_index, last_order_index, remaining_dependencies)
  select p.run_id, p.scope_index, 'steps', p.isolation, p.order_index, p.order_index, 0 from etl.procedure_runs p where p.run_id = run.run_id;
  return v_count;
end $$;
comment on function etl._insert_chunks(etl.runs, jsonb, etl.runs) is 'Plans the chunks of a backfill, new or resumed, and stores them; returns their number.';
revoke all on function etl._insert_chunks(etl.runs, jsonb, etl.runs) from public;

create or replace function etl._create_backfill(asked jsonb, parent etl.runs) returns etl.runs
language plpgsql volatile set search_path = pg_catalog, pg_temp as $$
declare
  v_request     jsonb := coalesce(parent.request - 'idempotency_key' - 'reason', '{}') || asked;
  v_pipeline_id int := coalesce(parent.pipeline_id, (etl._pipeline(asked->>'pipeline')).pipeline_id);
  v_run         etl.runs;
begin
  insert into etl.runs (kind, pipeline_id, config_version_id, parent_run_id, mode, request, idempotency_key, fingerprint, requested_by,
    application_name, reason, max_concurrency, pause_ms, step_count, started_at, status, worker_pid)
  values ('backfill', v_pipeline_id, (select max(v.config_version_id) from etl.config_versions v where v.pipeline_id = v_pipeline_id), parent.run_id,
    'incremental', v_request, asked->>'idempotency_key', etl._fingerprint(asked), etl._requester(), current_setting('application_name'),
    coalesce(asked->>'reason', parent.reason), 1, 0, 0, clock_timestamp(), 'running', pg_backend_pid())
  returning * into v_run;
  v_run.step_count := etl._insert_chunks(v_run, asked, parent);
  update etl.runs r
     set step_count = v_run.step_count, pause_ms = coalesce((v_request->>'pause_ms')::int, 0),
         request = case when parent.run_id is null then etl._resolved_request(v_request, v_run.run_id) else v_request end,
         parameters = (select coalesce(jsonb_object_agg(q.procedure_name, q.parameters) filter (where q.parameters <> '{}'), '{}')
                         from (select distinct on (p.procedure_id) p.procedure_name, p.parameters from etl.procedure_runs p
                                where p.run_id = v_run.run_id order by p.procedure_id) q)
   where r.run_id = v_run.run_id
  returning * into v_run;
  return v_run;
end $$;
comment on function etl._create_backfill(jsonb, etl.runs) is 'Plans a backfill and stores it as a run that this session executes.';
revoke all on function etl._create_backfill(jsonb, etl.runs) from public;

-- The row of the backfill to resume is held until this one is stored: of two that resume the same one, the second finds the first active.
create or replace function etl._begin_backfill(request jsonb, out run_id bigint, out lock_key int, out pause_ms int, out is_new boolean)
language plpgsql volatile security definer set search_path = pg_catalog, pg_temp as $$
declare
  v_run    etl.runs := etl._known_run(request);
  v_parent etl.runs;
begin
  run_id := v_run.run_id;
  is_new := run_id is null;
  if not is_new then return; end if;
  if not pg_try_advisory_xact_lock_shared(6435443, 0) then
    perform etl._fail('PT409', 'install.active', 'b2s is being upgraded in this database', 'try again in a moment');
  end if;
  if request ? 'resume' then
    perform from etl.runs r where r.run_id = (_begin_backfill.request->>'resume')::bigint for update;
    v_parent := etl._resumable(request);
  end if;
  perform etl._abandon_backfills(coalesce(v_parent.pipeline_id, (etl._pipeline(request->>'pipeline')).pipeline_id));
  v_run := etl._create_backfill(request, v_parent);
  run_id := v_run.run_id; lock_key := etl._lock_key(v_run); pause_ms := v_run.pause_ms;
  if not pg_try_advisory_xact_lock(6435443, lock_key) then perform etl._fail_not_owned(run_id); end if;
end $$;
comment on function etl._begin_backfill(jsonb) is
  'Plans a backfill and stores it as a run owned by this session, or finds the one that has the same idempotency key. Raises what etl.backfill raises.';
revoke all on function etl._begin_backfill(jsonb) from public;
grant execute on function etl._begin_backfill(jsonb) to etl_admin;

-- Horizons: up to where everything that will ever be committed has been committed.
--
-- A row gets its timestamp or id when it is written and becomes visible when its transaction commits, so the newest value
-- that can be seen says nothing about what is still to come below it. Each strategy has its own way to know:
--
--   timestamp  no transaction that is open now can write a row with now() before its own start
--   id         no transaction that has not yet a lock on the table can draw an id below those drawn already
--   xid        a snapshot says of every transaction whether it had committed, so nothing has to be waited for
--
-- Whatever is read below such a bound must be read in a snapshot taken after it: etl._claim fixes the window and commits,
-- then the step begins.

create or replace function etl._is_query(sources text[]) returns boolean
language sql immutable
return sources[1] ~* '^\s*(select|with)\M';
comment on function etl._is_query(text[]) is 'Whether the source of a watermark is a query and not a list of columns.';
revoke all on function etl._is_query(text[]) from public;

-- Null: it cannot be told, as for a view; then any table counts.
create or replace function etl._source_tables(sources text[]) returns oid[]
language plpgsql stable set search_path = pg_catalog, pg_temp as $$
declare
  v_tables oid[];
  v_found  oid[];
begin
  if etl._is_query(sources) then return null; end if;
  select case when bool_and(c.relkind in ('r', 'p')) then array_agg(c.oid) end into v_tables
    from unnest(sources) s(source)
    cross join lateral parse_ident(s.source) i(parts)
    join pg_catalog.pg_namespace n on n.nspname = i.parts[1]
    join pg_catalog.pg_class c on c.relnamespace = n.oid and c.relname = i.parts[2];
  v_found := v_tables;
  loop
    v_found := array(select h.inhrelid from pg_catalog.pg_inherits h where h.inhparent = any (v_found) and h.inhrelid <> all (v_tables));
    exit when v_found = '{}' or v_found is null;
    v_tables := v_tables || v_found;
  end loop;
  return v_tables;
end $$;
comment on function etl._source_tables(text[]) is 'Every table through which a row can come into a source: partitions and children too. Null when it cannot be told.';
revoke all on function etl._source_tables(text[]) from public;

-- A prepared transaction has no process.
create or replace function etl._writers(tables oid[]) returns table (vxid text, pid int)
language plpgsql volatile set search_path = pg_catalog, pg_temp as $$
begin
  return query
    select distinct l.virtualtransaction, l.pid
      from pg_catalog.pg_locks l
     where l.locktype = 'relation' and l.granted and l.pid is distinct from pg_backend_pid()
       and l.database = (select d.oid from pg_catalog.pg_database d where d.datname = current_database())
       and l.mode in ('RowExclusiveLock', 'ShareRowExclusiveLock', 'ExclusiveLock', 'AccessExclusiveLock')
       and (l.relation = any (tables) or tables is null and l.relation >= 16384);
end $$;
comment on function etl._writers(oid[]) is 'Transactions of others that hold a lock for writing on one of these tables; null: on any. pid is null for a prepared one.';
revoke all on function etl._writers(oid[]) from public;

create or replace function etl._describe_holder(pid int) returns text
language sql volatile strict set search_path = pg_catalog, pg_temp as $$
  select format('backend %s (%s), in a transaction since %s', a.pid, concat_ws(', ', r.rolname, nullif(a.application_name, '')),
                coalesce(to_char(a.xact_start, 'YYYY-MM-DD HH24:MI:SS OF'), 'a moment that it does not show'))
    from pg_catalog.pg_stat_get_activity(_describe_holder.pid) a left join pg_catalog.pg_roles r on r.oid = a.usesysid
$$;
comment on function etl._describe_holder(int) is 'The session that holds a horizon back, in words.';
revoke all on function etl._describe_holder(int) from public;

-- The oldest transaction of this database that was open at one moment, and the sessions that are inside one and do not show
-- since when: of a role whose statistics we may not see, or with track_activities off. Between two transactions of one
-- message a session shows none, but the next one gets the time of the message. Whoever waits for its client, outside a
-- transaction, has no message. A walsender streams in one message without end, and writes nothing meanwhile.
--
-- The statistics functions by backend read a picture of all sessions at once, and of each only what is asked for: of the
-- thousand that are idle one function or two, of the few that are left everything.
create or replace function etl._oldest_transaction(out started_at timestamptz, out pid int, out hidden int[])
language plpgsql volatile set search_path = pg_catalog, pg_temp as $$
declare
  v_database oid := (select d.oid from pg_catalog.pg_database d where d.datname = current_database());
  v_shown    int[];
  v_doubtful int[];
  v_inside   int[];
  v_close    record;
begin
  perform pg_stat_clear_snapshot();
  select min(q.xact_start) filter (where q.is_writer), (array_agg(q.pid order by q.xact_start) filter (where q.is_writer))[1],
         coalesce(array_agg(q.pid) filter (where q.xact_start is not null), '{}'), array_agg(q.pid) filter (where q.xact_start is null and q.is_writer)
    into started_at, pid, v_shown, v_doubtful
    from (select s.xact_start, pg_stat_get_backend_pid(s.id) as pid,
                 pg_stat_get_backend_dbid(s.id) = v_database and pg_stat_get_backend_userid(s.id) <> 0
                 and pg_stat_get_backend_pid(s.id) <> pg_backend_pid() as is_writer
            from (select i.id, pg_stat_get_backend_xact_start(i.id) as xact_start from pg_stat_get_backend_idset() i(id) offset 0) s
           where case when s.xact_start is null then pg_stat_get_backend_wait_event(s.id) is distinct from 'ClientRead' else true end) q;
  v_inside := array(select l.pid from pg_catalog.pg_locks l
                     where l.locktype = 'virtualxid' and l.mode = 'ExclusiveLock' and l.granted and l.pid <> all (v_shown) and l.pid <> pg_backend_pid());
  v_doubtful := v_doubtful || v_inside;
  if v_doubtful is null or v_doubtful = '{}' then return; end if;
  perform pg_stat_clear_snapshot();
  select min(q.started_at) as started_at, (array_agg(q.pid order by q.started_at))[1] as pid,
         array_agg(q.pid) filter (where q.xact_start is null and q.pid = any (v_inside)) as hidden
    into v_close
    from (select distinct a.pid, a.xact_start,
                 coalesce(a.xact_start, case when a.state in ('active', 'fastpath function call') then a.query_start end) as started_at
            from unnest(v_doubtful) d(pid) cross join lateral pg_stat_get_activity(d.pid) a
           where a.datid = v_database and a.usesysid is not null
             and (a.backend_type is distinct from 'walsender' or a.query !~* '^\s*start_replication')) q;
  if started_at is null or v_close.started_at < started_at then started_at := v_close.started_at; pid := v_close.pid; end if;
  hidden := v_close.hidden;
end $$;
comment on function etl._oldest_transaction() is
  'The start of the oldest open transaction of this database and its backend; and the backends whose start is hidden, or null.';
revoke all on function etl._oldest_transaction() from public;

-- The clock comes first: whoever begins after it was read writes later timestamps. Then the sessions, then the prepared
-- transactions: one that was prepared between the two is still counted as a session. The margin of one second is for a
-- writer that took its time and was interrupted before it could show it.
create or replace function etl._safe_timestamp(sources text[], wait_ms int, out bound timestamptz, out held_back_by text)
language plpgsql volatile set search_path = pg_catalog, pg_temp as $$
declare
  v_clock    timestamptz := clock_timestamp();
  v_deadline timestamptz := v_clock + wait_ms * interval '1 ms';
  v_oldest   record;
  v_tables   oid[];
  v_prepared text[];
begin
  loop
    v_oldest := etl._oldest_transaction();
    exit when v_oldest.hidden is null;
    if clock_timestamp() > v_deadline then
      perform etl._fail('PT403', 'watermark.hidden_session',
        format('backend %s is in a transaction and does not show since when, so no timestamp is safe to read up to', v_oldest.hidden[1]),
        'grant pg_read_all_stats to etl_owner; and track_activities must be on in every session that writes',
        jsonb_build_object('pids', v_oldest.hidden));
    end if;
    perform pg_sleep(0.005);
  end loop;
  if exists (select from pg_catalog.pg_prepared_xacts x where x.database = current_database()) then
    v_tables := etl._source_tables(sources);
    v_prepared := array(select w.vxid from etl._writers(v_tables) w where w.pid is null);
    while exists (select from etl._writers(v_tables) w where w.vxid = any (v_prepared)) loop
      if clock_timestamp() > v_deadline then
        bound := '-infinity';
        held_back_by := (select format('prepared transaction %s of %s, since %s', x.gid, x.owner, to_char(x.prepared, 'YYYY-MM-DD HH24:MI:SS OF'))
                           from pg_catalog.pg_prepared_xacts x where x.database = current_database() order by x.prepared limit 1);
        return;
      end if;
      perform pg_sleep(0.005);
    end loop;
  end if;
  bound := least(v_clock, v_oldest.started_at) - interval '1 second';
  if v_oldest.started_at < v_clock - interval '5 seconds' then held_back_by := etl._describe_holder(v_oldest.pid); end if;
end $$;
comment on function etl._safe_timestamp(text[], int) is
  'A time below which no row with now() can still be committed; -infinity while a prepared transaction makes that unknown. Waits at most wait_ms. '
  'Raises PT403 watermark.hidden_session when sessions hide since when they are in a transaction.';
revoke all on function etl._safe_timestamp(text[], int) from public;

-- Partitions that the planner left out are not locked, and cannot hold the value that was looked for.
create or replace function etl._read_tables() returns oid[]
language plpgsql volatile set search_path = pg_catalog, pg_temp as $$
begin
  return array(select l.relation from pg_catalog.pg_locks l
                where l.pid = pg_backend_pid() and l.locktype = 'relation' and l.relation >= 16384 and l.mode = 'AccessShareLock');
end $$;
comment on function etl._read_tables() is 'Relations that this transaction has read.';
revoke all on function etl._read_tables() from public;

create or replace function etl._feeding_sequences(tables oid[], column_name text) returns table (oid oid, cache bigint, increment bigint)
language plpgsql stable set search_path = pg_catalog, pg_temp as $$
begin
  return query
    select distinct q.seqrelid, q.seqcache, q.seqincrement
      from unnest(tables) t(oid)
      join pg_catalog.pg_attribute a on a.attrelid = t.oid and a.attnum > 0 and (a.attname = column_name or column_name is null)
      cross join lateral (
        select d.objid as seqrelid from pg_catalog.pg_depend d
         where d.refclassid = 'pg_class'::regclass and d.refobjid = a.attrelid and d.refobjsubid = a.attnum and d.classid = 'pg_class'::regclass
        union all
        select d.refobjid from pg_catalog.pg_attrdef f join pg_catalog.pg_depend d on d.classid = 'pg_attrdef'::regclass and d.objid = f.oid
         where f.adrelid = a.attrelid and f.adnum = a.attnum and d.refclassid = 'pg_class'::regclass) r
      join pg_catalog.pg_sequence q on q.seqrelid = r.seqrelid;
end $$;
comment on function etl._feeding_sequences(oid[], text) is
  'The sequences that make the values of a column, or of any: those it owns, and those its default names.';
revoke all on function etl._feeding_sequences(oid[], text) from public;

-- The newest value there is. User's tables are read with the planner's own settings, which etl._claim narrows.
create or replace function etl._newest(sources text[]) returns text
language plpgsql volatile set search_path = pg_catalog, pg_temp set enable_seqscan = on set enable_bitmapscan = on set enable_sort = on as $$
declare
  v_newest text;
begin
  if etl._is_query(sources) then
    execute format('select to_jsonb(q.value) #>> ''{}'' from (%s) q(value)', sources[1]) into v_newest;
  else
    execute (select format('select max(q.value) from (%s) q', string_agg(format('select max(%I)::bigint as value from %I.%I', i[3], i[1], i[2]), ' union all '))
               from (select parse_ident(s) from unnest(sources) s) p(i)) into v_newest;
  end if;
  return v_newest;
end $$;
comment on function etl._newest(text[]) is 'The newest value of a source: what its query returns, or the highest id of its columns.';
revoke all on function etl._newest(text[]) from public;

-- stage 1: the writers that were there right after the bound was read; 2: those of them that were prepared meanwhile, which
-- changes their name in pg_locks; 3: all gone, the bound is safe.
create or replace function etl._settle(fence jsonb, tables oid[]) returns jsonb
language plpgsql volatile set search_path = pg_catalog, pg_temp as $$
begin
  if fence->>'stage' = '1' and not exists (select from etl._writers(tables) w where fence->'writers' ? w.vxid) then
    fence := fence || jsonb_build_object('stage', 2, 'writers',
      (select coalesce(jsonb_agg(w.vxid), '[]') from etl._writers(tables) w where w.pid is null));
  end if;
  if fence->>'stage' = '2' and not exists (select from etl._writers(tables) w where fence->'writers' ? w.vxid) then
    fence := fence || '{"stage": 3, "writers": []}';
  end if;
  return fence;
end $$;
comment on function etl._settle(jsonb, oid[]) is 'A remembered bound, one stage further when the writers it waits for have ended.';
revoke all on function etl._settle(jsonb, oid[]) from public;

-- Everything whose lock shows that a transaction writes ids, or has drawn one to write it later. A sequence that caches hands
-- out ids that were drawn, and committed around, long before they are inserted; one that counts down begins at the wrong end.
create or replace function etl._id_relations(sources text[]) returns oid[]
language plpgsql volatile set search_path = pg_catalog, pg_temp as $$
declare
  v_tables   oid[] := case when etl._is_query(sources) then etl._read_tables() else etl._source_tables(sources) end;
  v_columns  text[] := case when etl._is_query(sources) then array[null] else array(select distinct (parse_ident(s))[3] from unnest(sources) s) end;
  v_sequence record;
begin
  for v_sequence in select q.* from unnest(v_columns) c cross join etl._feeding_sequences(v_tables, c) q loop
    if v_sequence.cache > 1 or v_sequence.increment < 0 then
      perform etl._fail('PT422', 'watermark.unordered_sequence',
        format('sequence %s (cache %s, increment %s) does not make ids in the order in which they are inserted, so no id is safe to read up to',
               v_sequence.oid::regclass, v_sequence.cache, v_sequence.increment),
        format('alter sequence %s cache 1; or use the xid strategy', v_sequence.oid::regclass));
    end if;
    v_tables := v_tables || v_sequence.oid;
  end loop;
  return v_tables;
end $$;
comment on function etl._id_relations(text[]) is
  'The tables that ids are written to, and the sequences that make them. Raises PT422 watermark.unordered_sequence.';
revoke all on function etl._id_relations(text[]) from public;

-- What cannot be settled in time is remembered and settled by a later run. The bound comes first, then what is to be watched.
create or replace function etl._safe_id(sources text[], inout fence jsonb, wait_ms int, out bound bigint, out held_back_by text)
language plpgsql volatile set search_path = pg_catalog, pg_temp as $$
declare
  v_deadline  timestamptz := clock_timestamp() + wait_ms * interval '1 ms';
  v_newest    bigint := coalesce(etl._newest(sources)::bigint, -9223372036854775808);
  v_relations oid[] := etl._id_relations(sources);
  v_old       jsonb := fence;
  v_new       jsonb;
begin
  v_new := (select jsonb_build_object('bound', v_newest, 'stage', case when count(*) = 0 then 3 else 1 end, 'writers', coalesce(jsonb_agg(w.vxid), '[]'))
              from etl._writers(v_relations) w);
  while v_new->>'stage' <> '3' loop
    v_old := etl._settle(v_old, v_relations);
    v_new := etl._settle(v_new, v_relations);
    exit when clock_timestamp() > v_deadline;
    if v_new->>'stage' <> '3' then perform pg_sleep(0.01); end if;
  end loop;
  bound := case when v_new->>'stage' = '3' then v_newest when v_old->>'stage' = '3' then (v_old->>'bound')::bigint end;
  fence := case when v_new->>'stage' = '3' then null when v_old->>'stage' in ('1', '2') then v_old else v_new end;
  if fence is not null then
    held_back_by := (select coalesce(etl._describe_holder(w.pid), format('a prepared transaction (%s)', w.vxid))
                       from etl._writers(v_relations) w where v_new->'writers' ? w.vxid order by w.pid limit 1);
  end if;
end $$;
comment on function etl._safe_id(text[], jsonb, int) is
  'The highest id below or at which no writer can still commit a row, or null while none is known; and what to remember for the next time. '
  'Waits at most wait_ms. Raises PT422 watermark.unordered_sequence.';
revoke all on function etl._safe_id(text[], jsonb, int) from public;

-- Our own transaction counts as unfinished: what it may still write belongs to a later window.
create or replace function etl._safe_snapshot() returns pg_snapshot
language plpgsql volatile set search_path = pg_catalog, pg_temp as $$
declare
  v_now pg_snapshot := pg_current_snapshot();
  v_own xid8 := pg_current_xact_id_if_assigned();
begin
  if v_own is null or v_own >= pg_snapshot_xmax(v_now) then return v_now; end if;
  return (select format('%s:%s:%s', (array_agg(q.x order by q.x))[1], pg_snapshot_xmax(v_now), string_agg(q.x::text, ',' order by q.x))
            from (select pg_snapshot_xip(v_now) union select v_own) q(x))::pg_snapshot;
end $$;
comment on function etl._safe_snapshot() is 'This moment as a snapshot in which this transaction is still running.';
revoke all on function etl._safe_snapshot() from public;

-- Everything a strategy knows about how far may be read. The bound is exclusive, in the strategy's type, as text.
create or replace function etl._upper_bound(strategy text, state_key text, sources text[], delay_ms int, wait_ms int,
  out bound text, out held_back_by text, out fence jsonb)
language plpgsql volatile set search_path = pg_catalog, pg_temp as $$
declare
  v_safe   record;
  v_newest timestamptz;
  v_shared record;
begin
  -- Who shares the watermark shares its bound, and that must be safe for all of them.
  select array_agg(distinct s.source) as sources, max(p.delay_ms) as delay_ms into v_shared
    from etl.procedures p cross join unnest(p.watermark_sources) s(source)
   where p.state_key = _upper_bound.state_key and p.is_active and s.source <> all (sources);
  sources := sources || coalesce(v_shared.sources, '{}');
  delay_ms := greatest(delay_ms, v_shared.delay_ms);
  case strategy
    when 'timestamp' then
      v_safe := etl._safe_timestamp(sources, least(wait_ms, 1000));
      -- The newest value is itself to be read: the bound is one tick after it.
      if etl._is_query(sources) then v_newest := coalesce(etl._newest(sources)::timestamptz + interval '1 microsecond', '-infinity'); end if;
      bound := to_jsonb(least(v_safe.bound - delay_ms * interval '1 ms', v_newest)) #>> '{}';
    when 'id' then
      v_safe := etl._safe_id(sources, (select s.fence from etl.state s where s.state_key = _upper_bound.state_key), least(wait_ms, 500));
      bound := coalesce(case when v_safe.bound > -9223372036854775808 then v_safe.bound + 1 end, -9223372036854775808);
      fence := v_safe.fence;
    when 'xid' then
      bound := etl._safe_snapshot();
      return;
  end case;
  held_back_by := v_safe.held_back_by;
end $$;
comment on function etl._upper_bound(text, text, text[], int, int) is
  'Exclusive end of what may be read now, a timestamptz, bigint or pg_snapshot as text; what holds it back; and, for ids, what to remember. Waits at most wait_ms.';
revoke all on function etl._upper_bound(text, text, text[], int, int) from public;

-- Windows and watermarks. A window is half open, [since, until), and is fixed before the transaction that reads it begins.

-- One reader's snapshots follow each other: the later one sees all that the earlier one saw.
create or replace function etl._is_after(strategy text, bound text, other text) returns boolean
language sql stable set search_path = pg_catalog, pg_temp as $$
  select case strategy
    when 'timestamp' then bound::timestamptz > other::timestamptz
    when 'id' then bound::bigint > other::bigint
    else pg_snapshot_xmax(bound::pg_snapshot) > pg_snapshot_xmax(other::pg_snapshot)
      or exists (select from pg_snapshot_xip(other::pg_snapshot) x where pg_visible_in_snapshot(x, bound::pg_snapshot)) end
$$;
comment on function etl._is_after(text, text, text) is 'Whether one watermark of a strategy lies after another.';
revoke all on function etl._is_after(text, text, text) from public;

-- Transactions are numbered per cluster: those that a watermark from another one counts are not ours.
create or replace function etl._check_snapshot(state etl.state) returns void
language plpgsql volatile set search_path = pg_catalog, pg_temp as $$
declare
  v_server_id bigint := (select c.system_identifier from pg_catalog.pg_control_system() c);
begin
  if state.server_id <> v_server_id or pg_snapshot_xmax(state.last_success_watermark::pg_snapshot) > pg_snapshot_xmax(pg_current_snapshot()) then
    perform etl._fail('PT409', 'watermark.foreign',
      format('the watermark of %s counts the transactions of another cluster: the database was restored or upgraded since', state.state_key),
      format('select etl.rebase_watermark(%L, reason => ''...'')', state.state_key),
      jsonb_build_object('watermark', state.last_success_watermark, 'server_id', state.server_id, 'this_server_id', v_server_id));
  end if;
end $$;
comment on function etl._check_snapshot(etl.state) is 'Raises PT409 watermark.foreign when a watermark of the xid strategy was taken in another cluster.';
revoke all on function etl._check_snapshot(etl.state) from public;

-- For ids and snapshots a moment of the past means the newest bound that was noted by then.
create or replace function etl._bound_as_of(state_key text, as_of timestamptz) returns text
language sql stable set search_path = pg_catalog, pg_temp as $$
  select t.bound from etl.watermark_ticks t
   where t.state_key = _bound_as_of.state_key and t.ticked_at <= as_of order by t.ticked_at desc limit 1
$$;
comment on function etl._bound_as_of(text, timestamptz) is 'What was safe to read at a moment of the past, or null when nothing was noted by then.';
revoke all on function etl._bound_as_of(text, timestamptz) from public;

-- The window that a step would get now. Writes nothing; etl._fix_window and etl._show_plan share it.
create or replace function etl._window(procedure etl.procedures, mode text, as_of timestamptz, wait_ms int,
  out since text, out until text, out bound text, out held_back_by text, out fence jsonb)
language plpgsql volatile set search_path = pg_catalog, pg_temp as $$
declare
  v_state etl.state;
  v_upper record;
begin
  select * into v_state from etl.state s where s.state_key = procedure.state_key;
  since := v_state.last_success_watermark;
  if procedure.watermark_strategy = 'xid' and since is not null then perform etl._check_snapshot(v_state); end if;
  v_upper := etl._upper_bound(procedure.watermark_strategy, procedure.state_key, procedure.watermark_sources, procedure.delay_ms, wait_ms);
  bound := v_upper.bound; held_back_by := v_upper.held_back_by; fence := v_upper.fence;
  until := bound;
  if as_of < clock_timestamp() then
    if procedure.watermark_strategy = 'timestamp' then
      until := to_jsonb(least(bound::timestamptz, as_of)) #>> '{}';
    else
      until := coalesce(etl._bound_as_of(procedure.state_key, as_of), since);
      if until is null then
        perform etl._fail('PT422', 'watermark.no_tick', format('what was safe to read at %s was not noted for %s', as_of, procedure.state_key),
          'leave out as_of; from now on every run notes it, and so does etl.tick_watermarks()');
      end if;
    end if;
  end if;
  if etl._is_after(procedure.watermark_strategy, since, until) then until := since; end if;
  if mode = 'full' then since := null; end if;
end $$;
comment on function etl._window(etl.procedures, text, timestamptz, int) is
  'The window of a step, what is safe to read, and what holds that back. An as_of at or before the watermark gives an empty window. Waits at most wait_ms.';
revoke all on function etl._window(etl.procedures, text, timestamptz, int) from public;

-- Tables that an earlier step of this run has written are read up to that step's rows: this waits out the margin, a second.
create or replace function etl._await_margin(run_id bigint, procedure etl.procedures) returns void
language plpgsql volatile set search_path = pg_catalog, pg_temp as $$
declare
  v_wait interval := (
    select max(p.ended_at) + interval '1 second' + procedure.delay_ms * interval '1 ms' - clock_timestamp()
      from etl.dependencies d
      join etl.procedure_runs p on p.procedure_id = d.depends_on_id and p.run_id = _await_margin.run_id and p.status = 'succeeded'
     where d.procedure_id = procedure.procedure_id
       and p.table_counts ?| array(select format('%I.%I', i[1], i[2]) from (select parse_ident(s) from unnest(procedure.watermark_sources) s) x(i)));
begin
  if v_wait between interval '0' and interval '2 seconds' then perform pg_sleep_for(v_wait); end if;
end $$;
comment on function etl._await_margin(bigint, etl.procedures) is 'Waits until what earlier steps of the run wrote into the sources of a procedure is safe to read.';
revoke all on function etl._await_margin(bigint, etl.procedures) from public;

-- Whether any row of the sources lies in a window; with a query as source, whether the window has any length.
create or replace function etl._has_rows(procedure etl.procedures, since text, until text) returns boolean
language plpgsql volatile set search_path = pg_catalog, pg_temp set enable_seqscan = on set enable_bitmapscan = on set enable_sort = on as $$
declare
  v_type   text := case procedure.watermark_strategy when 'timestamp' then 'timestamptz' when 'id' then 'bigint' else 'pg_snapshot' end;
  v_zone   text := current_setting('timezone');
  v_exists boolean;
begin
  if etl._is_query(procedure.watermark_sources) then return since is distinct from until; end if;
  perform set_config('timezone', coalesce(procedure.watermark_time_zone, v_zone), true);
  execute (
    select 'select ' || string_agg(format(
             case when procedure.watermark_strategy = 'xid' then 'exists (select from %2$I.%3$I where etl.arrived(%1$I, $1::pg_snapshot, $2::pg_snapshot))'
                  when since is null then 'exists (select from %2$I.%3$I where %1$I < $2::%4$s)'
                  else 'exists (select from %2$I.%3$I where %1$I >= $1::%4$s and %1$I < $2::%4$s)' end, i[3], i[1], i[2], v_type), ' or ')
      from (select parse_ident(s) from unnest(procedure.watermark_sources) s) x(i)) into v_exists using since, until;
  perform set_config('timezone', v_zone, true);
  return v_exists;
end $$;
comment on function etl._has_rows(etl.procedures, text, text) is 'Whether a window holds any row of the sources.';
revoke all on function etl._has_rows(etl.procedures, text, text) from public;

create or replace function etl._fix_window(run etl.runs, order_index int, attempt int) returns void
language plpgsql volatile set search_path = pg_catalog, pg_temp as $$
declare
  v_step      etl.procedure_runs;
  v_procedure etl.procedures;
  v_window    record;
  v_shared    text;
  v_since     text;
  v_sqlstate  text; v_message text; v_detail text; v_hint text;
begin
  select * into strict v_step from etl.procedure_runs p
   where p.run_id = run.run_id and p.order_index = _fix_window.order_index and p.attempt = _fix_window.attempt;
  select * into v_procedure from etl.procedures p where p.procedure_id = v_step.procedure_id;
  -- A source that cannot be read fails this step, in its scope (etl._execute_step), and not the run.
  begin
    if v_step.window_goal is not null then
      perform etl._set_window(v_step, v_procedure, v_step.window_since, v_step.window_goal, null);
      return;
    end if;
    -- Steps that share a watermark share its window.
    select p.window_until into v_shared from etl.procedure_runs p
     where p.run_id = v_step.run_id and p.scope_index = v_step.scope_index and p.state_key = v_step.state_key and p.window_until is not null
     limit 1;
    if v_shared is not null then
      v_since := (select s.last_success_watermark from etl.state s where s.state_key = v_step.state_key and v_step.mode = 'incremental');
      perform etl._set_window(v_step, v_procedure, v_since, v_shared, null);
      return;
    end if;
    if v_step.watermark_strategy = 'timestamp' and not etl._is_query(v_procedure.watermark_sources) then perform etl._await_margin(run.run_id, v_procedure); end if;
    v_window := etl._window(v_procedure, v_step.mode, run.as_of, 1000);
    perform etl._set_window(v_step, v_procedure, v_window.since, v_window.until, v_window.held_back_by);
    perform etl._note_bound(v_step, v_window.bound, v_window.fence);
  exception when query_canceled or assert_failure or others then
    get stacked diagnostics v_sqlstate = returned_sqlstate, v_message = message_text, v_detail = pg_exception_detail, v_hint = pg_exception_hint;
    if v_sqlstate = '57014' then perform etl._absorb_signal(); end if;
    update etl.procedure_runs p
       set sqlstate = v_sqlstate, error_message = v_message, error_detail = v_detail, error_hint = v_hint
     where p.run_id = v_step.run_id and p.order_index = v_step.order_index and p.attempt = v_step.attempt;
  end;
end $$;
comment on function etl._fix_window(etl.runs, int, int) is 'Fixes the window of a step, in the transaction before the one that reads it.';
revoke all on function etl._fix_window(etl.runs, int, int) from public;

-- Writes down a window: its first slice only, where it is longer than max_window. A step without rows to read is skipped if
-- it is configured so; its watermark stays, and the next window begins where this one would have begun.
create or replace function etl._set_window(step etl.procedure_runs, procedure etl.procedures, since text, goal text, held_back_by text) returns void
language plpgsql volatile set search_path = pg_catalog, pg_temp as $$
declare
  v_scope etl.run_scopes;
  v_until text := goal;
begin
  if step.mode = 'incremental' and procedure.max_window is not null then
    select * into v_scope from etl.run_scopes s where s.run_id = step.run_id and s.scope_index = step.scope_index;
    if v_scope.first_order_index = v_scope.last_order_index then v_until := etl._slice_end(procedure, since, goal, v_scope.slice_width); end if;
  end if;
  update etl.procedure_runs p
     set window_since = since, window_until = v_until, held_back_by = _set_window.held_back_by,
         window_goal = case when v_until <> goal or step.window_goal is not null then goal end
   where p.run_id = step.run_id and p.order_index = step.order_index and p.attempt = step.attempt;
  if procedure.on_empty = 'skip' and step.mode = 'incremental' and step.slice_index = 1 and not etl._has_rows(procedure, since, goal) then
    update etl.procedure_runs p
       set status = 'skipped', skip_reason = 'no_data', started_at = null, worker_pid = null, ended_at = clock_timestamp()
     where p.run_id = step.run_id and p.order_index = step.order_index and p.attempt = step.attempt;
  end if;
end $$;
comment on function etl._set_window(etl.procedure_runs, etl.procedures, text, text, text) is
  'Stores the window of a step, or its first slice; skips a step that has nothing to read and is configured to be skipped then.';
revoke all on function etl._set_window(etl.procedure_runs, etl.procedures, text, text, text) from public;

create or replace function etl._note_bound(step etl.procedure_runs, bound text, fence jsonb) returns void
language plpgsql volatile set search_path = pg_catalog, pg_temp as $$
begin
  if step.watermark_strategy = 'timestamp' then return; end if;
  insert into etl.watermark_ticks (state_key, bound) values (step.state_key, _note_bound.bound) on conflict do nothing;
  if step.watermark_strategy = 'id' then
    insert into etl.state (state_key, strategy, fence) values (step.state_key, 'id', _note_bound.fence)
    on conflict (state_key) do update set fence = excluded.fence where state.fence is distinct from excluded.fence;
  end if;
end $$;
comment on function etl._note_bound(etl.procedure_runs, text, jsonb) is
  'Notes when what was safe to read, for as_of; and, for ids, which writers have to end before more of it is.';
revoke all on function etl._note_bound(etl.procedure_runs, text, jsonb) from public;

-- Moves the watermark in the transaction that wrote the data. It must still stand where the window began.
create or replace function etl._advance_watermark(step etl.procedure_runs, row_count bigint) returns void
language plpgsql volatile set search_path = pg_catalog, pg_temp as $$
declare
  v_state etl.state;
begin
  insert into etl.state (state_key, strategy) values (step.state_key, step.watermark_strategy) on conflict do nothing;
  select * into v_state from etl.state s where s.state_key = step.state_key for update;
  if step.mode = 'incremental' and v_state.last_success_watermark is distinct from step.window_since
     and not (v_state.last_run_id = step.run_id and v_state.last_success_watermark = step.window_until) then
    perform etl._fail('PT409', 'watermark.moved',
      format('the watermark of %s moved from %s to %s while the step ran', step.state_key,
             coalesce(step.window_since, '(none)'), coalesce(v_state.last_success_watermark, '(none)')),
      'start another run: it begins at the new watermark');
  end if;
  update etl.state s
     set last_success_watermark = step.window_until, strategy = step.watermark_strategy, last_run_id = step.run_id,
         procedure_ids = case when step.procedure_id = any (s.procedure_ids) then s.procedure_ids else s.procedure_ids || step.procedure_id end,
         server_id = case when step.watermark_strategy = 'xid' then (select c.system_identifier from pg_catalog.pg_control_system() c) end,
         last_run_at = clock_timestamp(), last_rowcount = row_count
   where s.state_key = step.state_key;
  if v_state.last_success_watermark is distinct from step.window_until then
    insert into etl.state_history (state_key, old_watermark, new_watermark, run_id, cause, changed_by)
    values (step.state_key, v_state.last_success_watermark, step.window_until, step.run_id, step.mode,
            (select r.requested_by from etl.runs r where r.run_id = step.run_id));
  end if;
end $$;
comment on function etl._advance_watermark(etl.procedure_runs, bigint) is
  'Moves the watermark of a step to the end of its window. Raises PT409 watermark.moved if somebody else moved it.';
revoke all on function etl._advance_watermark(etl.procedure_runs, bigint) from public;

-- A long window is read in slices (max_window), each a transaction with its own watermark step and its own attempt.

-- Where the rows begin: slices do not pace through years without any.
create or replace function etl._next_value(procedure etl.procedures, since text) returns text
language plpgsql volatile set search_path = pg_catalog, pg_temp set enable_seqscan = on set enable_bitmapscan = on set enable_sort = on as $$
declare
  v_type  text := case procedure.watermark_strategy when 'timestamp' then 'timestamptz' when 'id' then 'bigint' else 'xid8' end;
  v_from  text := case when procedure.watermark_strategy = 'xid' then pg_snapshot_xmax(since::pg_snapshot)::text else since end;
  v_zone  text := current_setting('timezone');
  v_value text;
begin
  perform set_config('timezone', coalesce(procedure.watermark_time_zone, v_zone), true);
  execute (
    select format('select to_jsonb(q.value) #>> ''{}'' from (%s) q order by q.value limit 1', string_agg(format(
             '(select %1$I::%4$s as value from %2$I.%3$I where %1$I is not null' || case when v_from is not null then ' and %1$I >= $1::%4$s' else '' end
             || case when procedure.watermark_strategy = 'timestamp' then ' and %1$I > ''-infinity''' else '' end
             || ' order by %1$I limit 1)', i[3], i[1], i[2], v_type), ' union all '))
      from (select parse_ident(s) from unnest(procedure.watermark_sources) s) x(i)) into v_value using v_from;
  perform set_config('timezone', v_zone, true);
  return v_value;
end $$;
comment on function etl._next_value(etl.procedures, text) is 'The first value of the sources that a window beginning at since holds; null when there is none.';
revoke all on function etl._next_value(etl.procedures, text) from public;

-- A snapshot can be cut at any transaction id: the slice sees the transactions below it, except those that the goal does not see.
create or replace function etl._slice_end(procedure etl.procedures, since text, goal text, slice_width numeric) returns text
language plpgsql volatile set search_path = pg_catalog, pg_temp as $$
declare
  v_width numeric := coalesce(slice_width,
    case jsonb_typeof(procedure.max_window) when 'string' then extract(epoch from (procedure.max_window #>> '{}')::interval) * 1000
                                            else (procedure.max_window #>> '{}')::numeric end);
  v_next  text := etl._next_value(procedure, since);
  v_end   text;
  v_xip   xid8[];
begin
  if v_next is null then return goal; end if;
  case procedure.watermark_strategy
    when 'timestamp' then v_end := to_jsonb(v_next::timestamptz + v_width::float8 * interval '1 ms') #>> '{}';
    when 'id' then v_end := trunc(v_next::numeric + v_width);
    when 'xid' then
      v_end := trunc(v_next::numeric + v_width);
      if v_end::numeric >= pg_snapshot_xmax(goal::pg_snapshot)::text::numeric then return goal; end if;
      v_xip := array(select x from pg_snapshot_xip(goal::pg_snapshot) x where x < v_end::xid8 order by x);
      return format('%s:%s:%s', coalesce(v_xip[1]::text, v_end), v_end, array_to_string(v_xip, ','));
  end case;
  return case when etl._is_after(procedure.watermark_strategy, goal, v_end) then v_end else goal end;
end $$;
comment on function etl._slice_end(etl.procedures, text, text, numeric) is 'Exclusive end of the next slice of a window that ends at goal.';
revoke all on function etl._slice_end(etl.procedures, text, text, numeric) from public;

-- After a committed slice, or after one that ran out of a resource: the next attempt of the step.
create or replace function etl._add_slice(step etl.procedure_runs, since text, slice_index int) returns void
language plpgsql volatile set search_path = pg_catalog, pg_temp as $$
begin
  insert into etl.procedure_runs (run_id, order_index, attempt, scope_index, procedure_id, procedure_name, procedure_type, group_name, mode,
    tx_scope, isolation, parameters, dependencies, statement, rows_column, lock_key, settings, watermark_strategy, state_key, window_since,
    window_goal, slice_index, definition)
  values (step.run_id, step.order_index, step.attempt + 1, step.scope_index, step.procedure_id, step.procedure_name, step.procedure_type,
    step.group_name, step.mode, step.tx_scope, step.isolation, step.parameters, step.dependencies, step.statement, step.rows_column,
    step.lock_key, step.settings, step.watermark_strategy, step.state_key, since, coalesce(step.window_goal, step.window_until), _add_slice.slice_index,
    step.definition);
  update etl.run_scopes s set attempt = step.attempt + 1 where s.run_id = step.run_id and s.scope_index = step.scope_index;
end $$;
comment on function etl._add_slice(etl.procedure_runs, text, int) is 'Plans the next slice of a step; where it ends is settled when it is claimed.';
revoke all on function etl._add_slice(etl.procedure_runs, text, int) from public;

-- Halves what a slice reads, down to one unit.
create or replace function etl._halve_slice(scope etl.run_scopes, failure jsonb) returns boolean
language plpgsql volatile set search_path = pg_catalog, pg_temp as $$
declare
  v_step      etl.procedure_runs;
  v_procedure etl.procedures;
  v_next      text;
  v_width     numeric;
begin
  if failure->>'class' <> 'resource' or scope.first_order_index < scope.last_order_index then return false; end if;
  select * into strict v_step from etl.procedure_runs p
   where p.run_id = scope.run_id and p.order_index = scope.first_order_index and p.attempt = scope.attempt;
  select * into strict v_procedure from etl.procedures p where p.procedure_id = v_step.procedure_id;
  if v_step.mode <> 'incremental' or v_step.state_key is null or v_procedure.max_window is null then return false; end if;
  v_next := etl._next_value(v_procedure, v_step.window_since);
  v_width := case v_step.watermark_strategy
    when 'timestamp' then extract(epoch from v_step.window_until::timestamptz - v_next::timestamptz) * 1000
    when 'id' then v_step.window_until::numeric - v_next::numeric
    else pg_snapshot_xmax(v_step.window_until::pg_snapshot)::text::numeric - v_next::numeric end / 2;
  if v_width is null or v_width < 1 then return false; end if;
  update etl.run_scopes s set slice_width = v_width where s.run_id = scope.run_id and s.scope_index = scope.scope_index;
  perform etl._add_slice(v_step, v_step.window_since, v_step.slice_index);
  return true;
end $$;
comment on function etl._halve_slice(etl.run_scopes, jsonb) is
  'When a step ran out of a resource and has a max_window: plans it again with half of what it read. False when that cannot help.';
revoke all on function etl._halve_slice(etl.run_scopes, jsonb) from public;

-- Which procedures could read with the strongest strategy, and what to type.

-- The columns by which a procedure tells new rows, with what the catalog says of their tables. None for a query.
create or replace function etl._watermark_columns(procedure etl.procedures)
returns table (source text, relation oid, table_name text, relkind "char", is_partition boolean, column_name text, attnum smallint, type text,
  is_nullable boolean)
language plpgsql stable set search_path = pg_catalog, pg_temp as $$
begin
  if procedure.watermark_sources is null or etl._is_query(procedure.watermark_sources) then return; end if;
  return query
    select s.source, c.oid, format('%I.%I', n.nspname, c.relname), c.relkind, c.relispartition, a.attname::text, a.attnum,
           format_type(a.atttypid, null), not a.attnotnull
      from unnest(procedure.watermark_sources) s(source)
      cross join lateral parse_ident(s.source) i(parts)
      join pg_catalog.pg_namespace n on n.nspname = i.parts[1]
      join pg_catalog.pg_class c on c.relnamespace = n.oid and c.relname = i.parts[2]
      join pg_catalog.pg_attribute a on a.attrelid = c.oid and a.attname = i.parts[3] and a.attnum > 0 and not a.attisdropped;
end $$;
comment on function etl._watermark_columns(etl.procedures) is 'The watermark columns of a procedure that exist, with their tables.';
revoke all on function etl._watermark_columns(etl.procedures) from public;

create or replace function etl._upgrade_hint(procedure etl.procedures) returns text
language sql stable set search_path = pg_catalog, pg_temp as $$
  select 'could use xid: '
      || coalesce(string_agg(distinct format('b2s watermark add-column %s', c.table_name), '; ') filter (where x.attnum is null),
                  'strategy: xid, source: ' || string_agg(distinct c.table_name || '.etl_xid', ', '))
    from etl._watermark_columns(procedure) c
    left join pg_catalog.pg_attribute x on x.attrelid = c.relation and x.attname = 'etl_xid' and not x.attisdropped and x.atttypid = 'xid8'::regtype
   where procedure.watermark_strategy in ('timestamp', 'id')
  having bool_and(c.relkind in ('r', 'p') and not c.is_partition) and count(distinct c.source) = (select count(distinct s) from unnest(procedure.watermark_sources) s)
$$;
comment on function etl._upgrade_hint(etl.procedures) is
  'How a procedure that reads timestamps or ids of plain tables could read transactions instead, or null: it does already, or cannot.';
revoke all on function etl._upgrade_hint(etl.procedures) from public;

-- Claiming the next scope of a run. Runs in a transaction of its own, committed asynchronously: a crash that loses it
-- loses nothing, and the window it fixes is older than the snapshot in which the data will be read.
--
-- etl._claim turns off every plan but the index scan, and replanning, for all that it calls: every statement here is a
-- primary-key access, planned once per session. Left alone, the server plans some anew for every step (200 us), or sorts a
-- whole run, of which it has no statistics yet, to find the next scope (2,000 us). jit is off wherever a kind of plan is, as
-- the server takes the penalty for a large query.

-- Scopes that ended free those that wait for them, once: one that is passed has done so. Whoever ended a scope releases it; for
-- a session that died before it could, another one does (etl._recover_lost_scope). One statement, whose index scan takes the rows
-- in ascending order, so that sessions cannot wait for each other in a circle.
create or replace function etl._release(run_id bigint, scopes int[]) returns void
language plpgsql volatile set search_path = pg_catalog, pg_temp as $$
declare
  v_freed int[];
begin
  select array_agg(f.scope_index) into v_freed
    from etl.run_scopes s cross join lateral unnest(s.required_by || s.precedes) f(scope_index)
   where s.run_id = _release.run_id and s.scope_index = any (scopes) and not s.is_passed;
  if v_freed is not null then
    update etl.run_scopes s
       set remaining_dependencies = s.remaining_dependencies - coalesce(cardinality(array_positions(v_freed, s.scope_index)), 0),
           is_passed = s.is_passed or s.scope_index = any (scopes)
     where s.run_id = _release.run_id and s.scope_index = any (v_freed || scopes);
  end if;
end $$;
comment on function etl._release(bigint, int[]) is 'Counts ended scopes down in the scopes that wait for them.';
revoke all on function etl._release(bigint, int[]) from public;

-- Ends scopes that will not run: their steps and refreshes are skipped. The caller frees what waits for those that are returned;
-- another session may just have taken, or skipped, the others.
create or replace function etl._skip_scopes(run_id bigint, scopes int[], reason text) returns int[]
language plpgsql volatile set search_path = pg_catalog, pg_temp as $$
declare
  v_skipped int[];
begin
  with steps as (
    update etl.procedure_runs p set status = 'skipped', skip_reason = reason, ended_at = clock_timestamp()
      from etl.run_scopes s
     where s.run_id = _skip_scopes.run_id and s.scope_index = any (scopes)
       and p.run_id = s.run_id and p.order_index between s.first_order_index and s.last_order_index and p.status = 'pending'
    returning p.scope_index
  ), refreshes as (
    update etl.mv_refreshes m set status = 'skipped', skip_reason = reason, ended_at = clock_timestamp()
     where m.run_id = _skip_scopes.run_id and m.scope_index = any (scopes) and m.status = 'pending'
    returning m.scope_index
  )
  select coalesce(array_agg(distinct q.scope_index), '{}') into v_skipped from (select * from steps union all select * from refreshes) q;
  return v_skipped;
end $$;
comment on function etl._skip_scopes(bigint, int[], text) is 'Skips scopes that were not started, with a reason; returns those it has skipped.';
revoke all on function etl._skip_scopes(bigint, int[], text) from public;

-- Scopes whose steps or refresh were not started.
create or replace function etl._pending_scopes(run_id bigint) returns int[]
language sql stable set search_path = pg_catalog, pg_temp as $$
  select array_agg(q.scope_index) from (
    select p.scope_index from etl.procedure_runs p where p.run_id = _pending_scopes.run_id and p.status = 'pending'
    union select m.scope_index from etl.mv_refreshes m where m.run_id = _pending_scopes.run_id and m.status = 'pending') q
$$;
comment on function etl._pending_scopes(bigint) is 'The scopes of a run that were not started, or null.';
revoke all on function etl._pending_scopes(bigint) from public;

-- The first scope after the one given that waits for nothing and was not started; from the start when there is none after it.
-- One that another session is just taking is passed over.
create or replace function etl._next_scope(run_id bigint, after_scope int) returns etl.run_scopes
language plpgsql volatile set search_path = pg_catalog, pg_temp as $$
declare
  v_scope etl.run_scopes;
begin
  select s.* into v_scope
    from etl.run_scopes s
   where s.run_id = _next_scope.run_id and s.scope_index > after_scope and s.remaining_dependencies = 0
     and (s.ready_at is null or s.ready_at <= clock_timestamp())
     and case s.kind
           when 'steps' then (select p.status from etl.procedure_runs p
                               where p.run_id = s.run_id and p.order_index = s.first_order_index and p.attempt = s.attempt) = 'pending'
           when 'refresh' then (select m.status from etl.mv_refreshes m where m.run_id = s.run_id and m.scope_index = s.scope_index) = 'pending'
           else not s.is_passed end
   order by s.scope_index limit 1 for update of s skip locked;
  if v_scope.scope_index is null and after_scope > 0 then return etl._next_scope(run_id, 0); end if;
  return v_scope;
end $$;
comment on function etl._next_scope(bigint, int) is 'The next scope that is ready to start, its row locked, or null.';
revoke all on function etl._next_scope(bigint, int) from public;

-- Why a refresh must not happen, or null.
create or replace function etl._refresh_skip_reason(run_id bigint, scope_index int) returns text
language sql stable set search_path = pg_catalog, pg_temp as $$
  select 'upstream_failed'
    from etl.mv_refreshes m
   where m.run_id = _refresh_skip_reason.run_id and m.scope_index = _refresh_skip_reason.scope_index
     and (m.refresh_on = 'success' and exists (
            select from unnest(m.feeders) f(order_index)
             where not exists (select from etl.procedure_runs p
                                where p.run_id = m.run_id and p.order_index = f.order_index
                                  and (p.status = 'succeeded' or p.skip_reason in ('no_data', 'reused'))))
          or exists (select from etl.mv_refreshes d
                      where d.run_id = m.run_id and d.scope_index = any (m.depends_on) and d.status <> 'succeeded'
                         and d.skip_reason is distinct from 'reused'))
$$;
comment on function etl._refresh_skip_reason(bigint, int) is 'upstream_failed when a refresh must be skipped, else null.';
revoke all on function etl._refresh_skip_reason(bigint, int) from public;

-- What the start of a scope's steps brings with it: windows, and news for clients that follow.
create or replace function etl._open_steps(run etl.runs, scope etl.run_scopes) returns void
language plpgsql volatile set search_path = pg_catalog, pg_temp as $$
declare
  v_step etl.procedure_runs;
begin
  for v_step in
    select * from etl.procedure_runs p
     where p.run_id = run.run_id and p.order_index between scope.first_order_index and scope.last_order_index and p.attempt = scope.attempt
     order by p.order_index
  loop
    if v_step.watermark_strategy is not null and v_step.window_until is null then
      perform etl._fix_window(run, v_step.order_index, scope.attempt);
    end if;
    if current_setting('b2s.progress', true) = 'json' then perform etl._announce(etl._step_event('step_started', v_step)); end if;
  end loop;
end $$;
comment on function etl._open_steps(etl.runs, etl.run_scopes) is 'Fixes the windows of the steps of a scope and announces them to clients that follow.';
revoke all on function etl._open_steps(etl.runs, etl.run_scopes) from public;

-- Takes a scope for this session. Another session may have taken it since it was seen pending: then nothing is updated.
create or replace function etl._take_scope(run etl.runs, scope etl.run_scopes) returns boolean
language plpgsql volatile set search_path = pg_catalog, pg_temp as $$
declare
  v_name       text;
  v_has_window boolean;
begin
  if scope.kind = 'refresh' then
    update etl.mv_refreshes m set status = 'running', worker_pid = pg_backend_pid(), started_at = clock_timestamp()
     where m.run_id = run.run_id and m.scope_index = scope.scope_index and m.status = 'pending'
    returning m.mv_name into v_name;
  else
    update etl.procedure_runs p set status = 'running', worker_pid = pg_backend_pid(), started_at = clock_timestamp()
     where p.run_id = run.run_id and p.order_index = scope.first_order_index and p.attempt = scope.attempt and p.status = 'pending'
    returning p.procedure_name, p.watermark_strategy is not null into v_name, v_has_window;
    if v_name is not null and scope.first_order_index < scope.last_order_index then
      update etl.procedure_runs p set status = 'running', worker_pid = pg_backend_pid(), started_at = clock_timestamp()
       where p.run_id = run.run_id and p.order_index > scope.first_order_index and p.order_index <= scope.last_order_index
         and p.attempt = scope.attempt;
      v_has_window := true;
    end if;
    if v_has_window or v_name is not null and current_setting('b2s.progress', true) = 'json' then
      perform etl._open_steps(run, scope);
      -- Steps whose window holds no row may have been skipped; when nothing is left of the scope, what waits for it goes on.
      if not exists (select from etl.procedure_runs p
                      where p.run_id = run.run_id and p.order_index between scope.first_order_index and scope.last_order_index
                        and p.attempt = scope.attempt and p.status = 'running') then
        perform etl._release(run.run_id, array[scope.scope_index]);
        return false;
      end if;
    end if;
  end if;
  if v_name is null then return false; end if;
  return set_config('application_name', format('b2s run %s %s', run.run_id, v_name), false) is not null;
end $$;
comment on function etl._take_scope(etl.runs, etl.run_scopes) is
  'Marks the steps or the refresh of a scope running in this session and fixes windows; false when another session was faster, or nothing was left to run.';
revoke all on function etl._take_scope(etl.runs, etl.run_scopes) from public;

-- The next scope that can be taken, taken: past barriers and refreshes that must not happen. Null when none is left.
create or replace function etl._take_next(run etl.runs, after_scope int) returns etl.run_scopes
language plpgsql volatile set search_path = pg_catalog, pg_temp as $$
declare
  v_scope  etl.run_scopes;
  v_reason text;
begin
  loop
    v_scope := etl._next_scope(run.run_id, after_scope);
    if v_scope.kind = 'barrier' then
      perform etl._release(run.run_id, array[v_scope.scope_index]);
      continue;
    end if;
    if v_scope.kind = 'refresh' then
      v_reason := etl._refresh_skip_reason(run.run_id, v_scope.scope_index);
      if v_reason is not null then
        perform etl._release(run.run_id, etl._skip_scopes(run.run_id, array[v_scope.scope_index], v_reason));
        continue;
      end if;
    end if;
    if v_scope.scope_index is null or etl._take_scope(run, v_scope) then return v_scope; end if;
  end loop;
end $$;
comment on function etl._take_next(etl.runs, int) is 'Takes the next scope of a run that is ready; null when none is left.';
revoke all on function etl._take_next(etl.runs, int) from public;

-- What was not started is skipped, and frees what waits for it. Its rows are locked at once or not at all: a session that waited
-- here, for others that have just freed or taken scopes, could have them wait for it in turn.
create or replace function etl._cancel_pending(run_id bigint) returns boolean
language plpgsql volatile set search_path = pg_catalog, pg_temp as $$
declare
  v_skipped int[];
begin
  begin
    perform from etl.run_scopes s where s.run_id = _cancel_pending.run_id and not s.is_passed order by s.scope_index for update nowait;
  exception when lock_not_available then
    return null;
  end;
  v_skipped := etl._skip_scopes(run_id, etl._pending_scopes(run_id), 'cancelled');
  perform etl._release(run_id, v_skipped);
  return v_skipped <> '{}';
end $$;
comment on function etl._cancel_pending(bigint) is
  'Skips every scope of a run that was not started because the run is to stop; false when there was none left, null when others are just busy with them.';
revoke all on function etl._cancel_pending(bigint) from public;

create or replace function etl._has_worked(run etl.runs) returns boolean
language sql stable set search_path = pg_catalog, pg_temp as $$
  select run.worker_pid = pg_backend_pid() or exists (select from etl.run_workers w where w.run_id = run.run_id and w.pid = pg_backend_pid())
$$;
comment on function etl._has_worked(etl.runs) is 'Whether this session has executed a run, which another one may have ended since.';
revoke all on function etl._has_worked(etl.runs) from public;

-- Sessions that died left scopes running, or ended and not released. Whoever looks executes nothing itself: what bears its own
-- number it left behind in a CALL that was interrupted.
create or replace function etl._lost_scopes(run etl.runs) returns table (scope_index int, worker_pid int, is_running boolean)
language plpgsql volatile set search_path = pg_catalog, pg_temp as $$
declare
  -- Its own snapshot, younger than the one that saw them at work: who was alive then and is gone now is gone.
  v_alive int[];
begin
  for scope_index, worker_pid, is_running in
    select s.scope_index, max(w.worker_pid), bool_or(w.status = 'running')
      from etl.run_scopes s
      join (select p.scope_index, p.worker_pid, p.status, p.attempt from etl.procedure_runs p where p.run_id = run.run_id
            union all
            select m.scope_index, m.worker_pid, m.status, 1 from etl.mv_refreshes m where m.run_id = run.run_id) w
        on w.scope_index = s.scope_index and w.attempt = s.attempt
     where s.run_id = run.run_id and not s.is_passed and w.worker_pid is not null
       and (w.status = 'running' or w.status = 'succeeded' and s.required_by || s.precedes <> '{}')
     group by s.scope_index
  loop
    v_alive := coalesce(v_alive, array_remove(etl._living_workers(run), pg_backend_pid()));
    if worker_pid <> all (v_alive) then return next; end if;
  end loop;
end $$;
comment on function etl._lost_scopes(etl.runs) is 'Scopes that a session has left behind: running, or ended and not released.';
revoke all on function etl._lost_scopes(etl.runs) from public;

create or replace function etl._is_running(run_id bigint, scope_index int) returns boolean
language sql volatile set search_path = pg_catalog, pg_temp as $$
  select exists (select from etl.procedure_runs p where p.run_id = _is_running.run_id and p.scope_index = _is_running.scope_index and p.status = 'running')
      or exists (select from etl.mv_refreshes m where m.run_id = _is_running.run_id and m.scope_index = _is_running.scope_index and m.status = 'running')
$$;
comment on function etl._is_running(bigint, int) is 'Whether a scope has been taken and not ended.';
revoke all on function etl._is_running(bigint, int) from public;

-- What was running is recorded like any error that can pass by itself, so that it is tried again. One scope at a time, each in a
-- transaction that locks no other scopes before: or sessions could wait for each other in a circle.
create or replace function etl._recover_lost_scope(run etl.runs) returns boolean
language plpgsql volatile set search_path = pg_catalog, pg_temp as $$
declare
  v_lost record;
begin
  if not exists (select from etl._lost_scopes(run)) then return false; end if;
  perform from etl.runs r where r.run_id = run.run_id for update;
  select * into v_lost from etl._lost_scopes(run) l order by l.scope_index limit 1;
  if not v_lost.is_running then
    perform etl._release(run.run_id, array[v_lost.scope_index]);
  -- What a dead session did is final now: it may have ended the scope after it was seen at work.
  elsif etl._is_running(run.run_id, v_lost.scope_index) then
    perform etl._record_failure(run.run_id, v_lost.scope_index, jsonb_build_object('class', 'transient', 'code', 'worker.lost', 'sqlstate', '57P01',
      'message', format('the session that executed the step (backend %s) is gone', v_lost.worker_pid),
      'hint', 'nothing of the step was kept; another session tries it again'));
  end if;
  return true;
end $$;
comment on function etl._recover_lost_scope(etl.runs) is 'Has a step of a worker that died tried again, by those that are alive; false when there is none.';
revoke all on function etl._recover_lost_scope(etl.runs) from public;

-- Nothing is running, nothing is ready, and nobody else is there to change that. While the run is locked, nobody joins it.
create or replace function etl._is_stuck(run etl.runs) returns boolean
language plpgsql volatile set search_path = pg_catalog, pg_temp as $$
begin
  if etl._living_workers(run) <> array[pg_backend_pid()] then return false; end if;
  perform from etl.runs r where r.run_id = run.run_id and r.status = 'running' for update;
  if not found then return false; end if;
  return etl._living_workers(run) = array[pg_backend_pid()]
    and exists (select from etl.procedure_runs p where p.run_id = run.run_id and p.ended_at is null
                union all select from etl.mv_refreshes m where m.run_id = run.run_id and m.ended_at is null)
    and not exists (select from etl._lost_scopes(run))
    and not exists (select from etl.run_scopes s where s.run_id = run.run_id and s.ready_at > clock_timestamp())
    and (etl._next_scope(run.run_id, 0)).scope_index is null;
end $$;
comment on function etl._is_stuck(etl.runs) is 'Whether a run can never go on: only when the helpers of the engine were called out of turn.';
revoke all on function etl._is_stuck(etl.runs) from public;

-- When nothing is ready: the end of the run, or another session is at work on what is left.
create or replace function etl._end_or_wait(run etl.runs, is_idle boolean) returns etl.run_scopes
language plpgsql volatile set search_path = pg_catalog, pg_temp as $$
declare
  v_scope etl.run_scopes;
begin
  if not exists (select from etl.procedure_runs p where p.run_id = run.run_id and p.ended_at is null)
     and not exists (select from etl.mv_refreshes m where m.run_id = run.run_id and m.ended_at is null) then
    perform from etl.runs r where r.run_id = run.run_id and r.status = 'running' for update;
    if found then perform etl._finish_run(run); end if;
  -- Whoever has just ended a scope has none at work: the helpers were called by hand, and a step was passed by.
  elsif not is_idle and exists (select from etl.procedure_runs p where p.run_id = run.run_id and p.status = 'running' and p.worker_pid = pg_backend_pid()) then
    perform etl._fail_not_owned(run.run_id);
  else
    if is_idle and not etl._recover_lost_scope(run) and etl._is_stuck(run) then perform etl._fail_not_owned(run.run_id); end if;
    v_scope.scope_index := 0;
  end if;
  return v_scope;
end $$;
comment on function etl._end_or_wait(etl.runs, boolean) is
  'Ends a run of which nothing is left, then null; scope 0 when there is something to wait for. is_idle: this session has just looked before, and freed nothing.';
revoke all on function etl._end_or_wait(etl.runs, boolean) from public;

-- done: what _execute_scope or _execute_refresh returned for the scope that this session has just committed, or null.
-- is_awaited: whether anything waits for that scope. Null when the run has ended; scope 0 when others execute what is left.
-- As a rule the next scope in order is ready, so a session alone tries it first.
create or replace function etl._claim(run_id bigint, done jsonb, is_awaited boolean) returns etl.run_scopes
language plpgsql volatile security definer set search_path = pg_catalog, pg_temp set enable_seqscan = off set enable_bitmapscan = off
  set enable_sort = off set plan_cache_mode = force_generic_plan set jit = off as $$
declare
  v_run     etl.runs;
  v_ended   int := coalesce((done->>'scope_index')::int, 0);
  -- A slice was committed, and the next one of the same step follows.
  v_is_over boolean := not coalesce(done ? 'goes_on', false);
  v_is_idle boolean := done is null;
  v_is_skipped boolean;
  v_scope   etl.run_scopes;
  v_is_set  boolean;
  v_is_worker boolean;
begin
  select * into v_run from etl.runs r where r.run_id = _claim.run_id;
  v_is_worker := coalesce(etl._is_owner(v_run), false) or etl._is_helper(v_run);
  if not v_is_worker and not (v_run.ended_at is not null and etl._has_worked(v_run)) then perform etl._fail_not_owned(run_id); end if;
  for i in 0 .. coalesce(jsonb_array_length(done->'events'), 0) - 1 loop
    v_is_set := etl._announce(done->'events'->i);
  end loop;
  if not v_is_worker then return null; end if;
  if is_awaited and v_is_over then perform etl._release(run_id, array[v_ended]); end if;
  if v_run.cancel_requested_at is not null then
    v_is_skipped := etl._cancel_pending(run_id);
    if v_is_skipped is null then
      v_scope.scope_index := 0;
      return v_scope;
    end if;
    v_is_idle := v_is_idle and not v_is_skipped;
  end if;
  if not exists (select from etl.run_workers w where w.run_id = _claim.run_id) then
    select * into v_scope from etl.run_scopes s
     where s.run_id = _claim.run_id and s.scope_index = v_ended + v_is_over::int and s.kind = 'steps' and s.remaining_dependencies = 0;
  end if;
  if v_scope.scope_index is null or not etl._take_scope(v_run, v_scope) then v_scope := etl._take_next(v_run, v_ended); end if;
  if v_scope.scope_index is null then v_scope := etl._end_or_wait(v_run, v_is_idle); end if;
  if v_scope.scope_index is not null then v_is_set := set_config('synchronous_commit', 'off', true) is not null; end if;
  return v_scope;
end $$;
comment on function etl._claim(bigint, jsonb, boolean) is
  'Claims the next scope of a run for this session; null when there is none left and the run has been ended. Called by the engine only.';
revoke all on function etl._claim(bigint, jsonb, boolean) from public;
grant execute on function etl._claim(bigint, jsonb, boolean) to etl_operator;

-- What an SQLSTATE means for a step, and what a person can do about it.
create or replace function etl._error_class(sqlstate_ text, code text) returns text
language sql immutable set search_path = pg_catalog, pg_temp as $$
  select case
    when sqlstate_ in ('40001', '40P01', '55P03', '53300', '57P01', '57P02', '57P03') or sqlstate_ like '08%' then 'transient'
    when sqlstate_ like '22%' or sqlstate_ like '23%' or code = 'check.failed' then 'data_quality'
    when sqlstate_ in ('42P01', '42703', '42883', '42804', '42P02', '42704', '3F000', '42846') then 'schema_mismatch'
    when sqlstate_ like '53%' or sqlstate_ like '54%' then 'resource'
    when sqlstate_ = '57014' then 'cancelled'
    else 'code'
  end
$$;
comment on function etl._error_class(text, text) is
  'transient (retried), data_quality, schema_mismatch, resource, cancelled or code, from SQLSTATE and stable code.';
revoke all on function etl._error_class(text, text) from public;

create or replace function etl._remedy(error_class text, sqlstate_ text) returns text
language sql immutable set search_path = pg_catalog, pg_temp as $$
  select case
    when sqlstate_ = '2D000' then 'the routine commits or rolls back: take that out, the step is one transaction and b2s ends it'
    when sqlstate_ = '42501' then 'steps run as etl_owner: grant it what the message names'
    when sqlstate_ in ('42P01', '42883') then
      'create what is missing; if it exists, qualify its name or list its schema under search_path in transformations.yaml'
    when sqlstate_ = '55P03' then 'another session held a lock for longer than lock_timeout; see pg_locks, then start again'
    when sqlstate_ = '23503' then 'a row refers to one that is not there: load or repair the referenced rows first, then start again'
    else case error_class
      when 'transient' then 'nothing is wrong with the data: start the run again'
      when 'data_quality' then 'repair the rows in Bronze or handle them in the routine, then start the run again'
      when 'schema_mismatch' then 'the routine and the tables do not fit: correct the routine, then start the run again'
      when 'resource' then 'the server ran out of a resource: free some, or process less at a time, then start the run again'
      when 'cancelled' then 'nothing of the step was kept: start the run again'
      else 'correct the routine, then start the run again'
    end
  end
$$;
comment on function etl._remedy(text, text) is 'What to do about an error for which the server gives no hint.';
revoke all on function etl._remedy(text, text) from public;

-- One failure as recorded: the fields of a caught error, completed.
create or replace function etl._failure(sqlstate_ text, message text, detail text, hint text, context text, order_index int)
returns jsonb
language sql stable set search_path = pg_catalog, pg_temp as $$
  select jsonb_build_object('sqlstate', sqlstate_, 'code', c.code, 'message', message, 'detail', nullif(detail, ''),
           'hint', coalesce(nullif(hint, ''), etl._remedy(etl._error_class(sqlstate_, c.code), sqlstate_)),
           -- What lies beneath the step's own statement is the engine's, and no help.
           'context', nullif(regexp_replace(context, '(^|\n)[^\n]*\n[^\n]*etl\._execute_(step|refresh).*$', ''), ''), 'order_index', order_index, 'class', etl._error_class(sqlstate_, c.code))
    from (select coalesce(case when sqlstate_ like 'PT%' then substring(detail from '"code": "([^"]+)"') end, sqlstate_) as code) c
$$;
comment on function etl._failure(text, text, text, text, text, int) is 'A caught error as jsonb, with its class, stable code and remedy.';
revoke all on function etl._failure(text, text, text, text, text, int) from public;

-- A cancel request of a client (Ctrl-C) reaches the backend as two signals on some versions of the server, microseconds
-- apart: the second one must not hit the bookkeeping that follows the first.
create or replace function etl._absorb_signal() returns void
language plpgsql volatile set search_path = pg_catalog, pg_temp as $$
begin
  perform pg_sleep(0.02);
exception when query_canceled then
  null;
end $$;
comment on function etl._absorb_signal() is 'Waits for the second signal of a cancel request, and lets it pass.';
revoke all on function etl._absorb_signal() from public;

-- What a run says while it goes: one line for people; the same as JSON in DETAIL for clients that ask for it
-- (set b2s.progress = 'json'), and on the channel etl for whoever listens.
create or replace function etl._step_event(event text, step etl.procedure_runs, more jsonb default '{}') returns jsonb
language plpgsql stable set search_path = pg_catalog, pg_temp as $$
begin
  return jsonb_build_object('event', event, 'run_id', step.run_id, 'order_index', step.order_index, 'procedure', step.procedure_name,
                            'mode', step.mode, 'tx_scope', step.tx_scope, 'attempt', step.attempt) || more;
end $$;
comment on function etl._step_event(text, etl.procedure_runs, jsonb) is 'An event of a step as jsonb.';
revoke all on function etl._step_event(text, etl.procedure_runs, jsonb) from public;

create or replace function etl._event_text(event jsonb) returns text
language plpgsql stable set search_path = pg_catalog, pg_temp as $$
begin
  if event->>'event' = 'step_succeeded' and not event ?| array['warning', 'slice_index'] then
    return format('[%s] %s succeeded %s in %s ms', event->>'order_index', event->>'procedure',
      case event->>'rows_affected' when '1' then '1 row' else (event->>'rows_affected') || ' rows' end, round((event->>'duration_ms')::numeric));
  end if;
  return concat_ws(' ',
    '[' || (event->>'order_index') || ']',
    coalesce(event->>'procedure', event->>'mv_name', 'run ' || (event->>'run_id')),
    regexp_replace(event->>'event', '^(step|refresh|run)_', ''),
    case event->>'rows_affected' when '1' then '1 row' else (event->>'rows_affected') || ' rows' end,
    'in ' || round((event->>'duration_ms')::numeric) || ' ms',
    'slice ' || (event->>'slice_index') || ', up to ' || left(event->>'window_until', 40),
    '(' || (event->>'warning') || ')')
    || coalesce(': ' || (event->>'error_message'), '');
end $$;
comment on function etl._event_text(jsonb) is 'An event as one line for people.';
revoke all on function etl._event_text(jsonb) from public;

create or replace function etl._announce(event jsonb) returns boolean
language plpgsql volatile set search_path = pg_catalog, pg_temp as $$
declare
  v_text text := etl._event_text(event);
begin
  begin
    if current_setting('b2s.progress', true) = 'json' then
      raise notice using errcode = 'PT200', message = v_text, detail = event::text;
    elsif event->>'event' ~ 'failed|retrying|cancelled' or event ? 'warning' then
      raise warning '%', v_text;
    else
      raise notice '%', v_text;
    end if;
  exception when untranslatable_character then
    -- The client's encoding lacks a character: that must not end the run.
    raise notice '%', regexp_replace(v_text, '[^ -~]', '?', 'g');
  end;
  -- A payload has 8000 bytes; what has no bound of its own is in the run's tables.
  perform pg_notify('etl', (event - array['error_message', 'table_counts', 'warning']
    || case when octet_length(event->>'error_code') > 200 then jsonb_build_object('error_code', left(event->>'error_code', 50)) else '{}' end)::text);
  return true;
end $$;
comment on function etl._announce(jsonb) is 'Tells clients and listeners about an event of a run.';
revoke all on function etl._announce(jsonb) from public;

-- Rows written per table, without the routine's help, from the server's own counters of this transaction.
--
-- Within one CALL these counters are not reset by COMMIT or ROLLBACK, so each step takes the difference to what
-- was seen before it. In a database of few tables all of them are looked at; else those this transaction holds a write
-- lock on (80 us, whatever their number). A relation that came into being after the baseline has a higher oid than any
-- before it, and makes the locks be looked at too.
create or replace function etl._change_baseline() returns jsonb
language plpgsql volatile set search_path = pg_catalog, pg_temp as $$
declare
  v_tables oid[] := array(select c.oid from pg_catalog.pg_class c
                           where c.relkind = 'r' and c.relpersistence <> 't' and c.oid >= 16384 and c.relnamespace <> 'etl'::regnamespace);
  v_is_few boolean := cardinality(v_tables) <= 24;
begin
  return (
    select jsonb_build_object('last_oid', case when v_is_few then (select c.oid::bigint from pg_catalog.pg_class c order by c.oid desc limit 1) end,
             'tables', coalesce(jsonb_object_agg(q.oid::text, jsonb_build_array(etl._table_name(q.oid), q.i, q.u, q.d)), '{}'))
      from (select t.oid, pg_stat_get_xact_tuples_inserted(t.oid) as i, pg_stat_get_xact_tuples_updated(t.oid) as u,
                   pg_stat_get_xact_tuples_deleted(t.oid) as d from unnest(v_tables) t(oid)) q
     where v_is_few or q.i + q.u + q.d > 0);
end $$;
comment on function etl._change_baseline() is
  'The counters of tables as they stand, by oid: [name, inserted, updated, deleted]; with last_oid when these are all tables there are.';
revoke all on function etl._change_baseline() from public;
grant execute on function etl._change_baseline() to etl_operator;

-- Null for the engine's own tables, for temporary ones, and for one that the step itself has dropped.
create or replace function etl._table_name(relation oid) returns text
language sql stable set search_path = pg_catalog, pg_temp as $$
  select format('%I.%I', n.nspname, c.relname)
    from pg_catalog.pg_class c join pg_catalog.pg_namespace n on n.oid = c.relnamespace
   where c.oid = relation and c.relkind = 'r' and c.relpersistence <> 't' and n.nspname <> 'etl'
$$;
comment on function etl._table_name(oid) is 'The qualified name of a table whose changes count, else null.';
revoke all on function etl._table_name(oid) from public;
grant execute on function etl._table_name(oid) to etl_operator;

-- The tables that this transaction holds a write lock on.
create or replace function etl._written_tables() returns oid[]
language sql volatile set search_path = pg_catalog, pg_temp as $$
  select coalesce(array_agg(distinct l.relation), '{}') from pg_catalog.pg_locks l
   where l.pid = pg_backend_pid() and l.locktype = 'relation' and l.relation >= 16384
     and l.mode in ('RowExclusiveLock', 'ShareRowExclusiveLock', 'ExclusiveLock', 'AccessExclusiveLock')
$$;
comment on function etl._written_tables() is 'Relations on which this transaction holds a lock for writing.';
revoke all on function etl._written_tables() from public;

create or replace function etl._count_changes(inout seen jsonb, out changes jsonb)
language plpgsql volatile set search_path = pg_catalog, pg_temp set plan_cache_mode = force_generic_plan as $$
declare
  v_new jsonb;
begin
  if (seen->'last_oid')::text is distinct from (select c.oid::text from pg_catalog.pg_class c order by c.oid desc limit 1) then
    seen := jsonb_set(seen, '{tables}', (
      select coalesce(jsonb_object_agg(t.oid::text, jsonb_build_array(etl._table_name(t.oid), 0, 0, 0)), '{}')
        from unnest(etl._written_tables()) t(oid)) || (seen->'tables'));
  end if;
  -- TRUNCATE takes back what the transaction had counted before it, that is, what earlier steps of the group did: then
  -- the count since the scope began is the count since the TRUNCATE.
  select jsonb_object_agg(q.key, jsonb_build_array(q.name, q.i, q.u, q.d)),
         jsonb_object_agg(q.name, jsonb_build_object('inserted', q.i - (q.before->>1)::bigint, 'updated', q.u - (q.before->>2)::bigint,
                                                     'deleted', q.d - (q.before->>3)::bigint))
    into v_new, changes
    from (select k.key, k.value->>0 as name, c.i, c.u, c.d,
                 case when c.i < (k.value->>1)::bigint or c.u < (k.value->>2)::bigint or c.d < (k.value->>3)::bigint
                      then coalesce(seen->'start'->k.key, '[null, 0, 0, 0]') else k.value end as before
            from jsonb_each(seen->'tables') k,
                 lateral (select pg_stat_get_xact_tuples_inserted(k.key::oid) as i, pg_stat_get_xact_tuples_updated(k.key::oid) as u,
                                 pg_stat_get_xact_tuples_deleted(k.key::oid) as d) c
           where c.i + c.u + c.d > 0 and (c.i, c.u, c.d) <> ((k.value->>1)::bigint, (k.value->>2)::bigint, (k.value->>3)::bigint)) q
   where q.name is not null;
  if v_new is null then
    changes := '{}';
  else
    seen := jsonb_set(seen, '{tables}', (seen->'tables') || v_new);
  end if;
end $$;
comment on function etl._count_changes(jsonb) is 'Rows inserted, updated and deleted per table since the counters given; and the counters now.';
revoke all on function etl._count_changes(jsonb) from public;

-- Checks run in the step's own transaction: what violates one of severity error is never published.
create or replace function etl._run_checks(procedure_name text, checks jsonb) returns jsonb
language plpgsql volatile set search_path = pg_catalog, pg_temp as $$
declare
  v_check      jsonb;
  v_violations bigint;
  v_failed     jsonb := '[]';
  v_warned     jsonb := '[]';
begin
  for v_check in select c from jsonb_array_elements(checks) c loop
    execute v_check->>'sql' into v_violations;
    continue when coalesce(v_violations, 0) = 0;
    v_check := v_check - 'sql' || jsonb_build_object('violations', v_violations);
    if v_check->>'severity' = 'warn' then v_warned := v_warned || v_check; else v_failed := v_failed || v_check; end if;
  end loop;
  if v_failed <> '[]' then
    perform etl._fail('PT422', 'check.failed',
      (select format('%s: %s', procedure_name, string_agg(format('check %s found %s violation(s)', f->>'name', f->>'violations'), '; '))
         from jsonb_array_elements(v_failed) f),
      'nothing was published; look at the offending rows, then start the run again', jsonb_build_object('checks', v_failed));
  end if;
  return nullif(v_warned, '[]');
end $$;
comment on function etl._run_checks(text, jsonb) is
  'Runs the checks of a procedure. Raises PT422 check.failed for those of severity error; returns the others that did not hold.';
revoke all on function etl._run_checks(text, jsonb) from public;

-- Executing one scope: ONE subtransaction holds its steps, their row counts, checks, watermarks and outcome.
-- The caller commits when this returns events, and rolls everything back when it returns a failure.

-- The steps in a range that this session has claimed and not yet executed, in order.
create or replace function etl._claimed_steps(run_id bigint, first_order_index int, last_order_index int) returns etl.procedure_runs[]
language plpgsql stable set search_path = pg_catalog, pg_temp set enable_seqscan = off set enable_bitmapscan = off
  set plan_cache_mode = force_generic_plan set jit = off as $$
begin
  return array(
    select p from etl.procedure_runs p
     where p.run_id = _claimed_steps.run_id and p.order_index between first_order_index and last_order_index
       and p.status = 'running' and p.worker_pid = pg_backend_pid()
       -- A scope is executed whole: whoever calls the helpers by hand cannot commit a part of a group.
       and exists (select from etl.run_scopes s where s.run_id = p.run_id and s.scope_index = p.scope_index
                      and (s.first_order_index, s.last_order_index) = (_claimed_steps.first_order_index, _claimed_steps.last_order_index))
     order by p.order_index);
end $$;
comment on function etl._claimed_steps(bigint, int, int) is 'The steps in a range that this session has claimed.';
revoke all on function etl._claimed_steps(bigint, int, int) from public;

-- The outcome of a step, written with its data. An index lookup even on a tiny table: a sequential scan here would
-- make serializable scopes that run side by side fail each other.
create or replace function etl._record_success(step etl.procedure_runs, step_started_at timestamptz, row_count bigint, changes jsonb, unmet_checks jsonb)
returns jsonb
language plpgsql volatile set search_path = pg_catalog, pg_temp set enable_seqscan = off set jit = off as $$
declare
  v_now   timestamptz := clock_timestamp();
  v_event jsonb;
begin
  update etl.procedure_runs p
     set status = case when step.window_until <> step.window_goal then 'advanced' else 'succeeded' end, started_at = step_started_at, ended_at = v_now,
         duration_ms = extract(epoch from v_now - step_started_at) * 1000, rows_affected = row_count,
         table_counts = changes, warnings = unmet_checks
   where p.run_id = step.run_id and p.order_index = step.order_index and p.attempt = step.attempt
  returning p.duration_ms, p.status into step.duration_ms, step.status;
  v_event := jsonb_build_object('event', 'step_' || step.status, 'run_id', step.run_id, 'order_index', step.order_index,
    'procedure', step.procedure_name, 'mode', step.mode, 'tx_scope', step.tx_scope, 'attempt', step.attempt,
    'rows_affected', row_count, 'duration_ms', step.duration_ms, 'table_counts', changes);
  if step.window_goal is not null then
    v_event := v_event || jsonb_build_object('slice_index', step.slice_index, 'window_until', step.window_until, 'window_goal', step.window_goal);
  end if;
  if unmet_checks is not null then
    v_event := v_event || jsonb_build_object('warning', (
      select string_agg(format('check %s found %s violation(s)', c->>'name', c->>'violations'), '; ') from jsonb_array_elements(unmet_checks) c));
  end if;
  return v_event;
end $$;
comment on function etl._record_success(etl.procedure_runs, timestamptz, bigint, jsonb, jsonb) is
  'Writes the outcome of a step in the transaction of its data; returns the event to announce after the commit.';
revoke all on function etl._record_success(etl.procedure_runs, timestamptz, bigint, jsonb, jsonb) from public;

-- What a step may set for itself, until the end of its transaction.
create or replace function etl._apply_settings(settings jsonb) returns void
language plpgsql volatile as $$
begin
  if settings ? 'time_zone' then perform pg_catalog.set_config('timezone', settings->>'time_zone', true); end if;
  if settings ? 'lock_timeout_ms' then perform pg_catalog.set_config('lock_timeout', settings->>'lock_timeout_ms', true); end if;
  if settings ? 'search_path' then
    perform pg_catalog.set_config('search_path', (
      select 'pg_catalog, ' || pg_catalog.string_agg(pg_catalog.quote_ident(s), ', ') || ', pg_temp'
        from pg_catalog.jsonb_array_elements_text(settings->'search_path') s), true);
  end if;
end $$;
comment on function etl._apply_settings(jsonb) is
  'Sets timezone, lock_timeout and search_path for a step. Pins no search_path itself, or what it sets would end with it.';
revoke all on function etl._apply_settings(jsonb) from public;

-- A routine that says create temp table if not exists would otherwise use one that the caller has made, with triggers
-- of the caller's that run as the owner of the steps.
create or replace function etl._check_temporary_objects() returns void
language plpgsql volatile set search_path = pg_catalog, pg_temp as $$
declare
  v_names text := (select string_agg(c.relname, ', ' order by c.relname) from pg_catalog.pg_class c
                    where c.relnamespace = pg_my_temp_schema() and c.relkind <> 'i' and not pg_has_role(c.relowner, 'etl_owner', 'member')
                      and c.relowner <> 'etl_owner'::regrole);
begin
  if v_names is not null then
    perform etl._fail('PT409', 'session.temporary_objects', format('this session has temporary objects that steps could mistake for their own: %s', v_names),
      'drop them (discard temp), or start the run from another session');
  end if;
end $$;
comment on function etl._check_temporary_objects() is
  'Raises PT409 session.temporary_objects when the session has temporary objects of a role that is not a member of etl_owner.';
revoke all on function etl._check_temporary_objects() from public;

-- One step: settings, the routine, what it changed, checks, watermark, outcome.
create or replace function etl._execute_step(step etl.procedure_runs, inout seen jsonb, out event jsonb)
language plpgsql volatile set search_path = pg_catalog, pg_temp as $$
declare
  v_started_at timestamptz := clock_timestamp();
  v_timeout    text := current_setting('lock_timeout');
  v_time_zone  text := current_setting('timezone');
  v_result     record;
  v_rows       bigint;
  v_unmet      jsonb;
  v_counts     record;
begin
  -- Its window could not be fixed when it was claimed: that error is this step's.
  if step.sqlstate is not null then
    raise exception using errcode = step.sqlstate, message = step.error_message, detail = coalesce(step.error_detail, ''), hint = coalesce(step.error_hint, '');
  end if;
  -- A backfill of the same procedure must not read a row, wait for us to write its newer version, and write the older one over it.
  if step.window_until is not null then perform pg_advisory_xact_lock(6435445, step.procedure_id); end if;
  if step.settings is not null then perform etl._apply_settings(step.settings); end if;
  -- A procedure without output returns no row to put anywhere.
  if step.rows_column is null then
    execute step.statement using step.mode, step.window_since, step.window_until, step.run_id, step.parameters;
  else
    execute step.statement into v_result using step.mode, step.window_since, step.window_until, step.run_id, step.parameters;
  end if;
  if step.settings is not null then
    perform set_config('search_path', 'pg_catalog, pg_temp', true), set_config('lock_timeout', v_timeout, true), set_config('timezone', v_time_zone, true);
  end if;
  v_counts := etl._count_changes(seen);
  seen := v_counts.seen;
  if step.rows_column is not null then v_rows := (to_jsonb(v_result)->>step.rows_column)::numeric; end if;
  if v_rows is null then
    select coalesce(sum((t.value->>'inserted')::bigint + (t.value->>'updated')::bigint + (t.value->>'deleted')::bigint), 0)
      into v_rows from jsonb_each(v_counts.changes) t;
  end if;
  if step.settings ? 'checks' then v_unmet := etl._run_checks(step.procedure_name, step.settings->'checks'); end if;
  if step.watermark_strategy is not null then perform etl._advance_watermark(step, v_rows); end if;
  event := etl._record_success(step, v_started_at, v_rows, v_counts.changes, v_unmet);
  if step.window_until <> step.window_goal then perform etl._add_slice(step, step.window_until, step.slice_index + 1); end if;
end $$;
comment on function etl._execute_step(etl.procedure_runs, jsonb) is 'Runs one step and writes its outcome, in the caller''s transaction.';
revoke all on function etl._execute_step(etl.procedure_runs, jsonb) from public;

-- A deadlock names the processes. A lock timeout names nobody: whoever holds a lock for writing, and had it before the step
-- began, may have been in the way.
create or replace function etl._lock_holders(detail text, since timestamptz) returns jsonb
language sql volatile set search_path = pg_catalog, pg_temp as $$
  select jsonb_agg(jsonb_build_object('pid', q.pid, 'user', q.usename, 'application', q.application_name, 'since', q.xact_start) order by q.xact_start)
    from (select distinct a.pid, a.usename, a.application_name, a.xact_start
            from pg_catalog.pg_stat_activity a
           where a.pid <> pg_backend_pid() and a.datname = current_database()
             and case when detail ~ 'Process [0-9]+' then a.pid in (select m[1]::int from regexp_matches(detail, 'rocess ([0-9]+)', 'g') m)
                      else coalesce(a.xact_start < since + interval '1 minute', true) and exists (
                             select from pg_catalog.pg_locks l where l.pid = a.pid and l.granted and l.locktype = 'relation' and l.relation >= 16384
                                and l.mode in ('RowExclusiveLock', 'ShareUpdateExclusiveLock', 'ShareLock', 'ShareRowExclusiveLock', 'ExclusiveLock', 'AccessExclusiveLock')) end
           order by a.xact_start limit 5) q
$$;
comment on function etl._lock_holders(text, timestamptz) is 'Sessions that a step may have waited for: those a deadlock names, else up to five that hold locks for writing.';
revoke all on function etl._lock_holders(text, timestamptz) from public;

-- seen: table counters before this scope. Returns {events, seen}, with goes_on when another slice follows, or {failure}.
create or replace function etl._execute_scope(run_id bigint, first_order_index int, last_order_index int, seen jsonb) returns jsonb
language plpgsql volatile security definer set search_path = pg_catalog, pg_temp as $$
declare
  v_steps   etl.procedure_runs[] := etl._claimed_steps(run_id, first_order_index, last_order_index);
  v_step    etl.procedure_runs;
  v_result  record;
  v_events  jsonb := '[]';
  v_sqlstate text; v_message text; v_detail text; v_hint text; v_context text;
begin
  -- They are claimed by a backend of this number; that it is this very session, the run lock tells.
  if v_steps = '{}' or not pg_try_advisory_xact_lock_shared(6435443, v_steps[1].lock_key) then perform etl._fail_not_owned(run_id); end if;
  if cardinality(v_steps) > 1 then seen := seen || jsonb_build_object('start', seen->'tables'); end if;
  begin
    if pg_my_temp_schema() <> 0 then perform etl._check_temporary_objects(); end if;
    foreach v_step in array v_steps loop
      v_result := etl._execute_step(v_step, seen);
      seen := v_result.seen;
      v_events := v_events || v_result.event;
    end loop;
    set constraints all immediate;
    if current_setting('transaction_isolation') = 'serializable' then perform from etl.serialization_probe; end if;
    return jsonb_build_object('scope_index', v_step.scope_index, 'events', v_events, 'seen', seen - 'start')
      || case when v_step.window_until <> v_step.window_goal then '{"goes_on": true}'::jsonb else '{}' end;
  exception when query_canceled or assert_failure or others then
    get stacked diagnostics v_sqlstate = returned_sqlstate, v_message = message_text, v_detail = pg_exception_detail,
      v_hint = pg_exception_hint, v_context = pg_exception_context;
    if v_sqlstate = '57014' then perform etl._absorb_signal(); end if;
    return jsonb_build_object('failure', etl._failure(v_sqlstate, v_message, v_detail, v_hint, v_context, v_step.order_index)
      || case when v_sqlstate in ('40P01', '55P03') then jsonb_build_object('blocked_by', etl._lock_holders(v_detail, v_steps[1].started_at)) else '{}' end);
  end;
end $$;
comment on function etl._execute_scope(bigint, int, int, jsonb) is
  'Executes a claimed scope inside one subtransaction; returns {events, seen} to commit or {failure} to roll back. Called by the engine only.';
revoke all on function etl._execute_scope(bigint, int, int, jsonb) from public;
grant execute on function etl._execute_scope(bigint, int, int, jsonb) to etl_operator;

-- Refreshing materialized views: each in a transaction of its own, after the data is committed.

-- Whether the server will accept REFRESH ... CONCURRENTLY: populated, and a unique index on plain columns over all rows.
create or replace function etl._can_refresh_concurrently(mv regclass) returns boolean
language sql stable strict set search_path = pg_catalog, pg_temp as $$
  select c.relispopulated and exists (
           select from pg_catalog.pg_index i
             join pg_catalog.pg_class ic on ic.oid = i.indexrelid
             join pg_catalog.pg_am am on am.oid = ic.relam
            where i.indrelid = c.oid and i.indisunique and i.indimmediate and i.indisvalid and am.amname = 'btree'
              and i.indpred is null and not (0 = any (i.indkey::int2[])))
    from pg_catalog.pg_class c where c.oid = mv and c.relkind = 'm'
$$;
comment on function etl._can_refresh_concurrently(regclass) is 'Whether a materialized view can be refreshed CONCURRENTLY as it stands.';
revoke all on function etl._can_refresh_concurrently(regclass) from public;

-- Returns whether it was concurrent, and a warning when it had to be done otherwise than asked for.
create or replace function etl._refresh(mv_name text, concurrency text, out is_concurrent boolean, out warning text)
language plpgsql volatile set search_path = pg_catalog, pg_temp as $$
declare
  v_name text := (select string_agg(quote_ident(part), '.') from unnest(parse_ident(mv_name)) part);
begin
  is_concurrent := concurrency <> 'false' and coalesce(etl._can_refresh_concurrently(to_regclass(mv_name)), false);
  if concurrency = 'true' and not is_concurrent then
    warning := format('%s was refreshed without CONCURRENTLY, readers waited: it is not populated or has no unique index on plain columns without WHERE', mv_name);
  end if;
  if is_concurrent then
    begin
      execute format('refresh materialized view concurrently %s', v_name);
      return;
    exception when object_not_in_prerequisite_state or feature_not_supported then
      warning := format('%s was refreshed without CONCURRENTLY, readers waited: %s', mv_name, sqlerrm);
      is_concurrent := false;
    end;
  end if;
  execute format('refresh materialized view %s', v_name);
end $$;
comment on function etl._refresh(text, text) is 'Refreshes a materialized view, CONCURRENTLY where the server will accept it.';
revoke all on function etl._refresh(text, text) from public;

create or replace function etl._execute_refresh(run_id bigint, scope_index int) returns jsonb
language plpgsql volatile security definer set search_path = pg_catalog, pg_temp as $$
declare
  v_refresh etl.mv_refreshes;
  v_done    record;
  v_sqlstate text; v_message text; v_detail text; v_hint text; v_context text;
begin
  perform etl._check_owner(run_id);
  select * into strict v_refresh from etl.mv_refreshes m
   where m.run_id = _execute_refresh.run_id and m.scope_index = _execute_refresh.scope_index and m.status = 'running' and m.worker_pid = pg_backend_pid();
  begin
    v_done := etl._refresh(v_refresh.mv_name, v_refresh.concurrency);
    update etl.mv_refreshes m
       set status = 'succeeded', ended_at = clock_timestamp(), is_concurrent = v_done.is_concurrent, warning = v_done.warning
     where m.run_id = v_refresh.run_id and m.scope_index = v_refresh.scope_index
    returning m.* into v_refresh;
    return jsonb_build_object('scope_index', scope_index, 'events', jsonb_build_array(jsonb_strip_nulls(jsonb_build_object('event', 'refresh_succeeded',
      'run_id', v_refresh.run_id, 'mv_name', v_refresh.mv_name, 'is_concurrent', v_refresh.is_concurrent,
      'duration_ms', v_refresh.duration_ms, 'warning', v_refresh.warning))));
  exception when query_canceled or assert_failure or others then
    get stacked diagnostics v_sqlstate = returned_sqlstate, v_message = message_text, v_detail = pg_exception_detail,
      v_hint = pg_exception_hint, v_context = pg_exception_context;
    if v_sqlstate = '57014' then perform etl._absorb_signal(); end if;
    return jsonb_build_object('failure', etl._failure(v_sqlstate, v_message, v_detail, v_hint, v_context, null));
  end;
end $$;
comment on function etl._execute_refresh(bigint, int) is
  'Refreshes the materialized view of a claimed scope; returns {events} to commit or {failure} to roll back. Called by the engine only.';
revoke all on function etl._execute_refresh(bigint, int) from public;
grant execute on function etl._execute_refresh(bigint, int) to etl_operator;

-- After a scope was rolled back: what failed, what that means for the rest of the run, and whether to try again.

-- Everything that needs one of these scopes, directly or not, and was not started.
create or replace function etl._requiring_scopes(run_id bigint, scope_index int) returns int[]
language sql stable set search_path = pg_catalog, pg_temp as $$
  with recursive down(scope_index) as (
    select unnest(s.required_by) from etl.run_scopes s
     where s.run_id = _requiring_scopes.run_id and s.scope_index = _requiring_scopes.scope_index
    union
    select unnest(s.required_by) from down d join etl.run_scopes s on s.run_id = _requiring_scopes.run_id and s.scope_index = d.scope_index
  )
  select array_agg(distinct d.scope_index) from down d
    join etl.procedure_runs p on p.run_id = _requiring_scopes.run_id and p.scope_index = d.scope_index and p.status = 'pending'
$$;
comment on function etl._requiring_scopes(bigint, int) is 'The pending scopes that need one to succeed, transitively, or null.';
revoke all on function etl._requiring_scopes(bigint, int) from public;

-- The new attempt has the same window, parameters and statement. No session takes it up before the delay has passed.
create or replace function etl._prepare_attempt(scope etl.run_scopes, delay_ms float8) returns void
language plpgsql volatile set search_path = pg_catalog, pg_temp as $$
begin
  insert into etl.procedure_runs (run_id, order_index, attempt, scope_index, procedure_id, procedure_name, procedure_type, group_name, mode,
    tx_scope, isolation, parameters, dependencies, statement, rows_column, lock_key, settings, watermark_strategy, state_key, window_since,
    window_until, window_goal, slice_index, definition)
  select p.run_id, p.order_index, p.attempt + 1, p.scope_index, p.procedure_id, p.procedure_name, p.procedure_type, p.group_name, p.mode,
         p.tx_scope, p.isolation, p.parameters, p.dependencies, p.statement, p.rows_column, p.lock_key, p.settings, p.watermark_strategy, p.state_key,
         p.window_since, p.window_until, p.window_goal, p.slice_index, p.definition
    from etl.procedure_runs p
   where p.run_id = scope.run_id and p.order_index between scope.first_order_index and scope.last_order_index and p.attempt = scope.attempt;
  update etl.run_scopes s set attempt = s.attempt + 1, ready_at = clock_timestamp() + delay_ms * interval '1 ms'
   where s.run_id = scope.run_id and s.scope_index = scope.scope_index;
end $$;
comment on function etl._prepare_attempt(etl.run_scopes, float8) is 'Plans the next attempt of a whole scope.';
revoke all on function etl._prepare_attempt(etl.run_scopes, float8) from public;

create or replace function etl._record_step_failure(scope etl.run_scopes, failure jsonb, failed_status text) returns void
language plpgsql volatile set search_path = pg_catalog, pg_temp as $$
declare
  -- An error outside every step (a deferred constraint, the serialization probe) belongs to the last one.
  v_failed int := coalesce((failure->>'order_index')::int, scope.last_order_index);
  v_step   etl.procedure_runs;
begin
  for v_step in
    update etl.procedure_runs p
       set status = case when p.order_index = v_failed then failed_status
                         when failed_status = 'cancelled' then 'cancelled' else 'rolled_back' end,
           ended_at = clock_timestamp(), duration_ms = extract(epoch from clock_timestamp() - p.started_at) * 1000,
           error_class = case when p.order_index = v_failed then failure->>'class' end,
           error_code = case when p.order_index = v_failed then failure->>'code' end,
           sqlstate = case when p.order_index = v_failed then failure->>'sqlstate' end,
           error_message = case when p.order_index = v_failed then failure->>'message'
                                else format('rolled back with its group: step %s failed', v_failed) end,
           error_detail = case when p.order_index = v_failed then failure->>'detail' end,
           error_hint = case when p.order_index = v_failed then failure->>'hint' end,
           error_context = case when p.order_index = v_failed then failure->>'context' end,
           blocked_by = case when p.order_index = v_failed then failure->'blocked_by' end
     where p.run_id = scope.run_id and p.order_index between scope.first_order_index and scope.last_order_index
       and p.attempt = scope.attempt
    returning p.*
  loop
    perform etl._announce(etl._step_event('step_' || v_step.status, v_step, jsonb_strip_nulls(jsonb_build_object(
      'duration_ms', v_step.duration_ms, 'error_class', v_step.error_class, 'error_code', v_step.error_code,
      'error_message', v_step.error_message))));
  end loop;
end $$;
comment on function etl._record_step_failure(etl.run_scopes, jsonb, text) is 'Writes the outcome of every step of a scope that was rolled back.';
revoke all on function etl._record_step_failure(etl.run_scopes, jsonb, text) from public;

-- Milliseconds to wait before the next attempt, or null when there is none: exponential with jitter.
create or replace function etl._retry_delay(scope etl.run_scopes, failure jsonb) returns float8
language sql volatile set search_path = pg_catalog, pg_temp as $$
  select least(p.max_backoff_ms, p.backoff_ms * 2.0 ^ (n.attempts - 1)) * (0.5 + random() / 2)
    from etl.procedure_runs s join etl.procedures p using (procedure_id)
    cross join lateral (select count(*) as attempts from etl.procedure_runs a
                         where a.run_id = s.run_id and a.order_index = s.order_index and a.slice_index = s.slice_index) n
   where failure->>'class' = 'transient' and s.run_id = scope.run_id and s.attempt = scope.attempt
     and s.order_index = coalesce((failure->>'order_index')::int, scope.last_order_index) and n.attempts < p.max_attempts
$$;
comment on function etl._retry_delay(etl.run_scopes, jsonb) is 'Milliseconds until the next attempt of a scope, or null when it is not to be tried again.';
revoke all on function etl._retry_delay(etl.run_scopes, jsonb) from public;

create or replace function etl._record_refresh_failure(scope etl.run_scopes, failure jsonb) returns void
language plpgsql volatile set search_path = pg_catalog, pg_temp as $$
declare
  v_refresh etl.mv_refreshes;
begin
  update etl.mv_refreshes m
     set status = case when failure->>'class' = 'cancelled' then 'cancelled' else 'failed' end, ended_at = clock_timestamp(),
         error_code = failure->>'code', error_message = failure->>'message', error_hint = failure->>'hint'
   where m.run_id = scope.run_id and m.scope_index = scope.scope_index
  returning m.* into v_refresh;
  perform etl._announce(jsonb_build_object('event', 'refresh_' || v_refresh.status, 'run_id', v_refresh.run_id,
    'mv_name', v_refresh.mv_name, 'duration_ms', v_refresh.duration_ms, 'error_code', v_refresh.error_code,
    'error_message', v_refresh.error_message));
end $$;
comment on function etl._record_refresh_failure(etl.run_scopes, jsonb) is 'Writes the failure of a refresh; the data stays.';
revoke all on function etl._record_refresh_failure(etl.run_scopes, jsonb) from public;

-- Nobody cancels one statement, or a wait, to see the next one start: an interruption asks the run to stop. Whoever asked
-- first stays on record.
create or replace function etl._note_interruption(run_id bigint, reason text) returns void
language sql volatile set search_path = pg_catalog, pg_temp as $$
  update etl.runs r
     set cancel_requested_at = clock_timestamp(), cancel_requested_by = etl._requester(), cancel_reason = _note_interruption.reason
   where r.run_id = _note_interruption.run_id and r.cancel_requested_at is null and r.ended_at is null
$$;
comment on function etl._note_interruption(bigint, text) is 'Records that a run is to stop because its session was interrupted.';
revoke all on function etl._note_interruption(bigint, text) from public;

-- A statement that etl.watchdog cancelled: that is the step's own failure, and nobody asked the run to stop.
create or replace function etl._timed_out(scope etl.run_scopes, failure jsonb) returns jsonb
language plpgsql stable set search_path = pg_catalog, pg_temp as $$
declare
  v_timeout_ms bigint;
begin
  if failure->>'class' <> 'cancelled' or scope.kind <> 'steps' then return failure; end if;
  select sum((p.settings->>'timeout_ms')::bigint) into v_timeout_ms
    from etl.procedure_runs p
   where p.run_id = scope.run_id and p.order_index between scope.first_order_index and scope.last_order_index and p.attempt = scope.attempt
     and p.timed_out_at is not null;
  if v_timeout_ms is null then return failure; end if;
  return failure || jsonb_build_object('class', 'timeout', 'code', 'step.timeout', 'message', format('the timeout of %s ms has passed', v_timeout_ms),
    'hint', 'find out what it waited for (etl.step_history, pg_stat_activity), raise timeout, or read less at a time (max_window); then start the run again');
end $$;
comment on function etl._timed_out(etl.run_scopes, jsonb) is 'A failure as it is, or as a timeout when the watchdog had cancelled the step.';
revoke all on function etl._timed_out(etl.run_scopes, jsonb) from public;

-- Returns the milliseconds to wait before the scope is claimed again, or null: the run goes on with what is left.
create or replace function etl._record_failure(run_id bigint, scope_index int, failure jsonb) returns float8
language plpgsql volatile security definer set search_path = pg_catalog, pg_temp set enable_seqscan = off set enable_bitmapscan = off set plan_cache_mode = force_generic_plan set jit = off as $$
declare
  v_run   etl.runs := etl._check_owner(run_id);
  v_scope etl.run_scopes;
  v_delay float8;
  v_stops boolean;
  v_is_halved boolean;
  v_waiting   int[];
  v_locked    int[];
  v_skipped   int[];
begin
  select * into strict v_scope from etl.run_scopes s
   where s.run_id = _record_failure.run_id and s.scope_index = _record_failure.scope_index;
  -- A session ends its own scope, or one whose session is gone.
  if exists (select from (select p.worker_pid from etl.procedure_runs p where p.run_id = v_scope.run_id and p.scope_index = v_scope.scope_index and p.status = 'running'
                          union select m.worker_pid from etl.mv_refreshes m where m.run_id = v_scope.run_id and m.scope_index = v_scope.scope_index and m.status = 'running') w
              where w.worker_pid <> pg_backend_pid() and w.worker_pid = any (etl._living_workers(v_run))) then
    perform etl._fail_not_owned(run_id);
  end if;
  failure := etl._timed_out(v_scope, failure);
  if failure->>'class' = 'cancelled' and v_run.cancel_requested_at is null then perform etl._note_interruption(run_id, failure->>'message'); end if;
  if v_scope.kind = 'refresh' then
    perform etl._record_refresh_failure(v_scope, failure);
  else
    if v_run.cancel_requested_at is null then
      v_delay := etl._retry_delay(v_scope, failure);
      v_is_halved := v_delay is null and etl._halve_slice(v_scope, failure);
    end if;
    perform etl._record_step_failure(v_scope, failure,
      case when v_delay is not null or v_is_halved then 'retrying' when failure->>'class' = 'cancelled' then 'cancelled' else 'failed' end);
    if v_is_halved then return 0; end if;
    if v_delay is not null then
      perform etl._prepare_attempt(v_scope, v_delay);
      return v_delay;
    end if;
  end if;
  select bool_or(p.on_failure = 'stop') into v_stops
    from etl.procedure_runs s join etl.procedures p using (procedure_id)
   where s.run_id = _record_failure.run_id and s.order_index between v_scope.first_order_index and v_scope.last_order_index;
  -- Sessions whose steps fail at the same time do this one after the other, and lock all the scopes it is about in one go, in order.
  perform from etl.runs r where r.run_id = _record_failure.run_id for update;
  v_waiting := etl._requiring_scopes(run_id, scope_index);
  v_locked := scope_index || coalesce(v_waiting, '{}') || case when v_stops then etl._pending_scopes(run_id) else '{}' end;
  perform from etl.run_scopes s
    where s.run_id = _record_failure.run_id
      and s.scope_index = any (v_locked || array(select unnest(e.required_by || e.precedes) from etl.run_scopes e
                                                  where e.run_id = _record_failure.run_id and e.scope_index = any (v_locked)))
    order by s.scope_index for update;
  v_skipped := etl._skip_scopes(run_id, v_waiting, case when failure->>'class' = 'cancelled' then 'cancelled' else 'upstream_failed' end);
  if v_stops then v_skipped := v_skipped || etl._skip_scopes(run_id, etl._pending_scopes(run_id), 'stopped'); end if;
  perform etl._release(run_id, scope_index || v_skipped);
  return null;
end $$;
comment on function etl._record_failure(bigint, int, jsonb) is
  'Records why a scope was rolled back, skips what needs it, or plans the next attempt. Called by the engine only.';
revoke all on function etl._record_failure(bigint, int, jsonb) from public;
grant execute on function etl._record_failure(bigint, int, jsonb) to etl_operator;

-- The end of a run: its status follows from its steps and refreshes.
create or replace function etl._finish_run(run etl.runs) returns void
language plpgsql volatile set search_path = pg_catalog, pg_temp as $$
declare
  v_steps  record;
  v_first  etl.procedure_runs;
  v_status text;
begin
  if exists (select from etl.procedure_runs p where p.run_id = run.run_id and p.ended_at is null)
     or exists (select from etl.mv_refreshes m where m.run_id = run.run_id and m.ended_at is null) then
    perform etl._fail_not_owned(run.run_id);
  end if;
  select count(*) filter (where p.status = 'succeeded') as succeeded, count(*) filter (where p.status = 'failed') as failed,
         count(*) filter (where p.status = 'cancelled' or p.skip_reason = 'cancelled') as cancelled,
         count(*) filter (where p.status = 'skipped') as skipped, count(p.warnings) as warned
    into v_steps
    from etl.procedure_runs p where p.run_id = run.run_id;
  select * into v_first from etl.procedure_runs p where p.run_id = run.run_id and p.status = 'failed' order by p.order_index limit 1;
  v_status := case
    when v_steps.cancelled > 0
      or exists (select from etl.mv_refreshes m where m.run_id = run.run_id and 'cancelled' in (m.status, m.skip_reason)) then 'cancelled'
    when v_steps.failed > 0 then 'failed'
    when v_steps.warned > 0
      or exists (select from etl.mv_refreshes m where m.run_id = run.run_id and (m.status = 'failed' or m.status = 'skipped' and m.skip_reason <> 'reused' or m.warning is not null))
      then 'completed_with_warnings'
    else 'succeeded' end;
  update etl.runs r
     set status = v_status, ended_at = clock_timestamp(), error_code = v_first.error_code,
         error_message = case when v_first.order_index is not null
           then format('%s: %s', v_first.procedure_name, v_first.error_message) end
   where r.run_id = run.run_id
  returning r.* into run;
  perform etl._announce(jsonb_strip_nulls(jsonb_build_object('event', 'run_' || v_status, 'run_id', run.run_id,
    'duration_ms', run.duration_ms, 'error_code', run.error_code, 'error_message', run.error_message,
    'steps', to_jsonb(v_steps))));
end $$;
comment on function etl._finish_run(etl.runs) is 'Gives a run its final status.';
revoke all on function etl._finish_run(etl.runs) from public;

-- Several sessions on one run, and runs that wait in a queue. Each session that executes a run shares its lock.

-- A queued run is planned when it is taken up, on behalf of whoever asked for it; when that fails, so does the run.
create or replace function etl._start_queued(run etl.runs) returns boolean
language plpgsql volatile set search_path = pg_catalog, pg_temp as $$
declare
  v_plan    record;
  v_sqlstate text; v_message text; v_detail text;
begin
  begin
    v_plan := etl._plan(run.request, run.requested_by);
  exception when others then
    get stacked diagnostics v_sqlstate = returned_sqlstate, v_message = message_text, v_detail = pg_exception_detail;
    update etl.runs r
       set status = 'failed', started_at = clock_timestamp(), ended_at = clock_timestamp(), error_message = v_message,
           error_code = coalesce(substring(v_detail from '"code": "([^"]+)"'), v_sqlstate)
     where r.run_id = run.run_id;
    raise warning 'run %, which was queued, cannot start: %', run.run_id, v_message;
    return false;
  end;
  update etl.runs r
     set status = 'running', started_at = clock_timestamp(), worker_pid = pg_backend_pid(), max_concurrency = v_plan.max_concurrency,
         step_count = (select count(*) from unnest(v_plan.items) i where i.kind = 'steps'),
         config_version_id = (select max(v.config_version_id) from etl.config_versions v where v.pipeline_id = run.pipeline_id)
   where r.run_id = run.run_id;
  perform etl._insert_scopes(run.run_id, v_plan.items);
  perform etl._insert_steps(run.run_id, v_plan.items);
  return true;
end $$;
comment on function etl._start_queued(etl.runs) is 'Plans a queued run and makes this session its worker; false when its plan fails, which ends it.';
revoke all on function etl._start_queued(etl.runs) from public;

-- The row of the run makes those that want to join wait for each other; its lock, taken before the next one counts, counts at once.
create or replace function etl._join_run(run etl.runs) returns boolean
language plpgsql volatile set search_path = pg_catalog, pg_temp as $$
declare
  v_alive int[];
begin
  perform from etl.runs r where r.run_id = run.run_id and r.status = 'running' for update;
  if not found then return false; end if;
  v_alive := etl._living_workers(run);
  if v_alive = '{}' or cardinality(v_alive) >= run.max_concurrency or pg_backend_pid() = any (v_alive)
     or not pg_try_advisory_xact_lock_shared(6435443, 0) then
    return false;
  end if;
  -- Whoever begins the run lets go of its row a moment before it lets go of the lock that it has taken exclusively.
  for i in 1 .. 20 loop
    exit when pg_try_advisory_xact_lock_shared(6435443, etl._lock_key(run));
    if i = 20 then return false; end if;
    perform pg_sleep(0.005);
  end loop;
  insert into etl.run_workers (run_id, pid) values (run.run_id, pg_backend_pid())
  on conflict on constraint run_workers_pkey do update set joined_at = clock_timestamp();
  return true;
end $$;
comment on function etl._join_run(etl.runs) is 'Makes this session a worker of an active run; false when it has as many as it may have, or is dead.';
revoke all on function etl._join_run(etl.runs) from public;

-- What there is to do: the active run, else the oldest that waits. Null run_id: nothing, or nothing that this session may do.
create or replace function etl._enlist(pipeline text, wanted_run_id bigint, out run_id bigint, out lock_key int, out pause_ms int)
language plpgsql volatile security definer set search_path = pg_catalog, pg_temp as $$
declare
  v_wanted      etl.runs;
  v_pipeline_id int;
  v_run         etl.runs;
begin
  if wanted_run_id is not null then
    select * into v_wanted from etl.runs r where r.run_id = wanted_run_id;
    if not found then perform etl._fail('PT404', 'run.unknown', format('there is no run %s', wanted_run_id), 'which there are: select * from etl.run_history'); end if;
  end if;
  v_pipeline_id := coalesce(v_wanted.pipeline_id, (etl._pipeline(pipeline)).pipeline_id);
  perform etl._drop_holds(v_pipeline_id);
  select * into v_run from etl.runs r where r.pipeline_id = v_pipeline_id and r.status = 'running' and r.kind = 'run';
  if v_run.run_id is null then
    -- Another worker may just be taking up the oldest one: wait until it has, and help it.
    perform from etl.runs r
      where r.pipeline_id = v_pipeline_id and r.status = 'queued' and (r.run_id = wanted_run_id or wanted_run_id is null) order by r.run_id limit 1 for update;
    select * into v_run from etl.runs r where r.pipeline_id = v_pipeline_id and r.status = 'running' and r.kind = 'run';
  end if;
  if v_run.run_id is not null and etl._is_alive(v_run) then
    if (wanted_run_id is null or wanted_run_id = v_run.run_id) and etl._join_run(v_run) then run_id := v_run.run_id; end if;
  else
    for v_run in
      select * from etl.runs r
       where r.pipeline_id = v_pipeline_id and r.status = 'queued' and (r.run_id = wanted_run_id or wanted_run_id is null)
       order by r.run_id for update skip locked
    loop
      exit when not pg_try_advisory_xact_lock_shared(6435443, 0) or not pg_try_advisory_xact_lock(6435443, v_pipeline_id);
      perform etl._abandon_orphans(v_pipeline_id);
      if etl._start_queued(v_run) then
        run_id := v_run.run_id;
        exit;
      end if;
    end loop;
  end if;
  if run_id is not null then lock_key := etl._lock_key(v_run); pause_ms := v_run.pause_ms; end if;
end $$;
comment on function etl._enlist(text, bigint) is
  'Makes this session a worker of the active run of a pipeline, or of the oldest queued one; null when there is none for it. Called by etl.work.';
revoke all on function etl._enlist(text, bigint) from public;
grant execute on function etl._enlist(text, bigint) to etl_operator;

-- A run that did not get to its end, taken up again: what succeeded is kept, the rest is done with the same windows and parameters.

-- Whoever may run it may resume it; a full refresh keeps its guardrails.
create or replace function etl._resumable_run(wanted_run_id bigint) returns etl.runs
language plpgsql volatile set search_path = pg_catalog, pg_temp as $$
declare
  v_run etl.runs;
begin
  select * into v_run from etl.runs r where r.run_id = wanted_run_id;
  if not found then
    perform etl._fail('PT404', 'run.unknown', format('there is no run %s', wanted_run_id), 'which there are: select * from etl.run_history');
  elsif v_run.kind = 'backfill' then
    perform etl._fail('PT422', 'run.not_resumable', format('run %s is a backfill', wanted_run_id), format('call etl.backfill(resume => %s)', wanted_run_id));
  elsif v_run.status = 'queued' then
    perform etl._fail('PT409', 'run.queued', format('run %s has not begun', wanted_run_id), format('call etl.work(run_id => %s)', wanted_run_id));
  end if;
  perform etl._acquire(v_run.pipeline_id);
  perform etl._abandon_orphans(v_run.pipeline_id);
  select * into v_run from etl.runs r where r.run_id = wanted_run_id;
  if v_run.status in ('succeeded', 'completed_with_warnings') then
    perform etl._fail('PT409', 'run.nothing_left', format('run %s has %s: nothing is left to do', wanted_run_id, replace(v_run.status, '_', ' ')),
      'start another run: call etl.start_run()');
  elsif not exists (select from etl.procedure_runs p where p.run_id = wanted_run_id) then
    perform etl._fail('PT409', 'run.nothing_left', format('run %s ended before it was planned', wanted_run_id), 'repeat the request: call etl.start_run()');
  end if;
  return v_run;
end $$;
comment on function etl._resumable_run(bigint) is
  'The run to resume; this session holds its lock then. Raises PT404 run.unknown, PT422 run.not_resumable, PT409 run.active, run.queued or run.nothing_left.';
revoke all on function etl._resumable_run(bigint) from public;

-- The last attempt of each step, how it ended, and the configuration as it is now. A row of the table itself: Postgres 15 crashes
-- where a function in SQL returns one of a subquery as that type.
create or replace function etl._steps_to_resume(parent etl.runs)
returns table (step etl.procedure_runs, procedure etl.procedures, is_done boolean, is_changed boolean)
language sql stable set search_path = pg_catalog, pg_temp as $$
  select s, p, s.status = 'succeeded' or coalesce(s.skip_reason in ('no_data', 'reused'), false), etl._definition(p) is distinct from s.definition
    from etl.procedure_runs s
    left join etl.procedures p on p.procedure_id = s.procedure_id and p.is_active
   where s.run_id = parent.run_id
     and s.attempt = (select max(x.attempt) from etl.procedure_runs x where x.run_id = s.run_id and x.order_index = s.order_index)
   order by s.order_index
$$;
comment on function etl._steps_to_resume(etl.runs) is 'The steps of a run that is resumed, whether each is done, and whether its definition has changed since.';
revoke all on function etl._steps_to_resume(etl.runs) from public;

create or replace function etl._check_resume(parent etl.runs, changed_steps text) returns void
language plpgsql volatile set search_path = pg_catalog, pg_temp as $$
declare
  v_gone    text[];
  v_changed text[];
  v_new     text[];
begin
  if changed_steps not in ('reuse', 'rerun') then
    perform etl._fail('PT422', 'request.invalid', format('changed_steps is reuse or rerun, not %s', changed_steps), 'changed_steps => ''reuse''');
  end if;
  select array_agg((s.step).procedure_name) filter (where not s.is_done and (s.procedure).procedure_id is null),
         array_agg((s.step).procedure_name) filter (where s.is_done and s.is_changed and (s.procedure).procedure_id is not null),
         array_agg((s.step).procedure_name) filter (where not s.is_done and s.is_changed)
    into v_gone, v_changed, v_new
    from etl._steps_to_resume(parent) s;
  if v_gone is not null then
    perform etl._fail('PT404', 'procedure.unknown', format('%s is left to do and no longer configured', array_to_string(v_gone, ', ')),
      'start another run: call etl.start_run()', jsonb_build_object('steps', v_gone));
  elsif v_changed is not null and changed_steps is null then
    perform etl._fail('PT409', 'run.definition_changed', format('%s succeeded in run %s and has changed since', array_to_string(v_changed, ', '), parent.run_id),
      'say what is to be done: changed_steps => ''reuse'' keeps what it did, ''rerun'' does it again with the same window', jsonb_build_object('steps', v_changed));
  end if;
  if v_new is not null then
    raise notice 'changed since run %, and run as it is now: %', parent.run_id, array_to_string(v_new, ', ');
  end if;
end $$;
comment on function etl._check_resume(etl.runs, text) is
  'Raises PT404 procedure.unknown and PT409 run.definition_changed; names steps that are run in another form than the one that did not succeed.';
revoke all on function etl._check_resume(etl.runs, text) from public;

-- A frozen window holds as long as the watermark stands where it began; else the step gets a new one. A succeeded step that is
-- done again reads its old window and leaves the watermark, which has passed it, alone.
create or replace function etl._insert_resumed(run etl.runs, parent etl.runs, changed_steps text) returns void
language plpgsql volatile set search_path = pg_catalog, pg_temp set enable_nestloop = off set jit = off as $$
begin
  insert into etl.procedure_runs (run_id, order_index, scope_index, procedure_id, procedure_name, procedure_type, group_name, mode, tx_scope, isolation,
    parameters, dependencies, statement, rows_column, lock_key, settings, definition, watermark_strategy, state_key, window_since, window_until, window_goal,
    slice_index, status, skip_reason, ended_at)
  select run.run_id, (q.s).order_index, (q.s).scope_index, (q.s).procedure_id, (q.s).procedure_name, (q.s).procedure_type, (q.s).group_name, (q.s).mode,
         (q.s).tx_scope, (q.s).isolation, (q.s).parameters, (q.s).dependencies, coalesce((q.p).call_sql, (q.s).statement),
         case when (q.p).procedure_id is not null then (q.p).rows_column else (q.s).rows_column end, etl._lock_key(run),
         case when (q.p).procedure_id is not null then etl._step_settings(q.p, l.search_path) end, etl._definition(q.p),
         case when not q.is_again then (q.s).watermark_strategy end, case when not q.is_again then (q.s).state_key end,
         case when w.is_kept then (q.s).window_since end, case when w.is_kept then (q.s).window_until end, case when w.is_kept then (q.s).window_goal end,
         case when w.is_kept then (q.s).slice_index else 1 end,
         case when q.is_reused then 'skipped' else 'pending' end, case when q.is_reused then 'reused' end, case when q.is_reused then clock_timestamp() end
    from (select r.step as s, r.procedure as p, x.is_again, r.is_done and not x.is_again as is_reused
            from etl._steps_to_resume(parent) r
            cross join lateral (select r.is_done and r.is_changed and coalesce(changed_steps, '') = 'rerun' and (r.procedure).procedure_id is not null as is_again) x) q
    cross join etl.pipelines l
    left join etl.state t on t.state_key = (q.s).state_key
    cross join lateral (select q.is_again or q.is_reused or (q.s).mode = 'incremental' and (q.s).window_until is not null
                                 and t.last_success_watermark is not distinct from (q.s).window_since as is_kept) w
   where l.pipeline_id = run.pipeline_id;
  insert into etl.mv_refreshes (run_id, scope_index, refresh_target_id, mv_name, refresh_after, refresh_on, concurrency, feeders, depends_on, status,
    skip_reason, ended_at)
  select run.run_id, m.scope_index, m.refresh_target_id, m.mv_name, m.refresh_after, m.refresh_on, m.concurrency, m.feeders, m.depends_on,
         case when d.is_done then 'skipped' else 'pending' end, case when d.is_done then 'reused' end, case when d.is_done then clock_timestamp() end
    from etl.mv_refreshes m
    cross join lateral (select (m.status = 'succeeded' or coalesce(m.skip_reason = 'reused', false)) and not exists (
                                 select from etl.procedure_runs p where p.run_id = run.run_id and p.order_index = any (m.feeders) and p.status = 'pending') as is_done) d
   where m.run_id = parent.run_id;
end $$;
comment on function etl._insert_resumed(etl.runs, etl.runs, text) is 'Stores the steps and refreshes of a run that resumes another one.';
revoke all on function etl._insert_resumed(etl.runs, etl.runs, text) from public;

-- Scopes wait for those before them that are to be executed; a barrier is passed anew.
create or replace function etl._insert_resumed_scopes(run_id bigint, parent_run_id bigint) returns void
language sql volatile set search_path = pg_catalog, pg_temp set enable_nestloop = off set jit = off as $$
  with scopes as materialized (
    select s.*, s.kind <> 'barrier'
                and not exists (select from etl.procedure_runs p where p.run_id = _insert_resumed_scopes.run_id and p.scope_index = s.scope_index and p.status = 'pending')
                and not exists (select from etl.mv_refreshes m where m.run_id = _insert_resumed_scopes.run_id and m.scope_index = s.scope_index and m.status = 'pending') as is_done
      from etl.run_scopes s where s.run_id = parent_run_id
  ), waits as (
    select f.scope_index, count(*) as waits_for from scopes s cross join lateral unnest(s.required_by || s.precedes) f(scope_index)
     where not s.is_done group by f.scope_index
  )
  insert into etl.run_scopes (run_id, scope_index, kind, isolation, first_order_index, last_order_index, required_by, precedes, remaining_dependencies)
  select _insert_resumed_scopes.run_id, s.scope_index, s.kind, s.isolation, s.first_order_index, s.last_order_index, s.required_by, s.precedes, coalesce(w.waits_for, 0)
    from scopes s left join waits w using (scope_index)
$$;
comment on function etl._insert_resumed_scopes(bigint, bigint) is 'Stores the scopes of a run that resumes another one, with what each still waits for.';
revoke all on function etl._insert_resumed_scopes(bigint, bigint) from public;

create or replace function etl._begin_resume(wanted_run_id bigint, changed_steps text, out run_id bigint, out lock_key int)
language plpgsql volatile security definer set search_path = pg_catalog, pg_temp as $$
declare
  v_parent etl.runs := etl._resumable_run(wanted_run_id);
  v_run    etl.runs;
begin
  perform etl._check_full_refresh((select array_agg(row((s.step).scope_index, 'steps', (s.step).order_index, (s.step).procedure_id, null, (s.step).mode, null, null, null,
      null, null, null, null, null, null, null)::etl.plan_item) from etl._steps_to_resume(v_parent) s where not s.is_done), v_parent.request, etl._requester());
  perform etl._check_resume(v_parent, changed_steps);
  insert into etl.runs (pipeline_id, config_version_id, parent_run_id, mode, as_of, parameters, request, fingerprint, requested_by, application_name, approved_by,
    reason, max_concurrency, step_count, started_at, status, worker_pid)
  values (v_parent.pipeline_id, (select max(v.config_version_id) from etl.config_versions v where v.pipeline_id = v_parent.pipeline_id), v_parent.run_id, v_parent.mode,
    v_parent.as_of, v_parent.parameters, v_parent.request - 'idempotency_key', v_parent.fingerprint, etl._requester(), current_setting('application_name'),
    v_parent.approved_by, v_parent.reason, v_parent.max_concurrency, v_parent.step_count, clock_timestamp(), 'running', pg_backend_pid())
  returning * into v_run;
  perform etl._insert_resumed(v_run, v_parent, changed_steps);
  perform etl._insert_resumed_scopes(v_run.run_id, v_parent.run_id);
  run_id := v_run.run_id; lock_key := etl._lock_key(v_run);
end $$;
comment on function etl._begin_resume(bigint, text) is 'Plans what is left of a run and stores it as a run that this session executes. Raises what etl.resume_run raises.';
revoke all on function etl._begin_resume(bigint, text) from public;
grant execute on function etl._begin_resume(bigint, text) to etl_operator;

-- dry_run => 'execute': the engine's own helpers run every scope in one transaction that is rolled back, so that later
-- steps see what earlier ones wrote and the row counts are true. Isolation levels are the caller's; nothing is waited for.
create or replace function etl._rehearse(request jsonb, out steps etl.procedure_runs[], out refreshes etl.mv_refreshes[])
language plpgsql volatile security definer set search_path = pg_catalog, pg_temp as $$
declare
  v_plan   record := etl._plan(request);
  v_run_id bigint;
  v_next   etl.run_scopes;
  v_result jsonb;
  v_seen   jsonb := etl._change_baseline();
  v_name   text := current_setting('application_name');
begin
  perform etl._acquire(v_plan.pipeline_id);
  begin
    -- What the helpers announce is about to be undone.
    perform set_config('client_min_messages', 'error', true);
    perform etl._abandon_orphans(v_plan.pipeline_id);
    v_run_id := etl._create_run(request - 'idempotency_key', v_plan.pipeline_id, v_plan.max_concurrency, v_plan.items);
    loop
      v_next := etl._claim(v_run_id, v_result, v_next.required_by <> '{}' or v_next.precedes <> '{}');
      exit when v_next.scope_index is null;
      if v_next.kind = 'refresh' then v_result := etl._execute_refresh(v_run_id, v_next.scope_index);
      else v_result := etl._execute_scope(v_run_id, v_next.first_order_index, v_next.last_order_index, v_seen); end if;
      if v_result ? 'failure' then perform etl._record_failure(v_run_id, v_next.scope_index, v_result->'failure'); end if;
      v_seen := coalesce(v_result->'seen', etl._change_baseline());
      if v_result ? 'failure' then v_result := null; v_next := null; end if;
    end loop;
    select array_agg(p order by p.order_index, p.attempt) into steps from etl.procedure_runs p where p.run_id = v_run_id;
    select array_agg(m order by m.scope_index) into refreshes from etl.mv_refreshes m where m.run_id = v_run_id;
    raise exception using errcode = 'PT200', message = 'rehearsal over';
  exception when sqlstate 'PT200' then
    perform set_config('application_name', v_name, false);
  end;
end $$;
comment on function etl._rehearse(jsonb) is 'Runs a request and rolls everything back; returns what would have been recorded.';
revoke all on function etl._rehearse(jsonb) from public;
grant execute on function etl._rehearse(jsonb) to etl_operator;

-- From a configured routine to the statement that calls it: read from pg_proc what the routine declares, pass that, by name, typed.

create or replace function etl._config_problem(loc jsonb, message text, hint text) returns jsonb
language sql immutable set search_path = pg_catalog, pg_temp as $$
  select jsonb_build_object('loc', loc, 'message', message, 'hint', hint)
$$;
comment on function etl._config_problem(jsonb, text, text) is 'A problem of a configuration: the place in the document, the cause and the remedy.';
revoke all on function etl._config_problem(jsonb, text, text) from public;

-- Not to_regclass: that raises an error for a schema that etl_owner may not use.
create or replace function etl._relation(name text) returns oid
language sql stable set search_path = pg_catalog, pg_temp as $$
  select c.oid from pg_catalog.pg_class c join pg_catalog.pg_namespace n on n.oid = c.relnamespace
   where array[n.nspname, c.relname] = parse_ident(_relation.name)::name[]
$$;
comment on function etl._relation(text) is 'The oid of the relation that a qualified name means, or null.';
revoke all on function etl._relation(text) from public;

-- The routine that a name means, or why there is none.
create or replace function etl._resolve_routine(routine text, out oid oid, out message text, out hint text)
language plpgsql stable set search_path = pg_catalog, pg_temp as $$
declare
  v_parts text[];
  v_found text[];
begin
  if position('(' in routine) > 0 then
    begin
      oid := to_regprocedure(routine);
    exception when others then
      oid := null;
    end;
    if oid is null then
      message := format('routine %s does not exist', routine);
      hint := 'write the signature as \df shows it, e.g. silver.load_sales(text, timestamptz)';
    end if;
    return;
  end if;
  v_parts := parse_ident(routine);
  if cardinality(v_parts) <> 2 then
    message := format('routine %s must be written schema.name', routine);
    hint := format('e.g. routine: silver.%s', v_parts[cardinality(v_parts)]);
    return;
  end if;
  select array_agg(p.oid::regprocedure::text order by p.oid::regprocedure::text), min(p.oid::bigint)::oid into v_found, oid
    from pg_catalog.pg_proc p join pg_catalog.pg_namespace n on n.oid = p.pronamespace
   where n.nspname = v_parts[1] and p.proname = v_parts[2] and p.prokind in ('f', 'p');
  if v_found is null then
    message := format('routine %s does not exist', routine);
    hint := 'create it before you run b2s sync-config, or correct the name'
      || coalesce((select format('; schema %s has %s', v_parts[1], string_agg(q.proname, ', ')) from (
           select distinct p.proname from pg_catalog.pg_proc p join pg_catalog.pg_namespace n on n.oid = p.pronamespace
            where n.nspname = v_parts[1] and p.prokind in ('f', 'p') order by 1 limit 8) q), '');
  elsif cardinality(v_found) > 1 then
    oid := null;
    message := format('routine %s is overloaded: %s', routine, array_to_string(v_found, ', '));
    hint := format('say which one: routine: "%s"', v_found[1]);
  end if;
end $$;
comment on function etl._resolve_routine(text) is 'The oid of the routine that a configured name means, or a message and a hint.';
revoke all on function etl._resolve_routine(text) from public;

create or replace function etl._routine_arguments(routine oid)
returns table (ordinal int, name text, is_input boolean, is_output boolean, type text, type_oid oid, default_sql text)
language sql stable set search_path = pg_catalog, pg_temp as $$
  select a.ord::int, coalesce(a.name, ''), coalesce(a.mode, 'i') in ('i', 'b', 'v'), coalesce(a.mode, 'i') in ('o', 'b', 't'),
         format_type(a.typ, null), a.typ, pg_get_function_arg_default(p.oid, a.ord::int)
    from pg_catalog.pg_proc p,
         unnest(coalesce(p.proallargtypes, p.proargtypes::oid[]), p.proargnames, p.proargmodes::text[]) with ordinality a(typ, name, mode, ord)
   where p.oid = routine and a.typ is not null
$$;
comment on function etl._routine_arguments(oid) is 'The arguments of a routine, from pg_proc.';
revoke all on function etl._routine_arguments(oid) from public;

-- What an argument of a routine receives: a contract name, a parameter, or nothing.
create or replace function etl._binding(argument text, procedure jsonb) returns text
language sql immutable set search_path = pg_catalog, pg_temp as $$
  select coalesce(
    (select a.key from jsonb_each_text(procedure->'args') a where a.value = argument and a.key <> 'rows'),
    case when argument in ('p_mode', 'p_since', 'p_until', 'p_run_id') and not procedure->'args' ? argument then argument end,
    (select p->>'name' from jsonb_array_elements(procedure->'params') p
      where p->>'name' in (argument, substring(argument from '^p_(.+)$')) and not procedure->'args' ? (p->>'name')
      order by p->>'name' <> argument limit 1))
$$;
comment on function etl._binding(text, jsonb) is 'The contract name or parameter that an argument of a routine receives, or null.';
revoke all on function etl._binding(text, jsonb) from public;

-- The expression that passes a binding, cast to the argument's own type.
create or replace function etl._argument_sql(binding text, type text, default_sql text, procedure jsonb) returns text
language sql stable set search_path = pg_catalog, pg_temp as $$
  select case binding
    when 'p_mode' then format('$1::%s', type)
    when 'p_since' then format('$2::%s', type)
    when 'p_until' then format('$3::%s', type)
    when 'p_run_id' then format('$4::%s', type)
    else (
      select case when default_sql is not null and not p ? 'default'
               then format('case when $5 ? %L then %s else %s end', binding, e.value_sql, default_sql) else e.value_sql end
        from jsonb_array_elements(procedure->'params') p,
             lateral (select case when type in ('json', 'jsonb') then format('($5->%L)::%s', binding, type)
                                  when p->>'type' = 'array' then format('etl._text_array($5->%L)::%s', binding, type)
                                  else format('($5->>%L)::%s', binding, type) end as value_sql) e
       where p->>'name' = binding)
  end
$$;
comment on function etl._argument_sql(text, text, text, jsonb) is 'The SQL that passes one argument of a compiled call.';
revoke all on function etl._argument_sql(text, text, text, jsonb) from public;

create or replace function etl._text_array(value jsonb) returns text[]
language sql immutable strict set search_path = pg_catalog, pg_temp as $$
  select coalesce(array_agg(e order by n), '{}') from jsonb_array_elements_text(value) with ordinality a(e, n)
$$;
comment on function etl._text_array(jsonb) is 'A jsonb array as text[]; CALL takes no subquery among its arguments.';
revoke all on function etl._text_array(jsonb) from public;

-- Which output holds the number of rows: the one named in args.rows, else p_rows or rows, else the only one; integers only.
create or replace function etl._rows_output(routine oid, procedure jsonb) returns text
language sql stable set search_path = pg_catalog, pg_temp as $$
  select coalesce(max(a.name) filter (where a.name = procedure#>>'{args,rows}'),
                  case when not procedure->'args' ? 'rows' then coalesce(max(a.name) filter (where a.name in ('p_rows', 'rows')),
                                                                        case when count(*) = 1 then max(a.name) end) end)
    from etl._routine_arguments(routine) a
   where a.is_output and a.type in ('smallint', 'integer', 'bigint', 'numeric')
$$;
comment on function etl._rows_output(oid, jsonb) is 'The name of the output argument that reports rows, or null.';
revoke all on function etl._rows_output(oid, jsonb) from public;

-- How the call looks around its arguments, by kind of routine and what it returns.
create or replace function etl._call_shape(routine oid, procedure jsonb, arguments text, out call_sql text, out rows_column text)
language plpgsql stable set search_path = pg_catalog, pg_temp as $$
declare
  v_proc    pg_catalog.pg_proc;
  v_outputs int := (select count(*) from etl._routine_arguments(routine) a where a.is_output);
  v_name    text;
begin
  select * into strict v_proc from pg_catalog.pg_proc p where p.oid = routine;
  v_name := (select format('%I.%I', n.nspname, v_proc.proname) from pg_catalog.pg_namespace n where n.oid = v_proc.pronamespace);
  rows_column := etl._rows_output(routine, procedure);
  if v_proc.prokind = 'p' then
    call_sql := format('call %s(%s)', v_name, arguments);
  elsif v_proc.proretset then
    -- All of a set must be read: a function in SQL stops where its reader stops.
    call_sql := format('select pg_catalog.count(*) as result_rows from %s(%s)', v_name, arguments);
    rows_column := null;
  elsif v_outputs > 0 then
    call_sql := format('select * from %s(%s)', v_name, arguments);
    if v_outputs = 1 and rows_column is not null then call_sql := format('select %s(%s) as %I', v_name, arguments, rows_column); end if;
  else
    call_sql := format('select %s(%s) as rows', v_name, arguments);
    rows_column := case when v_proc.prorettype in ('int2'::regtype, 'int4'::regtype, 'int8'::regtype, 'numeric'::regtype) then 'rows' end;
  end if;
end $$;
comment on function etl._call_shape(oid, jsonb, text) is 'The statement that calls a routine, and the output column that reports rows.';
revoke all on function etl._call_shape(oid, jsonb, text) from public;

-- Compiles one procedure of a configuration. problems: everything that makes the routine unusable as configured.
create or replace function etl._compile_call(procedure jsonb, out routine_signature text, out call_sql text, out rows_column text, out problems jsonb)
language plpgsql stable set search_path = pg_catalog, pg_temp as $$
declare
  v_loc       jsonb := jsonb_build_array('procedures', procedure->>'name', 'routine');
  v_routine   record := etl._resolve_routine(procedure->>'routine');
  v_arguments text;
  v_shape     record;
begin
  if v_routine.oid is null then
    problems := jsonb_build_array(etl._config_problem(v_loc, v_routine.message, v_routine.hint));
    return;
  end if;
  routine_signature := v_routine.oid::regprocedure::text;
  problems := etl._routine_problems(v_routine.oid, procedure);
  select string_agg(format(case when p.proargmodes[a.ordinal] = 'v' then 'variadic %I => %s' else '%I => %s' end, a.name,
           case when b.binding is not null then etl._argument_sql(b.binding, a.type, a.default_sql, procedure) else format('null::%s', a.type) end),
           ', ' order by a.ordinal)
    into v_arguments
    from etl._routine_arguments(v_routine.oid) a
    cross join lateral (select case when a.is_input then etl._binding(a.name, procedure) end as binding) b
    join pg_catalog.pg_proc p on p.oid = v_routine.oid
   where b.binding is not null or (a.is_output and (p.prokind = 'p' or (a.is_input and a.default_sql is null)));
  v_shape := etl._call_shape(v_routine.oid, procedure, coalesce(v_arguments, ''));
  call_sql := v_shape.call_sql;
  rows_column := v_shape.rows_column;
end $$;
comment on function etl._compile_call(jsonb) is 'The call statement of a configured procedure, and every problem its routine has.';
revoke all on function etl._compile_call(jsonb) from public;

-- A declared check as the query that counts its violations. Names reach SQL only as identifiers that the server resolved.
create or replace function etl._compile_check(definition jsonb, out sql text, out problem text)
language plpgsql stable set search_path = pg_catalog, pg_temp as $$
declare
  v_table   oid := etl._relation(definition->>'table');
  v_name    text := (select format('%I.%I', n.nspname, c.relname) from pg_catalog.pg_class c join pg_catalog.pg_namespace n on n.oid = c.relnamespace where c.oid = v_table);
  v_columns text[] := (select array_agg(c) from jsonb_array_elements_text(definition->'columns') c);
  v_missing text := (select string_agg(c, ', ') from unnest(v_columns) c where not exists (
    select from pg_catalog.pg_attribute a where a.attrelid = v_table and a.attname = c and a.attnum > 0 and not a.attisdropped));
  v_list    text := (select string_agg(quote_ident(c), ', ') from unnest(v_columns) c);
  v_routine record;
begin
  if definition->>'type' = 'routine' then
    v_routine := etl._resolve_routine(definition->>'routine');
    problem := v_routine.message;
    if problem is not null then return; end if;
    select case p.prorettype when 'bool'::regtype then format('select case when %I.%I() then 0 else 1 end', n.nspname, p.proname)
                             when 'int4'::regtype then format('select %I.%I()::bigint', n.nspname, p.proname)
                             when 'int8'::regtype then format('select %I.%I()', n.nspname, p.proname) end
      into sql
      from pg_catalog.pg_proc p join pg_catalog.pg_namespace n on n.oid = p.pronamespace
     where p.oid = v_routine.oid and p.prokind = 'f' and not p.proretset and p.pronargs = p.pronargdefaults;
    if sql is null then problem := format('%s must be a function without required arguments that returns boolean, integer or bigint', definition->>'routine'); end if;
    return;
  end if;
  if v_table is null then problem := format('table %s does not exist', definition->>'table'); return; end if;
  if v_missing is not null then problem := format('table %s has no column %s', v_name, v_missing); return; end if;
  if not (has_table_privilege('etl_owner', v_table, 'select')
          and has_schema_privilege('etl_owner', (select c.relnamespace from pg_catalog.pg_class c where c.oid = v_table), 'usage')) then problem := format('role etl_owner may not read %s', v_name); return; end if;
  sql := case definition->>'type'
    when 'not_null' then format('select count(*) from %s where %s', v_name, (select string_agg(format('%I is null', c), ' or ') from unnest(v_columns) c))
    when 'unique' then format('select count(*) from (select 1 from %s where %s group by %s having count(*) > 1) d', v_name,
                              (select string_agg(format('%I is not null', c), ' and ') from unnest(v_columns) c), v_list)
    when 'row_count' then format('select (count(*) not between %s and %s)::int from %s', coalesce((definition->>'min')::bigint, 0),
                                 coalesce((definition->>'max')::bigint, 9223372036854775807), v_name)
  end;
end $$;
comment on function etl._compile_check(jsonb) is 'The query that counts the violations of a declared check, or what is wrong with the declaration.';
revoke all on function etl._compile_check(jsonb) from public;

-- Everything about a configuration that only the database can know. Each problem names its place in the document.

create or replace function etl._routine_problems(routine oid, procedure jsonb) returns jsonb
language sql stable set search_path = pg_catalog, pg_temp as $$
  with arguments as (
    select a.*, case when a.is_input then etl._binding(a.name, procedure) end as binding from etl._routine_arguments(routine) a
  ), found(loc, message, hint) as (
    select array['routine'], format('argument %s of %s is passed by nothing and has no default', coalesce(nullif(a.name, ''), '#' || a.ordinal), routine::regprocedure),
           case when a.name = '' then 'name the argument: b2s passes arguments by name'
                else format('declare it as a param, map it under args, or give it a default; b2s itself passes p_mode, p_since, p_until and p_run_id') end
      from arguments a where a.is_input and not a.is_output and a.binding is null and a.default_sql is null
    union all
    select array['params', p->>'name'], format('%s has no argument for param %s', routine::regprocedure, p->>'name'),
           format('name an argument %s or p_%s, or map it: args: {%s: argument_name}', p->>'name', p->>'name', p->>'name')
      from jsonb_array_elements(procedure->'params') p
     where not exists (select from arguments a where a.binding = p->>'name')
    union all
    select array['args', g.key], format('%s has no argument %s', routine::regprocedure, g.value), 'correct the name under args'
      from jsonb_each_text(procedure->'args') g
     where not exists (select from arguments a where a.name = g.value and (g.key <> 'rows' or a.is_output))
    union all
    select array['watermark'], format('%s declares no window (p_since or p_until), so the watermark would move over rows it never read', routine::regprocedure),
           'declare p_since and p_until and use them, or remove the watermark'
     where jsonb_typeof(procedure->'watermark') = 'object' and not exists (select from arguments a where a.binding in ('p_since', 'p_until'))
    union all
    select array['routine'], format('argument %s of %s is of type %s; the %s strategy passes %s', a.name, routine::regprocedure, a.type,
             procedure#>>'{watermark,strategy}', w.types[1]),
           format('declare it as one of: %s', array_to_string(w.types, ', '))
      from arguments a
      join (values ('timestamp', array['timestamp with time zone', 'text']),
                   ('id', array['bigint', 'numeric', 'text']), ('xid', array['pg_snapshot', 'text'])) w(strategy, types)
        on w.strategy = procedure#>>'{watermark,strategy}'
     where a.binding in ('p_since', 'p_until') and a.type <> all (w.types)
    union all
    select array['routine'], format('role etl_owner, as which steps run, may not execute %s', routine::regprocedure),
           format('grant usage on schema %I to etl_owner; grant execute on routine %s to etl_owner', n.nspname, routine::regprocedure)
      from pg_catalog.pg_proc p join pg_catalog.pg_namespace n on n.oid = p.pronamespace
     where p.oid = routine and not (has_schema_privilege('etl_owner', n.oid, 'usage') and has_function_privilege('etl_owner', p.oid, 'execute'))
  )
  select coalesce(jsonb_agg(etl._config_problem(jsonb_build_array('procedures', procedure->>'name') || to_jsonb(f.loc), f.message, f.hint)), '[]')
    from found f
$$;
comment on function etl._routine_problems(oid, jsonb) is 'What makes a routine unusable as it is configured.';
revoke all on function etl._routine_problems(oid, jsonb) from public;

create or replace function etl._refresh_problems(procedure jsonb) returns jsonb
language sql stable set search_path = pg_catalog, pg_temp as $$
  select coalesce(jsonb_agg(etl._config_problem(jsonb_build_array('procedures', procedure->>'name', 'mv_refresh', m.name), q.message, q.hint)), '[]')
    from (select t->>'name' as name, etl._relation(t->>'name') as oid from jsonb_array_elements(procedure->'mv_refresh') t) m
    left join pg_catalog.pg_class c on c.oid = m.oid
    cross join lateral (select
      case when c.oid is null then format('materialized view %s does not exist', m.name)
           when c.relkind <> 'm' then format('%s is not a materialized view', m.name)
           when not (pg_has_role('etl_owner', c.relowner, 'usage')
                     or case when current_setting('server_version_num')::int >= 170000 then has_table_privilege('etl_owner', c.oid, 'maintain') else false end)
             then format('role etl_owner, as which refreshes run, does not own %s', m.name) end as message,
      case when c.oid is null then 'create it before you run b2s sync-config, or correct the name (schema.name)'
           when c.relkind <> 'm' then 'name a materialized view'
           else format('alter materialized view %s owner to etl_owner', m.name) end as hint) q
   where q.message is not null
$$;
comment on function etl._refresh_problems(jsonb) is 'What is wrong with the refresh targets of a configured procedure.';
revoke all on function etl._refresh_problems(jsonb) from public;

-- Rows of a foreign table or of a materialized view come to be seen long after they got their number.
create or replace function etl._column_source_problems(watermark jsonb) returns table (message text, hint text)
language sql stable set search_path = pg_catalog, pg_temp as $$
  select q.message, q.hint
    from (select s as source, parse_ident(s) as parts, etl._relation(format('%I.%I', (parse_ident(s))[1], (parse_ident(s))[2])) as oid
            from jsonb_array_elements_text(watermark->'source') s) s
    left join pg_catalog.pg_class c on c.oid = s.oid
    left join pg_catalog.pg_attribute a on a.attrelid = s.oid and a.attname = s.parts[3] and a.attnum > 0 and not a.attisdropped
    join (values ('timestamp', array['timestamp with time zone', 'timestamp without time zone']), ('id', array['smallint', 'integer', 'bigint']),
                 ('xid', array['xid8'])) w(strategy, types) on w.strategy = watermark->>'strategy'
    cross join lateral (select
      case when s.oid is null then format('table %s.%s does not exist', s.parts[1], s.parts[2])
           when a.attname is null then format('table %s.%s has no column %s', s.parts[1], s.parts[2], s.parts[3])
           when format_type(a.atttypid, null) <> all (w.types)
             then format('%s is of type %s, the %s strategy needs %s', s.source, format_type(a.atttypid, null), w.strategy, array_to_string(w.types, ' or '))
           when not (has_column_privilege('etl_owner', a.attrelid, a.attnum, 'select')
                     and has_schema_privilege('etl_owner', (parse_ident(s.source))[1], 'usage')) then format('role etl_owner may not read %s', s.source)
           when c.relkind in ('f', 'm') and not (w.strategy = 'timestamp' and coalesce((watermark->>'delay_ms')::int, 0) > 0)
             then format('%s.%s is a %s: its rows come to be seen after they were written, which the %s strategy cannot know', s.parts[1], s.parts[2],
                         case c.relkind when 'f' then 'foreign table' else 'materialized view' end, w.strategy)
           when c.relkind = 'v' and w.strategy = 'id' then format('%s.%s is a view: who writes to it cannot be told, which the id strategy needs', s.parts[1], s.parts[2])
      end as message,
      case when s.oid is null or a.attname is null or format_type(a.atttypid, null) <> all (w.types) then 'source is schema.table.column of the rows the routine reads'
           when c.relkind in ('f', 'm') then 'read the tables behind it; or strategy: timestamp with a delay longer than its rows can be late'
           when c.relkind = 'v' then 'name the table behind it'
           else format('grant usage on schema %I to etl_owner; grant select on %I.%I to etl_owner', s.parts[1], s.parts[1], s.parts[2]) end as hint) q
   where q.message is not null
$$;
comment on function etl._column_source_problems(jsonb) is 'What is wrong with the columns that are the source of a watermark.';
revoke all on function etl._column_source_problems(jsonb) from public;

create or replace function etl._id_source_problems(sources text[]) returns table (message text, hint text)
language sql stable set search_path = pg_catalog, pg_temp as $$
  with feeding as (
    select s.source, q.* from unnest(sources) s(source)
     cross join lateral etl._feeding_sequences(etl._source_tables(array[s.source]), (parse_ident(s.source))[3]) q
  )
  select distinct format('sequence %s (cache %s, increment %s) does not make ids in the order in which they are inserted: rows would be missed',
           f.oid::regclass, f.cache, f.increment),
         format('alter sequence %s cache 1; or use the xid strategy', f.oid::regclass)
    from feeding f where f.cache > 1 or f.increment < 0
  union all
  select 'ids of several tables are one order only when one sequence makes all of them', 'a procedure per table; or strategy: xid or timestamp'
   where cardinality(sources) > 1
     and (select count(distinct f.oid) <> 1 or count(distinct f.source) < cardinality(sources) from feeding f)
$$;
comment on function etl._id_source_problems(text[]) is 'What makes the ids of these columns no watermark.';
revoke all on function etl._id_source_problems(text[]) from public;

-- The query is planned and typed, not executed.
create or replace function etl._query_source_problem(watermark jsonb, out message text, out hint text)
language plpgsql stable set search_path = pg_catalog, pg_temp as $$
declare
  v_type  text;
  v_types text[] := case watermark->>'strategy' when 'timestamp' then array['timestamp with time zone', 'timestamp without time zone', 'date']
                                                when 'id' then array['smallint', 'integer', 'bigint'] end;
begin
  hint := 'source is a column (schema.table.column), or one query that returns one value: the newest there is to read';
  if v_types is null then
    message := 'the xid strategy reads columns, a query has no meaning for it';
    return;
  end if;
  execute format('select format_type(pg_typeof(q.value), null) from (select) r left join lateral (%s) q(value) on false', watermark#>>'{source,0}') into v_type;
  if v_type <> all (v_types) then
    message := format('the source query returns %s, the %s strategy needs %s', v_type, watermark->>'strategy', array_to_string(v_types, ' or '));
  end if;
exception when others then
  message := format('the source query fails: %s', sqlerrm);
end $$;
comment on function etl._query_source_problem(jsonb) is 'What is wrong with the query that is the source of a watermark, or null.';
revoke all on function etl._query_source_problem(jsonb) from public;

create or replace function etl._watermark_problems(procedure jsonb) returns jsonb
language plpgsql stable set search_path = pg_catalog, pg_temp as $$
declare
  v_watermark jsonb  := procedure->'watermark';
  v_sources   text[] := etl._text_array(v_watermark->'source');
  v_problems  jsonb;
begin
  if jsonb_typeof(v_watermark) is distinct from 'object' then return '[]'; end if;
  if etl._is_query(v_sources) then
    select jsonb_agg(etl._config_problem('[]', p.message, p.hint)) into v_problems from etl._query_source_problem(v_watermark) p where p.message is not null;
  else
    select jsonb_agg(etl._config_problem('[]', p.message, p.hint)) into v_problems from etl._column_source_problems(v_watermark) p;
    if v_problems is null and v_watermark->>'strategy' = 'id' then
      select jsonb_agg(etl._config_problem('[]', p.message, p.hint)) into v_problems from etl._id_source_problems(v_sources) p;
    end if;
  end if;
  return (select coalesce(jsonb_agg(p || jsonb_build_object('loc', jsonb_build_array('procedures', procedure->>'name', 'watermark', 'source'))), '[]')
            from jsonb_array_elements(v_problems) p);
end $$;
comment on function etl._watermark_problems(jsonb) is 'What is wrong with the watermark sources of a configured procedure.';
revoke all on function etl._watermark_problems(jsonb) from public;

-- Relations between procedures: a program that writes the document itself may not have checked them.
create or replace function etl._relation_problems(config jsonb) returns jsonb
language sql stable set search_path = pg_catalog, pg_temp as $$
  with procedure as (
    select p->>'name' as name, p as definition from jsonb_array_elements(config->'procedures') p
  ), dependency as (
    select p.name, d as needs, p.definition, q.definition as needed from procedure p
      cross join lateral jsonb_array_elements_text(p.definition->'dependencies') d left join procedure q on q.name = d
  ), found(loc, message, hint) as (
    select jsonb_build_array('procedures', d.name, 'dependencies'), format('%s depends on %s, which is not in this pipeline', d.name, d.needs), 'correct the name, or add the procedure'
      from dependency d where d.needed is null
    union all
    select jsonb_build_array('procedures', d.name, 'dependencies'), format('dimension %s depends on fact %s', d.name, d.needs),
           'remove the dependency, or declare it: allow_fact_dependency: true'
      from dependency d where d.definition->>'type' = 'dimension' and d.needed->>'type' = 'fact' and d.definition->'allow_fact_dependency' <> 'true'
    union all
    select jsonb_build_array('procedures', min(p.name), 'name'), format('procedure %s is defined %s times', p.name, count(*)), 'names are unique in a pipeline'
      from procedure p group by p.name having count(*) > 1
    union all
    select jsonb_build_array('procedures', max(p.name), 'watermark', 'state_key'),
           format('state_key %s is shared by %s, which do not always run together', p.definition#>>'{watermark,state_key}', string_agg(p.name, ', ' order by p.name)),
           'give each its own state_key, or put them into one group with transaction_scope: per_group'
      from procedure p where jsonb_typeof(p.definition->'watermark') = 'object' group by p.definition#>>'{watermark,state_key}'
    having count(*) > 1 and (count(distinct p.definition->>'group') <> 1 or bool_or(p.definition->>'group' is null)
                             or bool_or(p.definition->>'transaction_scope' <> 'per_group'))
    union all
    select jsonb_build_array('procedures', max(p.name), 'watermark', 'state_key'),
           format('state_key %s has one window for %s, but their sources have no order in common', p.definition#>>'{watermark,state_key}', string_agg(p.name, ', ' order by p.name)),
           'give each its own state_key'
      from procedure p where p.definition#>>'{watermark,state_key}' is not null group by p.definition#>>'{watermark,state_key}'
    having count(distinct p.definition#>'{watermark,source}') > 1 and (min(p.definition#>>'{watermark,strategy}') = 'id'
                             or bool_or(etl._is_query(etl._text_array(p.definition#>'{watermark,source}'))))
    union all
    select jsonb_build_array('procedures', p.name, 'max_window'), 'max_window needs columns as source of the watermark: a query does not say where the rows are',
           'name the columns, or remove max_window'
      from procedure p
     where jsonb_typeof(p.definition->'max_window') in ('number', 'string') and etl._is_query(etl._text_array(p.definition#>'{watermark,source}'))
    union all
    select jsonb_build_array('procedures', p.name, 'watermark', 'state_key'),
           format('state_key %s already stands at %s, up to where %s has not read', t.state_key, t.last_success_watermark, p.name),
           'give it a state_key of its own, so that it begins at the beginning'
      from procedure p
      join etl.state t on t.state_key = p.definition#>>'{watermark,state_key}' and t.last_success_watermark is not null
     where not exists (select from etl.procedures q join etl.pipelines l using (pipeline_id)
                        where l.name = config->>'pipeline' and q.name = p.name and q.procedure_id = any (t.procedure_ids))
    union all
    select jsonb_build_array('procedures', p.name, 'watermark', 'state_key'),
           format('state_key %s belongs to procedure %s of pipeline %s', o.state_key, o.name, l.name), 'give it its own state_key'
      from procedure p
      join etl.procedures o on o.state_key = p.definition#>>'{watermark,state_key}' and o.is_active
      join etl.pipelines l using (pipeline_id)
     where l.name <> config->>'pipeline'
    union all
    select jsonb_build_array('procedures', p.name, 'watermark', 'state_key'),
           format('the watermark of state_key %s is of the %s strategy', s.state_key, s.strategy),
           'give the procedure a new state_key: it starts without a watermark'
      from procedure p
      join etl.state s on s.state_key = p.definition#>>'{watermark,state_key}'
     where s.last_success_watermark is not null and s.strategy <> p.definition#>>'{watermark,strategy}'
  )
  select coalesce(jsonb_agg(etl._config_problem(f.loc, f.message, f.hint)), '[]') from found f
$$;
comment on function etl._relation_problems(jsonb) is 'What is wrong with the relations between the procedures of a configuration.';
revoke all on function etl._relation_problems(jsonb) from public;

-- A configuration in the form in which two of them are compared: parts by name, lists without an order of their own sorted.
create or replace function etl._normalise_config(config jsonb) returns jsonb
language sql immutable set search_path = pg_catalog, pg_temp as $$
  select jsonb_build_object('pipeline', config->'pipeline',
    'settings', jsonb_strip_nulls(jsonb_build_object('description', config->'description', 'max_concurrency', config->'max_concurrency', 'search_path', config->'search_path')),
    'groups', (select coalesce(jsonb_object_agg(g->>'name', jsonb_strip_nulls(g)), '{}') from jsonb_array_elements(config->'groups') g),
    'schedules', (select coalesce(jsonb_object_agg(s->>'name', jsonb_strip_nulls(s)), '{}') from jsonb_array_elements(config->'schedules') s),
    'procedures', (select coalesce(jsonb_object_agg(p->>'name', jsonb_strip_nulls(p || jsonb_build_object(
        'dependencies', (select coalesce(jsonb_agg(d order by d), '[]') from jsonb_array_elements_text(p->'dependencies') d),
        'tags', (select coalesce(jsonb_agg(t order by t), '[]') from jsonb_array_elements_text(p->'tags') t),
        'watermark', case jsonb_typeof(p->'watermark') when 'object' then '{"delay_ms": 0, "on_empty": "run"}' || jsonb_strip_nulls(p->'watermark') end,
        'mv_refresh', (select coalesce(jsonb_agg(m || jsonb_build_object('concurrently', m->>'concurrently') order by m->>'name'), '[]')
                         from jsonb_array_elements(p->'mv_refresh') m)))), '{}')
      from jsonb_array_elements(config->'procedures') p))
$$;
comment on function etl._normalise_config(jsonb) is 'A configuration with its parts by name, for comparison.';
revoke all on function etl._normalise_config(jsonb) from public;

create or replace function etl._digest(config jsonb) returns text
language sql immutable strict set search_path = pg_catalog, pg_temp as $$
  select encode(sha256(convert_to(config::text, 'UTF8')), 'hex')
$$;
comment on function etl._digest(jsonb) is 'sha256 of a configuration in normal form.';
revoke all on function etl._digest(jsonb) from public;

-- The configuration that the catalog tables hold, in normal form; null when the pipeline is not there.
create or replace function etl._catalog_procedure(p etl.procedures) returns jsonb
language sql stable set search_path = pg_catalog, pg_temp as $$
  select jsonb_strip_nulls(jsonb_build_object('name', p.name, 'type', p.type, 'description', p.description, 'routine', p.routine,
    'default_mode', p.default_mode, 'allow_full_refresh', p.allow_full_refresh, 'allow_fact_dependency', p.allow_fact_dependency,
    'transaction_scope', p.transaction_scope, 'isolation', p.isolation, 'args', p.args, 'timeout_ms', p.timeout_ms,
    'lock_timeout_ms', p.lock_timeout_ms, 'on_failure', p.on_failure, 'max_window', p.max_window,
    'retries', jsonb_build_object('attempts', p.max_attempts, 'backoff_ms', p.backoff_ms, 'max_backoff_ms', p.max_backoff_ms),
    'checks', (select coalesce(jsonb_agg(c - 'sql' order by n), '[]') from jsonb_array_elements(p.checks) with ordinality x(c, n)),
    'watermark', case when p.state_key is not null then jsonb_build_object('strategy', p.watermark_strategy,
      'source', p.watermark_sources, 'state_key', p.state_key, 'delay_ms', p.delay_ms,
      'on_empty', p.on_empty) end,
    'group', (select g.name from etl.group_members m join etl.groups g using (group_id) where m.procedure_id = p.procedure_id),
    'tags', (select coalesce(jsonb_agg(t.name order by t.name), '[]') from etl.procedure_tags x join etl.tags t using (tag_id)
              where x.procedure_id = p.procedure_id),
    'dependencies', (select coalesce(jsonb_agg(q.name order by q.name), '[]') from etl.dependencies d
                       join etl.procedures q on q.procedure_id = d.depends_on_id where d.procedure_id = p.procedure_id),
    'params', (select coalesce(jsonb_agg(d.declaration order by d.ordinal), '[]') from etl.parameters d where d.procedure_id = p.procedure_id),
    'mv_refresh', (select coalesce(jsonb_agg(jsonb_build_object('name', t.name, 'after', x.refresh_after, 'on', x.refresh_on,
                       'concurrently', x.concurrency) order by t.name), '[]')
                     from etl.procedure_refresh_targets x join etl.refresh_targets t using (refresh_target_id)
                    where x.procedure_id = p.procedure_id)))
$$;
comment on function etl._catalog_procedure(etl.procedures) is 'A procedure as the catalog tables hold it, in normal form.';
revoke all on function etl._catalog_procedure(etl.procedures) from public;

create or replace function etl._catalog_config(pipeline text) returns jsonb
language sql stable set search_path = pg_catalog, pg_temp as $$
  select jsonb_build_object('pipeline', l.name,
    'settings', jsonb_strip_nulls(jsonb_build_object('description', l.description, 'max_concurrency', l.max_concurrency, 'search_path', l.search_path)),
    'groups', (select coalesce(jsonb_object_agg(g.name, jsonb_strip_nulls(jsonb_build_object('name', g.name, 'description', g.description))), '{}')
                 from etl.groups g where g.pipeline_id = l.pipeline_id and g.is_active),
    'schedules', (select coalesce(jsonb_object_agg(s.name, s.definition), '{}') from etl.schedules s where s.pipeline_id = l.pipeline_id and s.is_active),
    'procedures', (select coalesce(jsonb_object_agg(p.name, etl._catalog_procedure(p)), '{}') from etl.procedures p
                    where p.pipeline_id = l.pipeline_id and p.is_active))
    from etl.pipelines l where l.name = pipeline
$$;
comment on function etl._catalog_config(text) is 'The configuration that the catalog tables hold, in normal form, or null.';
revoke all on function etl._catalog_config(text) from public;

-- What turns one configuration into another: + added, ~ changed (with the fields), - removed.
create or replace function etl._part_changes(kind text, old jsonb, new jsonb) returns setof jsonb
language sql immutable set search_path = pg_catalog, pg_temp as $$
  select jsonb_build_object('action', case when o.value is null then '+' when n.value is null then '-' else '~' end,
           'kind', kind, 'name', coalesce(n.key, o.key),
           'fields', case when o.value is not null and n.value is not null then (
             select jsonb_object_agg(coalesce(a.key, b.key), jsonb_build_array(a.value, b.value))
               from jsonb_each(o.value) a full join jsonb_each(n.value) b on a.key = b.key
              where a.value is distinct from b.value) else '{}' end)
    from jsonb_each(coalesce(old, '{}')) o full join jsonb_each(new) n on n.key = o.key
   where o.value is distinct from n.value
   order by coalesce(n.key, o.key)
$$;
comment on function etl._part_changes(text, jsonb, jsonb) is 'What changes between two sets of named parts of a configuration.';
revoke all on function etl._part_changes(text, jsonb, jsonb) from public;

create or replace function etl._config_changes(old jsonb, new jsonb) returns jsonb
language sql immutable set search_path = pg_catalog, pg_temp as $$
  select coalesce(jsonb_agg(c), '[]') from (
    select etl._part_changes('pipeline', case when old is not null then jsonb_build_object(old->>'pipeline', old->'settings') end,
                             jsonb_build_object(new->>'pipeline', new->'settings')) as c
    union all select etl._part_changes('group', old->'groups', new->'groups')
    union all select etl._part_changes('procedure', old->'procedures', new->'procedures')
    union all select etl._part_changes('schedule', old->'schedules', new->'schedules')) q
$$;
comment on function etl._config_changes(jsonb, jsonb) is
  'The changes from one configuration to another: [{"action": "+", "~" or "-", "kind", "name", "fields": {field: [old, new]}}].';
revoke all on function etl._config_changes(jsonb, jsonb) from public;

-- Validates a configuration against the database. Raises PT422 config.invalid with every problem found.
create or replace function etl._check_graph(config jsonb) returns void
language plpgsql stable set search_path = pg_catalog, pg_temp as $$
declare
  v_names  text[];
  v_phases int[];
  v_scopes int[];
  v_from   int[];
  v_to     int[];
begin
  select array_agg(q.name order by q.name), array_agg(q.phase order by q.name), array_agg(q.scope order by q.name)
    into v_names, v_phases, v_scopes
    from (select p->>'name' as name, case p->>'type' when 'fact' then 2 else 0 end as phase,
                 (dense_rank() over (order by case when p->>'transaction_scope' = 'per_group' then 'g' || (p->>'group') else 'p' || (p->>'name') end))::int as scope
            from jsonb_array_elements(config->'procedures') p) q;
  select array_agg(array_position(v_names, d.needs) order by array_position(v_names, d.needs)), array_agg(array_position(v_names, d.name) order by array_position(v_names, d.needs))
    into v_from, v_to
    from (select distinct p->>'name' as name, n.needs from jsonb_array_elements(config->'procedures') p
            cross join lateral jsonb_array_elements_text(p->'dependencies') n(needs)) d;
  perform etl._order_nodes(v_names, v_phases, v_scopes, v_from, v_to);
end $$;
comment on function etl._check_graph(jsonb) is 'Raises PT400 plan.cycle or plan.group_cycle when a configuration cannot be put in order.';
revoke all on function etl._check_graph(jsonb) from public;

create or replace function etl._check_config(config jsonb) returns void
language plpgsql stable set search_path = pg_catalog, pg_temp as $$
declare
  v_problems jsonb := etl._relation_problems(config);
begin
  v_problems := v_problems || (
    select coalesce(jsonb_agg(e.problem), '[]')
      from jsonb_array_elements(config->'procedures') p
      cross join lateral jsonb_array_elements((etl._compile_call(p)).problems || etl._refresh_problems(p) || etl._watermark_problems(p)
        || coalesce((select jsonb_agg(etl._config_problem(jsonb_build_array('procedures', p->>'name', 'checks', c->>'name'), (etl._compile_check(c)).problem,
                       case when (etl._compile_check(c)).problem like 'role etl_owner may not read %'
                         then format('grant usage on schema %s to etl_owner; grant select on %s to etl_owner', split_part(c->>'table', '.', 1), c->>'table')
                         else 'correct the check' end)) from jsonb_array_elements(p->'checks') c where (etl._compile_check(c)).problem is not null), '[]')) e(problem));
  if v_problems <> '[]' then
    perform etl._fail('PT422', 'config.invalid', format('the configuration has %s problem(s); the first: %s', jsonb_array_length(v_problems), v_problems->0->>'message'),
      v_problems->0->>'hint', jsonb_build_object('errors', v_problems));
  end if;
  perform etl._check_graph(config);
end $$;
comment on function etl._check_config(jsonb) is 'Validates a configuration against the database. Raises PT422 config.invalid with every problem, PT400 for a cycle.';
revoke all on function etl._check_config(jsonb) from public;

-- Writing a validated configuration into the catalog tables. The caller holds the configuration lock.

create or replace function etl._store_pipeline(config jsonb) returns int
language plpgsql volatile set search_path = pg_catalog, pg_temp as $$
declare
  v_pipeline_id int;
begin
  insert into etl.pipelines (name, description, max_concurrency, search_path)
  values (config->>'pipeline', config->>'description', (config->>'max_concurrency')::int, etl._text_array(config->'search_path'))
  on conflict (name) do update
    set description = excluded.description, max_concurrency = excluded.max_concurrency, search_path = excluded.search_path
  returning pipeline_id into v_pipeline_id;
  update etl.groups g set is_active = false
   where g.pipeline_id = v_pipeline_id and g.is_active and g.name not in (select x->>'name' from jsonb_array_elements(config->'groups') x);
  insert into etl.groups (pipeline_id, name, description)
  select v_pipeline_id, x->>'name', x->>'description' from jsonb_array_elements(config->'groups') x
  on conflict (pipeline_id, name) do update set description = excluded.description, is_active = true;
  update etl.schedules s set is_active = false
   where s.pipeline_id = v_pipeline_id and s.is_active and s.name not in (select x->>'name' from jsonb_array_elements(config->'schedules') x);
  insert into etl.schedules (pipeline_id, name, definition)
  select v_pipeline_id, x->>'name', jsonb_strip_nulls(x) from jsonb_array_elements(config->'schedules') x
  on conflict (pipeline_id, name) do update set definition = excluded.definition, is_active = true;
  insert into etl.tags (name) select distinct t from jsonb_array_elements(config->'procedures') p, jsonb_array_elements_text(p->'tags') t
  on conflict do nothing;
  insert into etl.refresh_targets (pipeline_id, name)
  select distinct v_pipeline_id, m->>'name' from jsonb_array_elements(config->'procedures') p, jsonb_array_elements(p->'mv_refresh') m
  on conflict do nothing;
  return v_pipeline_id;
end $$;
comment on function etl._store_pipeline(jsonb) is 'Stores a pipeline with its groups, schedules, tags and refresh targets.';
revoke all on function etl._store_pipeline(jsonb) from public;

-- Such values mean a time only in a zone: without one of its own, a step would read other rows in a session of another zone.
create or replace function etl._is_without_time_zone(watermark jsonb) returns boolean
language sql stable set search_path = pg_catalog, pg_temp as $$
  select watermark->>'strategy' = 'timestamp' and not etl._is_query(etl._text_array(watermark->'source')) and exists (
    select from jsonb_array_elements_text(watermark->'source') s
      cross join lateral parse_ident(s) i(parts)
      join pg_catalog.pg_attribute a on a.attrelid = etl._relation(format('%I.%I', i.parts[1], i.parts[2])) and a.attname = i.parts[3]
     where a.atttypid = 'timestamp'::regtype)
$$;
comment on function etl._is_without_time_zone(jsonb) is 'Whether a source of a watermark is a column of type timestamp without time zone.';
revoke all on function etl._is_without_time_zone(jsonb) from public;

create or replace function etl._store_procedure(pipeline_id int, p jsonb) returns void
language plpgsql volatile set search_path = pg_catalog, pg_temp as $$
declare
  v_call      record := etl._compile_call(p);
  v_watermark jsonb := case when jsonb_typeof(p->'watermark') = 'object' then p->'watermark' else '{}' end;
begin
  insert into etl.procedures (pipeline_id, name, type, description, routine, routine_signature, call_sql, rows_column, default_mode,
    allow_full_refresh, allow_fact_dependency, transaction_scope, isolation, args, watermark_strategy, watermark_sources, state_key, delay_ms, on_empty, watermark_time_zone,
    max_attempts, backoff_ms, max_backoff_ms, timeout_ms, lock_timeout_ms, on_failure, max_window, checks, is_active)
  values (_store_procedure.pipeline_id, p->>'name', p->>'type', p->>'description', p->>'routine', v_call.routine_signature, v_call.call_sql,
    v_call.rows_column, p->>'default_mode', (p->>'allow_full_refresh')::boolean, (p->>'allow_fact_dependency')::boolean,
    p->>'transaction_scope', p->>'isolation', p->'args', v_watermark->>'strategy', etl._text_array(v_watermark->'source'), v_watermark->>'state_key',
    coalesce((v_watermark->>'delay_ms')::int, 0), coalesce(v_watermark->>'on_empty', 'run'),
    case when etl._is_without_time_zone(v_watermark) then current_setting('timezone') end, (p#>>'{retries,attempts}')::int, (p#>>'{retries,backoff_ms}')::int,
    (p#>>'{retries,max_backoff_ms}')::int, (p->>'timeout_ms')::int, (p->>'lock_timeout_ms')::int, p->>'on_failure',
    nullif(p->'max_window', 'null'),
    (select coalesce(jsonb_agg(c || jsonb_build_object('sql', (etl._compile_check(c)).sql) order by n), '[]')
       from jsonb_array_elements(p->'checks') with ordinality x(c, n)), true)
  on conflict on constraint a_procedure_name_is_unique_in_its_pipeline do update set
    type = excluded.type, description = excluded.description, routine = excluded.routine, routine_signature = excluded.routine_signature,
    call_sql = excluded.call_sql, rows_column = excluded.rows_column, default_mode = excluded.default_mode,
    allow_full_refresh = excluded.allow_full_refresh, allow_fact_dependency = excluded.allow_fact_dependency,
    transaction_scope = excluded.transaction_scope, isolation = excluded.isolation, args = excluded.args,
    watermark_strategy = excluded.watermark_strategy, watermark_sources = excluded.watermark_sources, state_key = excluded.state_key,
    delay_ms = excluded.delay_ms, on_empty = excluded.on_empty,
    watermark_time_zone = case when excluded.watermark_time_zone is not null then coalesce(procedures.watermark_time_zone, excluded.watermark_time_zone) end, max_attempts = excluded.max_attempts, backoff_ms = excluded.backoff_ms,
    max_backoff_ms = excluded.max_backoff_ms, timeout_ms = excluded.timeout_ms, lock_timeout_ms = excluded.lock_timeout_ms,
    on_failure = excluded.on_failure, max_window = excluded.max_window, checks = excluded.checks, is_active = true;
end $$;
comment on function etl._store_procedure(int, jsonb) is 'Stores one procedure with its compiled call and checks.';
revoke all on function etl._store_procedure(int, jsonb) from public;

-- What links procedures to each other and to the rest is replaced whole.
create or replace function etl._store_links(pipeline_id int, config jsonb) returns void
language plpgsql volatile set search_path = pg_catalog, pg_temp as $$
declare
  v_mine int[] := (select array_agg(p.procedure_id) from etl.procedures p where p.pipeline_id = _store_links.pipeline_id);
begin
  delete from etl.dependencies d where d.procedure_id = any (v_mine);
  delete from etl.parameters d where d.procedure_id = any (v_mine);
  delete from etl.group_members d where d.procedure_id = any (v_mine);
  delete from etl.procedure_tags d where d.procedure_id = any (v_mine);
  delete from etl.procedure_refresh_targets d where d.procedure_id = any (v_mine);
  insert into etl.dependencies (procedure_id, depends_on_id)
  select distinct p.procedure_id, q.procedure_id
    from jsonb_array_elements(config->'procedures') x cross join lateral jsonb_array_elements_text(x->'dependencies') d(name)
    join etl.procedures p on p.pipeline_id = _store_links.pipeline_id and p.name = x->>'name'
    join etl.procedures q on q.pipeline_id = _store_links.pipeline_id and q.name = d.name;
  insert into etl.parameters (procedure_id, name, ordinal, declaration)
  select p.procedure_id, d.param->>'name', d.n, jsonb_strip_nulls(d.param)
    from jsonb_array_elements(config->'procedures') x cross join lateral jsonb_array_elements(x->'params') with ordinality d(param, n)
    join etl.procedures p on p.pipeline_id = _store_links.pipeline_id and p.name = x->>'name';
  insert into etl.group_members (group_id, procedure_id)
  select g.group_id, p.procedure_id
    from jsonb_array_elements(config->'procedures') x
    join etl.procedures p on p.pipeline_id = _store_links.pipeline_id and p.name = x->>'name'
    join etl.groups g on g.pipeline_id = _store_links.pipeline_id and g.name = x->>'group';
  insert into etl.procedure_tags (procedure_id, tag_id)
  select distinct p.procedure_id, t.tag_id
    from jsonb_array_elements(config->'procedures') x cross join lateral jsonb_array_elements_text(x->'tags') d(name)
    join etl.procedures p on p.pipeline_id = _store_links.pipeline_id and p.name = x->>'name'
    join etl.tags t on t.name = d.name;
  insert into etl.procedure_refresh_targets (procedure_id, refresh_target_id, refresh_after, refresh_on, concurrency)
  select p.procedure_id, t.refresh_target_id, m.target->>'after', m.target->>'on', m.target->>'concurrently'
    from jsonb_array_elements(config->'procedures') x cross join lateral jsonb_array_elements(x->'mv_refresh') m(target)
    join etl.procedures p on p.pipeline_id = _store_links.pipeline_id and p.name = x->>'name'
    join etl.refresh_targets t on t.pipeline_id = _store_links.pipeline_id and t.name = m.target->>'name';
end $$;
comment on function etl._store_links(int, jsonb) is 'Stores dependencies, parameters, group members, tags and refresh targets of all procedures of a pipeline.';
revoke all on function etl._store_links(int, jsonb) from public;

-- What a test of a routine's contract is made of: calls, and what the tables written hold after them.
--
-- MVCC is the scratch copy. Every variant (some calls, one after the other) runs in a subtransaction that is undone, so each
-- of them starts from the same rows, and nobody but this transaction ever sees one. What a variant found survives in variables.
--
-- contract, here and in the other files: {call_sql, rows_column, settings, mode, parameters, strategy, sources, since, until,
-- ignored, pieces, max_rows, tables, emptied}. A call is {"mode", "since", "until"}.

create or replace function etl._contract_call_of(contract jsonb, since text, until text) returns jsonb
language sql immutable set search_path = pg_catalog, pg_temp as $$
  select jsonb_build_object('mode', contract->>'mode', 'since', since, 'until', until)
$$;
comment on function etl._contract_call_of(jsonb, text, text) is 'A call of the tested routine for one window.';
revoke all on function etl._contract_call_of(jsonb, text, text) from public;

create or replace function etl._contract_show_window(since text, until text) returns text
language sql immutable set search_path = pg_catalog, pg_temp as $$
  select format('[%s, %s)', coalesce(since, 'the beginning'), until)
$$;
comment on function etl._contract_show_window(text, text) is 'A window as text.';
revoke all on function etl._contract_show_window(text, text) from public;

-- In a run the next call is another transaction: deferred constraints are checked, and deferred again.
create or replace function etl._contract_check_constraints() returns void
language plpgsql volatile set search_path = pg_catalog, pg_temp as $$
declare
  v_deferred text := (select string_agg(distinct format('%I.%I', n.nspname, k.conname), ', ')
                        from pg_catalog.pg_constraint k join pg_catalog.pg_namespace n on n.oid = k.connamespace where k.condeferred);
begin
  set constraints all immediate;
  if v_deferred is not null then execute 'set constraints ' || v_deferred || ' deferred'; end if;
end $$;
comment on function etl._contract_check_constraints() is 'Checks deferred constraints now, as a commit would, and defers them again.';
revoke all on function etl._contract_check_constraints() from public;

-- And its temporary tables are gone.
create or replace function etl._contract_drop_temporary(kept oid[]) returns void
language plpgsql volatile set search_path = pg_catalog, pg_temp as $$
declare
  v_table text;
begin
  for v_table in
    select c.relname from pg_catalog.pg_class c
     where c.relnamespace = pg_my_temp_schema() and c.relkind in ('r', 'p') and not c.relispartition and c.oid <> all (kept)
  loop
    execute format('drop table if exists pg_temp.%I cascade', v_table);
  end loop;
end $$;
comment on function etl._contract_drop_temporary(oid[]) is 'Drops the temporary tables of this session but those to keep.';
revoke all on function etl._contract_drop_temporary(oid[]) from public;

create or replace function etl._contract_call(contract jsonb, call jsonb, out reported numeric, out counted bigint)
language plpgsql volatile set search_path = pg_catalog, pg_temp as $$
declare
  v_temporary oid[] := array(select c.oid from pg_catalog.pg_class c where c.relnamespace = pg_my_temp_schema());
  v_seen      jsonb := etl._change_baseline();
  v_result    record;
begin
  if contract ? 'settings' then perform etl._apply_settings(contract->'settings'); end if;
  if contract ? 'rows_column' then
    execute contract->>'call_sql' into v_result
      using call->>'mode', call->>'since', call->>'until', (contract->>'run_id')::bigint, contract->'parameters';
    reported := (to_jsonb(v_result)->>(contract->>'rows_column'))::numeric;
  else
    execute contract->>'call_sql' using call->>'mode', call->>'since', call->>'until', (contract->>'run_id')::bigint, contract->'parameters';
  end if;
  perform set_config('search_path', 'pg_catalog, pg_temp', true);
  select coalesce(sum((t.value->>'inserted')::bigint + (t.value->>'updated')::bigint + (t.value->>'deleted')::bigint), 0)
    into counted from etl._count_changes(v_seen) c, jsonb_each(c.changes) t;
  perform etl._contract_check_constraints(), etl._contract_drop_temporary(v_temporary);
end $$;
comment on function etl._contract_call(jsonb, jsonb) is
  'Calls the tested routine as a step would, in the caller''s subtransaction; the rows it reported and those it wrote.';
revoke all on function etl._contract_call(jsonb, jsonb) from public;

-- Partitions count as the table they belong to. Values that the table itself draws (identity, sequences) differ from call to call.
create or replace function etl._contract_tables(seen oid[], ignored jsonb) returns jsonb
language sql volatile set search_path = pg_catalog, pg_temp as $$
  select coalesce(jsonb_object_agg(t.name, jsonb_build_object('skipped', k.skipped, 'key', k.key)), '{}')
    from (select distinct c.oid, format('%I.%I', n.nspname, c.relname) as name
            from unnest(etl._written_tables()) w(oid)
            join pg_catalog.pg_class c on c.oid = coalesce(pg_partition_root(w.oid), w.oid)
            join pg_catalog.pg_namespace n on n.oid = c.relnamespace
           where w.oid <> all (seen) and c.relkind in ('r', 'p') and c.relpersistence <> 't' and n.nspname <> 'etl') t
    cross join lateral (
      select coalesce(jsonb_agg(a.attname) filter (where a.attidentity <> '' or pg_get_expr(d.adbin, d.adrelid) like 'nextval(%'
                                                         or ignored ? a.attname or ignored ? (t.name || '.' || quote_ident(a.attname))), '[]') as skipped,
             coalesce(jsonb_agg(a.attname order by array_position(i.indkey::int2[], a.attnum)) filter (where a.attnum = any (i.indkey)), '[]') as key
        from pg_catalog.pg_attribute a
        left join pg_catalog.pg_attrdef d on d.adrelid = a.attrelid and d.adnum = a.attnum
        left join pg_catalog.pg_index i on i.indrelid = a.attrelid and i.indisprimary
       where a.attrelid = t.oid and a.attnum > 0 and not a.attisdropped) k
$$;
comment on function etl._contract_tables(oid[], jsonb) is
  'The tables that this transaction has locked for writing since, by name: the columns not to compare, and the primary key.';
revoke all on function etl._contract_tables(oid[], jsonb) from public;

-- jsonb, because it knows when two values are equal: 1.0 and 1.00, whatever the type of the column.
create or replace function etl._contract_rows(tables jsonb) returns jsonb[]
language plpgsql volatile set search_path = pg_catalog, pg_temp as $$
declare
  v_table record;
  v_rows  jsonb[];
  v_all   jsonb[] := '{}';
begin
  for v_table in select t.key as name, etl._text_array(t.value->'skipped') as skipped, c.relkind
                   from jsonb_each(tables) t join pg_catalog.pg_class c on c.oid = etl._relation(t.key) order by t.key loop
    execute format('select array_agg(jsonb_build_object(''table'', $1, ''row'', to_jsonb(t) - $2)) from %s %s t',
                   case v_table.relkind when 'r' then 'only' end, v_table.name)
      into v_rows using v_table.name, v_table.skipped;
    v_all := v_all || v_rows;
  end loop;
  return v_all;
end $$;
comment on function etl._contract_rows(jsonb) is 'The rows of tables as they are now, without the columns that are not compared.';
revoke all on function etl._contract_rows(jsonb) from public;

-- A cancel request is not caught: it ends the test, and everything is undone.
create or replace function etl._contract_variant(
  contract jsonb, calls jsonb, prepare text default null, checks jsonb default null,
  out "rows" jsonb[], out tables jsonb, out reported numeric, out counted bigint, out failure jsonb)
language plpgsql volatile set search_path = pg_catalog, pg_temp as $$
declare
  v_seen     oid[] := etl._written_tables();
  v_call     jsonb;
  v_is_over  boolean := false;
  v_sqlstate text; v_message text; v_detail text; v_hint text; v_context text;
begin
  begin
    if prepare is not null then execute prepare; end if;
    for v_call in select c from jsonb_array_elements(calls) c loop
      select c.reported, c.counted into reported, counted from etl._contract_call(contract, v_call) c;
    end loop;
    if checks is not null then perform etl._run_checks(contract->>'name', checks); end if;
    tables := etl._contract_tables(v_seen, contract->'ignored');
    "rows" := etl._contract_rows(contract->'tables');
    v_is_over := true;
    raise exception using errcode = 'PT200', message = 'variant over';
  exception when assert_failure or others then
    if v_is_over then return; end if;
    get stacked diagnostics v_sqlstate = returned_sqlstate, v_message = message_text, v_detail = pg_exception_detail,
      v_hint = pg_exception_hint, v_context = pg_exception_context;
  end;
  failure := etl._failure(v_sqlstate, v_message, v_detail, v_hint, v_context, null);
  failure := failure || jsonb_build_object(
    'message', concat_ws('; ', v_message, nullif(v_detail, ''),
      nullif(regexp_replace(v_context, '(^|\n)(SQL statement [^\n]*\n)?PL/pgSQL function etl\._(contract|run_checks).*$', ''), '')),
    'hint', case when failure->>'class' = 'transient' then 'another session works on the same rows: test again when no run is active'
                 else failure->>'hint' end);
end $$;
comment on function etl._contract_variant(jsonb, jsonb, text, jsonb) is
  'Makes calls in a subtransaction and undoes them: what the tables held in the end, which were written, the rows reported and written by the last call, or why it failed.';
revoke all on function etl._contract_variant(jsonb, jsonb, text, jsonb) from public;

-- Rows that one outcome has and the other one has not, as often as they are missing. Mostly both are the same in the same order.
create or replace function etl._contract_difference(contract jsonb, expected jsonb[], actual jsonb[], out "rows" jsonb, out summary text)
language sql immutable set search_path = pg_catalog, pg_temp as $$
  with differing as materialized (
    select q.entry, sum(q.n) as n
      from (select e as entry, -1 as n from unnest(expected) e union all select a, 1 from unnest(actual) a) q
     where expected is distinct from actual
     group by q.entry having sum(q.n) <> 0
  ), shown as (
    select jsonb_build_object('table', d.entry->>'table', 'change', case when d.n < 0 then '-' else '+' end, 'row', d.entry->'row') as line,
           row_number() over (order by d.entry->>'table', k.key, d.n, d.entry, r.i) as position
      from differing d cross join lateral generate_series(1, least(abs(d.n), 20)) r(i)
      cross join lateral (
        select jsonb_agg(d.entry->'row'->c order by o) as key
          from jsonb_array_elements_text(contract->'tables'->(d.entry->>'table')->'key') with ordinality x(c, o)) k
  )
  select (select jsonb_agg(s.line order by s.position) from shown s where s.position <= 20),
         (select string_agg(format('%s %s', t.name, t.changes), ', ' order by t.name)
            from (select d.entry->>'table' as name, concat_ws(' ', '-' || nullif(sum(-d.n) filter (where d.n < 0), 0),
                                                              '+' || nullif(sum(d.n) filter (where d.n > 0), 0)) as changes
                    from differing d group by 1) t)
$$;
comment on function etl._contract_difference(jsonb, jsonb[], jsonb[]) is
  'How two outcomes differ: up to 20 rows with - (expected only) or + (actual only), and the totals by table; null when they do not.';
revoke all on function etl._contract_difference(jsonb, jsonb[], jsonb[]) from public;

create or replace function etl._contract_finding(
  check_name text, status text, detail text, remedy text default null, difference jsonb default null) returns jsonb
language sql immutable set search_path = pg_catalog, pg_temp as $$
  select jsonb_build_object('check_name', check_name, 'status', status, 'detail', detail, 'remedy', remedy, 'difference', difference)
$$;
comment on function etl._contract_finding(text, text, text, text, jsonb) is 'One row of what etl.test_procedure returns.';
revoke all on function etl._contract_finding(text, text, text, text, jsonb) from public;

-- claim: what was to be proven; legend: what - and + stand for.
create or replace function etl._contract_compare(
  contract jsonb, check_name text, expected jsonb[], actual jsonb[], failure jsonb, claim text, legend text, remedy text) returns jsonb
language plpgsql immutable set search_path = pg_catalog, pg_temp as $$
declare
  v_difference record;
begin
  if failure is not null then
    return etl._contract_finding(check_name, 'fail', format('%s: %s', legend, failure->>'message'), failure->>'hint');
  end if;
  v_difference := etl._contract_difference(contract, expected, actual);
  if v_difference.rows is null then return etl._contract_finding(check_name, 'ok', claim); end if;
  return etl._contract_finding(check_name, 'fail', format('%s: rows %s', legend, v_difference.summary), remedy, v_difference.rows);
end $$;
comment on function etl._contract_compare(jsonb, text, jsonb[], jsonb[], jsonb, text, text, text) is
  'The finding of a check that two outcomes are the same.';
revoke all on function etl._contract_compare(jsonb, text, jsonb[], jsonb[], jsonb, text, text, text) from public;

-- Windows to test a routine's contract on: which rows of its sources they hold, where to cut them, where their ends meet a row.
--
-- A value is what a watermark column holds, as text; a bound is what a routine is passed as p_since or p_until. For transactions
-- the bound at a value is a snapshot in which that transaction is still open: a routine that compares ids alone takes it for ended.

-- The sources of a procedure that are columns; a query has none that could be looked into.
create or replace function etl._contract_sources(sources text[]) returns jsonb
language sql stable set search_path = pg_catalog, pg_temp as $$
  select coalesce(jsonb_agg(jsonb_build_object('name', s.source, 'relation', format('%I.%I', s.parts[1], s.parts[2]), 'column', format('%I', s.parts[3]),
           'value', case when a.atttypid = 'timestamp'::regtype then format('%I::timestamptz', s.parts[3]) else format('%I', s.parts[3]) end,
           'is_nullable', not a.attnotnull) order by s.n), '[]')
    from (select u.source, u.n, parse_ident(u.source) as parts from unnest(sources) with ordinality u(source, n)
           where sources[1] !~* '^\s*(select|with)\M') s
    join pg_catalog.pg_attribute a on a.attrelid = etl._relation(format('%I.%I', s.parts[1], s.parts[2])) and a.attname = s.parts[3]
$$;
comment on function etl._contract_sources(text[]) is 'The watermark columns of a procedure: name, relation, column, the value it stands for, is_nullable.';
revoke all on function etl._contract_sources(text[]) from public;

create or replace function etl._contract_bound(strategy text, value text, shift int default 0) returns text
language sql stable strict set search_path = pg_catalog, pg_temp as $$
  select case strategy
    when 'timestamp' then to_jsonb(value::timestamptz + shift * interval '1 microsecond') #>> '{}'
    when 'id' then (value::bigint + shift)::text
    when 'xid' then format('%s:%s:%s', value::bigint + shift, value::bigint + shift + 1, value::bigint + shift)
  end
$$;
comment on function etl._contract_bound(text, text, int) is 'The bound at a value, or so many of the smallest steps after it.';
revoke all on function etl._contract_bound(text, text, int) from public;

-- Bounds as a user gives them, in the form the engine passes.
create or replace function etl._contract_given_bound(strategy text, name text, bound text) returns text
language plpgsql stable strict set search_path = pg_catalog, pg_temp as $$
begin
  return case strategy when 'timestamp' then to_jsonb(bound::timestamptz) #>> '{}' when 'id' then bound::bigint::text
                       else bound::pg_snapshot::text end;
exception when data_exception then
  perform etl._fail('PT422', 'test.window', format('%s is not a bound of the %s strategy: %s', name, strategy, bound),
    case strategy when 'timestamp' then 'write a time as ''2026-11-21 02:00+00''' when 'id' then 'write a whole number'
                  else 'write a pg_snapshot, such as select pg_current_snapshot() returns' end);
end $$;
comment on function etl._contract_given_bound(text, text, text) is 'A bound given by a user, checked and in normal form. Raises PT422 test.window.';
revoke all on function etl._contract_given_bound(text, text, text) from public;

-- %1$s in the template is a watermark column, %2$s its table.
create or replace function etl._contract_union(sources jsonb, template text) returns text
language sql immutable set search_path = pg_catalog, pg_temp as $$
  select string_agg(format(template, s->>'value', s->>'relation'), ' union all ') from jsonb_array_elements(sources) s
$$;
comment on function etl._contract_union(jsonb, text) is 'A query over all sources of a procedure.';
revoke all on function etl._contract_union(jsonb, text) from public;

-- $1 and $2 are the bounds. A row without a value is in no window.
create or replace function etl._contract_rows_inside(contract jsonb) returns text
language sql stable set search_path = pg_catalog, pg_temp as $$
  select etl._contract_union(contract->'sources', 'select %1$s as v from %2$s where ' || case contract->>'strategy'
    when 'timestamp' then '($1 is null or %1$s >= $1::timestamptz) and %1$s < $2::timestamptz'
    when 'id' then '($1 is null or %1$s >= $1::bigint) and %1$s < $2::bigint'
    else 'etl.arrived(%1$s, $1::pg_snapshot, $2::pg_snapshot)' end)
$$;
comment on function etl._contract_rows_inside(jsonb) is 'The query for the values of the source rows that lie between two bounds.';
revoke all on function etl._contract_rows_inside(jsonb) from public;

create or replace function etl._contract_count_inside(contract jsonb, since text, until text) returns bigint
language plpgsql volatile set search_path = pg_catalog, pg_temp as $$
declare
  v_count bigint;
begin
  if contract->'sources' = '[]' then return null; end if;
  execute format('select count(*) from (%s) q', etl._contract_rows_inside(contract)) into v_count using since, until;
  return v_count;
end $$;
comment on function etl._contract_count_inside(jsonb, text, text) is 'How many source rows lie between two bounds; null when the source is a query.';
revoke all on function etl._contract_count_inside(jsonb, text, text) from public;

-- The newest value of the sources, up to now; with an offset, the newest but so many in one of them.
create or replace function etl._contract_newest(contract jsonb, preceding int default 0) returns text
language plpgsql volatile set search_path = pg_catalog, pg_temp as $$
declare
  v_value text;
begin
  execute format('select to_jsonb(q.v) #>> ''{}'' from (%s) q order by q.v desc limit 1', etl._contract_union(contract->'sources',
      '(select %1$s as v from %2$s where %1$s is not null'
      || case when contract->>'strategy' = 'timestamp' then ' and %1$s <= clock_timestamp() and %1$s > ''-infinity''' else '' end
      || ' order by %1$s desc limit 1 offset ' || preceding || ')'))
    into v_value;
  return v_value;
end $$;
comment on function etl._contract_newest(jsonb, int) is 'The newest value in the sources of a procedure, or the newest but so many; null when there are fewer.';
revoke all on function etl._contract_newest(jsonb, int) from public;

-- What is not given: until just behind the newest row, since before the newest 10,000 rows of a source.
create or replace function etl._contract_window(contract jsonb, inout since text, inout until text, in sources text[])
language plpgsql volatile set search_path = pg_catalog, pg_temp as $$
declare
  v_strategy text := contract->>'strategy';
  v_newest   text;
begin
  since := etl._contract_given_bound(v_strategy, 'since', since);
  until := etl._contract_given_bound(v_strategy, 'until', until);
  if contract->'sources' = '[]' then
    if until is null then execute format('select to_jsonb(q.v) #>> ''{}'' from (%s) q(v)', sources[1]) into v_newest; end if;
  elsif until is null or since is null then
    v_newest := etl._contract_newest(contract);
    if since is null and until is null then since := etl._contract_bound(v_strategy, etl._contract_newest(contract, 9999)); end if;
  end if;
  until := coalesce(until, etl._contract_bound(v_strategy, v_newest, 1),
                    case v_strategy when 'timestamp' then to_jsonb(now()) #>> '{}' when 'id' then '0' else pg_current_snapshot()::text end);
  if not (case v_strategy when 'timestamp' then since::timestamptz < until::timestamptz when 'id' then since::bigint < until::bigint
                          else pg_snapshot_xmax(since::pg_snapshot) <= pg_snapshot_xmax(until::pg_snapshot) end) then
    perform etl._fail('PT422', 'test.window', format('the window [%s, %s) is empty', since, until), 'since lies before until');
  end if;
end $$;
comment on function etl._contract_window(jsonb, text, text, text[]) is
  'The window to test: as given, else the newest rows of the sources. Raises PT422 test.window.';
revoke all on function etl._contract_window(jsonb, text, text, text[]) from public;

-- Bounds that cut the window at rows there are, so that each of those rows is the first of one piece and just behind another one.
create or replace function etl._contract_cuts(contract jsonb) returns text[]
language plpgsql volatile set search_path = pg_catalog, pg_temp as $$
declare
  v_values text[];
begin
  if contract->'sources' = '[]' then return '{}'; end if;
  execute format($q$
    select array_agg(to_jsonb(d.v) #>> '{}' order by d.v)
      from (select q.v, row_number() over (order by q.v) as position, count(*) over () as n from (select distinct v from (%s) s) q) d
     where d.position in (select d.n * i / $3 + 1 from generate_series(1, $3 - 1) i) $q$, etl._contract_rows_inside(contract))
    into v_values using contract->>'since', contract->>'until', (contract->>'pieces')::int;
  return array(select b.bound from unnest(v_values) with ordinality u(value, n), lateral etl._contract_bound(contract->>'strategy', u.value) b(bound)
                where b.bound is distinct from contract->>'since' order by u.n);
end $$;
comment on function etl._contract_cuts(jsonb) is 'The bounds at which the window of a test is cut into pieces, each at a row.';
revoke all on function etl._contract_cuts(jsonb) from public;

-- The oldest values of a source with nothing right before them in any source: what a routine does there, it does because of that row.
create or replace function etl._contract_boundary_values(contract jsonb, source jsonb) returns text[]
language plpgsql volatile set search_path = pg_catalog, pg_temp as $$
declare
  v_values   text[];
  v_found    text[] := '{}';
  v_strategy text := contract->>'strategy';
begin
  execute format('select array_agg(to_jsonb(q.v) #>> ''{}'' order by q.v) from (select distinct %1$s as v from %2$s where %1$s is not null %3$s order by 1 limit 50) q',
                 source->>'value', source->>'relation', case when v_strategy = 'timestamp' then format('and isfinite(%s)', source->>'value') end)
    into v_values;
  for i in 1 .. coalesce(cardinality(v_values), 0) loop
    exit when cardinality(v_found) = 5;
    if etl._contract_count_inside(contract, etl._contract_bound(v_strategy, v_values[i], -1), etl._contract_bound(v_strategy, v_values[i])) = 0 then
      v_found := v_found || v_values[i];
    end if;
  end loop;
  return v_found;
end $$;
comment on function etl._contract_boundary_values(jsonb, jsonb) is 'Up to five values of a source around which to test the ends of windows.';
revoke all on function etl._contract_boundary_values(jsonb, jsonb) from public;

-- The scratch copy of a test: the tables a routine writes, emptied where that is possible. Over rows that are loaded already most
-- mistakes leave no trace: a row that is left out is there all the same.

create or replace function etl._contract_has_more(name text, max_rows int) returns boolean
language plpgsql volatile set search_path = pg_catalog, pg_temp as $$
declare
  v_has_more boolean;
begin
  execute format('select count(*) > $1 from (select from %s limit $1::bigint + 1) q', name) into v_has_more using max_rows;
  return v_has_more;
end $$;
comment on function etl._contract_has_more(text, int) is 'Whether a table has more than so many rows.';
revoke all on function etl._contract_has_more(text, int) from public;

-- The deletes hold row locks of production, and every comparison reads the tables whole: a limit keeps both short.
create or replace function etl._contract_check_tables(contract jsonb) returns void
language plpgsql volatile set search_path = pg_catalog, pg_temp as $$
declare
  v_max    int := (contract->>'max_rows')::int;
  v_hidden text := (select string_agg(t.name, ', ' order by t.name) from jsonb_object_keys(contract->'tables') t(name)
                     where etl._relation(t.name) is not null and not has_table_privilege('etl_owner', etl._relation(t.name), 'select'));
  v_large  text;
begin
  if v_hidden is not null then
    perform etl._fail('PT403', 'test.not_readable', format('role etl_owner writes %s but may not read what it wrote', v_hidden),
      format('grant select on %s to etl_owner', v_hidden));
  end if;
  v_large := (select string_agg(t.name, ', ' order by t.name) from jsonb_object_keys(contract->'tables') t(name)
               where etl._relation(t.name) is not null and etl._contract_has_more(t.name, v_max));
  if v_large is null and (contract->>'row_count')::bigint > v_max then v_large := 'the window ' || etl._contract_show_window(contract->>'since', contract->>'until'); end if;
  if v_large is not null then
    perform etl._fail('PT422', 'test.too_large', format('%s holds more than %s rows, too many to compare', v_large, v_max),
      'test in a smaller copy of the database, name a smaller window, or allow more (max_rows, --max-rows)', jsonb_build_object('max_rows', v_max));
  end if;
end $$;
comment on function etl._contract_check_tables(jsonb) is
  'Raises PT403 test.not_readable, and PT422 test.too_large when a tested table or window holds too many rows.';
revoke all on function etl._contract_check_tables(jsonb) from public;

-- A table can be emptied together with the tables that refer to it. Sources never are.
create or replace function etl._contract_emptiable(contract jsonb) returns jsonb
language sql volatile set search_path = pg_catalog, pg_temp as $$
  with recursive needed(root, relid) as (
    select t.name, etl._relation(t.name) from jsonb_object_keys(contract->'tables') t(name) where etl._relation(t.name) is not null
    union
    select n.root, k.conrelid from needed n join pg_catalog.pg_constraint k on k.contype = 'f' and k.confrelid = n.relid and k.conparentid = 0
  )
  select coalesce(jsonb_object_agg(q.root, q.names), '{}')
    from (select n.root, jsonb_agg(format('%I.%I', s.nspname, c.relname)) as names
            from needed n join pg_catalog.pg_class c on c.oid = n.relid join pg_catalog.pg_namespace s on s.oid = c.relnamespace
           group by n.root
          having bool_and(has_schema_privilege('etl_owner', s.oid, 'usage') and has_table_privilege('etl_owner', c.oid, 'select')
                          and has_table_privilege('etl_owner', c.oid, 'delete')
                          and not contract->'sources' @> jsonb_build_array(jsonb_build_object('relation', format('%I.%I', s.nspname, c.relname))))) q
   where not exists (select from jsonb_array_elements_text(q.names) x(name) where etl._contract_has_more(x.name, (contract->>'max_rows')::int))
$$;
comment on function etl._contract_emptiable(jsonb) is 'The tables that a test may empty, each with all that must be emptied with it.';
revoke all on function etl._contract_emptiable(jsonb) from public;

-- In whichever order foreign keys allow.
create or replace function etl._contract_empty(names text[]) returns void
language plpgsql volatile set search_path = pg_catalog, pg_temp as $$
declare
  v_name text;
  v_left text[];
begin
  foreach v_name in array names loop
    begin
      execute format('delete from %s', v_name);
    exception when foreign_key_violation then
      v_left := v_left || v_name;
      if v_left = names then raise; end if;
    end;
  end loop;
  if v_left is not null then perform etl._contract_empty(v_left); end if;
  perform etl._contract_check_constraints();
end $$;
comment on function etl._contract_empty(text[]) is 'Deletes the rows of tables, referring ones first.';
revoke all on function etl._contract_empty(text[]) from public;

-- A table that stays empty is one whose rows the routine only changes: it must keep them. When the routine fails on empty tables,
-- it is tested on the tables as they are.
create or replace function etl._contract_emptied(contract jsonb) returns jsonb
language plpgsql volatile set search_path = pg_catalog, pg_temp as $$
declare
  v_tables jsonb := etl._contract_emptiable(contract);
  v_names  jsonb;
  v_once   record;
  v_idle   text[];
begin
  while v_tables <> '{}' loop
    v_names := (select jsonb_agg(distinct n) from jsonb_each(v_tables) t, jsonb_array_elements_text(t.value) n);
    v_once := etl._contract_variant(contract, jsonb_build_array(etl._contract_call_of(contract, contract->>'since', contract->>'until')),
                                    format('select etl._contract_empty(etl._text_array(%L))', v_names));
    if v_once.failure is not null then return '[]'; end if;
    v_idle := array(select k from jsonb_object_keys(v_tables) k where k not in (select r->>'table' from unnest(v_once.rows) r));
    if v_idle = '{}' then return v_names; end if;
    v_tables := v_tables - v_idle;
  end loop;
  return '[]';
end $$;
comment on function etl._contract_emptied(jsonb) is 'The tables that a test empties before it compares.';
revoke all on function etl._contract_emptied(jsonb) from public;

-- The checks of etl.test_procedure, one function each: it makes variants and says what their comparison proves.

-- Columns whose values differ although nothing was different.
create or replace function etl._contract_volatile(first jsonb[], second jsonb[]) returns jsonb
language sql immutable set search_path = pg_catalog, pg_temp as $$
  with differing as (
    select q.entry, sum(q.n) as n
      from (select e as entry, -1 as n from unnest(first) e union all select a, 1 from unnest(second) a) q
     where first is distinct from second
     group by q.entry having sum(q.n) <> 0
  ), columns as (
    select d.entry->>'table' as name, v.key
      from differing d cross join lateral jsonb_each(d.entry->'row') v
     group by d.entry->>'table', v.key, v.value having sum(d.n) <> 0
  )
  select jsonb_object_agg(c.name, c.keys) from (select name, jsonb_agg(distinct key) as keys from columns group by name) c
$$;
comment on function etl._contract_volatile(jsonb[], jsonb[]) is 'By table, the columns in which two outcomes have different values; null for none.';
revoke all on function etl._contract_volatile(jsonb[], jsonb[]) from public;

create or replace function etl._contract_without(entries jsonb[], columns jsonb) returns jsonb[]
language sql immutable set search_path = pg_catalog, pg_temp as $$
  select coalesce(array_agg(case when columns ? (e->>'table')
    then jsonb_set(e, '{row}', (e->'row') - etl._text_array(columns->(e->>'table'))) else e end), '{}') from unnest(entries) e
$$;
comment on function etl._contract_without(jsonb[], jsonb) is 'An outcome without some columns, given by table.';
revoke all on function etl._contract_without(jsonb[], jsonb) from public;

-- Columns that are not deterministic are left out of all later comparisons: contract comes back with them, expected without.
create or replace function etl._contract_deterministic(inout contract jsonb, out expected jsonb[], out finding jsonb)
language plpgsql volatile set search_path = pg_catalog, pg_temp as $$
declare
  v_calls    jsonb := jsonb_build_array(etl._contract_call_of(contract, contract->>'since', contract->>'until'));
  v_first    record;
  v_second   record;
  v_volatile jsonb;
  v_table    record;
begin
  v_first := etl._contract_variant(contract, v_calls);
  v_second := etl._contract_variant(contract, v_calls);
  finding := etl._contract_compare(contract, 'deterministic', v_first.rows, v_second.rows, coalesce(v_first.failure, v_second.failure),
    'the same rows give the same result', 'run from the same rows once (-) and once more (+)',
    'order rows fully where only some of them are taken (distinct on, limit, row_number), and compute values from the source');
  expected := v_first.rows;
  v_volatile := etl._contract_volatile(v_first.rows, v_second.rows);
  if v_volatile is null then return; end if;
  for v_table in select t.key as name, t.value as columns from jsonb_each(v_volatile) t loop
    contract := jsonb_set(contract, array['tables', v_table.name, 'skipped'], (contract->'tables'->v_table.name->'skipped') || v_table.columns);
  end loop;
  expected := etl._contract_without(v_first.rows, v_volatile);
  if (etl._contract_difference(contract, expected, etl._contract_without(v_second.rows, v_volatile))).rows is null then
    finding := finding || (
      select jsonb_build_object('status', 'warn', 'difference', null,
               'detail', format('not deterministic, and not compared: %s', string_agg(t.key || '.' || c, ', ' order by t.key, c)),
               'remedy', format('compute it from the source (now() is the same for a whole run), or say that it may differ (ignore_columns, --ignore): %s',
                                string_agg(distinct c, ', ')))
        from jsonb_each(v_volatile) t, jsonb_array_elements_text(t.value) c);
  end if;
end $$;
comment on function etl._contract_deterministic(jsonb) is
  'Runs the window twice from the same rows: the outcome to expect, and the contract without the columns that differ by themselves.';
revoke all on function etl._contract_deterministic(jsonb) from public;

create or replace function etl._contract_idempotent(contract jsonb, expected jsonb[]) returns jsonb
language plpgsql volatile set search_path = pg_catalog, pg_temp as $$
declare
  v_call  jsonb := etl._contract_call_of(contract, contract->>'since', contract->>'until');
  v_twice record := etl._contract_variant(contract, jsonb_build_array(v_call, v_call));
begin
  return etl._contract_compare(contract, 'idempotent', expected, v_twice.rows, v_twice.failure, 'run twice is run once', 'run once (-) and twice (+)',
    'write so that it can be repeated: insert ... on conflict (key) do update, merge, or delete what the window will write before inserting it');
end $$;
comment on function etl._contract_idempotent(jsonb, jsonb[]) is 'Whether the window run twice gives what it gives once.';
revoke all on function etl._contract_idempotent(jsonb, jsonb[]) from public;

-- What the routine should say about one end of its window, or about both.
create or replace function etl._contract_condition(contract jsonb, bound text, "column" text) returns text
language sql immutable set search_path = pg_catalog, pg_temp as $$
  select case when contract->>'strategy' = 'xid' then format('etl.arrived(%s, p_since, p_until)', c.name)
              else concat_ws(' and ', case when bound is distinct from 'until' then format('(p_since is null or %s >= p_since)', c.name) end,
                                      case when bound is distinct from 'since' then format('%s < p_until', c.name) end) end
    from (select coalesce("column", 'the column') as name) c
$$;
comment on function etl._contract_condition(jsonb, text, text) is 'The condition by which a routine reads its window; bound since or until: that end of it.';
revoke all on function etl._contract_condition(jsonb, text, text) from public;

create or replace function etl._contract_pieces(contract jsonb) returns jsonb
language sql volatile set search_path = pg_catalog, pg_temp as $$
  with bounds as (
    select b.bound, b.n from unnest(array[contract->>'since'] || etl._text_array(contract->'cuts') || array[contract->>'until']) with ordinality b(bound, n)
  )
  select jsonb_agg(etl._contract_call_of(contract, f.bound, t.bound) order by f.n) from bounds f join bounds t on t.n = f.n + 1
$$;
comment on function etl._contract_pieces(jsonb) is 'The calls that read the window piece by piece.';
revoke all on function etl._contract_pieces(jsonb) from public;

create or replace function etl._contract_splits(contract jsonb, expected jsonb[]) returns jsonb
language plpgsql volatile set search_path = pg_catalog, pg_temp as $$
declare
  v_cuts   text := array_to_string((etl._text_array(contract->'cuts'))[1:4], ', ') || case when jsonb_array_length(contract->'cuts') > 4 then ', ...' else '' end;
  v_pieces record;
begin
  if contract->'cuts' = '[]' then
    return etl._contract_finding('splits', 'skipped', case when contract->'sources' = '[]' then 'the source is a query: there are no rows to cut the window at'
                                                           else 'the window holds too few different values to be cut' end);
  end if;
  v_pieces := etl._contract_variant(contract, etl._contract_pieces(contract));
  return etl._contract_compare(contract, 'splits', expected, v_pieces.rows, v_pieces.failure,
    format('one window is the same window in %s pieces, cut at %s', jsonb_array_length(contract->'cuts') + 1, v_cuts),
    format('in one piece (-) and in pieces cut at %s (+)', v_cuts),
    format('read %s, and compute each key that the window touches from all its rows, not from those of the window alone',
           etl._contract_condition(contract, null, contract#>>'{sources,0,column}')));
end $$;
comment on function etl._contract_splits(jsonb, jsonb[]) is 'Whether the window in pieces gives what it gives in one.';
revoke all on function etl._contract_splits(jsonb, jsonb[]) from public;

-- Around one value of a source, with no row right before it. base: what the tables hold when nothing is read.
create or replace function etl._contract_boundary_at(contract jsonb, source jsonb, value text, base jsonb[]) returns jsonb
language plpgsql volatile set search_path = pg_catalog, pg_temp as $$
declare
  v_before    text := etl._contract_bound(contract->>'strategy', value, -1);
  v_at        text := etl._contract_bound(contract->>'strategy', value);
  v_after     text := etl._contract_bound(contract->>'strategy', value, 1);
  v_around    record := etl._contract_variant(contract, jsonb_build_array(etl._contract_call_of(contract, v_before, v_after)));
  v_from      record := etl._contract_variant(contract, jsonb_build_array(etl._contract_call_of(contract, v_at, v_after)));
  v_other     record;
  v_since     text;
  v_finding   jsonb;
  v_is_oldest boolean := etl._contract_count_inside(contract, null, v_at) = 0;
begin
  v_finding := etl._contract_compare(contract, 'boundary', v_around.rows, v_from.rows, coalesce(v_around.failure, v_from.failure), null,
    format('a row of %s at p_since: read by %s (-) and by %s (+)', source->>'name',
           etl._contract_show_window(v_before, v_after), etl._contract_show_window(v_at, v_after)),
    format('read %s', etl._contract_condition(contract, 'since', source->>'column')));
  if v_finding->>'status' = 'fail' then return v_finding; end if;
  if (etl._contract_difference(contract, base, v_from.rows)).rows is null then return null; end if;
  foreach v_since in array array[v_before] || case when v_is_oldest then array[null::text] end loop
    v_other := etl._contract_variant(contract, jsonb_build_array(etl._contract_call_of(contract, v_since, v_at)));
    v_finding := etl._contract_compare(contract, 'boundary', base, v_other.rows, v_other.failure, null,
      format('a row of %s at p_until: before (-) and after (+) the window %s, which holds no row', source->>'name', etl._contract_show_window(v_since, v_at)),
      format('read %s', etl._contract_condition(contract, 'until', source->>'column')));
    if v_finding->>'status' = 'fail' then return v_finding; end if;
  end loop;
  if v_is_oldest then
    v_other := etl._contract_variant(contract, jsonb_build_array(etl._contract_call_of(contract, null, v_after)));
    v_finding := etl._contract_compare(contract, 'boundary', v_around.rows, v_other.rows, v_other.failure, null,
      format('the oldest row of %s: read by %s (-) and by a first window, where p_since is null (+)', source->>'name', etl._contract_show_window(v_before, v_after)),
      format('read %s', etl._contract_condition(contract, 'since', source->>'column')));
    if v_finding->>'status' = 'fail' then return v_finding; end if;
  end if;
  v_other := etl._contract_variant(contract, jsonb_build_array(etl._contract_call_of(contract, v_before, v_at), etl._contract_call_of(contract, v_at, v_after)));
  return etl._contract_compare(contract, 'boundary', v_around.rows, v_other.rows, v_other.failure,
    format('a row of %s at p_since is read, one at p_until is left to the next window', source->>'name'),
    format('a row of %s in one window (-) and between two (+)', source->>'name'),
    format('read %s', etl._contract_condition(contract, null, source->>'column')));
end $$;
comment on function etl._contract_boundary_at(jsonb, jsonb, text, jsonb[]) is
  'Whether windows that begin and end at a row read it exactly once; null when the routine does nothing with that row.';
revoke all on function etl._contract_boundary_at(jsonb, jsonb, text, jsonb[]) from public;

create or replace function etl._contract_boundary(contract jsonb, source jsonb) returns jsonb
language plpgsql volatile set search_path = pg_catalog, pg_temp as $$
declare
  v_base    jsonb[] := etl._contract_rows(contract->'tables');
  v_values  text[] := etl._contract_boundary_values(contract, source);
  v_finding jsonb;
begin
  for i in 1 .. cardinality(v_values) loop
    v_finding := etl._contract_boundary_at(contract, source, v_values[i], v_base);
    if v_finding is not null then return v_finding; end if;
  end loop;
  return etl._contract_finding('boundary', 'skipped', case
    when v_values = '{}' then format('%s has no value with nothing right before it', source->>'name')
    when contract->'emptied' = '[]' then format('what the oldest rows of %s lead to is in the tables already, and these cannot be emptied', source->>'name')
    else format('the oldest rows of %s leave no trace in what the routine writes', source->>'name') end);
end $$;
comment on function etl._contract_boundary(jsonb, jsonb) is 'Whether a row of a source at the end of two windows is read exactly once.';
revoke all on function etl._contract_boundary(jsonb, jsonb) from public;

-- The rest of the checks of etl.test_procedure, and all of them in order.

-- A statement that gives the source one row without a value: a copy of its newest one, or that one itself.
create or replace function etl._contract_null_row(source jsonb, is_copy boolean) returns text
language sql stable set search_path = pg_catalog, pg_temp as $$
  select case when is_copy
    then format('insert into %1$s (%2$s) select %3$s from %1$s order by %4$s desc nulls last limit 1', source->>'relation',
                string_agg(quote_ident(a.attname), ', ' order by a.attnum),
                string_agg(case when quote_ident(a.attname) = source->>'column' then 'null' else quote_ident(a.attname) end, ', ' order by a.attnum), source->>'column')
    else format('update %1$s set %2$s = null where ctid = (select ctid from %1$s order by %2$s desc nulls last limit 1)', source->>'relation', source->>'column') end
    from pg_catalog.pg_attribute a left join pg_catalog.pg_attrdef d on d.adrelid = a.attrelid and d.adnum = a.attnum
   where a.attrelid = etl._relation(source->>'relation') and a.attnum > 0 and not a.attisdropped and a.attgenerated = '' and a.attidentity = ''
     and (quote_ident(a.attname) = source->>'column' or pg_get_expr(d.adbin, d.adrelid) is null or pg_get_expr(d.adbin, d.adrelid) not like 'nextval(%')
$$;
comment on function etl._contract_null_row(jsonb, boolean) is 'The statement that gives a source a row whose watermark column is null.';
revoke all on function etl._contract_null_row(jsonb, boolean) from public;

-- is_split: whether the window gives the same in pieces; if not, one row more proves nothing about pieces.
create or replace function etl._contract_nulls(contract jsonb, source jsonb, expected jsonb[], is_split boolean) returns jsonb
language plpgsql volatile set search_path = pg_catalog, pg_temp as $$
declare
  v_count   bigint;
  v_remedy  text := format('alter table %s alter column %s set not null', source->>'relation', source->>'column');
  v_prepare text := etl._contract_null_row(source, true);
  v_trial   record;
  v_one     record;
  v_pieces  record;
begin
  if not (source->>'is_nullable')::boolean then return etl._contract_finding('nulls', 'ok', format('%s is not null', source->>'name')); end if;
  execute format('select count(*) from %s where %s is null', source->>'relation', source->>'column') into v_count;
  if v_count > 0 then
    return etl._contract_finding('nulls', 'warn', format('%s row(s) of %s have no %s: no window holds them', v_count, source->>'relation', source->>'column'),
      'fill them, then: ' || v_remedy);
  end if;
  v_trial := etl._contract_variant(contract, '[]', v_prepare);
  if v_trial.failure is not null then
    v_prepare := etl._contract_null_row(source, false);
    if (etl._contract_variant(contract, '[]', v_prepare)).failure is not null then
      return etl._contract_finding('nulls', 'skipped', format('%s has no null now, and none can be put there: %s', source->>'name', v_trial.failure->>'message'),
        'rule it out: ' || v_remedy);
    end if;
  end if;
  v_one := etl._contract_variant(contract, jsonb_build_array(etl._contract_call_of(contract, contract->>'since', contract->>'until')), v_prepare);
  v_pieces := etl._contract_variant(contract, etl._contract_pieces(contract), v_prepare);
  return etl._contract_compare(contract, 'nulls', v_one.rows, case when is_split then v_pieces.rows else v_one.rows end, coalesce(v_one.failure, v_pieces.failure),
    format('%s has no null now; one would %s', source->>'name',
           case when v_trial.failure is not null then 'do no harm'
                when (etl._contract_difference(contract, expected, v_one.rows)).rows is null then 'be read by no window' else 'be read' end),
    format('a row with null in %s, in one piece (-) and in pieces (+)', source->>'name'), format('rule it out: %s; or leave such rows out', v_remedy));
end $$;
comment on function etl._contract_nulls(jsonb, jsonb, jsonb[], boolean) is 'What becomes of rows that have no value in a watermark column.';
revoke all on function etl._contract_nulls(jsonb, jsonb, jsonb[], boolean) from public;

create or replace function etl._contract_rows_reported(contract jsonb, reported numeric, counted bigint) returns jsonb
language sql immutable set search_path = pg_catalog, pg_temp as $$
  select case
    when not contract ? 'rows_column' then etl._contract_finding('rows_reported', 'ok', format('it reports no number: b2s counts what it writes, %s here', counted))
    when reported is null then etl._contract_finding('rows_reported', 'warn', format('it returned null; it wrote %s', counted),
      'get diagnostics n = row_count after the last statement that writes, and return n')
    when reported < 0 then etl._contract_finding('rows_reported', 'warn', format('it returned %s; it wrote %s', reported, counted), 'return the number of rows written, 0 for none')
    else etl._contract_finding('rows_reported', 'ok', format('it returned %s; it wrote %s', reported, counted)) end
$$;
comment on function etl._contract_rows_reported(jsonb, numeric, bigint) is 'Whether the number of rows that the routine returns can be one.';
revoke all on function etl._contract_rows_reported(jsonb, numeric, bigint) from public;

-- After the window, one that ends where it begins, at a row if there is one.
create or replace function etl._contract_empty_window(contract jsonb, expected jsonb[]) returns jsonb
language plpgsql volatile set search_path = pg_catalog, pg_temp as $$
declare
  v_at    text := coalesce(contract->'cuts'->>0, contract->>'until');
  v_after record := etl._contract_variant(contract, jsonb_build_array(
    etl._contract_call_of(contract, contract->>'since', contract->>'until'), etl._contract_call_of(contract, v_at, v_at)));
begin
  return etl._contract_compare(contract, 'empty_window', expected, v_after.rows, v_after.failure, 'a window that holds nothing changes nothing',
    format('before (-) and after (+) the empty window [%s, %s)', v_at, v_at), format('read %s', etl._contract_condition(contract, null, contract#>>'{sources,0,column}')));
end $$;
comment on function etl._contract_empty_window(jsonb, jsonb[]) is 'Whether a window that ends where it begins changes nothing.';
revoke all on function etl._contract_empty_window(jsonb, jsonb[]) from public;

-- On the tables as they are: what it leaves of the old rows it must leave twice. It may write others than a window does.
create or replace function etl._contract_full(contract jsonb) returns jsonb
language plpgsql volatile set search_path = pg_catalog, pg_temp as $$
declare
  v_call  jsonb := etl._contract_call_of(contract || '{"mode": "full"}', null, contract->>'until');
  v_large text := (select string_agg(s->>'relation', ', ') from jsonb_array_elements(contract->'sources') s
                    where etl._contract_has_more(s->>'relation', (contract->>'max_rows')::int));
  v_once  record;
  v_twice record;
begin
  if v_large is not null then
    return etl._contract_finding('full', 'skipped', format('%s holds more than %s rows', v_large, contract->>'max_rows'), 'allow more (max_rows, --max-rows)');
  end if;
  v_once := etl._contract_variant(contract, jsonb_build_array(v_call));
  if v_once.tables - array(select jsonb_object_keys(contract->'tables')) <> '{}' then
    contract := contract || jsonb_build_object('tables', v_once.tables || (contract->'tables'));
    perform etl._contract_check_tables(contract);
    v_once := etl._contract_variant(contract, jsonb_build_array(v_call));
  end if;
  v_twice := etl._contract_variant(contract, jsonb_build_array(v_call, v_call));
  return etl._contract_compare(contract, 'full', v_once.rows, v_twice.rows, coalesce(v_once.failure, v_twice.failure),
    'a full refresh twice is a full refresh once', 'a full refresh once (-) and twice (+)', 'delete the old rows first when p_mode is ''full''');
end $$;
comment on function etl._contract_full(jsonb) is 'Whether a full refresh can be repeated.';
revoke all on function etl._contract_full(jsonb) from public;

-- All checks that compare with a run of the window, on emptied tables; these are as before afterwards. contract comes back with the
-- columns that turned out not to be deterministic.
create or replace function etl._contract_findings(inout contract jsonb, out findings jsonb)
language plpgsql volatile set search_path = pg_catalog, pg_temp as $$
declare
  v_basis    record;
  v_source   jsonb;
  v_is_split boolean;
  v_is_over  boolean := false;
begin
  if contract->'emptied' <> '[]' then perform etl._contract_empty(etl._text_array(contract->'emptied')); end if;
  v_basis := etl._contract_deterministic(contract);
  contract := v_basis.contract;
  findings := jsonb_build_array(v_basis.finding, etl._contract_idempotent(contract, v_basis.expected));
  if contract ? 'strategy' then
    findings := findings || etl._contract_splits(contract, v_basis.expected);
    v_is_split := findings->-1->>'status' <> 'fail';
    for v_source in select s from jsonb_array_elements(contract->'sources') s loop
      findings := findings || etl._contract_boundary(contract, v_source) || etl._contract_nulls(contract, v_source, v_basis.expected, v_is_split);
    end loop;
    findings := findings || etl._contract_empty_window(contract, v_basis.expected);
  end if;
  v_is_over := true;
  raise exception using errcode = 'PT200', message = 'checks over';
exception when sqlstate 'PT200' then
  if not v_is_over then raise; end if;
end $$;
comment on function etl._contract_findings(jsonb) is 'Makes all checks that compare with a run of the window, and undoes everything.';
revoke all on function etl._contract_findings(jsonb) from public;

-- The window of the xid strategy: a row belongs to it when its transaction is visible in the later snapshot and not in
-- the earlier one, that is, when it had not begun then, or was still running. Both can be looked up in an index, so that a
-- transaction which stays open for hours does not make every window read those hours again. Where the planner does not know
-- the snapshots (a routine in SQL), it has the range between them. It inlines all of it: parsed here once, so that no
-- search_path can change what it means.
create or replace function etl._unfinished(snapshot pg_snapshot) returns xid8[]
language sql immutable parallel safe set search_path = pg_catalog, pg_temp as $$
  select coalesce(array_agg(x), '{}') from pg_snapshot_xip(snapshot) x
$$;
comment on function etl._unfinished(pg_snapshot) is 'The transactions that were running when a snapshot was taken.';
revoke all on function etl._unfinished(pg_snapshot) from public;
grant execute on function etl._unfinished(pg_snapshot) to etl_reader;

create or replace function etl.arrived(xid xid8, since pg_snapshot, until pg_snapshot) returns boolean
language sql stable parallel safe
return xid >= coalesce(pg_snapshot_xmin(since), '0') and xid < pg_snapshot_xmax(until) and pg_visible_in_snapshot(xid, until)
   and (xid >= coalesce(pg_snapshot_xmax(since), '0') or xid = any (etl._unfinished(since)));
comment on function etl.arrived(xid8, pg_snapshot, pg_snapshot) is
  'Whether a row whose column holds its inserting or updating transaction became visible between two snapshots; since null: ever before until.';
revoke all on function etl.arrived(xid8, pg_snapshot, pg_snapshot) from public;
grant execute on function etl.arrived(xid8, pg_snapshot, pg_snapshot) to etl_reader;

-- What keeps the column of the xid strategy true: every row that is written carries the transaction that wrote it.
--
-- The default of the column does that for an INSERT that does not name it. This trigger does it for the others: an UPDATE,
-- an INSERT or COPY that brings the value of another time (rows moved from an archive, a publisher that has the column too).
-- The column's name is fixed: setting a column by a name given to the trigger takes 1.6 times as long. Its condition,
-- when (new.etl_xid is distinct from pg_current_xact_id()), leaves rows alone that the default has filled already, at no
-- cost that could be measured; an update costs 2 us more. pg_current_xact_id() is the top transaction, in savepoints too.
create or replace function etl.touch_xid() returns trigger
language plpgsql volatile set search_path = pg_catalog, pg_temp as $$
begin
  -- Whoever stamps rows anew after a restore (etl.rebase_watermark) says which transaction they are to carry.
  if current_setting('b2s.rebase', true) is distinct from 'on' then new.etl_xid := pg_current_xact_id(); end if;
  return new;
end $$;
comment on function etl.touch_xid() is
  'Trigger, before insert or update, for each row: sets the column etl_xid to the transaction that writes the row. b2s watermark add-column creates it, '
  'enabled always, so that it works for rows that arrive by logical replication too.';
revoke all on function etl.touch_xid() from public;
grant execute on function etl.touch_xid() to etl_reader;

-- Runs a request to its end in this session.
--
-- These two procedures are the only code that ends transactions, and they do nothing else: a procedure that COMMITs
-- can neither be security definer nor pin its search_path, so everything that touches a table is in the guarded
-- helpers they call. The run lock passes hand over hand across every COMMIT and ROLLBACK (engine/_lock.sql).
-- It runs with the caller's search_path: operators only between values of one built-in type, the rest as pg_catalog functions,
-- or an operator that somebody put on that path could run as the caller.
-- SET TRANSACTION must directly follow the COMMIT: even an IF in between would take a snapshot.
create or replace procedure etl._walk(run_id bigint, lock_key int, pause_ms int default 0)
language plpgsql as $$
declare
  v_next         etl.run_scopes;
  v_result       jsonb;
  v_seen         jsonb := etl._change_baseline();
  v_delay        float8;
  v_interruption text;
  v_is_held      boolean;
begin
  v_is_held := etl._hold(lock_key); commit; set transaction isolation level read committed, read write; v_is_held := etl._rehold(lock_key);
  loop
    v_next := etl._claim(run_id, v_result, pg_catalog.cardinality(v_next.required_by) + pg_catalog.cardinality(v_next.precedes) > 0);
    v_is_held := etl._hold(lock_key);
    if v_next.scope_index is null then
      commit; v_is_held := pg_catalog.pg_advisory_unlock_shared(6435443, lock_key);
      return;
    end if;
    if v_next.scope_index = 0 then
      -- Others execute what is left: look again in a moment, holding no snapshot meanwhile.
      commit; set transaction isolation level read committed, read write; v_is_held := etl._rehold(lock_key);
      v_result := null;
      v_next := null;
      v_delay := 100;
    else
      if v_next.isolation = 'serializable' then commit; set transaction isolation level serializable, read write;
      elsif v_next.isolation = 'repeatable read' then commit; set transaction isolation level repeatable read, read write;
      else commit; set transaction isolation level read committed, read write; end if;
      v_is_held := etl._rehold(lock_key);
      if v_next.kind::text = 'refresh' then v_result := etl._execute_refresh(run_id, v_next.scope_index);
      else v_result := etl._execute_scope(run_id, v_next.first_order_index, v_next.last_order_index, v_seen); end if;
      v_is_held := etl._hold(lock_key);
      if pg_catalog.jsonb_exists(v_result, 'failure') then
        rollback; set transaction isolation level read committed, read write; v_is_held := etl._rehold(lock_key);
        v_delay := etl._record_failure(run_id, v_next.scope_index, pg_catalog.jsonb_object_field(v_result, 'failure'));
        v_seen := etl._change_baseline();
        v_result := null;
        v_next := null;
        v_is_held := etl._hold(lock_key); commit; set transaction isolation level read committed, read write; v_is_held := etl._rehold(lock_key);
      else
        commit; set transaction isolation level read committed, read write; v_is_held := etl._rehold(lock_key);
        v_seen := coalesce(pg_catalog.jsonb_object_field(v_result, 'seen'), v_seen);
        v_delay := pause_ms;
      end if;
    end if;
    while v_delay > 0::float8 loop
      v_interruption := null;
      begin
        perform pg_catalog.pg_sleep(least(v_delay, 500) / 1000::float8);
      exception when query_canceled then v_interruption := sqlerrm;
      end;
      v_delay := case when etl._is_cancelled(run_id, v_interruption) then 0 else v_delay - 500::float8 end;
      v_is_held := etl._hold(lock_key); commit; set transaction isolation level read committed, read write; v_is_held := etl._rehold(lock_key);
    end loop;
  end loop;
end $$;
comment on procedure etl._walk(bigint, int, int) is 'Executes the scopes of a run that this session owns until none is left. Called by the engine only.';
revoke all on procedure etl._walk(bigint, int, int) from public;
grant execute on procedure etl._walk(bigint, int, int) to etl_operator;

create or replace procedure etl.start_run(
  mode text default null, procedures text[] default null, groups text[] default null, tags text[] default null,
  with_upstream boolean default false, with_downstream boolean default false,
  as_of timestamptz default null, params jsonb default null,
  transaction_scope text default null, mv_refresh jsonb default null,
  idempotency_key text default null, dry_run etl.dry_run default 'false',
  confirm_full_refresh boolean default false, approved_by text default null, reason text default null,
  max_concurrency int default null, pipeline text default null,
  inout run_id bigint default null, inout status text default null)
language plpgsql as $$
declare
  v_request          jsonb;
  v_run              record;
  v_atomic           text;
  v_application_name text := pg_catalog.current_setting('application_name');
begin
  begin commit; exception when invalid_transaction_termination then v_atomic := sqlerrm; end;
  if v_atomic = etl._atomic_message() then perform etl._fail_in_transaction('etl.start_run'); end if;
  commit; set transaction isolation level read committed;
  v_request := etl._request(mode, procedures, groups, tags, with_upstream, with_downstream, as_of, params, transaction_scope,
    mv_refresh, idempotency_key, confirm_full_refresh, approved_by, reason, max_concurrency, pipeline);
  if dry_run::text in ('t', 'true', 'execute') then
    perform etl._report_plan(v_request, dry_run::text = 'execute');
    run_id := null; status := 'planned';
    return;
  end if;
  select * into v_run from etl._begin_run(v_request);
  run_id := v_run.run_id;
  if v_run.is_new then
    call etl._walk(v_run.run_id, v_run.pipeline_id);
    perform pg_catalog.set_config('application_name', v_application_name, false);
  end if;
  status := etl._run_status(v_run.run_id);
end $$;
comment on procedure etl.start_run(text, text[], text[], text[], boolean, boolean, timestamptz, jsonb, text, jsonb, text, etl.dry_run,
  boolean, text, text, int, text, bigint, text) is
  'Plans a request and runs it to its end in this session; returns run_id and the final status. CALL it alone, with autocommit on. '
  'Selection: procedures, groups, tags (their union; nothing: all), with_upstream, with_downstream. mode: incremental, full, or null for each '
  'procedure''s own. mv_refresh: ''true'', ''false'' or ''["mart.mv"]''. dry_run: true shows the plan, ''execute'' runs and rolls back. '
  'Raises PT400, PT403, PT404, PT409 or PT422 with {"code": ...} in DETAIL before anything is done; a failed step does not raise, see status.';
revoke all on procedure etl.start_run(text, text[], text[], text[], boolean, boolean, timestamptz, jsonb, text, jsonb, text, etl.dry_run,
  boolean, text, text, int, text, bigint, text) from public;
grant execute on procedure etl.start_run(text, text[], text[], text[], boolean, boolean, timestamptz, jsonb, text, jsonb, text, etl.dry_run,
  boolean, text, text, int, text, bigint, text) to etl_operator;

-- What a request would do, in order, writing nothing. With execute, it is really run and rolled back.
create or replace function etl._plan_notes(dependencies jsonb) returns text
language sql stable set search_path = pg_catalog, pg_temp as $$
  select string_agg(format('needs %s, which is not in this run and %s', d->>'procedure',
           coalesce('last succeeded at ' || (d->>'last_success_at'), 'never succeeded')), '; ')
    from jsonb_array_elements(dependencies) d
   where not (d->>'in_run')::boolean
$$;
comment on function etl._plan_notes(jsonb) is 'How old the dependencies are that a run does not include.';
revoke all on function etl._plan_notes(jsonb) from public;

create or replace function etl._show_plan(request jsonb)
returns table (order_index int, scope_index int, kind text, name text, procedure_type text, group_name text, mode text, tx_scope text,
  isolation text, depends_on text[], window_since text, window_until text, parameters jsonb, statement text, notes text)
language plpgsql volatile security definer set search_path = pg_catalog, pg_temp as $$
declare
  v_plan     record := etl._plan(request);
  v_items    etl.plan_item[] := v_plan.items;
  v_selected int[] := (select array_agg(i.procedure_id) from unnest(v_items) i where i.kind = 'steps');
begin
  return query
    select i.order_index, i.scope_index, case i.kind when 'steps' then 'step' else i.kind end, coalesce(p.name, i.mv_name), p.type, g.name,
           i.mode, i.tx_scope, p.isolation,
           case when i.kind = 'steps'
             then (select array_agg(x->>'procedure') from jsonb_array_elements(n.dependencies) x)
             else (select array_agg(q.name order by q.name) from unnest(v_items) s join etl.procedures q using (procedure_id)
                    where s.order_index = any (i.feeders)) end,
           w.since, w.until, i.parameters, etl._render_call(p.call_sql, i.mode, w.since, w.until, null, i.parameters),
           case when i.kind = 'steps' then nullif(concat_ws('; ', etl._plan_notes(n.dependencies), w.notes), '')
                else format('after %s, on %s, %s', i.refresh_after, i.refresh_on,
                       case when i.concurrency <> 'false' and etl._can_refresh_concurrently(to_regclass(i.mv_name)) then 'concurrently'
                            when i.concurrency <> 'false' and etl._can_refresh_concurrently(to_regclass(i.mv_name)) is null then 'which does not exist'
                            else 'readers wait' end) end
      from unnest(v_items) i
      left join etl.procedures p using (procedure_id)
      left join etl.group_members m using (procedure_id)
      left join etl.groups g using (group_id)
      left join etl._dependency_snapshots(v_selected) n using (procedure_id)
      left join lateral etl._preview_window(p, i.mode, (request->>'as_of')::timestamptz) w on true
     where i.kind <> 'barrier'
     order by i.scope_index, i.order_index;
end $$;
comment on function etl._show_plan(jsonb) is 'The plan of a request as rows.';
revoke all on function etl._show_plan(jsonb) from public;
grant execute on function etl._show_plan(jsonb) to etl_reader;

create or replace function etl._preview_window(procedure etl.procedures, mode text, as_of timestamptz, out since text, out until text, out notes text)
language plpgsql volatile set search_path = pg_catalog, pg_temp as $$
declare
  v_window record;
begin
  if procedure.state_key is null then return; end if;
  v_window := etl._window(procedure, mode, as_of, 100);
  since := v_window.since; until := v_window.until;
  notes := concat_ws('; ', 'held back by ' || v_window.held_back_by,
    case when mode = 'incremental' and procedure.max_window is not null and procedure.transaction_scope = 'per_group'
         then 'max_window has no effect in a group that is one transaction'
         when mode = 'incremental' and procedure.max_window is not null then nullif('read in slices, the first one up to ' || etl._slice_end(procedure, since, until, null), 'read in slices, the first one up to ' || until) end,
    case when mode = 'incremental' and procedure.on_empty = 'skip' and not etl._has_rows(procedure, since, until) then 'nothing to read: it is skipped' end,
    etl._upgrade_hint(procedure));
exception when others then
  notes := format('no window: %s', sqlerrm);
end $$;
comment on function etl._preview_window(etl.procedures, text, timestamptz) is 'The window that a step would get if it started now, and what is to be said of it.';
revoke all on function etl._preview_window(etl.procedures, text, timestamptz) from public;

create or replace function etl.plan_run(
  mode text default null, procedures text[] default null, groups text[] default null, tags text[] default null,
  with_upstream boolean default false, with_downstream boolean default false,
  as_of timestamptz default null, params jsonb default null,
  transaction_scope text default null, mv_refresh jsonb default null,
  confirm_full_refresh boolean default false, approved_by text default null, reason text default null,
  max_concurrency int default null, pipeline text default null)
returns table (order_index int, scope_index int, kind text, name text, procedure_type text, group_name text, step_mode text, tx_scope text,
  isolation text, depends_on text[], window_since text, window_until text, parameters jsonb, statement text, notes text)
language sql volatile set search_path = pg_catalog, pg_temp as $$
  select * from etl._show_plan(etl._request(mode, procedures, groups, tags, with_upstream, with_downstream, as_of, params, transaction_scope,
    mv_refresh, null, confirm_full_refresh, approved_by, reason, max_concurrency, pipeline))
$$;
comment on function etl.plan_run(text, text[], text[], text[], boolean, boolean, timestamptz, jsonb, text, jsonb, boolean, text, text, int, text) is
  'What etl.start_run with the same arguments would do, in order: steps and refreshes of materialized views, their scopes, windows as of now, '
  'parameters and statements. Writes nothing. Raises what start_run would raise.';
revoke all on function etl.plan_run(text, text[], text[], text[], boolean, boolean, timestamptz, jsonb, text, jsonb, boolean, text, text, int, text) from public;
grant execute on function etl.plan_run(text, text[], text[], text[], boolean, boolean, timestamptz, jsonb, text, jsonb, boolean, text, text, int, text) to etl_reader;

-- start_run with dry_run has no rows to return: the plan goes out as notices.
create or replace function etl._report_plan(request jsonb, is_executed boolean) returns void
language plpgsql volatile security definer set search_path = pg_catalog, pg_temp as $$
declare
  v_rehearsal record;
  v_row       record;
begin
  if is_executed then
    v_rehearsal := etl._rehearse(request);
    for v_row in
      select s.order_index, s.procedure_name as name, s.status, s.rows_affected, s.error_message from unnest(v_rehearsal.steps) s
      union all
      select null, m.mv_name, m.status, null, m.error_message from unnest(v_rehearsal.refreshes) m
    loop
      raise notice '% % %, rolled back%', coalesce('[' || v_row.order_index || ']', 'refresh'), v_row.name,
        coalesce(v_row.status || ' ' || v_row.rows_affected || ' rows', v_row.status), coalesce(': ' || v_row.error_message, '');
    end loop;
    return;
  end if;
  for v_row in select * from etl._show_plan(request) loop
    raise notice '%', concat_ws(' ', coalesce('[' || v_row.order_index || ']', 'refresh'), v_row.name, v_row.mode,
      case when v_row.tx_scope = 'per_group' then format('in group %s', v_row.group_name) end,
      case when v_row.window_until is not null then format('window [%s, %s)', coalesce(v_row.window_since, 'the beginning'), v_row.window_until) end,
      case when v_row.notes is not null then format('(%s)', v_row.notes) end);
  end loop;
end $$;
comment on function etl._report_plan(jsonb, boolean) is 'Shows a plan, or the outcome of a rehearsal, as notices.';
revoke all on function etl._report_plan(jsonb, boolean) from public;
grant execute on function etl._report_plan(jsonb, boolean) to etl_operator;

-- Reads a past range again, chunk by chunk, beside the runs of the pipeline: executed like a run (api/start_run.sql), under a
-- lock of its own, and with windows that move no watermark (engine/_backfill.sql). Thin for the same reason: it commits.
create or replace procedure etl.backfill(
  procedures text[] default null, from_ text default null, until text default null, chunk text default null, params jsonb default null,
  pause interval default null, reason text default null, resume bigint default null, idempotency_key text default null,
  pipeline text default null,
  inout run_id bigint default null, inout status text default null)
language plpgsql as $$
declare
  v_run              record;
  v_atomic           text;
  v_application_name text := pg_catalog.current_setting('application_name');
begin
  begin commit; exception when invalid_transaction_termination then v_atomic := sqlerrm; end;
  if v_atomic = etl._atomic_message() then perform etl._fail_in_transaction('etl.backfill'); end if;
  commit; set transaction isolation level read committed;
  select * into v_run from etl._begin_backfill(etl._backfill_request(procedures, from_, until, chunk, params, pause, reason, resume,
    idempotency_key, pipeline));
  run_id := v_run.run_id;
  if v_run.is_new then
    call etl._walk(v_run.run_id, v_run.lock_key, v_run.pause_ms);
    perform pg_catalog.set_config('application_name', v_application_name, false);
  end if;
  status := etl._run_status(v_run.run_id);
end $$;
comment on procedure etl.backfill(text[], text, text, text, jsonb, interval, text, bigint, text, text, bigint, text) is
  'Reads rows of the past again, in chunks that are a transaction each; returns run_id and the final status. CALL it alone, with autocommit on. '
  'from_ (inclusive; default: the first row) and until (exclusive; default: the watermark) are times, ids or numbers of transactions, by strategy; '
  'chunk is ''1 day'' or ''100000''; pause is waited after each chunk. resume: the number of a backfill that did not succeed; what is left of it is done. '
  'Runs go on beside it, and the watermarks stay where they are. Admins only. Raises PT404, PT409 or PT422 with {"code": ...} in DETAIL before '
  'anything is done; a chunk that fails does not raise, see status.';
revoke all on procedure etl.backfill(text[], text, text, text, jsonb, interval, text, bigint, text, text, bigint, text) from public;
grant execute on procedure etl.backfill(text[], text, text, text, jsonb, interval, text, bigint, text, text, bigint, text) to etl_admin;

-- The chunks that a backfill would consist of, writing nothing.
create or replace function etl._show_backfill(request jsonb)
returns table (order_index int, procedure text, window_since text, window_until text)
language plpgsql stable security definer set search_path = pg_catalog, pg_temp as $$
begin
  return query
    with chunk as materialized (
      select * from etl._plan_backfill(request) where not request ? 'resume'
      union all
      select c.* from (select etl._resumable(request) as parent where request ? 'resume') r cross join lateral etl._plan_resume(r.parent) c
    )
    select c.order_index, p.name, c.window_since, c.window_until
      from chunk c join etl.procedures p using (procedure_id)
     order by c.order_index;
end $$;
comment on function etl._show_backfill(jsonb) is 'The chunks of a backfill as rows.';
revoke all on function etl._show_backfill(jsonb) from public;
grant execute on function etl._show_backfill(jsonb) to etl_reader;

create or replace function etl.plan_backfill(
  procedures text[] default null, from_ text default null, until text default null, chunk text default null, params jsonb default null,
  resume bigint default null, pipeline text default null)
returns table (order_index int, procedure text, window_since text, window_until text)
language sql stable set search_path = pg_catalog, pg_temp as $$
  select * from etl._show_backfill(etl._backfill_request(procedures, from_, until, chunk, params, null, null, resume, null, pipeline))
$$;
comment on function etl.plan_backfill(text[], text, text, text, jsonb, bigint, text) is
  'The chunks that etl.backfill with the same arguments would execute, in order. Writes nothing. Raises what etl.backfill would raise.';
revoke all on function etl.plan_backfill(text[], text, text, text, jsonb, bigint, text) from public;
grant execute on function etl.plan_backfill(text[], text, text, text, jsonb, bigint, text) to etl_reader;

-- One run, whole: for programs that ask for one thing and get one document.
create or replace function etl.get_run(run_id bigint) returns jsonb
language plpgsql stable security definer set search_path = pg_catalog, pg_temp as $$
declare
  v_run         jsonb;
  v_is_backfill boolean;
begin
  select to_jsonb(h) || jsonb_build_object('request', r.request, 'parameters', r.parameters), r.kind = 'backfill' into v_run, v_is_backfill
    from etl.run_history h join etl.runs r using (run_id) where h.run_id = get_run.run_id;
  if v_run is null then
    perform etl._fail('PT404', 'run.unknown', format('there is no run %s', run_id), 'which there are: select * from etl.run_history');
  end if;
  if v_is_backfill then
    v_run := v_run || jsonb_build_object('backfill', (select to_jsonb(b) from etl.backfill_progress b where b.run_id = get_run.run_id));
  end if;
  -- A backfill may have a hundred thousand steps that all say the same.
  return v_run || jsonb_build_object(
    'steps', (select jsonb_agg(to_jsonb(s) order by s.order_index, s.attempt) from etl.step_history s
               where s.run_id = get_run.run_id and not (v_is_backfill and (s.started_at is null or s.status in ('succeeded', 'advanced') and s.warnings is null))),
    'mv_refreshes', (select coalesce(jsonb_agg(to_jsonb(m) order by m.scope_index), '[]') from etl.mv_refreshes m where m.run_id = get_run.run_id));
end $$;
comment on function etl.get_run(bigint) is
  'A run with its steps (every attempt) and refreshes as one jsonb document. Of a backfill: its row of etl.backfill_progress, and of its steps '
  'those that were started and did not simply succeed. Raises PT404 run.unknown.';
revoke all on function etl.get_run(bigint) from public;
grant execute on function etl.get_run(bigint) to etl_reader;

create or replace function etl.list_procedures(pipeline text default null)
returns table (pipeline_name text, name text, type text, routine text, group_name text, tags text[], dependencies text[], default_mode text,
  allow_full_refresh boolean, transaction_scope text, parameters jsonb, watermark jsonb, mv_refresh text[], description text)
language sql stable security definer set search_path = pg_catalog, pg_temp as $$
  select l.name, p.name, p.type, p.routine_signature,
         (select g.name from etl.group_members m join etl.groups g using (group_id) where m.procedure_id = p.procedure_id),
         (select coalesce(array_agg(t.name order by t.name), '{}') from etl.procedure_tags pt join etl.tags t using (tag_id) where pt.procedure_id = p.procedure_id),
         (select coalesce(array_agg(q.name order by q.name), '{}') from etl.dependencies d join etl.procedures q on q.procedure_id = d.depends_on_id
           where d.procedure_id = p.procedure_id),
         p.default_mode, p.allow_full_refresh, p.transaction_scope,
         (select coalesce(jsonb_object_agg(d.name, d.declaration), '{}') from etl.parameters d where d.procedure_id = p.procedure_id),
         case when p.watermark_strategy is not null then jsonb_build_object('strategy', p.watermark_strategy, 'source', p.watermark_sources,
           'state_key', p.state_key, 'watermark', (select s.last_success_watermark from etl.state s where s.state_key = p.state_key)) end,
         (select coalesce(array_agg(t.name order by t.name), '{}') from etl.procedure_refresh_targets x join etl.refresh_targets t using (refresh_target_id)
           where x.procedure_id = p.procedure_id),
         p.description
    from etl.procedures p join etl.pipelines l using (pipeline_id)
   where p.is_active and (list_procedures.pipeline is null or l.name = list_procedures.pipeline)
   order by l.name, p.name
$$;
comment on function etl.list_procedures(text) is 'The configured procedures of one pipeline, or of all, with what they need and allow.';
revoke all on function etl.list_procedures(text) from public;
grant execute on function etl.list_procedures(text) to etl_reader;

-- Asks a run to stop.
--
-- Cooperative by design: only the session that walks the run may end its own transaction, so the scope in flight
-- finishes (or fails) first and everything after it is skipped. With force, the statement in flight is cancelled too.
-- The signal is sent while this transaction holds the run's row and sees it running, so it cannot hit a run that has ended.
create or replace function etl._request_cancel(run_id bigint, reason text) returns int[]
language plpgsql volatile security definer set search_path = pg_catalog, pg_temp as $$
declare
  v_run  etl.runs;
  v_pids int[];
begin
  select * into v_run from etl.runs r where r.run_id = _request_cancel.run_id for update;
  if v_run.run_id is null then
    perform etl._fail('PT404', 'run.unknown', format('there is no run %s', run_id), 'which there are: select * from etl.run_history');
  elsif v_run.requested_by <> etl._requester() and not pg_has_role(etl._requester(), 'etl_admin', 'usage') then
    perform etl._fail('PT403', 'run.not_yours', format('run %s was requested by %s; %s may cancel its own runs only', run_id, v_run.requested_by, etl._requester()),
      'ask whoever requested it, or a member of etl_admin');
  elsif v_run.ended_at is not null then
    perform etl._fail('PT409', 'run.ended', format('run %s has already ended: %s', run_id, v_run.status),
      format('see select etl.get_run(%s)', run_id), jsonb_build_object('status', v_run.status));
  end if;
  if v_run.status = 'queued' then
    update etl.runs r
       set status = 'cancelled', ended_at = clock_timestamp(), cancel_requested_at = clock_timestamp(), cancel_requested_by = etl._requester(),
           cancel_reason = _request_cancel.reason
     where r.run_id = _request_cancel.run_id;
    return null;
  elsif not etl._is_alive(v_run) then
    perform etl._fail('PT409', 'run.dead', format('the session that executed run %s is gone', run_id),
      'nothing is left to cancel: the next etl.start_run records it as abandoned');
  end if;
  update etl.runs r
     set cancel_requested_at = coalesce(r.cancel_requested_at, clock_timestamp()), cancel_requested_by = coalesce(r.cancel_requested_by, etl._requester()),
         cancel_reason = coalesce(r.cancel_reason, _request_cancel.reason)
   where r.run_id = _request_cancel.run_id;
  -- The rows of the steps in flight, held until this transaction ends: no outcome can be written before the signal is
  -- sent, so the signal hits the step and not the bookkeeping after it, which would end the CALL. skip locked: an
  -- outcome already written is about to be committed.
  with steps as (
    select p.worker_pid from etl.procedure_runs p where p.run_id = _request_cancel.run_id and p.status = 'running' for update skip locked
  ), refreshes as (
    select m.worker_pid from etl.mv_refreshes m where m.run_id = _request_cancel.run_id and m.status = 'running' for update skip locked
  )
  select coalesce(array_agg(distinct q.worker_pid), '{}') into v_pids from (select * from steps union all select * from refreshes) q;
  return v_pids;
end $$;
comment on function etl._request_cancel(bigint, text) is
  'Records that a run is to stop; returns the backends that execute steps of it now; null when it was queued, and has ended. Raises what etl.cancel_run raises.';
revoke all on function etl._request_cancel(bigint, text) from public;
grant execute on function etl._request_cancel(bigint, text) to etl_operator;

-- Not security definer: a login may always cancel its own statements, whereas etl_owner may cancel those of others
-- only as a member of pg_signal_backend.
create or replace function etl.cancel_run(run_id bigint, reason text default null, force boolean default false) returns text
language plpgsql volatile set search_path = pg_catalog, pg_temp as $$
declare
  v_pids  int[] := etl._request_cancel(run_id, reason);
  v_pid   int;
  v_count int := 0;
begin
  if v_pids is null then return 'it was queued, and is not run'; end if;
  if not force or v_pids = '{}' then return 'the step in flight is finished, what follows is skipped'; end if;
  foreach v_pid in array v_pids loop
    if etl._cancel_statement(v_pid) then
      v_count := v_count + 1;
    else
      raise warning 'the statement in flight goes on: neither % nor etl_owner may cancel it', current_user
        using hint = 'grant pg_signal_backend to etl_owner; the statements of a superuser only a superuser may cancel';
    end if;
  end loop;
  if v_count = 0 then return 'the step in flight is finished, what follows is skipped'; end if;
  return 'the statement in flight was cancelled, what follows is skipped';
end $$;
comment on function etl.cancel_run(bigint, text, boolean) is
  'Asks an active run to stop after its current scope; with force its statement is cancelled now. Operators cancel their own runs, admins any. '
  'Raises PT404 run.unknown, PT403 run.not_yours, PT409 run.ended or run.dead.';
revoke all on function etl.cancel_run(bigint, text, boolean) from public;
grant execute on function etl.cancel_run(bigint, text, boolean) to etl_operator;

-- Only what somebody entitled to has asked to stop, or what is beyond its timeout.
create or replace function etl._signal_as_owner(pid int) returns boolean
language plpgsql volatile security definer set search_path = pg_catalog, pg_temp as $$
begin
  if not exists (select from etl.runs r
                  where r.status = 'running'
                    and (exists (select from etl.procedure_runs p where p.run_id = r.run_id and p.status = 'running' and p.worker_pid = _signal_as_owner.pid
                                    and (p.timed_out_at is not null or r.cancel_requested_at is not null))
                         or r.cancel_requested_at is not null and exists (
                              select from etl.mv_refreshes m where m.run_id = r.run_id and m.status = 'running' and m.worker_pid = _signal_as_owner.pid))) then
    return false;
  end if;
  return pg_cancel_backend(pid);
exception when insufficient_privilege then
  return false;
end $$;
comment on function etl._signal_as_owner(int) is
  'Cancels the statement of a step as etl_owner when its run was asked to stop or its timeout has passed; false when that is not so, or etl_owner may not.';
revoke all on function etl._signal_as_owner(int) from public;
grant execute on function etl._signal_as_owner(int) to etl_operator;

create or replace function etl._cancel_statement(pid int) returns boolean
language plpgsql volatile set search_path = pg_catalog, pg_temp as $$
begin
  return pg_cancel_backend(pid);
exception when insufficient_privilege then
  return etl._signal_as_owner(pid);
end $$;
comment on function etl._cancel_statement(int) is 'Cancels the statement of a backend, as the caller, else as etl_owner; false when neither may.';
revoke all on function etl._cancel_statement(int) from public;
grant execute on function etl._cancel_statement(int) to etl_operator;

-- An interrupted wait ends the run, like an interrupted step.
create or replace function etl._is_cancelled(run_id bigint, interruption text) returns boolean
language plpgsql volatile security definer set search_path = pg_catalog, pg_temp as $$
declare
  v_run etl.runs;
begin
  if interruption is not null then perform etl._absorb_signal(); end if;
  select * into v_run from etl.runs r where r.run_id = _is_cancelled.run_id;
  -- Another worker may have ended the run while this one waited: then there is nothing to wait for.
  if v_run.ended_at is not null and etl._has_worked(v_run) then return true; end if;
  if etl._is_owner(v_run) is not true and etl._is_helper(v_run) is not true then perform etl._fail_not_owned(run_id); end if;
  if v_run.cancel_requested_at is null and interruption is not null then
    perform etl._note_interruption(run_id, interruption);
  end if;
  return v_run.cancel_requested_at is not null or interruption is not null;
end $$;
comment on function etl._is_cancelled(bigint, text) is
  'Whether a run that waits for its next attempt is to stop; interruption: the error that ended the wait, or null. Called by the engine only.';
revoke all on function etl._is_cancelled(bigint, text) from public;
grant execute on function etl._is_cancelled(bigint, text) to etl_operator;

create or replace function etl._is_alive(run etl.runs) returns boolean
language sql stable security definer set search_path = pg_catalog, pg_temp as $$
  select run.status = 'running' and etl._living_workers(run) <> '{}'
$$;
comment on function etl._is_alive(etl.runs) is 'Whether any session that executes a run still holds its lock.';
revoke all on function etl._is_alive(etl.runs) from public;
grant execute on function etl._is_alive(etl.runs) to etl_reader;

-- The same request as etl.start_run, left for a worker: what a program calls that must not wait.
create or replace function etl._submit(request jsonb) returns table (run_id bigint, status text, is_new boolean)
language plpgsql volatile security definer set search_path = pg_catalog, pg_temp as $$
declare
  v_run  etl.runs := etl._known_run(request);
  v_plan record;
begin
  if v_run.run_id is not null then return query select v_run.run_id, etl._run_status(v_run.run_id), false; return; end if;
  v_plan := etl._plan(request);
  return query select etl._create_run(request, v_plan.pipeline_id, v_plan.max_concurrency, v_plan.items, is_queued => true), 'queued', true;
  perform pg_notify('etl', jsonb_build_object('event', 'run_queued', 'pipeline_id', v_plan.pipeline_id)::text);
end $$;
comment on function etl._submit(jsonb) is 'Stores a planned request as a queued run, or finds the one that has the same idempotency key.';
revoke all on function etl._submit(jsonb) from public;
grant execute on function etl._submit(jsonb) to etl_operator;

create or replace function etl.submit_run(
  mode text default null, procedures text[] default null, groups text[] default null, tags text[] default null,
  with_upstream boolean default false, with_downstream boolean default false,
  as_of timestamptz default null, params jsonb default null,
  transaction_scope text default null, mv_refresh jsonb default null,
  idempotency_key text default null, confirm_full_refresh boolean default false, approved_by text default null, reason text default null,
  max_concurrency int default null, pipeline text default null)
returns table (run_id bigint, status text, is_new boolean)
language sql volatile set search_path = pg_catalog, pg_temp as $$
  select * from etl._submit(etl._request(mode, procedures, groups, tags, with_upstream, with_downstream, as_of, params, transaction_scope,
    mv_refresh, idempotency_key, confirm_full_refresh, approved_by, reason, max_concurrency, pipeline))
$$;
comment on function etl.submit_run(text, text[], text[], text[], boolean, boolean, timestamptz, jsonb, text, jsonb, text, boolean, text, text, int, text) is
  'Queues the request that etl.start_run with the same arguments would run; a worker (etl.work, b2s worker) takes it up, first come, first served. '
  'Returns run_id, status and is_new (false: the idempotency key was known). Checked now, and planned again when it starts. Raises what etl.start_run raises.';
revoke all on function etl.submit_run(text, text[], text[], text[], boolean, boolean, timestamptz, jsonb, text, jsonb, text, boolean, text, text, int, text) from public;
grant execute on function etl.submit_run(text, text[], text[], text[], boolean, boolean, timestamptz, jsonb, text, jsonb, text, boolean, text, text, int, text) to etl_operator;

-- Be a worker: help the active run of a pipeline, or take up the runs that wait, until nothing is left.
--
-- Thin, like etl.start_run, and for the same reason: it ends transactions.
create or replace procedure etl.work(pipeline text default null, run_id bigint default null, inout executed int default null)
language plpgsql as $$
declare
  v_run              record;
  v_atomic           text;
  v_application_name text := pg_catalog.current_setting('application_name');
begin
  begin commit; exception when invalid_transaction_termination then v_atomic := sqlerrm; end;
  if v_atomic = etl._atomic_message() then perform etl._fail_in_transaction('etl.work'); end if;
  executed := 0;
  loop
    commit; set transaction isolation level read committed, read write;
    select * into v_run from etl._enlist(pipeline, run_id);
    exit when v_run.run_id is null;
    call etl._walk(v_run.run_id, v_run.lock_key, v_run.pause_ms);
    perform pg_catalog.set_config('application_name', v_application_name, false);
    executed := pg_catalog.int4pl(executed, 1);
  end loop;
end $$;
comment on procedure etl.work(text, bigint, int) is
  'Makes this session a worker: it helps the active run (as long as that has fewer sessions than max_concurrency), or takes up the oldest queued one, until '
  'nothing is left; returns how many runs it executed. run_id: that run only. CALL it alone, with autocommit on. Raises PT404 run.unknown or pipeline.unknown.';
revoke all on procedure etl.work(text, bigint, int) from public;
grant execute on procedure etl.work(text, bigint, int) to etl_operator;

-- Takes up a run that failed, was cancelled, or died. Thin, like etl.start_run: it ends transactions.
create or replace procedure etl.resume_run(
  run_id bigint, changed_steps text default null, inout new_run_id bigint default null, inout status text default null)
language plpgsql as $$
declare
  v_run              record;
  v_atomic           text;
  v_application_name text := pg_catalog.current_setting('application_name');
begin
  begin commit; exception when invalid_transaction_termination then v_atomic := sqlerrm; end;
  if v_atomic = etl._atomic_message() then perform etl._fail_in_transaction('etl.resume_run'); end if;
  commit; set transaction isolation level read committed;
  select * into v_run from etl._begin_resume(run_id, changed_steps);
  call etl._walk(v_run.run_id, v_run.lock_key);
  perform pg_catalog.set_config('application_name', v_application_name, false);
  new_run_id := v_run.run_id;
  status := etl._run_status(v_run.run_id);
end $$;
comment on procedure etl.resume_run(bigint, text, bigint, text) is
  'Runs what is left of a run that failed, was cancelled or was abandoned, as a new run with the same as_of, windows and params; what succeeded is reused. '
  'A window is taken anew when its watermark has moved since. changed_steps: reuse or rerun, for steps that succeeded and whose definition has changed since. '
  'Returns new_run_id and the final status. CALL it alone, with autocommit on. Raises PT403, PT404 or PT409 with {"code": ...} in DETAIL before anything is done.';
revoke all on procedure etl.resume_run(bigint, text, bigint, text) from public;
grant execute on procedure etl.resume_run(bigint, text, bigint, text) to etl_operator;

-- Runs whose sessions are all gone, recorded as what they are. Every start does this for its own pipeline; this does it for all.
create or replace function etl.reap() returns int
language plpgsql volatile security definer set search_path = pg_catalog, pg_temp as $$
declare
  v_run   etl.runs;
  v_count int := 0;
begin
  for v_run in select * from etl.runs r where r.status = 'running' order by r.run_id loop
    if etl._living_workers(v_run) = '{}' and pg_try_advisory_xact_lock(6435443, etl._lock_key(v_run)) then
      perform etl._abandon_run(v_run.run_id);
      v_count := v_count + 1;
    end if;
  end loop;
  return v_count;
end $$;
comment on function etl.reap() is 'Records runs and backfills whose sessions are gone as abandoned; returns how many. For a clock; every start does it for its pipeline anyway.';
revoke all on function etl.reap() from public;
grant execute on function etl.reap() to etl_operator;

-- Timeouts of steps. A session cannot time out its own statement inside a CALL, so somebody else does, once a second or so.
--
-- The rows of the step are held until this transaction ends: its outcome cannot be written before the signal is sent, so the
-- signal hits the step and not the bookkeeping after it. skip locked: an outcome already written is about to be committed.
create or replace function etl._time_out_steps() returns int[]
language plpgsql volatile security definer set search_path = pg_catalog, pg_temp as $$
declare
  v_scope record;
  v_pids  int[] := '{}';
begin
  for v_scope in
    select p.run_id, p.scope_index, p.worker_pid
      from etl.procedure_runs p join etl.runs r using (run_id)
     where r.status = 'running' and p.status = 'running'
     group by p.run_id, p.scope_index, p.worker_pid
    having bool_and(p.settings ? 'timeout_ms') and bool_and(p.timed_out_at is null)
       and min(p.started_at) + sum((p.settings->>'timeout_ms')::bigint) * interval '1 ms' < clock_timestamp()
  loop
    perform from etl.procedure_runs p
      where p.run_id = v_scope.run_id and p.scope_index = v_scope.scope_index and p.status = 'running' for update skip locked;
    continue when not found;
    update etl.procedure_runs p set timed_out_at = clock_timestamp()
     where p.run_id = v_scope.run_id and p.scope_index = v_scope.scope_index and p.status = 'running';
    v_pids := v_pids || v_scope.worker_pid;
  end loop;
  return v_pids;
end $$;
comment on function etl._time_out_steps() is
  'Marks steps whose timeout has passed, and returns the backends that execute them; a group, which is one transaction, has the sum of its timeouts.';
revoke all on function etl._time_out_steps() from public;
grant execute on function etl._time_out_steps() to etl_operator;

create or replace function etl.watchdog() returns int
language plpgsql volatile set search_path = pg_catalog, pg_temp as $$
declare
  v_pid   int;
  v_count int := 0;
begin
  foreach v_pid in array etl._time_out_steps() loop
    if etl._cancel_statement(v_pid) then
      v_count := v_count + 1;
    else
      raise warning 'the timeout of the step of backend % has passed, but neither % nor etl_owner may cancel it', v_pid, current_user
        using hint = 'grant pg_signal_backend to etl_owner; the statements of a superuser only a superuser may cancel';
    end if;
  end loop;
  return v_count;
end $$;
comment on function etl.watchdog() is
  'Cancels the statements of steps whose timeout has passed; returns how many. To be called once a second or so: b2s run and b2s worker do, or a clock.';
revoke all on function etl.watchdog() from public;
grant execute on function etl.watchdog() to etl_operator;

-- Throws or lifts the global freeze: while it is in force no run may refresh anything fully, whatever it confirms.
create or replace function etl.freeze_full_refresh(is_frozen boolean, reason text default null) returns text
language plpgsql volatile security definer set search_path = pg_catalog, pg_temp as $$
begin
  if coalesce(btrim(reason), '') = '' then
    perform etl._fail('PT422', 'freeze.no_reason', 'freezing or unfreezing full refreshes needs a reason',
      format('select etl.freeze_full_refresh(%s, reason => ''...'')', is_frozen));
  end if;
  insert into etl.full_refresh_freezes (is_frozen, reason, changed_by) values (is_frozen, reason, etl._requester());
  return case when is_frozen then 'full refreshes are frozen' else 'full refreshes are allowed again' end;
end $$;
comment on function etl.freeze_full_refresh(boolean, text) is
  'Freezes (true) or allows (false) full refreshes in this database, with a reason that is kept. Admins only. Raises PT422 freeze.no_reason.';
revoke all on function etl.freeze_full_refresh(boolean, text) from public;
grant execute on function etl.freeze_full_refresh(boolean, text) to etl_admin;

-- Moves a watermark by hand: back, to read a range again; forward, to leave one out; to null, to begin anew.
--
-- A step of that watermark that is under way fails with watermark.moved, and nothing of it stays.
create or replace function etl._watermark_value(strategy text, value text, bound text) returns text
language plpgsql volatile set search_path = pg_catalog, pg_temp as $$
declare
  v_value text;
begin
  if value = 'now' then return bound; end if;
  begin
    v_value := case strategy when 'timestamp' then to_jsonb(value::timestamptz) #>> '{}' when 'id' then value::bigint::text else value::pg_snapshot::text end;
  exception when data_exception then
    perform etl._fail('PT422', 'watermark.invalid', format('%L is not a watermark of the %s strategy: %s', value, strategy, sqlerrm),
      case strategy when 'timestamp' then 'a time with its zone, such as 2026-01-31 00:00:00+00; now; or null'
                    when 'id' then 'a whole number, the first id to read; now; or null' else 'a pg_snapshot, from etl.state_history; now; or null' end);
  end;
  if etl._is_after(strategy, v_value, bound) then
    perform etl._fail('PT422', 'watermark.ahead', format('%s lies beyond what is safe to read now, %s: rows that are being written would be left out', v_value, bound),
      'give an earlier value; now means the latest that is safe');
  end if;
  return v_value;
end $$;
comment on function etl._watermark_value(text, text, text) is
  'A watermark given by a person in its canonical form. Raises PT422 watermark.invalid, or watermark.ahead when it lies beyond the bound given.';
revoke all on function etl._watermark_value(text, text, text) from public;

create or replace function etl.set_watermark(state_key text, value text, reason text) returns text
language plpgsql volatile security definer set search_path = pg_catalog, pg_temp as $$
declare
  v_procedure  etl.procedures;
  v_state      etl.state;
  v_value      text;
begin
  select * into v_procedure from etl.procedures p where p.state_key = set_watermark.state_key and p.is_active order by p.procedure_id limit 1;
  if not found then
    perform etl._fail('PT404', 'watermark.unknown', format('no active procedure keeps its watermark under %s', state_key),
      'which there are: select state_key, procedures from etl.watermarks');
  elsif coalesce(btrim(reason), '') = '' then
    perform etl._fail('PT422', 'watermark.no_reason', format('moving the watermark of %s by hand needs a reason', state_key),
      'add reason => ''...''; it is kept in etl.state_history');
  end if;
  if value is not null then
    v_value := etl._watermark_value(v_procedure.watermark_strategy, value,
      (etl._upper_bound(v_procedure.watermark_strategy, set_watermark.state_key, v_procedure.watermark_sources, v_procedure.delay_ms, 1000)).bound);
  end if;
  insert into etl.state (state_key, strategy) values (set_watermark.state_key, v_procedure.watermark_strategy) on conflict do nothing;
  select * into v_state from etl.state s where s.state_key = set_watermark.state_key for update;
  update etl.state s
     set last_success_watermark = v_value, strategy = v_procedure.watermark_strategy, fence = null,
         server_id = case when v_procedure.watermark_strategy = 'xid' then (select c.system_identifier from pg_catalog.pg_control_system() c) end,
         procedure_ids = case when v_value is null then '{}' else array(select p.procedure_id from etl.procedures p where p.state_key = s.state_key and p.is_active) end
   where s.state_key = set_watermark.state_key;
  insert into etl.state_history (state_key, old_watermark, new_watermark, cause, reason, changed_by)
  values (set_watermark.state_key, v_state.last_success_watermark, v_value, 'set', set_watermark.reason, etl._requester());
  return v_value;
end $$;
comment on function etl.set_watermark(text, text, text) is
  'Moves a watermark by hand and returns it. value: a timestamptz, bigint or pg_snapshot by strategy; now, the latest that is safe; null, to read from the beginning. '
  'Kept with its reason in etl.state_history. Raises PT404 watermark.unknown, PT422 watermark.invalid, watermark.ahead or watermark.no_reason.';
revoke all on function etl.set_watermark(text, text, text) from public;
grant execute on function etl.set_watermark(text, text, text) to etl_admin;

-- After a restore into another cluster, or an upgrade of this one by pg_upgrade: the transaction ids in the Bronze rows, and the
-- snapshot kept as watermark, count another cluster's transactions.
--
-- Rows that were read already get the id 3, which every snapshot sees; all others get the id of this transaction, and are
-- read by the next run. Whoever shares a source table with the watermark is rebased with it. What was written since the
-- restore cannot be told from old rows by its number alone, so everything from the restoring transaction on counts as unread.
create or replace function etl._rebased_procedures(state_key text) returns etl.procedures[]
language sql stable set search_path = pg_catalog, pg_temp as $$
  with recursive sharing as (
    select p.procedure_id, p.state_key, p.watermark_sources from etl.procedures p where p.is_active and p.watermark_strategy = 'xid' and p.state_key = _rebased_procedures.state_key
    union
    select p.procedure_id, p.state_key, p.watermark_sources from sharing s join etl.procedures p
        on p.is_active and p.watermark_strategy = 'xid' and (p.state_key = s.state_key or p.watermark_sources && s.watermark_sources)
  )
  select array_agg(p) from etl.procedures p where p.procedure_id in (select s.procedure_id from sharing s)
$$;
comment on function etl._rebased_procedures(text) is 'The procedures that keep this watermark, and those that share a source with them, directly or not.';
revoke all on function etl._rebased_procedures(text) from public;

create or replace function etl._restamp(source text, read_before text[], restored_at xid8) returns bigint
language plpgsql volatile set search_path = pg_catalog, pg_temp as $$
declare
  v_column text[] := parse_ident(source);
  v_count  bigint;
begin
  execute format('lock table %I.%I in share row exclusive mode', v_column[1], v_column[2]);
  execute format(
    'update %1$I.%2$I set %3$I = case when %4$s then ''3''::xid8 else pg_current_xact_id() end '
    'where not %4$s or %3$I >= pg_snapshot_xmin(pg_current_snapshot())', v_column[1], v_column[2], v_column[3],
    format('(%I < $2 and not exists (select from unnest($1) w where not pg_visible_in_snapshot(%1$I, w::pg_snapshot)))', v_column[3]))
    using read_before, restored_at;
  get diagnostics v_count = row_count;
  return v_count;
exception when insufficient_privilege then
  perform etl._fail('PT403', 'watermark.cannot_restamp', format('%s cannot be given new transaction ids: %s', source, sqlerrm),
    format('for as long as this takes: grant select, update on %I.%I to etl_owner', v_column[1], v_column[2]));
end $$;
comment on function etl._restamp(text, text[], xid8) is
  'Gives the rows of a source ids of this cluster: read rows one that is older than any, the others that of this transaction. Returns how many changed.';
revoke all on function etl._restamp(text, text[], xid8) from public;

create or replace function etl.rebase_watermark(state_key text, reason text) returns bigint
language plpgsql volatile security definer set search_path = pg_catalog, pg_temp as $$
declare
  v_procedures etl.procedures[] := etl._rebased_procedures(state_key);
  v_keys       text[] := (select array_agg(distinct p.state_key) from unnest(v_procedures) p);
  v_read       text[];
  v_restored   xid8;
  v_count      bigint := 0;
  v_source     text;
  v_state      etl.state;
begin
  if v_procedures is null then
    perform etl._fail('PT404', 'watermark.unknown', format('no active procedure keeps a watermark of the xid strategy under %s', state_key),
      'which there are: select state_key, strategy from etl.watermarks');
  elsif coalesce(btrim(reason), '') = '' then
    perform etl._fail('PT422', 'watermark.no_reason', format('rebasing the watermark of %s needs a reason', state_key),
      'add reason => ''...''; it is kept in etl.state_history');
  end if;
  perform from etl.state s where s.state_key = any (v_keys) order by s.state_key for update;
  -- A key that was never read has no watermark: none of the rows it shares with others counts as read.
  v_read := array(select coalesce(s.last_success_watermark, '1:1:') from unnest(v_keys) k left join etl.state s on s.state_key = k);
  -- The numbers of this cluster from the one that restored the watermark on; xmin has 32 bits of the 64.
  select min(pg_current_xact_id()::text::bigint - ((pg_current_xact_id()::text::bigint - s.xmin::text::bigint) & 4294967295))::text::xid8 into v_restored
    from etl.state s where s.state_key = any (v_keys);
  perform set_config('b2s.rebase', 'on', true);
  for v_source in select distinct s from unnest(v_procedures) p cross join unnest(p.watermark_sources) s order by s loop
    v_count := v_count + etl._restamp(v_source, v_read, coalesce(v_restored, '0'));
  end loop;
  perform set_config('b2s.rebase', 'off', true);
  for v_state in select * from etl.state s where s.state_key = any (v_keys) and s.last_success_watermark is not null loop
    update etl.state s set last_success_watermark = etl._safe_snapshot(), server_id = (select c.system_identifier from pg_catalog.pg_control_system() c)
     where s.state_key = v_state.state_key;
    insert into etl.state_history (state_key, old_watermark, new_watermark, cause, reason, changed_by)
    select s.state_key, v_state.last_success_watermark, s.last_success_watermark, 'set', rebase_watermark.reason, etl._requester()
      from etl.state s where s.state_key = v_state.state_key;
  end loop;
  delete from etl.watermark_ticks t where t.state_key = any (v_keys);
  return v_count;
end $$;
comment on function etl.rebase_watermark(text, text) is
  'Makes a watermark of the xid strategy, and its source rows, count this cluster''s transactions after a restore or pg_upgrade; returns how many rows got a new id. '
  'What was not read before is read by the next run. Locks the source tables against writers. Raises PT404 watermark.unknown, PT403 watermark.cannot_restamp.';
revoke all on function etl.rebase_watermark(text, text) from public;
grant execute on function etl.rebase_watermark(text, text) to etl_admin;

-- Each run notes what was safe to read, and when; called by a clock, this does so between runs, so that as_of is as fine as
-- the clock's interval for ids and snapshots.
create or replace function etl.tick_watermarks() returns int
language plpgsql volatile security definer set search_path = pg_catalog, pg_temp as $$
declare
  v_procedure etl.procedures;
  v_upper     record;
  v_count     int := 0;
begin
  for v_procedure in
    select distinct on (p.state_key) p.* from etl.procedures p
     where p.is_active and p.watermark_strategy in ('id', 'xid') order by p.state_key, p.procedure_id
  loop
    begin
      v_upper := etl._upper_bound(v_procedure.watermark_strategy, v_procedure.state_key, v_procedure.watermark_sources, v_procedure.delay_ms, 500);
      insert into etl.watermark_ticks (state_key, bound) values (v_procedure.state_key, v_upper.bound);
      v_count := v_count + 1;
    exception when others then
      raise warning '%: %', v_procedure.state_key, sqlerrm;
    end;
  end loop;
  return v_count;
end $$;
comment on function etl.tick_watermarks() is
  'Notes what is safe to read now for every watermark of ids and snapshots, for runs with as_of; returns how many. For a clock: once a minute, say.';
revoke all on function etl.tick_watermarks() from public;
grant execute on function etl.tick_watermarks() to etl_operator;

-- What applying a configuration would change, checked against the database, writing nothing.
create or replace function etl.plan_config(config jsonb) returns jsonb
language plpgsql stable security definer set search_path = pg_catalog, pg_temp as $$
declare
  v_new     jsonb := etl._normalise_config(config);
  v_current jsonb := etl._catalog_config(config->>'pipeline');
  v_applied jsonb;
  v_changes jsonb;
begin
  perform etl._check_config(config);
  select v.config into v_applied from etl.config_versions v join etl.pipelines l using (pipeline_id)
   where l.name = plan_config.config->>'pipeline' order by v.version desc limit 1;
  -- A routine may have changed under an unchanged configuration.
  v_changes := etl._config_changes(v_current, v_new) || (
    select coalesce(jsonb_agg(jsonb_build_object('action', '~', 'kind', 'procedure', 'name', p.name, 'fields',
             jsonb_build_object('call', jsonb_build_array(p.call_sql, c.call_sql))) order by p.name), '[]')
      from jsonb_array_elements(plan_config.config->'procedures') x
      join etl.procedures p on p.name = x->>'name' and p.is_active
      join etl.pipelines l on l.pipeline_id = p.pipeline_id and l.name = plan_config.config->>'pipeline'
      cross join lateral etl._compile_call(x) c
     where v_current->'procedures'->p.name = v_new->'procedures'->p.name
       and (c.call_sql, c.rows_column) is distinct from (p.call_sql, p.rows_column));
  return jsonb_build_object('pipeline', config->'pipeline', 'base_digest', etl._digest(v_current), 'digest', etl._digest(v_new),
    'version', (select max(v.version) from etl.config_versions v join etl.pipelines l using (pipeline_id) where l.name = plan_config.config->>'pipeline'),
    'changes', v_changes,
    'drift', case when v_applied is null then '[]' else etl._config_changes(v_applied, v_current) end);
end $$;
comment on function etl.plan_config(jsonb) is
  'What etl.apply_config with this configuration would change, and how the catalog has drifted from what was last applied. Writes nothing. '
  'Raises PT422 config.invalid with every problem, PT400 plan.cycle or plan.group_cycle.';
revoke all on function etl.plan_config(jsonb) from public;
grant execute on function etl.plan_config(jsonb) to etl_reader;

-- Applies a configuration, whole, in the caller's transaction: the only way into the catalog tables.
create or replace function etl.apply_config(
  config jsonb, base_digest text default null, author text default null, git_revision text default null, source text default null) returns jsonb
language plpgsql volatile security definer set search_path = pg_catalog, pg_temp as $$
declare
  v_plan        jsonb;
  v_pipeline_id int;
  v_version     int;
begin
  -- One at a time, of whatever pipeline: a state_key belongs to one of them.
  perform pg_advisory_xact_lock(hashtextextended('b2s configuration', 0));
  v_plan := etl.plan_config(config);
  if base_digest is not null and base_digest is distinct from coalesce(v_plan->>'base_digest', '') then
    perform etl._fail('PT409', 'config.stale', 'the configuration in the database has changed since this plan was made',
      'plan again: b2s sync-config --dry-run', jsonb_build_object('base_digest', base_digest, 'digest', v_plan->'base_digest'));
  end if;
  if v_plan->'changes' = '[]' and v_plan->'drift' = '[]' then return v_plan; end if;
  v_pipeline_id := etl._store_pipeline(config);
  update etl.procedures p set is_active = false, state_key = null, watermark_strategy = null
   where p.pipeline_id = v_pipeline_id and p.is_active and p.name not in (select x->>'name' from jsonb_array_elements(apply_config.config->'procedures') x);
  perform etl._store_procedure(v_pipeline_id, p) from jsonb_array_elements(apply_config.config->'procedures') p;
  perform etl._store_links(v_pipeline_id, config);
  insert into etl.config_versions (pipeline_id, version, digest, config, changes, source, git_revision, author)
  select v_pipeline_id, coalesce(max(v.version), 0) + 1, v_plan->>'digest', etl._normalise_config(apply_config.config), v_plan->'changes', apply_config.source,
         apply_config.git_revision, coalesce(apply_config.author, etl._requester())
    from etl.config_versions v where v.pipeline_id = v_pipeline_id
  returning version into v_version;
  return v_plan || jsonb_build_object('version', v_version);
end $$;
comment on function etl.apply_config(jsonb, text, text, text, text) is
  'Applies a configuration whole and records it as a new version; returns the plan. base_digest: the digest the plan was made against, '
  'an empty string for none. Procedures that are gone are deactivated. Admins only. Raises PT422 config.invalid, PT400 plan.cycle, PT409 config.stale.';
revoke all on function etl.apply_config(jsonb, text, text, text, text) from public;
grant execute on function etl.apply_config(jsonb, text, text, text, text) to etl_admin;

-- What the database can know by itself about the health of its installation: one row per finding, or one that all is well.
-- A helper per subject, each with the columns of etl.diagnose.

create or replace function etl._diagnose_session() returns table (check_name text, status text, detail text, remedy text)
language sql stable set search_path = pg_catalog, pg_temp as $$
  select 'server', case when current_setting('server_version_num')::int >= 150000 then 'ok' else 'fail' end,
         'PostgreSQL ' || current_setting('server_version'), 'b2s needs PostgreSQL 15 or newer'
  union all
  select 'role', case when pg_has_role(etl._requester(), 'etl_operator', 'usage') then 'ok' else 'warn' end,
         format('%s %s', etl._requester(), coalesce('is a member of ' || (
           select string_agg(r, ', ') from unnest(array['etl_owner', 'etl_admin', 'etl_operator', 'etl_reader']) r where pg_has_role(etl._requester(), r, 'usage')),
           'is a member of no role of b2s')),
         format('to run procedures: grant etl_operator to %I', etl._requester())
  union all
  select s.name, case when s.is_harmless or s.value = '0' then 'ok' else 'warn' end,
         case when s.value = '0' then 'off' when s.is_harmless then s.value || ': a run is never idle in a transaction'
              else s.value || ' in this session: it ends a whole run, whatever its steps may take' end,
         format('for the role that runs: alter role %I set %s = 0', etl._requester(), s.name)
    from (values ('statement_timeout', current_setting('statement_timeout'), false),
                 ('idle_in_transaction_session_timeout', current_setting('idle_in_transaction_session_timeout'), true)) s(name, value, is_harmless)
  union all
  select 'track_counts', case when current_setting('track_counts')::boolean then 'ok' else 'fail' end, current_setting('track_counts'),
         'rows per table cannot be counted without it: alter system set track_counts = on; select pg_reload_conf()'
  union all
  select 'pg_cron', 'ok', coalesce('version ' || (select e.extversion from pg_catalog.pg_extension e where e.extname = 'pg_cron'), 'not installed; only schedules need it'), null
$$;
comment on function etl._diagnose_session() is 'Findings about the server, the role and the settings of this session.';
revoke all on function etl._diagnose_session() from public;

-- A configured routine is compiled again, as if it were configured now.
create or replace function etl._diagnose_procedures() returns table (check_name text, status text, detail text, remedy text)
language sql stable set search_path = pg_catalog, pg_temp as $$
  with compiled as materialized (
    select p.name, p.call_sql, p.rows_column, c.call_sql as now_sql, c.rows_column as now_rows_column, c.problems, d.definition
      from etl.procedures p
      cross join lateral (select etl._catalog_procedure(p) as definition) d
      cross join lateral etl._compile_call(d.definition) c
     where p.is_active
  )
  select 'routine', 'fail', format('%s: %s', c.name, x->>'message'), x->>'hint'
    from compiled c cross join lateral jsonb_array_elements(c.problems) x
  union all
  select 'routine', 'fail', format('%s: the routine has changed since it was configured', c.name), 'b2s sync-config shows the change and applies it'
    from compiled c where c.problems = '[]' and (c.now_sql, c.now_rows_column) is distinct from (c.call_sql, c.rows_column)
  union all
  select 'source', 'fail', format('%s: %s', c.name, x->>'message'), x->>'hint'
    from compiled c cross join lateral jsonb_array_elements(etl._watermark_problems(c.definition)) x
  union all
  select 'materialized view', 'fail', format('%s: %s', c.name, x->>'message'), x->>'hint'
    from compiled c cross join lateral jsonb_array_elements(etl._refresh_problems(c.definition)) x
  union all
  select distinct 'materialized view', 'warn', format('%s cannot be refreshed concurrently: readers wait', t.name),
         'populate it once (refresh materialized view ...) and create a unique index on plain columns of all its rows'
    from etl.procedure_refresh_targets x
    join etl.refresh_targets t using (refresh_target_id)
    join etl.procedures p using (procedure_id)
   where p.is_active and x.concurrency <> 'false' and not etl._can_refresh_concurrently(to_regclass(t.name))
$$;
comment on function etl._diagnose_procedures() is 'Findings about the routines, sources and materialized views that are configured.';
revoke all on function etl._diagnose_procedures() from public;

create or replace function etl._diagnose_pipelines() returns table (check_name text, status text, detail text, remedy text)
language sql stable set search_path = pg_catalog, pg_temp as $$
  select 'pipeline', 'warn', 'no pipeline is configured', 'write transformations.yaml, then: b2s sync-config'
   where not exists (select from etl.procedures p where p.is_active)
  union all
  select 'pipeline', case when d.is_drifted then 'warn' else 'ok' end,
         format('%s, version %s of %s%s', l.name, v.version, to_char(v.applied_at, 'YYYY-MM-DD HH24:MI'),
                case when d.is_drifted then ', but the catalog was changed since by other means' else '' end),
         'b2s sync-config shows the drift and applies the file'
    from etl.pipelines l
    join lateral (select * from etl.config_versions c where c.pipeline_id = l.pipeline_id order by c.version desc limit 1) v on true
    cross join lateral (select v.config is distinct from etl._catalog_config(l.name) as is_drifted) d
  union all
  select 'full refresh', 'warn', format('frozen since %s by %s: %s', to_char(f.changed_at, 'YYYY-MM-DD HH24:MI'), f.changed_by, f.reason),
         'an admin lifts it: select etl.freeze_full_refresh(false, reason => ''...'')'
    from (select * from etl.full_refresh_freezes order by freeze_id desc limit 1) f where f.is_frozen
  union all
  select 'run', 'fail', format('run %s of %s is dead: its session (backend %s) is gone', h.run_id, h.pipeline, h.worker_pid),
         'the next run of the pipeline records it as abandoned: b2s run'
    from etl.run_history h where h.is_dead
  union all
  select 'run lock', 'fail', format('backend %s holds the run lock of %s but executes nothing', k.pid, l.name),
         format('its CALL failed in COMMIT; end that session: select pg_terminate_backend(%s)', k.pid)
    from pg_catalog.pg_locks k
    join etl.pipelines l on l.pipeline_id::oid = k.objid
   where k.locktype = 'advisory' and k.classid = 6435443 and k.objsubid = 2 and k.granted
     and k.database = (select d.oid from pg_catalog.pg_database d where d.datname = current_database())
     and not exists (select from pg_catalog.pg_locks t where t.pid = k.pid and t.locktype = 'virtualxid')
$$;
comment on function etl._diagnose_pipelines() is 'Findings about pipelines: configuration, freeze, dead runs, run locks nobody uses.';
revoke all on function etl._diagnose_pipelines() from public;

create or replace function etl._has_leading_index(relation oid, column_name text) returns boolean
language sql stable set search_path = pg_catalog, pg_temp as $$
  with tables as (
    select relation as oid, true as is_whole union all
    select t.relid, false from pg_partition_tree(relation) t where t.isleaf and t.relid <> relation
  ), served as (
    select t.is_whole, exists (
             select from pg_catalog.pg_index i join pg_catalog.pg_attribute a on a.attrelid = i.indrelid and a.attnum = i.indkey[0]
              where i.indrelid = t.oid and i.indisvalid and i.indpred is null and a.attname = column_name) as is_served
      from tables t
  )
  select coalesce(bool_or(s.is_served) filter (where s.is_whole), false) or coalesce(bool_and(s.is_served) filter (where not s.is_whole), false) from served s
$$;
comment on function etl._has_leading_index(oid, text) is 'Whether an index leads with a column, of a table or of all partitions it has.';
revoke all on function etl._has_leading_index(oid, text) from public;

-- What a strategy relies on, column by column.
create or replace function etl._diagnose_watermarks() returns table (check_name text, status text, detail text, remedy text)
language sql stable set search_path = pg_catalog, pg_temp as $$
  with watched as materialized (
    select p.name, p.watermark_strategy as strategy, c.*, format('%s: %s', p.name, c.source) as subject
      from etl.procedures p cross join lateral etl._watermark_columns(p) c
     where p.is_active
  )
  select 'upgrade', 'hint', format('%s reads by %s: %s', p.name, p.watermark_strategy,
           case p.watermark_strategy when 'timestamp' then 'its windows end where the oldest open transaction began'
                                     else 'its windows wait for whoever writes to the table, and updates are not seen' end), u.hint
    from etl.procedures p cross join lateral (select etl._upgrade_hint(p) as hint) u
   where p.is_active and u.hint is not null
  union all
  select 'watermark', 'warn', format('%s: %s is %s', w.name, w.table_name, case w.relkind
           when 'v' then 'a view: whoever writes to any table counts as its writer'
           when 'm' then 'a materialized view: rows appear with its refresh, however old their values are'
           else 'a foreign table: transactions that are open on its server are not seen' end),
         'name the column of the table that the rows are first written to; or set a delay that covers it'
    from watched w where w.relkind in ('v', 'm', 'f')
  union all
  select 'watermark', 'warn', format('%s is a timestamp without time zone: it means another moment in each session''s TimeZone', w.subject),
         format('alter table %s alter column %I type timestamptz (rewrites the table); or let everybody use one TimeZone', w.table_name, w.column_name)
    from watched w where w.type = 'timestamp without time zone'
  union all
  select 'watermark', 'warn', format('%s leads no index: each run reads the whole table', w.subject),
         case when w.column_name = 'etl_xid' then format('b2s watermark add-column %s', w.table_name)
              when w.relkind = 'p' then format('create index on %s (%I), at a time when writers may wait', w.table_name, w.column_name)
              else format('create index concurrently on %s (%I)', w.table_name, w.column_name) end
    from watched w where w.relkind in ('r', 'p', 'm') and not etl._has_leading_index(w.relation, w.column_name)
  union all
  select 'watermark', 'warn', format('%s may be null, and a row where it is would never be read', w.subject),
         format('alter table %s alter column %I set not null', w.table_name, w.column_name)
    from watched w where w.is_nullable and w.relkind in ('r', 'p')
$$;
comment on function etl._diagnose_watermarks() is 'Findings about the columns by which new rows are told.';
revoke all on function etl._diagnose_watermarks() from public;

-- The column of the xid strategy is only as good as what fills it.
create or replace function etl._diagnose_xid_columns() returns table (check_name text, status text, detail text, remedy text)
language sql stable set search_path = pg_catalog, pg_temp as $$
  with stamped as (
    select distinct w.source, w.table_name, w.column_name, m.oid as relation
      from etl.procedures p
      cross join lateral etl._watermark_columns(p) w
      cross join lateral unnest(etl._source_tables(array[w.source])) m(oid)
     where p.is_active and p.watermark_strategy = 'xid'
  ), found as materialized (
    select s.*, pg_stat_get_tuples_updated(s.relation) as updates,
           (select pg_get_expr(d.adbin, d.adrelid) from pg_catalog.pg_attribute a
              join pg_catalog.pg_attrdef d on d.adrelid = a.attrelid and d.adnum = a.attnum
             where a.attrelid = s.relation and a.attname = s.column_name) as default_sql,
           exists (select from pg_catalog.pg_subscription_rel r where r.srrelid = s.relation) as is_subscribed,
           -- A column of another name has a trigger function of its own, which cannot be told from others.
           (select max(case g.tgenabled when 'A' then 2 when 'O' then 1 else 0 end) from pg_catalog.pg_trigger g
             where g.tgrelid = s.relation and g.tgtype & 19 = 19 and (g.tgfoid = 'etl.touch_xid()'::regprocedure or s.column_name <> 'etl_xid')) as trigger_level
      from stamped s
  ), remedied as (
    select f.*, case when f.column_name = 'etl_xid' then format('b2s watermark add-column %s', f.table_name)
                     else 'give it what b2s watermark add-column --dry-run prints for etl_xid' end as remedy
      from found f
  )
  select 'watermark', 'warn', format('rows of %s are updated, but no trigger sets %s: updates are not seen', r.relation::regclass, r.column_name), r.remedy
    from remedied r where r.updates > 0 and coalesce(r.trigger_level, 0) = 0
  union all
  select 'watermark', 'warn', format('the trigger of %s that sets %s is not enabled always: rows that arrive by replication keep the value they bring',
           r.relation::regclass, r.column_name), r.remedy
    from remedied r where r.is_subscribed and r.trigger_level = 1
  union all
  select 'watermark', 'warn', format('%s of %s has no default pg_current_xact_id()', r.column_name, r.relation::regclass), r.remedy
    from remedied r where coalesce(r.default_sql not like '%pg_current_xact_id()%', true)
  union all
  select 'watermark', 'fail', format('the watermark of %s counts the transactions of another cluster: its windows are refused', s.state_key),
         format('b2s watermark rebase %s --reason ''...''', s.state_key)
    from etl.state s cross join pg_control_system() c
   where s.strategy = 'xid' and s.last_success_watermark is not null and exists (select from etl.procedures p where p.state_key = s.state_key and p.is_active)
     and (s.server_id <> c.system_identifier or pg_snapshot_xmax(s.last_success_watermark::pg_snapshot) > pg_snapshot_xmax(pg_current_snapshot()))
$$;
comment on function etl._diagnose_xid_columns() is 'Findings about the xid strategy: default and trigger of its columns, replication, watermarks of another cluster.';
revoke all on function etl._diagnose_xid_columns() from public;

-- What timestamps and ids wait for. xid waits for nobody.
create or replace function etl._diagnose_horizons(older_than interval default '1 minute')
returns table (check_name text, status text, detail text, remedy text)
language sql volatile set search_path = pg_catalog, pg_temp as $$
  with waiting as materialized (
    select bool_or(p.watermark_strategy = 'timestamp') as by_timestamp, bool_or(p.watermark_strategy = 'id') as by_id
      from etl.procedures p where p.is_active
  ), writer as materialized (
    select w.pid from etl.procedures p cross join lateral etl._writers(etl._source_tables(p.watermark_sources)) w
     where p.is_active and p.watermark_strategy = 'id'
  )
  select 'pg_read_all_stats', 'fail', 'etl_owner cannot see when others began their transactions, so windows of timestamps are refused while there are any',
         'grant pg_read_all_stats to etl_owner'
    from waiting where by_timestamp and not pg_has_role('etl_owner', 'pg_read_all_stats', 'usage')
  union all
  select 'track_activities', 'warn', format('off %s: its transactions do not show when they began, and windows of timestamps are refused meanwhile', t.place), t.remedy
    from waiting cross join lateral (
      select 'in this session' as place, 'alter system set track_activities = on; select pg_reload_conf()' as remedy
       where not current_setting('track_activities')::boolean
      union all
      select concat_ws(' ', case when s.setrole <> 0 then 'for role ' || s.setrole::regrole end, 'in database ' || d.datname),
             format('alter %s reset track_activities', case
               when s.setrole = 0 then 'database ' || quote_ident(d.datname)
               else 'role ' || s.setrole::regrole || coalesce(' in database ' || quote_ident(d.datname), '') end)
        from pg_catalog.pg_db_role_setting s left join pg_catalog.pg_database d on d.oid = s.setdatabase
       where (s.setdatabase = 0 or d.datname = current_database()) and exists (
               select from unnest(s.setconfig) c where c ~ '^track_activities=(off|false|no|0)$')
    ) t where by_timestamp
  union all
  select 'horizon', 'warn', format('%s holds back the windows of %s', etl._describe_holder(a.pid), case when by_timestamp then 'timestamps' else 'ids' end),
         format('look at it: select * from pg_stat_activity where pid = %1$s; end it: select pg_terminate_backend(%1$s)', a.pid)
    from waiting cross join pg_stat_get_activity(null) a
   where a.datid = (select d.oid from pg_catalog.pg_database d where d.datname = current_database()) and a.pid <> pg_backend_pid()
     and a.usesysid is not null and a.leader_pid is null and a.backend_type not in ('autovacuum worker', 'walsender') and a.xact_start < clock_timestamp() - older_than
     and (by_timestamp or by_id and a.pid in (select w.pid from writer w))
  union all
  select 'horizon', 'warn', format('transaction %s was prepared by %s at %s and holds back the windows of the tables it wrote to', x.gid, x.owner,
           to_char(x.prepared, 'YYYY-MM-DD HH24:MI:SS')), format('commit prepared %1$L, or rollback prepared %1$L', x.gid)
    from waiting cross join pg_catalog.pg_prepared_xacts x
   where x.database = current_database() and x.prepared < clock_timestamp() - older_than and (by_timestamp or by_id)
$$;
comment on function etl._diagnose_horizons(interval) is 'Findings about what holds windows of timestamps and ids back, or hides it.';
revoke all on function etl._diagnose_horizons(interval) from public;

create or replace function etl.diagnose() returns table (check_name text, status text, detail text, remedy text)
language sql stable security definer set search_path = pg_catalog, pg_temp as $$
  with found as materialized (
    select 1 as part, f.* from etl._diagnose_session() f
    union all
    select 2, f.* from etl._diagnose_pipelines() f
    union all
    select 3, f.* from etl._diagnose_procedures() f
    union all
    select 4, f.* from etl._diagnose_watermarks() f
    union all
    select 4, f.* from etl._diagnose_xid_columns() f
    union all
    select 4, f.* from etl._diagnose_horizons() f
  ), sound(part, check_name, detail) as (
    values (2, 'run', 'no run is dead'), (2, 'run lock', 'held by living runs only'), (2, 'full refresh', 'not frozen'),
           (3, 'routine', 'all configured routines exist and fit'), (3, 'source', 'etl_owner may read every watermark column'),
           (3, 'materialized view', 'all can be refreshed while they are read'),
           (4, 'watermark', 'every source is as its strategy needs it'), (4, 'horizon', 'nobody holds a window back')
  )
  select f.check_name, f.status, f.detail, case when f.status <> 'ok' then f.remedy end
    from (select * from found
          union all
          select s.part, s.check_name, 'ok', s.detail, null from sound s
           where not exists (select from found f where f.check_name = s.check_name)) f
   order by f.part, f.check_name, f.status, f.detail
$$;
comment on function etl.diagnose() is
  'What the database knows about the health of its installation: status ok, hint, warn or fail, and for all but the first a remedy. Changes nothing.';
revoke all on function etl.diagnose() from public;
grant execute on function etl.diagnose() to etl_reader;

-- Proves the contract of a routine on a scratch copy: what must hold so that any number of runs, in any windows, give one result.

-- Everything a test needs to know about a procedure. A run has a number; a test has -1.
create or replace function etl._contract_of(procedure text, since text, until text, pieces int, params jsonb, ignore_columns text[], max_rows int, pipeline text)
returns jsonb
language plpgsql volatile set search_path = pg_catalog, pg_temp as $$
declare
  v_pipeline  etl.pipelines := etl._pipeline(pipeline);
  v_procedure etl.procedures;
  v_params    record;
  v_window    record;
  v_contract  jsonb;
begin
  select * into v_procedure from etl.procedures p where p.pipeline_id = v_pipeline.pipeline_id and p.name = procedure and p.is_active;
  if not found then
    perform etl._fail('PT404', 'procedure.unknown', format('there is no procedure %s', procedure), 'what there is: select * from etl.list_procedures()');
  end if;
  v_params := etl._check_parameters(v_procedure.procedure_id, v_procedure.name, params);
  if v_params.problems is not null then
    perform etl._fail('PT422', 'params.invalid', (select string_agg(p->>'message', '; ') from jsonb_array_elements(v_params.problems) p),
      'what there is: select * from etl.list_procedures()', jsonb_build_object('errors', v_params.problems));
  end if;
  v_contract := jsonb_strip_nulls(jsonb_build_object('name', v_procedure.name, 'run_id', -1, 'call_sql', v_procedure.call_sql,
    'rows_column', v_procedure.rows_column, 'settings', nullif(etl._step_settings(v_procedure, v_pipeline.search_path) - 'lock_timeout_ms', '{}'),
    'mode', case when v_procedure.watermark_strategy is null then v_procedure.default_mode else 'incremental' end,
    'allow_full', v_procedure.allow_full_refresh, 'strategy', v_procedure.watermark_strategy, 'pieces', pieces, 'max_rows', max_rows))
    || jsonb_build_object('parameters', v_params.parameters, 'ignored', coalesce(to_jsonb(ignore_columns), '[]'), 'tables', '{}'::jsonb, 'cuts', '[]'::jsonb,
                          'sources', etl._contract_sources(v_procedure.watermark_sources));
  if v_procedure.watermark_strategy is null then
    if since is not null or until is not null then
      perform etl._fail('PT422', 'test.window', format('%s has no watermark, so it has no window', v_procedure.name), 'leave out since and until');
    end if;
    return v_contract;
  end if;
  v_window := etl._contract_window(v_contract, since, until, v_procedure.watermark_sources);
  v_contract := v_contract || jsonb_build_object('since', v_window.since, 'until', v_window.until);
  return v_contract || jsonb_build_object('cuts', etl._contract_cuts(v_contract),
    'row_count', etl._contract_count_inside(v_contract, v_window.since, v_window.until));
end $$;
comment on function etl._contract_of(text, text, text, int, jsonb, text[], int, text) is
  'What etl.test_procedure is to test: call, window and sources. Raises PT404 procedure.unknown, PT422 params.invalid and test.window.';
revoke all on function etl._contract_of(text, text, text, int, jsonb, text[], int, text) from public;

create or replace function etl._contract_runs(contract jsonb, counted bigint) returns jsonb
language sql immutable set search_path = pg_catalog, pg_temp as $$
  select etl._contract_finding('runs', case when contract->'tables' = '{}' or contract->>'row_count' = '0' or v.is_idle then 'warn' else 'ok' end,
    concat_ws('; ', case when contract ? 'strategy' then 'window ' || etl._contract_show_window(contract->>'since', contract->>'until')
                         || coalesce(format(' of %s row(s) in its sources', contract->>'row_count'), '') else 'no window' end,
      case when contract->'tables' = '{}' then 'it wrote to no table'
           else format('wrote %s row(s) in %s', counted, (select string_agg(k, ', ' order by k) from jsonb_object_keys(contract->'tables') k)) end,
      'emptied for the checks that follow: ' || nullif((select string_agg(e, ', ' order by e) from jsonb_array_elements_text(contract->'emptied') e), '')),
    case when contract->'tables' = '{}' or contract->>'row_count' = '0' or v.is_idle
           then 'little is proven by that: put rows into its sources' || case when contract ? 'strategy' then ', or name another window' else '' end end)
    from (select counted = 0 and contract->'emptied' = '[]' as is_idle) v
$$;
comment on function etl._contract_runs(jsonb, bigint) is 'The first finding of a test: what was run on which window.';
revoke all on function etl._contract_runs(jsonb, bigint) from public;

create or replace function etl._test_procedure(contract jsonb) returns jsonb
language plpgsql volatile set search_path = pg_catalog, pg_temp as $$
declare
  v_run      record;
  v_checked  record;
  v_findings jsonb;
begin
  perform etl._contract_check_tables(contract);
  v_run := etl._contract_variant(contract, jsonb_build_array(etl._contract_call_of(contract, contract->>'since', contract->>'until')), null,
                                 contract#>'{settings,checks}');
  if v_run.failure is not null then return jsonb_build_array(etl._contract_finding('runs', 'fail', v_run.failure->>'message', v_run.failure->>'hint')); end if;
  contract := contract || jsonb_build_object('tables', v_run.tables);
  if v_run.tables = '{}' then return jsonb_build_array(etl._contract_runs(contract, v_run.counted)); end if;
  perform etl._contract_check_tables(contract);
  contract := contract || jsonb_build_object('emptied', etl._contract_emptied(contract));
  v_checked := etl._contract_findings(contract);
  v_findings := etl._contract_runs(contract, v_run.counted) || v_checked.findings
    || etl._contract_rows_reported(contract, v_run.reported, v_run.counted);
  if (contract->>'allow_full')::boolean and contract->>'mode' <> 'full' then v_findings := v_findings || etl._contract_full(v_checked.contract); end if;
  if current_setting('transaction_isolation') = 'read committed' and v_findings @> '[{"status": "fail"}]' then
    v_findings := v_findings || etl._contract_finding('snapshot', 'warn', 'rows that other sessions committed while the test ran can be among these differences',
      'to rule that out: begin isolation level repeatable read; select * from etl.test_procedure(...); rollback');
  end if;
  return v_findings;
end $$;
comment on function etl._test_procedure(jsonb) is 'The findings of a test, in no order. Raises PT403 test.not_readable, PT422 test.too_large.';
revoke all on function etl._test_procedure(jsonb) from public;

-- Each variant is undone as soon as it is compared; the lock timeout bounds how long it waits for others, and it ends with this function.
create or replace function etl.test_procedure(
  procedure text, since text default null, until text default null, pieces int default 3, params jsonb default null,
  ignore_columns text[] default null, max_rows int default 200000, pipeline text default null)
returns table (check_name text, status text, detail text, remedy text, difference jsonb)
language plpgsql volatile security definer set search_path = pg_catalog, pg_temp set lock_timeout = '5s' as $$
begin
  if pieces is null or pieces not between 2 and 100 or max_rows is null or max_rows < 1 then
    perform etl._fail('PT422', 'request.invalid', 'pieces is 2 to 100 and max_rows at least 1', 'leave them out for 3 and 200000');
  end if;
  if pg_my_temp_schema() <> 0 then perform etl._check_temporary_objects(); end if;
  return query
    select f.check_name, f.status, f.detail, f.remedy, nullif(f.difference, 'null')
      from jsonb_array_elements(etl._test_procedure(etl._contract_of(procedure, since, until, pieces, params, ignore_columns, max_rows, pipeline)))
             with ordinality e(finding, n)
      cross join lateral jsonb_to_record(e.finding) f(check_name text, status text, detail text, remedy text, difference jsonb)
     order by array_position('{runs,deterministic,idempotent,splits,boundary,nulls,rows_reported,full,empty_window,snapshot}'::text[], f.check_name), e.n;
end $$;
comment on function etl.test_procedure(text, text, text, int, jsonb, text[], int, text) is
  'Proves the contract of a routine on a scratch copy that only this transaction sees and that is always undone: it runs; twice from the same rows gives '
  'the same; run twice is run once; one window is the same window in pieces; a row between two windows is read once; nulls; the number of rows it returns; '
  'a full refresh can be repeated; an empty window changes nothing. Status ok, fail, warn or skipped; difference: rows with - or +. '
  'Without since and until the newest 10,000 rows of each source are the window. Admins only. Raises PT404 procedure.unknown, PT422 params.invalid, request.invalid, test.window, test.too_large, PT403 test.not_readable.';
revoke all on function etl.test_procedure(text, text, text, int, jsonb, text[], int, text) from public;
grant execute on function etl.test_procedure(text, text, text, int, jsonb, text[], int, text) to etl_admin;

-- What people and programs read.

create or replace view etl.run_history as
select r.run_id, l.name as pipeline, r.status, r.mode, r.requested_by, r.submitted_at, r.started_at, r.ended_at,
       coalesce(r.duration_ms, extract(epoch from clock_timestamp() - r.started_at) * 1000)::numeric(16, 3) as duration_ms,
       r.step_count, r.as_of, r.reason, r.approved_by, r.idempotency_key, r.parent_run_id, r.worker_pid,
       r.status = 'running' and not etl._is_alive(r) as is_dead,
       r.cancel_requested_at, r.cancel_requested_by, r.cancel_reason, r.error_code, r.error_message, r.kind
  from etl.runs r join etl.pipelines l using (pipeline_id);
comment on view etl.run_history is
  'Runs and backfills (kind) for people. duration_ms counts on while a run is active; is_dead: its session is gone, the next start marks it abandoned.';

create or replace view etl.step_history as
select p.run_id, p.order_index, p.attempt, p.procedure_name as procedure, p.procedure_type as type, p.group_name, p.mode, p.status, p.skip_reason,
       p.started_at, p.ended_at, coalesce(p.duration_ms, extract(epoch from clock_timestamp() - p.started_at) * 1000)::numeric(16, 3) as duration_ms,
       p.rows_affected, p.table_counts, p.warnings, p.tx_scope, p.isolation, p.window_since, p.window_until, p.parameters, p.dependencies,
       etl._render_call(p.statement, p.mode, p.window_since, p.window_until, p.run_id, p.parameters) as statement,
       p.error_class, p.error_code, p.sqlstate, p.error_message, p.error_detail, p.error_hint, p.error_context, p.window_goal, p.slice_index,
       p.held_back_by
  from etl.procedure_runs p;
comment on view etl.step_history is 'Attempts for people: the statement has its values written in.';

-- Chunks of backfills say nothing about how runs fare: the lock of their run has a negative key.
create or replace view etl.procedure_health as
select p.name as procedure, p.type, l.name as pipeline, last.run_id as last_run_id, last.status as last_status, last.ended_at as last_ended_at,
       last.duration_ms as last_duration_ms, last.rows_affected as last_rows_affected, last.error_code as last_error_code,
       last.error_message as last_error_message, etl._last_success_at(p.procedure_id) as last_success_at,
       s.last_success_watermark as watermark
  from etl.procedures p
  join etl.pipelines l using (pipeline_id)
  left join lateral (select * from etl.procedure_runs r where r.procedure_id = p.procedure_id and r.lock_key > 0
                      order by r.run_id desc, r.attempt desc limit 1) last on true
  left join etl.state s on s.state_key = p.state_key
 where p.is_active;
comment on view etl.procedure_health is 'How each active procedure last ended in a run, when it last succeeded in one, and its watermark. Backfills do not count.';

create or replace view etl.run_events as
select r.started_at as at, 'run_started' as event, r.run_id, null::int as order_index, null::text as procedure, r.mode, null::text as tx_scope,
       null::int as attempt, null::numeric as duration_ms, null::bigint as rows_affected, null::text as error_code, null::text as error_message
  from etl.runs r where r.started_at is not null
union all
select p.started_at, 'step_started', p.run_id, p.order_index, p.procedure_name, p.mode, p.tx_scope, p.attempt, null, null, null, null
  from etl.procedure_runs p where p.started_at is not null
union all
select p.ended_at, 'step_' || p.status, p.run_id, p.order_index, p.procedure_name, p.mode, p.tx_scope, p.attempt, p.duration_ms, p.rows_affected,
       coalesce(p.error_code, p.skip_reason), p.error_message
  from etl.procedure_runs p where p.ended_at is not null
union all
select m.ended_at, 'refresh_' || m.status, m.run_id, null, m.mv_name, null, null, null, m.duration_ms, null, coalesce(m.error_code, m.skip_reason),
       coalesce(m.error_message, m.warning)
  from etl.mv_refreshes m where m.ended_at is not null
union all
select r.ended_at, 'run_' || r.status, r.run_id, null, null, r.mode, null, null, r.duration_ms, null, r.error_code, r.error_message
  from etl.runs r where r.ended_at is not null;
comment on view etl.run_events is 'What happened in each run, event by event, from the run tables. Source of b2s logs.';

create or replace view etl.backfill_progress as
select r.run_id, l.name as pipeline, array(select n.name from jsonb_array_elements_text(r.request->'procedures') n(name)) as procedures, r.status,
       r.request->>'from' as from_, r.request->>'until' as until, r.request->>'chunk' as chunk, r.step_count as chunks_total,
       c.done as chunks_done, c.failed as chunks_failed, r.step_count - c.done - c.failed as chunks_left, c.rows_affected,
       round(c.rows_affected / nullif(e.seconds, 0), 1) as rows_per_second, round(60 * c.done / nullif(e.seconds, 0), 1) as chunks_per_minute, r.started_at,
       case when e.is_alive and c.done > 0
         then clock_timestamp() + (r.step_count - c.done - c.failed) * (c.mean_ms + r.pause_ms) * interval '1 ms' end as eta,
       r.parent_run_id, r.status = 'running' and not e.is_alive as is_dead
  from etl.runs r
  join etl.pipelines l using (pipeline_id)
  cross join lateral (
    select count(*) filter (where p.status = 'succeeded')::int as done, count(*) filter (where p.status = 'failed')::int as failed,
           coalesce(sum(p.rows_affected), 0)::bigint as rows_affected, avg(p.duration_ms) filter (where p.status = 'succeeded') as mean_ms
      from etl.procedure_runs p where p.run_id = r.run_id) c
  cross join lateral (
    select etl._is_alive(r) as is_alive, coalesce(r.duration_ms / 1000, extract(epoch from clock_timestamp() - r.started_at)) as seconds) e
 where r.kind = 'backfill';
comment on view etl.backfill_progress is
  'Backfills: range, chunks that succeeded (done), failed or are left, rows, rates, and when it will have ended (eta) at the mean time of a chunk. '
  'Left are those not started yet, or never: etl.backfill(resume => run_id) takes them up, and those that failed.';

grant select on etl.backfill_progress, etl.run_history, etl.step_history, etl.procedure_health, etl.run_events to etl_reader;

-- Watermarks for people: up to where each has got, up to where it could get now, and what is in the way.

-- Ids and snapshots do not say when they were new; the ticks do.
create or replace function etl._watermark_lag(strategy text, state_key text, watermark text) returns interval
language sql volatile set search_path = pg_catalog, pg_temp as $$
  select clock_timestamp() - case when strategy = 'timestamp' then (select t.at from (select watermark::timestamptz as at) t where isfinite(t.at))
    else (select t.ticked_at from etl.watermark_ticks t
           where t.state_key = _watermark_lag.state_key and not etl._is_after(strategy, t.bound, watermark)
           order by t.ticked_at desc limit 1) end
$$;
comment on function etl._watermark_lag(text, text, text) is
  'How old a watermark is: for timestamps the distance to the clock, else the age of the newest tick that it has reached. Null: not known.';
revoke all on function etl._watermark_lag(text, text, text) from public;

-- With the rights of the owner, as a step reads, for what is configured under a key: a definition is never taken from the
-- caller. A source that cannot be read is told in its own row and hides no other one.
create or replace function etl._watermark_now(state_key text, out horizon text, out held_back_by text, out lag interval, out hint text, out problem text)
language plpgsql volatile security definer set search_path = pg_catalog, pg_temp as $$
declare
  v_state     etl.state;
  v_procedure etl.procedures;
  v_safe      record;
begin
  select * into v_state from etl.state s where s.state_key = _watermark_now.state_key;
  lag := etl._watermark_lag(v_state.strategy, state_key, v_state.last_success_watermark);
  for v_procedure in select * from etl.procedures p where p.state_key = _watermark_now.state_key and p.is_active order by p.name loop
    hint := coalesce(hint, etl._upgrade_hint(v_procedure));
    if v_state.strategy = 'xid' and v_state.last_success_watermark is not null then perform etl._check_snapshot(v_state); end if;
    v_safe := etl._upper_bound(v_procedure.watermark_strategy, state_key, v_procedure.watermark_sources, v_procedure.delay_ms, 0);
    if horizon is null or etl._is_after(v_procedure.watermark_strategy, horizon, v_safe.bound) then
      horizon := v_safe.bound;
      held_back_by := v_safe.held_back_by;
    end if;
  end loop;
exception when others then
  problem := sqlerrm;
end $$;
comment on function etl._watermark_now(text) is
  'For one state_key: up to where may be read now, without waiting, and what holds that back; how old the watermark is; what could be better; what is wrong.';
revoke all on function etl._watermark_now(text) from public;
grant execute on function etl._watermark_now(text) to etl_reader;

create or replace view etl.watermarks as
select k.state_key, l.name as pipeline, p.procedures, coalesce(p.strategy, s.strategy) as strategy, p.sources, s.last_success_watermark as watermark,
       n.lag, n.horizon, n.held_back_by, s.last_run_id, s.last_run_at, s.last_rowcount, n.hint, n.problem
  from (select q.state_key from etl.procedures q where q.is_active and q.state_key is not null union select t.state_key from etl.state t) k
  left join etl.state s using (state_key)
  left join lateral (
    select min(q.pipeline_id) as pipeline_id, min(q.watermark_strategy) as strategy, array_agg(distinct q.name order by q.name) as procedures,
           array_agg(distinct c.source order by c.source) as sources
      from etl.procedures q cross join lateral unnest(q.watermark_sources) c(source)
     where q.state_key = k.state_key and q.is_active) p on true
  left join etl.pipelines l using (pipeline_id)
  cross join lateral etl._watermark_now(k.state_key) n;
comment on view etl.watermarks is
  'Every watermark: its procedures and sources, how old it is, up to where could be read now, and what holds that back. Source of b2s watermark list.';
comment on column etl.watermarks.procedures is 'The active procedures that read up to it; null: none does any more.';
comment on column etl.watermarks.sources is 'The columns, or the query, by which new rows are told.';
comment on column etl.watermarks.watermark is 'Up to where has been read, exclusive; null: nothing yet.';
comment on column etl.watermarks.lag is 'How old the watermark is; for ids and snapshots by the ticks, null when none is old enough.';
comment on column etl.watermarks.horizon is 'Up to where a run could read now without waiting, exclusive.';
comment on column etl.watermarks.held_back_by is 'The session or prepared transaction because of which the horizon is not newer.';
comment on column etl.watermarks.hint is 'What would make its windows stronger.';
comment on column etl.watermarks.problem is 'Why the horizon cannot be told: the error of the source.';

grant select on etl.watermarks to etl_reader;

-- Last part of every install and upgrade: drop what an earlier release left, stamp the version.
--
-- Every routine of this release was created or replaced by this transaction, so a routine of schema etl
-- that this transaction did not write is one that this release no longer has.
do $$
declare
  v_routine record;
begin
  for v_routine in
    select p.oid::regprocedure as signature
      from pg_catalog.pg_proc p
     where p.pronamespace = 'etl'::regnamespace and p.xmin <> pg_current_xact_id()::xid
  loop
    execute format('drop routine %s', v_routine.signature);
  end loop;
  insert into etl.installation (version) values (current_setting('b2s.version'))
  on conflict (is_only_row) do update
    set version = excluded.version, installed_at = clock_timestamp(), installed_by = session_user;
end $$;

grant usage on schema etl to etl_reader;
grant select on all tables in schema etl to etl_reader;

commit;
\echo b2s 0.1.0 is installed
