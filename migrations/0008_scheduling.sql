-- Sessions that share a run begin with what the longest path waits for.

alter table etl.runs add column scope_ranks int[];
comment on column etl.runs.scope_ranks is
  'Per scope: how long it and the longest path behind it are expected to take, milliseconds. Sessions that share a run take the ready scope with the most. Null: one session executes it, or it has more than 1,000 steps. Source: etl.metrics, when a second session joins.';
