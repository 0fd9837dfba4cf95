-- One value read from the tables of the team, with a statement that was put together from names the server has resolved, or with the
-- query that is the source of a watermark. It may write nothing: what it left for the end of the transaction would run as whoever called.
create or replace function etl._read_source(query text, first text default null, second text default null) returns text
language plpgsql volatile security definer set search_path = pg_catalog, pg_temp as $$
declare
  v_value text;
begin
  if current_user operator(pg_catalog.<>) 'etl_owner' then perform etl._fail_altered('etl._read_source'); end if;
  -- Read only until the subtransaction ends: a setting of the function would do, but servers from 17 on refuse that.
  begin
    perform set_config('transaction_read_only', 'on', true);
    execute query into v_value using first, second;
  exception when assert_failure then raise;
  end;
  return v_value;
end $$;
comment on function etl._read_source(text, text, text) is 'The value that a query ($1, $2) returns, read as etl_owner, in a transaction that may not write meanwhile.';
revoke all on function etl._read_source(text, text, text) from public;
grant execute on function etl._read_source(text, text, text) to etl_engine;

-- A cursor is for one statement: where there are several, none of them is executed. It shows the plan, and reads nothing.
create or replace function etl._check_source(query text) returns void
language plpgsql volatile security definer set search_path = pg_catalog, pg_temp as $$
declare
  v_plan refcursor;
begin
  if current_user operator(pg_catalog.<>) 'etl_owner' then perform etl._fail_altered('etl._check_source'); end if;
  begin
    perform set_config('transaction_read_only', 'on', true);
    open v_plan for execute 'explain ' || query;
    close v_plan;
  exception when assert_failure then raise;
  end;
end $$;
comment on function etl._check_source(text) is 'Raises what the server has to say against a text that is not one complete query which etl_owner may execute.';
revoke all on function etl._check_source(text) from public;
grant execute on function etl._check_source(text) to etl_engine;

-- The server looks names up with the rights of whoever asks.
create or replace function etl._find_routine(signature text) returns oid
language plpgsql stable security definer set search_path = pg_catalog, pg_temp as $$
begin
  if current_user operator(pg_catalog.<>) 'etl_owner' then perform etl._fail_altered('etl._find_routine'); end if;
  return to_regprocedure(signature);
exception when invalid_schema_name or invalid_text_representation or insufficient_privilege or syntax_error or undefined_object then
  return null;
end $$;
comment on function etl._find_routine(text) is 'The routine that a signature, as people write it, means to etl_owner; null when there is none.';
revoke all on function etl._find_routine(text) from public;
grant execute on function etl._find_routine(text) to etl_engine;
