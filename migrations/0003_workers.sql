-- A run has a lock of its own, its steps share the safe timestamp for a moment, and further sessions come through dblink.

comment on column etl.runs.worker_pid is
  'Backend that took the run up. It, and every session that helps (etl.run_workers), shares the advisory lock (6435444, run_id), or (6435444, -run_id) for a backfill.';
comment on column etl.procedure_runs.lock_key is 'The advisory lock of its run is (6435444, lock_key).';

create table etl.recent_horizons (
  pipeline_id  int primary key references etl.pipelines,
  run_id       bigint not null,
  noted_at     timestamptz not null,
  bound        timestamptz not null,
  held_back_by text
) with (fillfactor = 50);
comment on table etl.recent_horizons is
  'Per pipeline: the safe timestamp that a step of its newest run computed last. The next steps of that run share it for 250 ms. Source: the engine.';
comment on column etl.recent_horizons.noted_at is 'When it was computed: below bound nothing was left to commit then, and so for ever.';
comment on column etl.recent_horizons.held_back_by is 'The session because of which bound was older than usual.';

alter table etl.pipelines add column helper_server text;
comment on column etl.pipelines.helper_server is
  'Foreign server of the extension dblink through which etl.start_run and etl.resume_run open further sessions for a run; null: they open none.';
