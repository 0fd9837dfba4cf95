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
