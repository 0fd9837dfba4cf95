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
