-- Proves the contract of a routine on a scratch copy: what must hold so that any number of runs, in any windows, give one result.

-- Everything a test needs to know about a procedure. A run has a number; a test has -1.
create or replace function etl._contract_of(procedure text, since text, until text, pieces int, params jsonb, ignore_columns text[], max_rows int, pipeline text)
returns jsonb
language plpgsql volatile set search_path = pg_catalog, pg_temp as $$
declare
  v_pipeline  etl.pipelines := etl._pipeline(pipeline);
  v_procedure etl.procedures;
  v_params    record;
  v_window    record;
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
                          'sources', etl._contract_sources(v_procedure.watermark_sources));
  if v_procedure.watermark_strategy is null then
    if since is not null or until is not null then
      perform etl._fail('PT422', 'test.window', format('%s has no watermark, so it has no window', v_procedure.name), 'leave out since and until');
    end if;
    return v_contract;
  end if;
  v_window := etl._contract_window(v_contract, since, until, v_procedure.watermark_sources);
  v_contract := v_contract || jsonb_build_object('since', v_window.since, 'until', v_window.until);
  return v_contract || jsonb_build_object('cuts', etl._contract_cuts(v_contract),
    'row_count', etl._contract_count_inside(v_contract, v_window.since, v_window.until));
end $$;
comment on function etl._contract_of(text, text, text, int, jsonb, text[], int, text) is
  'What etl.test_procedure is to test: call, window and sources. Raises PT404 procedure.unknown, PT422 params.invalid and test.window.';
revoke all on function etl._contract_of(text, text, text, int, jsonb, text[], int, text) from public;

create or replace function etl._contract_runs(contract jsonb, counted bigint) returns jsonb
language sql immutable set search_path = pg_catalog, pg_temp as $$
  select etl._contract_finding('runs', case when contract->'tables' = '{}' or contract->>'row_count' = '0' or v.is_idle then 'warn' else 'ok' end,
    concat_ws('; ', case when contract ? 'strategy' then 'window ' || etl._contract_show_window(contract->>'since', contract->>'until')
                         || coalesce(format(' of %s row(s) in its sources', contract->>'row_count'), '') else 'no window' end,
      case when contract->'tables' = '{}' then 'it wrote to no table'
           else format('wrote %s row(s) in %s', counted, (select string_agg(k, ', ' order by k) from jsonb_object_keys(contract->'tables') k)) end,
      'emptied for the checks that follow: ' || nullif((select string_agg(e, ', ' order by e) from jsonb_array_elements_text(contract->'emptied') e), '')),
    case when contract->'tables' = '{}' or contract->>'row_count' = '0' or v.is_idle
           then 'little is proven by that: put rows into its sources' || case when contract ? 'strategy' then ', or name another window' else '' end end)
    from (select counted = 0 and contract->'emptied' = '[]' as is_idle) v
$$;
comment on function etl._contract_runs(jsonb, bigint) is 'The first finding of a test: what was run on which window.';
revoke all on function etl._contract_runs(jsonb, bigint) from public;

create or replace function etl._test_procedure(contract jsonb) returns jsonb
language plpgsql volatile set search_path = pg_catalog, pg_temp as $$
declare
  v_run      record;
  v_checked  record;
  v_findings jsonb;
begin
  perform etl._contract_check_tables(contract);
  v_run := etl._contract_variant(contract, jsonb_build_array(etl._contract_call_of(contract, contract->>'since', contract->>'until')), null,
                                 contract#>'{settings,checks}');
  if v_run.failure is not null then return jsonb_build_array(etl._contract_finding('runs', 'fail', v_run.failure->>'message', v_run.failure->>'hint')); end if;
  contract := contract || jsonb_build_object('tables', v_run.tables);
  if v_run.tables = '{}' then return jsonb_build_array(etl._contract_runs(contract, v_run.counted)); end if;
  perform etl._contract_check_tables(contract);
  contract := contract || jsonb_build_object('emptied', etl._contract_emptied(contract));
  v_checked := etl._contract_findings(contract);
  v_findings := etl._contract_runs(contract, v_run.counted) || v_checked.findings
    || etl._contract_rows_reported(contract, v_run.reported, v_run.counted);
  if (contract->>'allow_full')::boolean and contract->>'mode' <> 'full' then v_findings := v_findings || etl._contract_full(v_checked.contract); end if;
  if current_setting('transaction_isolation') = 'read committed' and v_findings @> '[{"status": "fail"}]' then
    v_findings := v_findings || etl._contract_finding('snapshot', 'warn', 'rows that other sessions committed while the test ran can be among these differences',
      'to rule that out: begin isolation level repeatable read; select * from etl.test_procedure(...); rollback');
  end if;
  return v_findings;
end $$;
comment on function etl._test_procedure(jsonb) is 'The findings of a test, in no order. Raises PT403 test.not_readable, PT422 test.too_large.';
revoke all on function etl._test_procedure(jsonb) from public;

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
  if pg_my_temp_schema() <> 0 then perform etl._check_temporary_objects(); end if;
  return query
    select f.check_name, f.status, f.detail, f.remedy, nullif(f.difference, 'null')
      from jsonb_array_elements(etl._test_procedure(etl._contract_of(procedure, since, until, pieces, params, ignore_columns, max_rows, pipeline)))
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
