-- What belongs to the role as which steps run, a step can alter.
create or replace function etl._fail_altered(routine text) returns void
language plpgsql volatile set search_path = pg_catalog, pg_temp as $$
begin
  perform etl._fail('PT403', 'engine.altered', format('routine %s was altered since it was installed', routine),
    'a step, or somebody as etl_owner, did that: find out who, then install it anew: b2s migrate', jsonb_build_object('routine', routine));
end $$;
comment on function etl._fail_altered(text) is 'Raises PT403 engine.altered: a routine of the engine does not run as it was installed.';
revoke all on function etl._fail_altered(text) from public;
grant execute on function etl._fail_altered(text) to etl_owner;
