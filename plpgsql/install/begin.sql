-- First part of every install and upgrade, inside its one transaction: lock, refusals, roles, schema, ledger.
--
-- Re-runnable. The caller has set b2s.version (the release being installed) for this transaction.

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
  v_role text;
begin
  foreach v_role in array array['etl_owner', 'etl_admin', 'etl_operator', 'etl_reader'] loop
    if not exists (select from pg_catalog.pg_roles where rolname = v_role) then
      begin
        execute format('create role %I nologin', v_role);
      exception
        when duplicate_object or unique_violation then null;
        when insufficient_privilege then
          raise exception using errcode = 'PT403',
            message = format('role %I does not exist and %I may not create it', v_role, current_user),
            hint = 'let a role with CREATEROLE run: create role etl_owner nologin; create role etl_admin nologin; '
                   'create role etl_operator nologin; create role etl_reader nologin; '
                   'grant etl_reader to etl_operator; grant etl_operator to etl_admin; grant pg_read_all_stats to etl_owner; '
                || format('grant etl_owner to %I;', current_user);
      end;
    end if;
  end loop;
  if not pg_has_role('etl_operator', 'etl_reader', 'member') then grant etl_reader to etl_operator; end if;
  if not pg_has_role('etl_admin', 'etl_operator', 'member') then grant etl_operator to etl_admin; end if;
  -- From 16 on, whoever creates a role administers it but may not SET ROLE to it before granting it to itself.
  if not pg_has_role(current_user, 'etl_owner', case when current_setting('server_version_num')::int >= 160000 then 'set' else 'member' end) then
    begin
      execute format('grant etl_owner to %I', current_user);
    exception when insufficient_privilege then
      raise exception using errcode = 'PT403',
        message = format('%I is not a member of role etl_owner, which owns schema etl', current_user),
        hint = format('let an administrator run: grant etl_owner to %I', current_user);
    end;
  end if;
  begin
    create schema if not exists etl authorization etl_owner;
  exception when insufficient_privilege then
    raise exception using errcode = 'PT403',
      message = format('%I may not create schema etl in database %I', current_user, current_database()),
      hint = format('let the owner of the database run: grant create on database %I to %I', current_database(), current_user);
  end;
  if (select nspowner::regrole::text from pg_catalog.pg_namespace where nspname = 'etl') <> 'etl_owner' then
    raise exception using errcode = 'PT409',
      message = 'this database has a schema etl that is not b2s''s',
      detail = (select format('schema etl belongs to role %s', nspowner::regrole) from pg_catalog.pg_namespace where nspname = 'etl'),
      hint = 'rename that schema, or install b2s into another database';
  end if;
end $$;

-- Windows of timestamps end where the oldest open transaction began, which the server shows to members of pg_read_all_stats
-- only. Not everybody may grant that (from 16 on: superusers and whoever was given it with admin option), and without
-- timestamps nothing needs it, so an install does without; b2s doctor reminds of it.
do $$
begin
  if pg_has_role('etl_owner', 'pg_read_all_stats', 'usage') then return; end if;
  grant pg_read_all_stats to etl_owner;
exception
  when unique_violation then null;
  when insufficient_privilege then
    raise warning using
      message = format('%I may not grant pg_read_all_stats to etl_owner: windows of timestamps are refused while somebody else is in a transaction', current_user),
      hint = 'let an administrator run: grant pg_read_all_stats to etl_owner';
end $$;

set local role etl_owner;
-- Routines may name others that a later file creates.
set local check_function_bodies = off;


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

do $$
declare
  v_version text := (select version from etl.installation);
  v_active  text;
begin
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
end $$;
