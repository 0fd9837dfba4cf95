-- Checks run in the step's own transaction: what violates one of severity error is never published.
create or replace function etl._unmet_checks(checks jsonb) returns jsonb
language plpgsql volatile set search_path = pg_catalog, pg_temp as $$
declare
  v_check      jsonb;
  v_violations bigint;
  v_unmet      jsonb := '[]';
begin
  for v_check in select c from jsonb_array_elements(checks) c loop
    execute v_check->>'sql' into v_violations;
    if v_violations <> 0 then v_unmet := v_unmet || (v_check - 'sql' || jsonb_build_object('violations', v_violations)); end if;
  end loop;
  return nullif(v_unmet, '[]');
end $$;
comment on function etl._unmet_checks(jsonb) is 'Runs checks, as whoever calls: those that found violations, with their number; null when there is none.';
revoke all on function etl._unmet_checks(jsonb) from public;
grant execute on function etl._unmet_checks(jsonb) to etl_owner;

create or replace function etl._judge_checks(procedure_name text, unmet_checks jsonb) returns jsonb
language plpgsql volatile set search_path = pg_catalog, pg_temp as $$
declare
  v_failed jsonb := (select jsonb_agg(c) from jsonb_array_elements(unmet_checks) c where c->>'severity' is distinct from 'warn');
begin
  if v_failed is not null then
    perform etl._fail('PT422', 'check.failed',
      (select format('%s: %s', procedure_name, string_agg(format('check %s found %s violation(s)', f->>'name', f->>'violations'), '; '))
         from jsonb_array_elements(v_failed) f),
      'nothing was published; look at the offending rows, then start the run again', jsonb_build_object('checks', v_failed));
  end if;
  return unmet_checks;
end $$;
comment on function etl._judge_checks(text, jsonb) is 'Raises PT422 check.failed for unmet checks of severity error; returns the others.';
revoke all on function etl._judge_checks(text, jsonb) from public;
grant execute on function etl._judge_checks(text, jsonb) to etl_owner;
