-- A test of a routine's contract, as etl_owner: it calls the routine, and reads and empties the tables of the team.
create or replace function etl._test_contract(contract jsonb, since text, until text) returns jsonb
language plpgsql volatile security definer set search_path = pg_catalog, pg_temp as $$
declare
  v_run      record;
  v_checked  record;
  v_findings jsonb;
begin
  if current_user operator(pg_catalog.<>) 'etl_owner' then perform etl._fail_altered('etl._test_contract'); end if;
  if contract ? 'strategy' then contract := etl._contract_with_window(contract, since, until); end if;
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
comment on function etl._test_contract(jsonb, text, text) is 'The findings of a test, in no order. Raises PT422 test.window, PT403 test.not_readable, PT422 test.too_large.';
revoke all on function etl._test_contract(jsonb, text, text) from public;
grant execute on function etl._test_contract(jsonb, text, text) to etl_engine;
