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

-- Whether a document is a request at all: programs may call the helpers of the verbs with one of their own making. What its values mean is
-- looked at when it is planned.
create or replace function etl._field_problem(kind text, value jsonb) returns text
language sql stable set search_path = pg_catalog, pg_temp as $$
  select case kind
    when 'text' then case when jsonb_typeof(value) <> 'string' then 'is a text' end
    when 'name' then case when jsonb_typeof(value) <> 'string' or length(value #>> '{}') not between 1 and 255 then 'is a text of 1 to 255 characters' end
    when 'boolean' then case when jsonb_typeof(value) <> 'boolean' then 'is true or false' end
    when 'names' then case when jsonb_typeof(value) <> 'array' or jsonb_path_exists(value, 'strict $[*] ? (@.type() <> "string")') then 'is a list of names' end
    when 'views' then case when jsonb_typeof(value) <> 'boolean' and (jsonb_typeof(value) <> 'array' or jsonb_path_exists(value, 'strict $[*] ? (@.type() <> "string")'))
                        then 'is true, false or a list of materialized views' end
    when 'object' then case when jsonb_typeof(value) <> 'object' then 'is an object like {"silver.fact_sales": {"country": "DE"}}' end
    when 'time' then case when jsonb_typeof(value) <> 'string' or not etl._is_a(value #>> '{}', 'date-time') or not isfinite((value #>> '{}')::timestamptz)
                       then 'is a time' end
    when 'sessions' then case when jsonb_typeof(value) <> 'number' or value not in (select to_jsonb(n) from generate_series(1, 64) n)
                           then format('is 1 to 64, not %s', left(value #>> '{}', 50)) end
    when 'number' then case when jsonb_typeof(value) <> 'number' or trunc((value #>> '{}')::numeric) not between -9223372036854775808 and 9223372036854775807
                                 or (value #>> '{}')::numeric % 1 <> 0 then 'is a whole number' end
    else 'is no field of a request' end
$$;
comment on function etl._field_problem(text, jsonb) is 'What is wrong with the form of a field of a request, or null; kind: what it holds.';
revoke all on function etl._field_problem(text, jsonb) from public;

create or replace function etl._check_document(document jsonb, kinds jsonb) returns void
language plpgsql volatile set search_path = pg_catalog, pg_temp as $$
declare
  v_problems jsonb;
begin
  if jsonb_typeof(document) is distinct from 'object' then
    perform etl._fail('PT422', 'request.invalid', 'a request is a JSON object', 'its fields are the arguments of the verb');
  end if;
  select jsonb_agg(jsonb_build_object('loc', jsonb_build_array(g.key), 'code', 'request.invalid', 'message', format('%s %s', left(g.key, 100), p.problem)) order by g.key)
    into v_problems
    from jsonb_each(document) g cross join lateral etl._field_problem(kinds->>g.key, g.value) p(problem)
   where p.problem is not null;
  if v_problems is not null then
    perform etl._fail('PT422', 'request.invalid', (select string_agg(p->>'message', '; ') from jsonb_array_elements(v_problems) p),
      'the fields of a request are the arguments of the verb', jsonb_build_object('errors', v_problems));
  end if;
end $$;
comment on function etl._check_document(jsonb, jsonb) is 'Raises PT422 request.invalid, with every problem, for a document that has not the form of a request. kinds: what each field holds.';
revoke all on function etl._check_document(jsonb, jsonb) from public;

create or replace function etl._check_request(request jsonb) returns void
language plpgsql volatile set search_path = pg_catalog, pg_temp as $$
begin
  perform etl._check_document(request, '{"mode": "text", "procedures": "names", "groups": "names", "tags": "names", "with_upstream": "boolean",
    "with_downstream": "boolean", "as_of": "time", "params": "object", "transaction_scope": "text", "mv_refresh": "views", "idempotency_key": "name",
    "confirm_full_refresh": "boolean", "approved_by": "name", "reason": "text", "max_concurrency": "sessions", "pipeline": "text"}');
end $$;
comment on function etl._check_request(jsonb) is 'Raises PT422 request.invalid, with every problem, for a document that is not a request for a run.';
revoke all on function etl._check_request(jsonb) from public;

create or replace function etl._check_backfill_request(request jsonb) returns void
language plpgsql volatile set search_path = pg_catalog, pg_temp as $$
begin
  perform etl._check_document(request, '{"procedures": "names", "from": "text", "until": "text", "chunk": "text", "params": "object", "pause_ms": "number",
    "reason": "text", "resume": "number", "idempotency_key": "name", "pipeline": "text", "time_zone": "text"}');
end $$;
comment on function etl._check_backfill_request(jsonb) is 'Raises PT422 request.invalid, with every problem, for a document that is not a request for a backfill.';
revoke all on function etl._check_backfill_request(jsonb) from public;
