-- What each procedure reads and writes: as its SQL says, and as the server saw it do.

alter table etl.pipelines add column observe_lineage text not null default 'daily',
  add constraint observe_lineage_is_known check (observe_lineage in ('daily', 'always', 'never'));
comment on column etl.pipelines.observe_lineage is
  'When the locks of a step are looked at. daily: the first time a routine runs in a mode after it has changed, then once a day.';

comment on column etl.procedure_runs.settings is
  'What the step sets or does beside its routine: timeout_ms, lock_timeout_ms, time_zone, search_path, checks, observe (its locks are looked at); null when nothing.';

create table etl.lineage_edges (
  procedure_id  int not null references etl.procedures,
  relation      text not null,
  access        text not null,
  source        text not null,
  columns       text[],
  derived_from  jsonb,
  written_rows  bigint,
  definition    text,
  first_seen_at timestamptz not null default clock_timestamp(),
  last_seen_at  timestamptz not null default clock_timestamp(),
  first_run_id  bigint,
  last_run_id   bigint,
  primary key (procedure_id, relation, access, source),
  constraint access_is_known check (access in ('read', 'write', 'reference')),
  constraint source_is_known check (source in ('static', 'observed')),
  constraint what_was_observed_belongs_to_a_run check (source <> 'observed' or last_run_id is not null)
) with (fillfactor = 70);
create index lineage_edges_relation on etl.lineage_edges (relation);
comment on table etl.lineage_edges is
  'Which relations a procedure reads and writes, and how that is known. etl.lineage shows it together with what the catalog knows. Source: etl.store_lineage (static), the engine (observed).';
comment on column etl.lineage_edges.relation is 'schema.name, quoted where needed; a partition counts as its partitioned table.';
comment on column etl.lineage_edges.access is 'read, write, or reference: rows were only locked, as a foreign key does.';
comment on column etl.lineage_edges.source is 'static: it stands in the SQL of the routine. observed: a step held a lock for it.';
comment on column etl.lineage_edges.columns is 'Columns that the SQL names; null when they are not known.';
comment on column etl.lineage_edges.derived_from is 'For a write, where a column comes from: {"amount": ["bronze.orders.amount"]}; null when it is not known.';
comment on column etl.lineage_edges.written_rows is 'Rows inserted, updated and deleted by the step that was observed last; 0: it might have written, and did not.';
comment on column etl.lineage_edges.definition is 'Digest of the routine when it was seen; when the routine has another one now, the edge may be history.';
comment on column etl.lineage_edges.last_run_id is 'The run that was observed last.';

create table etl.lineage_scans (
  procedure_id int not null references etl.procedures,
  source       text not null,
  mode         text not null default '',
  definition   text,
  scanned_at   timestamptz not null default clock_timestamp(),
  run_id       bigint,
  is_complete  boolean not null default true,
  primary key (procedure_id, source, mode),
  constraint source_is_known check (source in ('static', 'observed')),
  constraint a_scan_of_a_step_has_its_mode check ((source = 'observed') = (mode <> ''))
) with (fillfactor = 70);
comment on table etl.lineage_scans is 'When the SQL of a procedure was read, and when a step of it was observed in each mode. Source: etl.store_lineage, the engine.';
comment on column etl.lineage_scans.mode is 'incremental or full for an observed step; empty for static.';
comment on column etl.lineage_scans.is_complete is 'false: the SQL executes text that is known at run time only, so it may read and write more.';

create table etl.lineage_cursors (
  name            text primary key,
  floor_run_id    bigint not null default 0,
  emitted_run_ids bigint[] not null default '{}',
  moved_at        timestamptz not null default clock_timestamp()
);
comment on table etl.lineage_cursors is 'Which runs b2s lineage --openlineage --cursor has sent. Source: etl.move_lineage_cursor.';
comment on column etl.lineage_cursors.floor_run_id is 'Runs up to this one are not looked at any more.';
comment on column etl.lineage_cursors.emitted_run_ids is 'Runs above the floor that were sent: runs end in another order than they begin.';
