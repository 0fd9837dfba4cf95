-- Further sessions for a run that one CALL began, opened by that CALL itself: each is a worker (etl.work) behind a connection of
-- the extension dblink, which is optional, as is this. The connection is made as a foreign server and the user mapping of
-- etl_engine say, so no password is in the configuration. Nothing depends on a helper: one that cannot be opened is a warning,
-- and the run goes on; when this session dies, the helpers go on with the run.

create or replace function etl._dblink_schema() returns text
language sql stable set search_path = pg_catalog, pg_temp as $$
  select n.nspname from pg_catalog.pg_extension e join pg_catalog.pg_namespace n on n.oid = e.extnamespace where e.extname = 'dblink'
$$;
comment on function etl._dblink_schema() is 'The schema of the extension dblink, or null.';
revoke all on function etl._dblink_schema() from public;

create or replace function etl._helper_problems(config jsonb) returns jsonb
language sql stable set search_path = pg_catalog, pg_temp as $$
  select coalesce(jsonb_agg(etl._config_problem('["helper_server"]', q.message, q.hint)), '[]')
    from (select config->>'helper_server' as name) n
    left join pg_catalog.pg_foreign_server s on s.srvname = n.name
    cross join lateral (select
      case when etl._dblink_schema() is null then 'the extension dblink is not installed in this database'
           when not has_schema_privilege('etl_engine', etl._dblink_schema(), 'usage')
             then format('role etl_engine may not use schema %I, where the extension dblink is', etl._dblink_schema())
           when s.oid is null then format('there is no foreign server %I', n.name)
           when not has_server_privilege('etl_engine', s.oid, 'usage') then format('role etl_engine may not use foreign server %I', n.name)
           when not exists (select from pg_catalog.pg_user_mappings m where m.srvid = s.oid and m.umuser in ('etl_engine'::regrole, 0))
             then format('role etl_engine has no user mapping for foreign server %I', n.name) end as message,
      case when etl._dblink_schema() is null then 'create extension dblink'
           when not has_schema_privilege('etl_engine', etl._dblink_schema(), 'usage') then format('grant usage on schema %I to etl_engine', etl._dblink_schema())
           when s.oid is null then format('create server %I foreign data wrapper dblink_fdw options (host ''localhost'', dbname %L)', n.name, current_database())
           when not has_server_privilege('etl_engine', s.oid, 'usage') then format('grant usage on foreign server %I to etl_engine', n.name)
           else format('create user mapping for etl_engine server %I options (user ''a_member_of_etl_operator'', password ''...'')', n.name) end as hint) q
   where n.name is not null and q.message is not null
$$;
comment on function etl._helper_problems(jsonb) is 'What is missing for the helper_server of a configuration.';
revoke all on function etl._helper_problems(jsonb) from public;

-- Those of an earlier CALL too, which ended before it could close them. The run has ended: what goes wrong here takes nothing back.
create or replace function etl._close_helpers() returns void
language plpgsql volatile security definer set search_path = pg_catalog, pg_temp as $$
declare
  v_schema text := etl._dblink_schema();
  v_names  text[];
  v_name   text;
  v_busy   int;
begin
  if v_schema is null or not has_schema_privilege(v_schema, 'usage') then return; end if;
  execute format('select %I.dblink_get_connections()', v_schema) into v_names;
  foreach v_name in array coalesce(v_names, '{}') loop
    continue when v_name !~ '^b2s_helper_';
    -- A helper notices the end of its run within a tenth of a second; hung up on before, it would complain in the server's log.
    for i in 1 .. 40 loop
      execute format('select %I.dblink_is_busy($1)', v_schema) into v_busy using v_name;
      exit when v_busy = 0;
      perform pg_sleep(0.005);
    end loop;
    execute format('select %I.dblink_disconnect($1)', v_schema) using v_name;
  end loop;
exception when others then
  raise warning 'sessions that helped are not closed: %', sqlerrm using hint = 'they end with this session, or with the run that they help';
end $$;
comment on function etl._close_helpers() is 'Closes the connections that etl._open_helpers has opened in this session.';
revoke all on function etl._close_helpers() from public;
grant execute on function etl._close_helpers() to etl_operator;

-- As many as could ever be at work at once, as far as that is told by how many scopes each one frees.
create or replace function etl._helpers_wanted(run etl.runs) returns int
language sql stable set search_path = pg_catalog, pg_temp as $$
  select least(run.max_concurrency, greatest(count(*) filter (where s.remaining_dependencies = 0), max(cardinality(s.required_by || s.precedes)))) - 1
    from etl.run_scopes s where s.run_id = run.run_id
$$;
comment on function etl._helpers_wanted(etl.runs) is 'How many sessions beside the first one a run could use.';
revoke all on function etl._helpers_wanted(etl.runs) from public;

create or replace function etl._open_helpers(run_id bigint) returns boolean
language plpgsql volatile security definer set search_path = pg_catalog, pg_temp as $$
declare
  v_run    etl.runs := etl._check_owner(run_id);
  v_server text := (select l.helper_server from etl.pipelines l where l.pipeline_id = v_run.pipeline_id);
  v_schema text;
  v_name   text;
begin
  if v_server is null then return false; end if;
  v_schema := etl._dblink_schema();
  perform etl._close_helpers();
  for i in 1 .. etl._helpers_wanted(v_run) loop
    v_name := format('b2s_helper_%s', i);
    execute format('select %I.dblink_connect($1, $2)', v_schema) using v_name, v_server;
    -- Nobody listens, and a helper that speaks after this session has died would die of it.
    execute format('select %I.dblink_exec($1, $2)', v_schema) using v_name, 'set client_min_messages = error';
    execute format('select %I.dblink_send_query($1, $2)', v_schema) using v_name, format('call etl.work(run_id => %s)', run_id);
  end loop;
  return true;
exception when others then
  raise warning 'run % goes on without helpers: %', run_id, sqlerrm
    using hint = format('helper_server of the pipeline is %s: check the server and the user mapping of etl_engine', v_server);
  return true;
end $$;
comment on function etl._open_helpers(bigint) is 'Opens further sessions for a run through the helper_server of its pipeline, with a warning when that fails; false when none is configured.';
revoke all on function etl._open_helpers(bigint) from public;
grant execute on function etl._open_helpers(bigint) to etl_operator;
