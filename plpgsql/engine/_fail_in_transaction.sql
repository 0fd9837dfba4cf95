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

-- Before 18, a trigger that waits for the end of the transaction runs as whoever has deferred constraints checked: here as etl_owner. So the
-- caller must have left none.
create or replace function etl._check_nothing_deferred(verb text) returns void
language plpgsql volatile set search_path = pg_catalog, pg_temp as $$
declare
  v_trigger text;
begin
  if pg_current_xact_id_if_assigned() is null then return; end if;
  select format('%I of %s', t.tgname, t.tgrelid::regclass) into v_trigger
    from pg_catalog.pg_locks l join pg_catalog.pg_trigger t on t.tgrelid = l.relation
   where l.pid = pg_backend_pid() and l.locktype = 'relation' and l.granted and l.mode <> 'AccessShareLock' and t.tgdeferrable and not t.tgisinternal
   limit 1;
  if found then
    perform etl._fail('PT409', 'call.deferred_trigger', format('%s would run a trigger that this transaction has left for its end: %s', verb, v_trigger),
      format('end this transaction, then call %s in another one', verb));
  end if;
end $$;
comment on function etl._check_nothing_deferred(text) is
  'Raises PT409 call.deferred_trigger when the transaction has written to a table that has triggers which can wait for its end.';
revoke all on function etl._check_nothing_deferred(text) from public;
