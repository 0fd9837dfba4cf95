-- First part of every install and upgrade, inside its one transaction: lock, refusals, roles, schema, ledger.
--
-- Re-runnable. The caller has set b2s.version (the release being installed) for this transaction.
--
-- Two roles as which nobody logs in keep what is recorded out of the reach of what is run. etl_engine owns schema etl, its tables
-- and its routines. etl_owner is who the routines of a team run as: it may read in schema etl, and owns the few routines there
-- that run what the team wrote (steps/). etl_retention, as which nobody can be, owns the two that delete old history.

set local client_min_messages = warning;

-- One installer at a time; runs that are being started right now finish starting first, later ones are told to wait.
do $$ begin perform pg_advisory_xact_lock(6435443, 0); end $$;

do $$
begin
  if current_setting('server_version_num')::int < 150000 then
    raise exception using errcode = 'PT400',
      message = format('b2s needs PostgreSQL 15 or newer, this server is %s', current_setting('server_version')),
      hint = 'upgrade the server, or install into a database of a newer one';
  end if;
end $$;

-- Roles are shared by all databases of a server: another database may create them at the same moment.
do $$
declare
  v_set  text := case when current_setting('server_version_num')::int >= 160000 then 'set' else 'member' end;
  v_need record;
begin
  for v_need in
    with need(n, statement, problem) as (
      select 1, format('create role %I nologin;', r.name), format('role %I does not exist and %I may not create it', r.name, current_user)
        from unnest(array['etl_engine', 'etl_owner', 'etl_admin', 'etl_operator', 'etl_reader', 'etl_frontend', 'etl_retention']) r(name) where to_regrole(r.name) is null
      union all
      select 2, format('grant %I to %I;', g.role, g.member), format('%I is not a member of %I and %I may not grant that', g.member, g.role, current_user)
        from (values ('etl_reader', 'etl_operator'), ('etl_operator', 'etl_admin'), ('etl_reader', 'etl_owner')) g(role, member)
       where pg_has_role(to_regrole(g.member)::oid, to_regrole(g.role)::oid, 'member') is not true
      union all
      -- An earlier release read statistics, and sent signals, as etl_owner.
      select 3, format('grant %I to etl_engine;', g.role), format('etl_owner is a member of %I, etl_engine is not, and %I may not grant it', g.role, current_user)
        from unnest(array['pg_read_all_stats', 'pg_signal_backend']) g(role)
       where pg_has_role(to_regrole('etl_owner')::oid, to_regrole(g.role)::oid, 'usage') and pg_has_role(to_regrole('etl_engine')::oid, to_regrole(g.role)::oid, 'usage') is not true
      union all
      -- From 16 on, whoever creates a role administers it but may not SET ROLE to it before granting it to itself.
      select 4, format('grant %I to %I;', r.name, current_user), format('%I is not a member of role %I', current_user, r.name)
        from unnest(array['etl_engine', 'etl_owner']) r(name) where pg_has_role(current_user, to_regrole(r.name)::oid, v_set) is not true
    )
    select need.*, string_agg(need.statement, ' ') over () as all_statements from need order by need.n
  loop
    begin
      execute v_need.statement;
    exception
      when duplicate_object or unique_violation then null;
      when insufficient_privilege then
        raise exception using errcode = 'PT403', message = v_need.problem,
          hint = 'let an administrator run: ' || v_need.all_statements
            || case when v_need.n = 1 then ' grant pg_read_all_stats to etl_engine;' else '' end
            || case when pg_has_role(current_user, to_regrole('etl_retention')::oid, 'member with admin option') is not true
                    then format(' grant etl_retention to %I with admin option;', current_user) else '' end;
    end;
  end loop;
  -- For this transaction alone, which takes it back at its end: until then nobody else can see it (install/finish.sql).
  grant etl_retention to etl_engine;
exception when insufficient_privilege then
  raise exception using errcode = 'PT403',
    message = format('%I may not hand over routines to role etl_retention, as which old history is purged', current_user),
    hint = format('let an administrator run: grant etl_retention to %I with admin option', current_user);
end $$;

