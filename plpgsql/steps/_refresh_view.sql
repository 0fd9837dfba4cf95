-- Refreshing a materialized view as etl_owner: whether it was concurrent, and a warning when it had to be done otherwise than asked for.
-- The server runs the query of a view as the owner of the view.
create or replace function etl._refresh_view(mv_name text, concurrency text, out is_concurrent boolean, out warning text)
language plpgsql volatile security definer set search_path = pg_catalog, pg_temp as $$
declare
  v_name text;
begin
  if current_user operator(pg_catalog.<>) 'etl_owner' then perform etl._fail_altered('etl._refresh_view'); end if;
  v_name := (select string_agg(quote_ident(part), '.') from unnest(parse_ident(mv_name)) part);
  is_concurrent := concurrency <> 'false' and coalesce(etl._can_refresh_concurrently(etl._relation(mv_name)), false);
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
comment on function etl._refresh_view(text, text) is 'Refreshes a materialized view as etl_owner, CONCURRENTLY where the server will accept it.';
revoke all on function etl._refresh_view(text, text) from public;
grant execute on function etl._refresh_view(text, text) to etl_engine;
