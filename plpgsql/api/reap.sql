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
