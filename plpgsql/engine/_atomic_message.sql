-- What COMMIT says in a context that can never commit. A function is always such a context, so its text is
-- what etl.start_run compares its own probe with, in whatever language the server speaks.
create or replace function etl._atomic_message() returns text
language plpgsql volatile set search_path = pg_catalog, pg_temp as $$
begin
  begin
    commit;
  exception when invalid_transaction_termination then
    return sqlerrm;
  end;
end $$;
comment on function etl._atomic_message() is 'The text of the error that COMMIT raises inside a transaction block or a function.';
revoke all on function etl._atomic_message() from public;
grant execute on function etl._atomic_message() to etl_reader;
