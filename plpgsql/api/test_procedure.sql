-- Proves the contract of a routine on a scratch copy: what must hold so that any number of runs, in any windows, give one result.

-- Everything a test needs to know about a procedure. A run has a number; a test has -1.
create or replace function etl._contract_of(procedure text, since text, until text, pieces int, params jsonb, ignore_columns text[], max_rows int, pipeline text)
returns jsonb
language plpgsql volatile set search_path = pg_catalog, pg_temp as $$
declare
  v_pipeline  etl.pipelines := etl._pipeline(pipeline);
  v_procedure etl.procedures;
  v_params    record;
  v_contract  jsonb;
begin
  select * into v_procedure from etl.procedures p where p.pipeline_id = v_pipeline.pipeline_id and p.name = procedure and p.is_active;
  if not found then
    perform etl._fail('PT404', 'procedure.unknown', format('there is no procedure %s', procedure), 'what there is: select * from etl.list_procedures()');
  end if;
  v_params := etl._check_parameters(v_procedure.procedure_id, v_procedure.name, params);
  if v_params.problems is not null then
    perform etl._fail('PT422', 'params.invalid', (select string_agg(p->>'message', '; ') from jsonb_array_elements(v_params.problems) p),
      'what there is: select * from etl.list_procedures()', jsonb_build_object('errors', v_params.problems));
  end if;
  v_contract := jsonb_strip_nulls(jsonb_build_object('name', v_procedure.name, 'run_id', -1, 'call_sql', v_procedure.call_sql,
    'rows_column', v_procedure.rows_column, 'settings', nullif(etl._step_settings(v_procedure, v_pipeline.search_path) - 'lock_timeout_ms', '{}'),
    'mode', case when v_procedure.watermark_strategy is null then v_procedure.default_mode else 'incremental' end,
    'allow_full', v_procedure.allow_full_refresh, 'strategy', v_procedure.watermark_strategy, 'pieces', pieces, 'max_rows', max_rows))
    || jsonb_build_object('parameters', v_params.parameters, 'ignored', coalesce(to_jsonb(ignore_columns), '[]'), 'tables', '{}'::jsonb, 'cuts', '[]'::jsonb,
                          'sources', etl._contract_sources(v_procedure.watermark_sources),
                          'query', case when etl._is_query(v_procedure.watermark_sources) then v_procedure.watermark_sources[1] end);
  if v_procedure.watermark_strategy is null and (since is not null or until is not null) then
    perform etl._fail('PT422', 'test.window', format('%s has no watermark, so it has no window', v_procedure.name), 'leave out since and until');
  end if;
  return v_contract;
end $$;
comment on function etl._contract_of(text, text, text, int, jsonb, text[], int, text) is
  'What etl.test_procedure is to test: call and sources. Raises PT404 procedure.unknown, PT422 params.invalid and test.window.';
revoke all on function etl._contract_of(text, text, text, int, jsonb, text[], int, text) from public;

-- Each variant is undone as soon as it is compared; the lock timeout bounds how long it waits for others, and it ends with this function.
create or replace function etl.test_procedure(
  procedure text, since text default null, until text default null, pieces int default 3, params jsonb default null,
  ignore_columns text[] default null, max_rows int default 200000, pipeline text default null)
returns table (check_name text, status text, detail text, remedy text, difference jsonb)
language plpgsql volatile security definer set search_path = pg_catalog, pg_temp set lock_timeout = '5s' as $$
begin
  if pieces is null or pieces not between 2 and 100 or max_rows is null or max_rows < 1 then
    perform etl._fail('PT422', 'request.invalid', 'pieces is 2 to 100 and max_rows at least 1', 'leave them out for 3 and 200000');
  end if;
  perform etl._check_nothing_deferred('etl.test_procedure');
  if pg_my_temp_schema() <> 0 then perform etl._check_temporary_objects(); end if;
  return query
    select f.check_name, f.status, f.detail, f.remedy, nullif(f.difference, 'null')
      from jsonb_array_elements(etl._test_contract(etl._contract_of(procedure, since, until, pieces, params, ignore_columns, max_rows, pipeline), since, until))
             with ordinality e(finding, n)
      cross join lateral jsonb_to_record(e.finding) f(check_name text, status text, detail text, remedy text, difference jsonb)
     order by array_position('{runs,deterministic,idempotent,splits,boundary,nulls,rows_reported,full,empty_window,snapshot}'::text[], f.check_name), e.n;
end $$;
comment on function etl.test_procedure(text, text, text, int, jsonb, text[], int, text) is
  'Proves the contract of a routine on a scratch copy that only this transaction sees and that is always undone: it runs; twice from the same rows gives '
  'the same; run twice is run once; one window is the same window in pieces; a row between two windows is read once; nulls; the number of rows it returns; '
  'a full refresh can be repeated; an empty window changes nothing. Status ok, fail, warn or skipped; difference: rows with - or +. '
  'Without since and until the newest 10,000 rows of each source are the window. Admins only. Raises PT404 procedure.unknown, PT422 params.invalid, request.invalid, test.window, test.too_large, PT403 test.not_readable.';
revoke all on function etl.test_procedure(text, text, text, int, jsonb, text[], int, text) from public;
grant execute on function etl.test_procedure(text, text, text, int, jsonb, text[], int, text) to etl_admin;
