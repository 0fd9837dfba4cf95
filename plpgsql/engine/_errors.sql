-- What an SQLSTATE means for a step, and what a person can do about it.
create or replace function etl._error_class(sqlstate_ text, code text) returns text
language sql immutable set search_path = pg_catalog, pg_temp as $$
  select case
    when sqlstate_ in ('40001', '40P01', '55P03', '53300', '57P01', '57P02', '57P03') or sqlstate_ like '08%' then 'transient'
    when sqlstate_ like '22%' or sqlstate_ like '23%' or code = 'check.failed' then 'data_quality'
    when sqlstate_ in ('42P01', '42703', '42883', '42804', '42P02', '42704', '3F000', '42846') then 'schema_mismatch'
    when sqlstate_ like '53%' or sqlstate_ like '54%' then 'resource'
    when sqlstate_ = '57014' then 'cancelled'
    else 'code'
  end
$$;
comment on function etl._error_class(text, text) is
  'transient (retried), data_quality, schema_mismatch, resource, cancelled or code, from SQLSTATE and stable code.';
revoke all on function etl._error_class(text, text) from public;
grant execute on function etl._error_class(text, text) to etl_owner;

create or replace function etl._remedy(error_class text, sqlstate_ text) returns text
language sql immutable set search_path = pg_catalog, pg_temp as $$
  select case
    when sqlstate_ = '2D000' then 'the routine commits or rolls back: take that out, the step is one transaction and b2s ends it'
    when sqlstate_ = '42501' then 'steps run as etl_owner: grant it what the message names'
    when sqlstate_ in ('42P01', '42883') then
      'create what is missing; if it exists, qualify its name or list its schema under search_path in transformations.yaml'
    when sqlstate_ = '55P03' then 'another session held a lock for longer than lock_timeout; see pg_locks, then start again'
    when sqlstate_ = '23503' then 'a row refers to one that is not there: load or repair the referenced rows first, then start again'
    else case error_class
      when 'transient' then 'nothing is wrong with the data: start the run again'
      when 'data_quality' then 'repair the rows in Bronze or handle them in the routine, then start the run again'
      when 'schema_mismatch' then 'the routine and the tables do not fit: correct the routine, then start the run again'
      when 'resource' then 'the server ran out of a resource: free some, or process less at a time, then start the run again'
      when 'cancelled' then 'nothing of the step was kept: start the run again'
      else 'correct the routine, then start the run again'
    end
  end
$$;
comment on function etl._remedy(text, text) is 'What to do about an error for which the server gives no hint.';
revoke all on function etl._remedy(text, text) from public;
grant execute on function etl._remedy(text, text) to etl_owner;

-- One failure as recorded: the fields of a caught error, completed.
create or replace function etl._failure(sqlstate_ text, message text, detail text, hint text, context text, order_index int)
returns jsonb
language sql stable set search_path = pg_catalog, pg_temp as $$
  select jsonb_build_object('sqlstate', sqlstate_, 'code', c.code, 'message', message, 'detail', nullif(detail, ''),
           'hint', coalesce(nullif(hint, ''), etl._remedy(etl._error_class(sqlstate_, c.code), sqlstate_)),
           -- What lies beneath the step's own statement is the engine's, and no help.
           'context', nullif(regexp_replace(context, '(^|\n)[^\n]*\n[^\n]*etl\._(call_routine|execute_step|execute_refresh).*$', ''), ''), 'order_index', order_index, 'class', etl._error_class(sqlstate_, c.code))
    from (select coalesce(case when sqlstate_ like 'PT%' then substring(detail from '"code": "([^"]+)"') end, sqlstate_) as code) c
$$;
comment on function etl._failure(text, text, text, text, text, int) is 'A caught error as jsonb, with its class, stable code and remedy.';
revoke all on function etl._failure(text, text, text, text, text, int) from public;
grant execute on function etl._failure(text, text, text, text, text, int) to etl_owner;

-- A cancel request of a client (Ctrl-C) reaches the backend as two signals on some versions of the server, microseconds
-- apart: the second one must not hit the bookkeeping that follows the first.
create or replace function etl._absorb_signal() returns void
language plpgsql volatile set search_path = pg_catalog, pg_temp as $$
begin
  perform pg_sleep(0.02);
exception when query_canceled then
  null;
end $$;
comment on function etl._absorb_signal() is 'Waits for the second signal of a cancel request, and lets it pass.';
revoke all on function etl._absorb_signal() from public;
