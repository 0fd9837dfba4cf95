-- Last part of every install and upgrade: drop what an earlier release left, stamp the version.
--
-- Every routine of this release was created or replaced by this transaction, so a routine of schema etl
-- that this transaction did not write is one that this release no longer has.
do $$
declare
  v_routine record;
begin
  for v_routine in
    select p.oid::regprocedure as signature
      from pg_catalog.pg_proc p
     where p.pronamespace = 'etl'::regnamespace and p.xmin <> pg_current_xact_id()::xid
  loop
    execute format('drop routine %s', v_routine.signature);
  end loop;
  insert into etl.installation (version) values (current_setting('b2s.version'))
  on conflict (is_only_row) do update
    set version = excluded.version, installed_at = clock_timestamp(), installed_by = session_user;
end $$;

grant usage on schema etl to etl_reader;
grant select on all tables in schema etl to etl_reader;
do $$
begin
  if to_regprocedure('etl._count_history()') is not null then perform etl._count_history(); end if;
end $$;
