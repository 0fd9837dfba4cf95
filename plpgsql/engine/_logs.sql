-- What routines have to say, kept whatever becomes of their transaction.
--
-- A row, a setting, a temporary table: everything is undone with the step that fails. A prepared statement is not: PREPARE is no part
-- of the transaction. So etl.log leaves each line in this session as the text of a prepared statement that nobody executes, and the
-- engine makes rows of them at the end of the step: in its transaction when it succeeds, after the ROLLBACK when it fails. A session
-- that dies takes along what it had not ended; its client has had each line at once.

-- The month of a moment, in UTC, whoever runs.
create or replace function etl._log_partition(at timestamptz) returns text
language sql immutable
return 'step_logs_p' || to_char(at at time zone 'UTC', 'YYYYMM');
comment on function etl._log_partition(timestamptz) is 'The name of the partition of etl.step_logs that holds a moment.';
revoke all on function etl._log_partition(timestamptz) from public;

-- Nobody needs a clock for that: each run that ends makes the month after the one it ends in, unless somebody is just reading; a line of
-- a month that has none yet makes its own, and waits. Two that make the same one wait for each other: having waited for the lock is what
-- shows the other's to the second.
create or replace function etl._make_log_partition(at timestamptz, is_needed boolean) returns void
language plpgsql volatile set search_path = pg_catalog, pg_temp as $$
declare
  v_name  text := etl._log_partition(at);
  v_month timestamp := date_trunc('month', at at time zone 'UTC');
begin
  if to_regclass('etl.' || v_name) is not null then return; end if;
  if is_needed then lock table only etl.step_logs in access exclusive mode;
  else lock table only etl.step_logs in access exclusive mode nowait; end if;
  if to_regclass('etl.' || v_name) is null then
    execute format('create table etl.%I partition of etl.step_logs for values from (%L) to (%L)', v_name, v_month || '+00', v_month + interval '1 month' || '+00');
    execute format('grant select on etl.%I to etl_reader', v_name);
  end if;
exception when lock_not_available then
  if is_needed then raise; end if;
end $$;
comment on function etl._make_log_partition(timestamptz, boolean) is
  'Creates the partition of etl.step_logs for the month of a moment, unless it is there; when it is not needed yet, only if nobody has to be waited for.';
revoke all on function etl._make_log_partition(timestamptz, boolean) from public;

-- Read as text and never executed: with the rights of the owner that would execute whatever a client has prepared under such a name.
create or replace function etl._prepared_logs() returns table (name text, line jsonb)
language sql volatile set search_path = pg_catalog, pg_temp as $$
  select s.name, convert_from(decode(substring(s.statement from '''(.*)'''), 'base64'), 'UTF8')::jsonb
    from pg_catalog.pg_prepared_statements s where s.name ~ '^b2s_log_[0-9]+$'
$$;
comment on function etl._prepared_logs() is 'The log lines that this session keeps until their step has ended.';
revoke all on function etl._prepared_logs() from public;

create or replace function etl._forget_logs() returns void
language plpgsql volatile set search_path = pg_catalog, pg_temp as $$
declare
  v_name text;
begin
  for v_name in select s.name from pg_catalog.pg_prepared_statements s where s.name ~ '^b2s_log_[0-9]+$' loop
    execute format('deallocate %I', v_name);
  end loop;
  perform set_config('b2s.log_lines', '', true);
end $$;
comment on function etl._forget_logs() is 'Forgets the log lines that this session keeps; before a run, those that an interrupted CALL, or a client, has left behind.';
revoke all on function etl._forget_logs() from public;

create or replace function etl._keep_logs(run_id bigint) returns void
language plpgsql volatile set search_path = pg_catalog, pg_temp set plan_cache_mode = force_generic_plan as $$
declare
  v_months timestamptz[] := array(select distinct on (etl._log_partition(x.at)) x.at from (select (l.line->>'at')::timestamptz as at from etl._prepared_logs() l) x);
  v_month  timestamptz;
begin
  if v_months = '{}' then return; end if;
  foreach v_month in array v_months loop perform etl._make_log_partition(v_month, true); end loop;
  insert into etl.step_logs (log_id, logged_at, run_id, order_index, attempt, procedure_name, level, message, data, is_rolled_back)
  select substring(l.name from '[0-9]+$')::bigint, (l.line->>'at')::timestamptz, p.run_id, p.order_index, p.attempt, p.procedure_name,
         l.line->>'level', l.line->>'message', l.line->'data', p.status in ('failed', 'retrying', 'rolled_back', 'cancelled')
    from etl._prepared_logs() l
    join etl.procedure_runs p on p.run_id = _keep_logs.run_id and p.order_index = (l.line->>'order_index')::int and p.attempt = (l.line->>'attempt')::int
   where (l.line->>'run_id')::bigint = _keep_logs.run_id
   order by 1;
  perform etl._forget_logs();
end $$;
comment on function etl._keep_logs(bigint) is 'Makes rows of etl.step_logs of the lines that this session keeps for a run.';
revoke all on function etl._keep_logs(bigint) from public;
