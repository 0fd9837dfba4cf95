-- The one way in which b2s refuses something.
--
-- SQLSTATE PTnnn becomes HTTP status nnn in PostgREST and in our own API; DETAIL is one JSON object with a stable
-- code and every problem found, so that a client never has to parse prose.
create or replace function etl._fail(sqlstate_ text, code text, message text, hint text, data jsonb default '{}')
returns void
language plpgsql volatile set search_path = pg_catalog, pg_temp as $$
begin
  raise exception using errcode = sqlstate_, message = _fail.message, hint = _fail.hint,
    detail = (jsonb_build_object('code', code) || data)::text;
end $$;
comment on function etl._fail(text, text, text, text, jsonb) is
  'Raises an error with SQLSTATE PTnnn, a message, a hint and {"code": ...} in DETAIL.';
revoke all on function etl._fail(text, text, text, text, jsonb) from public;
grant execute on function etl._fail(text, text, text, text, jsonb) to etl_reader, etl_retention;
