-- A request as one jsonb document: what was asked for, defaults left out, so that equal requests have equal
-- fingerprints, in whatever time zone they are made.
create or replace function etl._request(
  mode text, procedures text[], groups text[], tags text[], with_upstream boolean, with_downstream boolean, as_of timestamptz,
  params jsonb, transaction_scope text, mv_refresh jsonb, idempotency_key text, confirm_full_refresh boolean, approved_by text,
  reason text, max_concurrency int, pipeline text) returns jsonb
language sql stable set search_path = pg_catalog, pg_temp set timezone = 'UTC' as $$
  select jsonb_strip_nulls(jsonb_build_object('mode', mode, 'procedures', procedures, 'groups', groups, 'tags', tags,
      'with_upstream', nullif(with_upstream, false), 'with_downstream', nullif(with_downstream, false), 'as_of', as_of,
      'transaction_scope', transaction_scope, 'mv_refresh', mv_refresh, 'idempotency_key', idempotency_key,
      'confirm_full_refresh', nullif(confirm_full_refresh, false), 'approved_by', approved_by, 'reason', reason,
      'max_concurrency', max_concurrency, 'pipeline', pipeline))
    || case when params is null or params = '{}' then '{}' else jsonb_build_object('params', params) end
$$;
comment on function etl._request(text, text[], text[], text[], boolean, boolean, timestamptz, jsonb, text, jsonb, text, boolean, text, text, int, text) is
  'The arguments of etl.start_run as one jsonb request.';
revoke all on function etl._request(text, text[], text[], text[], boolean, boolean, timestamptz, jsonb, text, jsonb, text, boolean, text, text, int, text) from public;
grant execute on function etl._request(text, text[], text[], text[], boolean, boolean, timestamptz, jsonb, text, jsonb, text, boolean, text, text, int, text) to etl_reader;

create or replace function etl._run_status(run_id bigint) returns text
language sql stable security definer set search_path = pg_catalog, pg_temp as $$
  select r.status from etl.runs r where r.run_id = _run_status.run_id
$$;
comment on function etl._run_status(bigint) is 'The status of a run.';
revoke all on function etl._run_status(bigint) from public;
grant execute on function etl._run_status(bigint) to etl_operator;

-- Whether a document is a request at all: programs call the helpers of the verbs with one of their own making. What its values mean is
-- looked at when it is planned.
create or replace function etl._check_request(request jsonb) returns void
language plpgsql volatile set search_path = pg_catalog, pg_temp as $$
declare
  v_problems jsonb;
begin
  if jsonb_typeof(request) is distinct from 'object' then
    perform etl._fail('PT422', 'request.invalid', 'a request is a JSON object', 'an empty one, {}, runs everything');
  end if;
  select jsonb_agg(jsonb_build_object('loc', jsonb_build_array(g.key), 'code', 'request.invalid', 'message', q.message) order by g.key)
    into v_problems
    from jsonb_each(request) g
    cross join lateral (
      select case
        when g.key in ('mode', 'pipeline', 'reason', 'transaction_scope') then case when jsonb_typeof(g.value) <> 'string' then 'is a text' end
        when g.key in ('approved_by', 'idempotency_key')
          then case when jsonb_typeof(g.value) <> 'string' or length(g.value #>> '{}') not between 1 and 255 then 'is a text of 1 to 255 characters' end
        when g.key in ('confirm_full_refresh', 'with_downstream', 'with_upstream') then case when jsonb_typeof(g.value) <> 'boolean' then 'is true or false' end
        when g.key in ('groups', 'procedures', 'tags')
          then case when jsonb_typeof(g.value) <> 'array' or jsonb_path_exists(g.value, 'strict $[*] ? (@.type() <> "string")') then 'is a list of names' end
        when g.key = 'mv_refresh'
          then case when jsonb_typeof(g.value) not in ('array', 'boolean') or jsonb_path_exists(g.value, 'lax $[*] ? (@.type() <> "string" && @.type() <> "boolean")')
                      then 'is true, false or a list of materialized views' end
        when g.key = 'params' then case when jsonb_typeof(g.value) <> 'object' then 'is an object like {"silver.fact_sales": {"country": "DE"}}' end
        when g.key = 'as_of'
          then case when jsonb_typeof(g.value) <> 'string' or not etl._is_a(g.value #>> '{}', 'date-time') or not isfinite((g.value #>> '{}')::timestamptz) then 'is a time' end
        when g.key = 'max_concurrency'
          then case when jsonb_typeof(g.value) <> 'number' or g.value not in (select to_jsonb(n) from generate_series(1, 64) n)
                      then format('is 1 to 64, not %s', left(g.value #>> '{}', 50)) end
        else 'is no field of a request' end) p(problem)
    cross join lateral (select format('%s %s', left(g.key, 100), p.problem)) q(message)
   where p.problem is not null;
  if v_problems is not null then
    perform etl._fail('PT422', 'request.invalid', (select string_agg(p->>'message', '; ') from jsonb_array_elements(v_problems) p),
      'the fields of a request are the arguments of etl.start_run', jsonb_build_object('errors', v_problems));
  end if;
end $$;
comment on function etl._check_request(jsonb) is 'Raises PT422 request.invalid, with every problem, for a document that has not the form of a request.';
revoke all on function etl._check_request(jsonb) from public;
