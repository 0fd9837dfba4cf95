-- Runs whose sessions are all gone, recorded as what they are. Every start does this for its own pipeline; this does it for all.
create or replace function etl.reap() returns int
language plpgsql volatile security definer set search_path = pg_catalog, pg_temp as $$
begin
  return etl._abandon_dead_runs(null);
end $$;
comment on function etl.reap() is 'Records runs and backfills whose sessions are gone as abandoned; returns how many. For a clock; every start does it for its pipeline anyway.';
revoke all on function etl.reap() from public;
grant execute on function etl.reap() to etl_operator;