do $$
begin
  if (select n.nspowner::regrole::text from pg_catalog.pg_namespace n where n.nspname = 'etl') not in ('etl_engine', 'etl_owner') then
    raise exception using errcode = 'PT409',
      message = 'this database has a schema etl that is not b2s''s',
      detail = (select format('schema etl belongs to role %s', n.nspowner::regrole) from pg_catalog.pg_namespace n where n.nspname = 'etl'),
      hint = 'rename that schema, or install b2s into another database';
  end if;
  -- Whoever installs need not inherit what its roles may do.
  perform set_config('b2s.installer', current_setting('role'), true),
          set_config('role', coalesce((select n.nspowner::regrole::text from pg_catalog.pg_namespace n where n.nspname = 'etl'), 'etl_engine'), true);
end $$;

do $$
declare
  v_version text;
  v_active  text;
begin
  if to_regclass('etl.installation') is not null then execute 'select version from etl.installation' into v_version; end if;
  if string_to_array(v_version, '.')::int[] > string_to_array(current_setting('b2s.version'), '.')::int[] then
    raise exception using errcode = 'PT409',
      message = format('this database has b2s %s, newer than the %s being installed', v_version, current_setting('b2s.version')),
      hint = 'upgrade the b2s package instead: pip install --upgrade b2s';
  end if;
  if to_regclass('etl.runs') is not null then
    -- A run whose advisory lock nobody holds is dead and does not stand in the way. Up to 0.1.0 it was the lock of the pipeline.
    execute $q$
      select string_agg(distinct format('%s (backend %s)', r.run_id, l.pid), ', ')
        from etl.runs r
        cross join lateral (values (6435444, case r.kind when 'backfill' then -1 else 1 end * (r.run_id % 2147483647)::int),
                                   (6435443, case r.kind when 'backfill' then -(r.run_id % 2147483647)::int else r.pipeline_id end)) k(class, key)
        join pg_catalog.pg_locks l on l.locktype = 'advisory' and l.classid = k.class::oid and l.objid = k.key::oid
         and l.objsubid = 2 and l.granted and l.database = (select oid from pg_catalog.pg_database where datname = current_database())
        left join lateral pg_catalog.pg_stat_get_activity(l.pid) a on true
       where r.status = 'running' and a.state is distinct from 'idle' $q$ into v_active;
    if v_active is not null then
      raise exception using errcode = 'PT409',
        message = format('run %s is active: its routines cannot be replaced under it', v_active),
        hint = 'wait until it has ended, or stop it: select etl.cancel_run(run_id, reason => ''upgrade'')';
    end if;
  end if;
  perform set_config('role', current_setting('b2s.installer'), true);
end $$;

-- A release before etl_engine left everything to etl_owner.
do $$
declare
  v_object text;
  v_grant  record;
begin
  begin
    create schema if not exists etl authorization etl_engine;
    if (select n.nspowner::regrole::text from pg_catalog.pg_namespace n where n.nspname = 'etl') = 'etl_engine' then return; end if;
    alter schema etl owner to etl_engine;
  exception when insufficient_privilege then
    raise exception using errcode = 'PT403',
      message = format('%I may not create schema etl in database %I, or give it to etl_engine', current_user, current_database()),
      hint = format('let the owner of the database run: grant create on database %I to %I', current_database(), current_user);
  end;
  for v_object in
    select format('%s %s', case c.relkind when 'v' then 'view' else 'table' end, c.oid::regclass) from pg_catalog.pg_class c
     where c.relnamespace = 'etl'::regnamespace and c.relkind in ('r', 'p', 'v')
    union all
    select format('type %s', t.oid::regtype) from pg_catalog.pg_type t
     where t.typnamespace = 'etl'::regnamespace and (t.typtype in ('d', 'e') or exists (select from pg_catalog.pg_class c where c.oid = t.typrelid and c.relkind = 'c'))
    union all
    select format('routine %s', p.oid::regprocedure) from pg_catalog.pg_proc p where p.pronamespace = 'etl'::regnamespace
  loop
    execute format('alter %s owner to etl_engine', v_object);
  end loop;
  -- What the team wrote need not see the sessions of others, or end them. A database of the same server that still has such a
  -- release does need it: roles are shared. What stays is told by b2s doctor.
  if exists (select from pg_catalog.pg_shdepend d
              where d.refclassid = 'pg_catalog.pg_authid'::regclass and d.refobjid = 'etl_owner'::regrole and d.deptype = 'o'
                and d.classid = 'pg_catalog.pg_namespace'::regclass
                and d.dbid <> (select o.oid from pg_catalog.pg_database o where o.datname = current_database())) then
    return;
  end if;
  for v_grant in
    select m.roleid::regrole as role, m.grantor::regrole as grantor from pg_catalog.pg_auth_members m
     where m.member = 'etl_owner'::regrole and m.roleid in ('pg_read_all_stats'::regrole, 'pg_signal_backend'::regrole) and pg_has_role('etl_engine', m.roleid, 'usage')
  loop
    begin
      execute format('revoke %s from etl_owner granted by %s', v_grant.role, v_grant.grantor);
    exception when insufficient_privilege or dependent_objects_still_exist then null;
    end;
  end loop;
