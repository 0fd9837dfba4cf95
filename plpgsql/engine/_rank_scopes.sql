-- Which of the scopes that are ready comes first, when several sessions share a run: the one with the longest path behind it, by how
-- long everything took last time. One session alone goes by the order of the plan, and needs none of this.

-- What has never run counts as much as the others on average.
create or replace function etl._expected_ms(run_id bigint) returns table (scope_index int, ms float8)
language sql stable set search_path = pg_catalog, pg_temp set jit = off as $$
  with last as materialized (
    select distinct on (m.family, m.subject_id, m.mode) m.family, m.subject_id, m.mode, m.last_seconds * 1000 as ms
      from etl.metrics m
     where m.family in ('step', 'refresh') and m.status = 'succeeded' and m.last_seconds is not null
     order by m.family, m.subject_id, m.mode, m.last_run_id desc
  ), work as (
    select p.scope_index, l.ms from etl.procedure_runs p left join last l on l.family = 'step' and l.subject_id = p.procedure_id and l.mode = p.mode
     where p.run_id = _expected_ms.run_id
    union all
    select r.scope_index, l.ms from etl.mv_refreshes r left join last l on l.family = 'refresh' and l.subject_id = r.refresh_target_id
     where r.run_id = _expected_ms.run_id
  )
  select w.scope_index, sum(coalesce(w.ms, (select avg(k.ms) from work k), 0)) from work w group by w.scope_index
$$;
comment on function etl._expected_ms(bigint) is 'How long each scope of a run is expected to take, milliseconds.';
revoke all on function etl._expected_ms(bigint) from public;

-- From the last scope to the first: whatever waits for a scope comes after it. Barriers take no time.
create or replace function etl._scope_ranks(run_id bigint) returns int[]
language plpgsql stable set search_path = pg_catalog, pg_temp as $$
declare
  v_ranks int[];
  v_scope record;
  v_rank  int;
  v_next  int;
begin
  for v_scope in
    select s.scope_index, s.required_by || s.precedes as next_scopes, coalesce(e.ms, 0)::int as ms
      from etl.run_scopes s left join etl._expected_ms(_scope_ranks.run_id) e using (scope_index)
     where s.run_id = _scope_ranks.run_id
     order by s.scope_index desc
  loop
    v_rank := 0;
    foreach v_next in array v_scope.next_scopes loop v_rank := greatest(v_rank, v_ranks[v_next]); end loop;
    v_ranks[v_scope.scope_index] := v_scope.ms + v_rank;
  end loop;
  return v_ranks;
end $$;
comment on function etl._scope_ranks(bigint) is 'Per scope of a run: its own expected time and that of the longest path behind it, milliseconds.';
revoke all on function etl._scope_ranks(bigint) from public;
