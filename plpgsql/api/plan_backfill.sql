-- The chunks that a backfill would consist of, writing nothing.
create or replace function etl._show_backfill(request jsonb)
returns table (order_index int, procedure text, window_since text, window_until text)
language plpgsql stable security definer set search_path = pg_catalog, pg_temp as $$
begin
  perform etl._check_backfill_request(request);
  return query
    with chunk as materialized (
      select * from etl._plan_backfill(request) where not request ? 'resume'
      union all
      select c.* from (select etl._resumable(request) as parent where request ? 'resume') r cross join lateral etl._plan_resume(r.parent) c
    )
    select c.order_index, p.name, c.window_since, c.window_until
      from chunk c join etl.procedures p using (procedure_id)
     order by c.order_index;
end $$;
comment on function etl._show_backfill(jsonb) is 'The chunks of a backfill as rows.';
revoke all on function etl._show_backfill(jsonb) from public;
grant execute on function etl._show_backfill(jsonb) to etl_reader;

create or replace function etl.plan_backfill(
  procedures text[] default null, from_ text default null, until text default null, chunk text default null, params jsonb default null,
  resume bigint default null, pipeline text default null)
returns table (order_index int, procedure text, window_since text, window_until text)
language sql stable set search_path = pg_catalog, pg_temp as $$
  select * from etl._show_backfill(etl._backfill_request(procedures, from_, until, chunk, params, null, null, resume, null, pipeline))
$$;
comment on function etl.plan_backfill(text[], text, text, text, jsonb, bigint, text) is
  'The chunks that etl.backfill with the same arguments would execute, in order. Writes nothing. Raises what etl.backfill would raise.';
revoke all on function etl.plan_backfill(text[], text, text, text, jsonb, bigint, text) from public;
grant execute on function etl.plan_backfill(text[], text, text, text, jsonb, bigint, text) to etl_reader;