exception when insufficient_privilege then
  raise exception using errcode = 'PT403', message = format('%I may not give schema etl to etl_engine: %s', current_user, sqlerrm),
    hint = 'install once as a role that inherits etl_owner and etl_engine, or as a superuser';
end $$;

-- Windows of timestamps end where the oldest open transaction began, which the server shows to members of pg_read_all_stats
-- only. Not everybody may grant that (from 16 on: superusers and whoever was given it with admin option), and without
-- timestamps nothing needs it, so an install does without; b2s doctor reminds of it.
do $$
begin
  if pg_has_role('etl_engine', 'pg_read_all_stats', 'usage') then return; end if;
  grant pg_read_all_stats to etl_engine;
exception
  when unique_violation then null;
  when insufficient_privilege then
    raise warning using
      message = format('%I may not grant pg_read_all_stats to etl_engine: windows of timestamps are refused while somebody else is in a transaction', current_user),
      hint = 'let an administrator run: grant pg_read_all_stats to etl_engine';
end $$;

set local role etl_engine;
grant usage on schema etl to etl_reader;
-- Routines may name others that a later file creates.
set local check_function_bodies = off;

-- What a release before has handed over is replaced by its owner.
do $$
declare
  v_routine record;
begin
  for v_routine in select p.oid::regprocedure as signature from pg_catalog.pg_proc p where p.pronamespace = 'etl'::regnamespace and p.proowner = 'etl_retention'::regrole loop
    execute format('alter routine %s owner to etl_engine', v_routine.signature);
  end loop;
end $$;

create table if not exists etl.migrations (
  name        text primary key,
  sha256      text not null,
  version     text not null,
  applied_at  timestamptz not null default clock_timestamp(),
  applied_by  text not null default session_user
);
comment on table etl.migrations is
  'The migrations applied to this database, each with the sha256 of the file as it was then. Source: b2s migrate.';

create table if not exists etl.installation (
  is_only_row  boolean primary key default true check (is_only_row),
  version      text not null,
  installed_at timestamptz not null default clock_timestamp(),
  installed_by text not null default session_user
);
comment on table etl.installation is 'The release of b2s whose routines are installed here. One row. Source: b2s migrate.';

create or replace function etl._begin_migration(name text, sha256 text) returns boolean
language plpgsql volatile set search_path = pg_catalog, pg_temp as $$
declare
  v_sha256 text := (select m.sha256 from etl.migrations m where m.name = _begin_migration.name);
begin
  if v_sha256 is null then
    insert into etl.migrations (name, sha256, version)
    values (_begin_migration.name, _begin_migration.sha256, pg_catalog.current_setting('b2s.version'));
    return true;
  elsif v_sha256 <> _begin_migration.sha256 then
    raise exception using errcode = 'PT409',
      message = pg_catalog.format('migration %s was changed after it had been applied to this database', name),
      detail = pg_catalog.format('applied with sha256 %s, the file now has %s', v_sha256, sha256),
      hint = 'a released migration is frozen: restore the file, and put the change into a new migration';
  end if;
  return false;
end $$;
comment on function etl._begin_migration(text, text) is
  'Records a migration as applied and says whether its file must be run now. Raises PT409 if the file differs from the one applied.';
revoke all on function etl._begin_migration(text, text) from public;

-- A function whose result changes cannot be replaced. These are what has changed since a release: an upgrade from one drops
-- them first. Where one is missing, tests/test_upgrade.py fails with the server's own hint (42P13).
do $$
declare
  v_routine record;
begin
  for v_routine in
    select p.oid::regprocedure as signature
      from pg_catalog.pg_proc p
     where p.pronamespace = 'etl'::regnamespace and p.proname in ('_begin_run', '_change_baseline', '_release', '_safe_timestamp', '_await_margin')
       and (select version from etl.installation) <> current_setting('b2s.version')
  loop
    execute format('drop function %s', v_routine.signature);
  end loop;
end $$;
