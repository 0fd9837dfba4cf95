-- Whether the engine is as it was installed, as far as etl_owner, or somebody with more rights, can change that.
create or replace function etl._diagnose_engine() returns table (check_name text, status text, detail text, remedy text)
language sql stable set search_path = pg_catalog, pg_temp as $$
  select 'engine', 'fail', format('%s, which runs what the team wrote, was altered since it was installed', p.oid::regprocedure),
         'find out who did that; then b2s migrate installs it anew'
    from pg_catalog.pg_proc p
   where p.pronamespace = 'etl'::regnamespace and p.proowner = 'etl_owner'::regrole
     and (not p.prosecdef or p.proisstrict or p.proconfig is distinct from array['search_path=pg_catalog, pg_temp'] or exists (
            select from aclexplode(p.proacl) a where a.grantee not in (p.proowner, 'etl_engine'::regrole)))
  union all
  select 'engine', 'fail', format('trigger %I of %s, which protects history, is disabled', t.tgname, t.tgrelid::regclass),
         format('find out who did that, and what was changed since; then: alter table %s enable trigger %I', t.tgrelid::regclass, t.tgname)
    from pg_catalog.pg_trigger t join pg_catalog.pg_class c on c.oid = t.tgrelid
   where c.relnamespace = 'etl'::regnamespace and not t.tgisinternal and t.tgenabled not in ('O', 'A')
  union all
  select 'engine', 'fail', format('%s belongs to %s', c.oid::regclass, c.relowner::regrole), format('alter table %s owner to etl_engine', c.oid::regclass)
    from pg_catalog.pg_class c where c.relnamespace = 'etl'::regnamespace and c.relkind in ('r', 'p', 'v') and c.relowner <> 'etl_engine'::regrole
  union all
  select 'engine', 'warn', format('%s is a member of etl_engine, and may change what is recorded', m.member::regrole),
         format('as long as it installs and upgrades b2s it must be; else: revoke etl_engine from %s', m.member::regrole)
    from pg_catalog.pg_auth_members m join pg_catalog.pg_roles r on r.oid = m.member
   where m.roleid = 'etl_engine'::regrole and not r.rolsuper
     and r.rolname not in (select i.installed_by from etl.installation i)
  union all
  -- A release before read statistics, and sent signals, as etl_owner; another database of the server may still have it.
  select 'engine', 'warn', format('etl_owner, as which runs what the team wrote, is a member of %s, which b2s does not need', m.roleid::regrole),
         format('as long as no routine needs it: revoke %s from etl_owner', m.roleid::regrole)
    from pg_catalog.pg_auth_members m
   where m.member = 'etl_owner'::regrole and m.roleid in ('pg_read_all_stats'::regrole, 'pg_signal_backend'::regrole)
     and not exists (
       select from pg_catalog.pg_shdepend d
        where d.refclassid = 'pg_catalog.pg_authid'::regclass and d.refobjid = m.member and d.deptype = 'o' and d.classid = 'pg_catalog.pg_namespace'::regclass
          and d.dbid <> (select o.oid from pg_catalog.pg_database o where o.datname = current_database()))
$$;
comment on function etl._diagnose_engine() is 'Findings about the engine itself: altered routines, disabled triggers, who could change history.';
revoke all on function etl._diagnose_engine() from public;
