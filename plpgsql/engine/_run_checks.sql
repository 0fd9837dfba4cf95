-- Checks run in the step's own transaction: what violates one of severity error is never published.
create or replace function etl._run_checks(procedure_name text, checks jsonb) returns jsonb
language plpgsql volatile set search_path = pg_catalog, pg_temp as $$
declare
  v_check      jsonb;
  v_violations bigint;
  v_failed     jsonb := '[]';
  v_warned     jsonb := '[]';
begin
  for v_check in select c from jsonb_array_elements(checks) c loop
    execute v_check->>'sql' into v_violations;
    continue when coalesce(v_violations, 0) = 0;
    v_check := v_check - 'sql' || jsonb_build_object('violations', v_violations);
    if v_check->>'severity' = 'warn' then v_warned := v_warned || v_check; else v_failed := v_failed || v_check; end if;
  end loop;
  if v_failed <> '[]' then
    perform etl._fail('PT422', 'check.failed',
      (select format('%s: %s', procedure_name, string_agg(format('check %s found %s violation(s)', f->>'name', f->>'violations'), '; '))
         from jsonb_array_elements(v_failed) f),
      'nothing was published; look at the offending rows, then start the run again', jsonb_build_object('checks', v_failed));
  end if;
  return nullif(v_warned, '[]');
end $$;
comment on function etl._run_checks(text, jsonb) is
  'Runs the checks of a procedure. Raises PT422 check.failed for those of severity error; returns the others that did not hold.';
revoke all on function etl._run_checks(text, jsonb) from public;
