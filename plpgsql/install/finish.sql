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

grant select on all tables in schema etl to etl_reader;

-- Tables have no right for PUBLIC of their own accord; types have.
do $$
declare
  v_type regtype;
begin
  for v_type in
    select t.oid from pg_catalog.pg_type t
     where t.typnamespace = 'etl'::regnamespace and (t.typtype in ('d', 'e') or exists (select from pg_catalog.pg_class c where c.oid = t.typrelid and c.relkind = 'c'))
  loop
    execute format('revoke all on type %s from public', v_type);
  end loop;
end $$;

do $$ begin perform etl._count_history(); end $$;

-- So that no step, and no run that ends, has to make a table while it holds locks that others wait for.
do $$ begin perform etl._make_log_partition(clock_timestamp(), true), etl._make_log_partition(clock_timestamp() + interval '1 month', true); end $$;

-- The door to history: these two may delete what has ended, as a role that can do nothing else and that nobody can be.
grant usage, create on schema etl to etl_retention;
grant select, delete on etl.runs, etl.run_scopes, etl.run_workers, etl.procedure_runs, etl.mv_refreshes, etl.state_history to etl_retention;
alter function etl._delete_runs(int) owner to etl_retention;
alter function etl._delete_moves(int) owner to etl_retention;
grant execute on function etl._delete_runs(int), etl._delete_moves(int) to etl_engine;
revoke create on schema etl from etl_retention;
do $$ begin perform pg_catalog.set_config('role', pg_catalog.current_setting('b2s.installer'), true); end $$;
revoke etl_retention from etl_engine;
