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
