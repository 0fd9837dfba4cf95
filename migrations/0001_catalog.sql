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
