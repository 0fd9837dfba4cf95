-- Explains why a verb that manages transactions cannot run where it was called.
create or replace function etl._fail_in_transaction(verb text) returns void
language plpgsql volatile set search_path = pg_catalog, pg_temp as $$
begin
  raise exception using errcode = '25001',
    message = format('%s manages its own transactions and cannot run inside one', verb),
    detail = jsonb_build_object('code', 'call.in_transaction')::text,
    hint = format('send CALL %s(...) as one statement with autocommit on: not after BEGIN, not from a function, a trigger or EXECUTE, '
                  'not together with other statements; psycopg: connect(..., autocommit=True); pg_cron: the CALL alone', verb);
end $$;
comment on function etl._fail_in_transaction(text) is 'Raises 25001, with what to do, for a CALL inside a transaction block.';
revoke all on function etl._fail_in_transaction(text) from public;
grant execute on function etl._fail_in_transaction(text) to etl_reader;
