-- The statement of a step with its values in place of $1..$5, as one could type it.
create or replace function etl._render_call(statement text, mode text, since text, until text, run_id bigint, parameters jsonb) returns text
language plpgsql stable set search_path = pg_catalog, pg_temp as $$
declare
  v_values text[] := array[quote_nullable(mode), quote_nullable(since), quote_nullable(until), coalesce(run_id::text, 'null'),
                           format('%L::jsonb', parameters)];
  v_result text := '';
  v_rest   text := statement;
  v_match  text[];
begin
  -- A $n directly after a letter, digit or quote belongs to an identifier.
  loop
    v_match := regexp_match(v_rest, '^(.*?[^a-zA-Z0-9_$"])[$]([1-5])(.*)$');
    exit when v_match is null;
    v_result := v_result || v_match[1] || v_values[v_match[2]::int];
    v_rest := v_match[3];
  end loop;
  return v_result || v_rest;
end $$;
comment on function etl._render_call(text, text, text, text, bigint, jsonb) is 'A compiled call with its values written in.';
revoke all on function etl._render_call(text, text, text, text, bigint, jsonb) from public;
grant execute on function etl._render_call(text, text, text, text, bigint, jsonb) to etl_reader;
