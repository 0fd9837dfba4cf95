-- Refreshing materialized views: each in a transaction of its own, after the data is committed.

-- Whether the server will accept REFRESH ... CONCURRENTLY: populated, and a unique index on plain columns over all rows.
create or replace function etl._can_refresh_concurrently(mv regclass) returns boolean
language sql stable strict set search_path = pg_catalog, pg_temp as $$
  select c.relispopulated and exists (
           select from pg_catalog.pg_index i
             join pg_catalog.pg_class ic on ic.oid = i.indexrelid
             join pg_catalog.pg_am am on am.oid = ic.relam
            where i.indrelid = c.oid and i.indisunique and i.indimmediate and i.indisvalid and am.amname = 'btree'
              and i.indpred is null and not (0 = any (i.indkey::int2[])))
    from pg_catalog.pg_class c where c.oid = mv and c.relkind = 'm'
$$;
comment on function etl._can_refresh_concurrently(regclass) is 'Whether a materialized view can be refreshed CONCURRENTLY as it stands.';
revoke all on function etl._can_refresh_concurrently(regclass) from public;

-- Returns whether it was concurrent, and a warning when it had to be done otherwise than asked for.
create or replace function etl._refresh(mv_name text, concurrency text, out is_concurrent boolean, out warning text)
language plpgsql volatile set search_path = pg_catalog, pg_temp as $$
declare
  v_name text := (select string_agg(quote_ident(part), '.') from unnest(parse_ident(mv_name)) part);
begin
  is_concurrent := concurrency <> 'false' and coalesce(etl._can_refresh_concurrently(to_regclass(mv_name)), false);
  if concurrency = 'true' and not is_concurrent then
    warning := format('%s was refreshed without CONCURRENTLY, readers waited: it is not populated or has no unique index on plain columns without WHERE', mv_name);
  end if;
  if is_concurrent then
    begin
      execute format('refresh materialized view concurrently %s', v_name);
      return;
    exception when object_not_in_prerequisite_state or feature_not_supported then
      warning := format('%s was refreshed without CONCURRENTLY, readers waited: %s', mv_name, sqlerrm);
      is_concurrent := false;
    end;
  end if;
  execute format('refresh materialized view %s', v_name);
end $$;
comment on function etl._refresh(text, text) is 'Refreshes a materialized view, CONCURRENTLY where the server will accept it.';
revoke all on function etl._refresh(text, text) from public;

create or replace function etl._execute_refresh(run_id bigint, scope_index int) returns jsonb
language plpgsql volatile security definer set search_path = pg_catalog, pg_temp as $$
declare
  v_refresh etl.mv_refreshes;
  v_done    record;
  v_sqlstate text; v_message text; v_detail text; v_hint text; v_context text;
begin
  perform etl._check_owner(run_id);
  select * into strict v_refresh from etl.mv_refreshes m
   where m.run_id = _execute_refresh.run_id and m.scope_index = _execute_refresh.scope_index and m.status = 'running' and m.worker_pid = pg_backend_pid();
  perform set_config('application_name', format('b2s run %s %s', run_id, v_refresh.mv_name), true);
  begin
    v_done := etl._refresh(v_refresh.mv_name, v_refresh.concurrency);
    update etl.mv_refreshes m
       set status = 'succeeded', ended_at = clock_timestamp(), is_concurrent = v_done.is_concurrent, warning = v_done.warning
     where m.run_id = v_refresh.run_id and m.scope_index = v_refresh.scope_index
    returning m.* into v_refresh;
    return jsonb_build_object('scope_index', scope_index, 'events', jsonb_build_array(jsonb_strip_nulls(jsonb_build_object('event', 'refresh_succeeded',
      'run_id', v_refresh.run_id, 'mv_name', v_refresh.mv_name, 'is_concurrent', v_refresh.is_concurrent,
      'duration_ms', v_refresh.duration_ms, 'warning', v_refresh.warning))));
  exception when query_canceled or assert_failure or others then
    get stacked diagnostics v_sqlstate = returned_sqlstate, v_message = message_text, v_detail = pg_exception_detail,
      v_hint = pg_exception_hint, v_context = pg_exception_context;
    if v_sqlstate = '57014' then perform etl._absorb_signal(); end if;
    return jsonb_build_object('failure', etl._failure(v_sqlstate, v_message, v_detail, v_hint, v_context, null));
  end;
end $$;
comment on function etl._execute_refresh(bigint, int) is
  'Refreshes the materialized view of a claimed scope; returns {events} to commit or {failure} to roll back. Called by the engine only.';
revoke all on function etl._execute_refresh(bigint, int) from public;
grant execute on function etl._execute_refresh(bigint, int) to etl_operator;
