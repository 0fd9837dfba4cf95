-- The safe timestamp that the steps of a run share for a moment.

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
