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

-- Nobody needs a clock for that: an install makes this month and the next one, each run that ends the month after the one it ends in,
-- unless somebody is just making one; a line of a month that has none yet makes its own, and waits. A table that is attached, and not
-- created as a partition, leaves those alone who read and write the others, however long this transaction may last.
create or replace function etl._make_log_partition(at timestamptz, is_needed boolean) returns void
language plpgsql volatile set search_path = pg_catalog, pg_temp as $$
declare
  v_name  text := etl._log_partition(at);
  v_month timestamp := date_trunc('month', at at time zone 'UTC');
begin
  if to_regclass('etl.' || v_name) is not null then return; end if;
  if is_needed then
    perform pg_advisory_xact_lock(6435448, 0);
  elsif not pg_try_advisory_xact_lock(6435448, 0) then
    return;
  end if;
  begin
    if is_needed then lock table only etl.step_logs in share update exclusive mode;
    else lock table only etl.step_logs in share update exclusive mode nowait; end if;
    -- Whoever made one just now may have made this one: having locked a table is what shows it.
    if to_regclass('etl.' || v_name) is not null then return; end if;
    execute format('create table etl.%I (like etl.step_logs including defaults including constraints)', v_name);
    execute format('alter table etl.step_logs attach partition etl.%I for values from (%L) to (%L)', v_name, v_month || '+00', v_month + interval '1 month' || '+00');
    execute format('create trigger step_logs_are_not_truncated before truncate on etl.%I execute function etl._refuse_change()', v_name);
    execute format('grant select on etl.%I to etl_reader', v_name);
  exception when lock_not_available then
    if is_needed then raise; end if;
  end;
end $$;
comment on function etl._make_log_partition(timestamptz, boolean) is
  'Creates the partition of etl.step_logs for the month of a moment, unless it is there; when it is not needed yet, only if nobody has to be waited for.';
revoke all on function etl._make_log_partition(timestamptz, boolean) from public;

-- What a step has prepared under such a name itself may be anything: whatever is no line is passed over.
create or replace function etl._log_line(name text, statement text, out log_id bigint, out logged_at timestamptz, out run_id bigint, out order_index int,
  out attempt int, out level text, out message text, out data jsonb)
language plpgsql stable set search_path = pg_catalog, pg_temp as $$
declare
  v_line jsonb;
begin
  v_line := convert_from(decode(substring(statement from '''(.*)'''), 'base64'), 'UTF8');
  logged_at := v_line->>'at'; run_id := v_line->>'run_id'; order_index := v_line->>'order_index'; attempt := v_line->>'attempt';
  message := v_line->>'message'; data := v_line->'data'; level := v_line->>'level';
  if level in ('debug', 'info', 'warning', 'error') and message is not null then log_id := substring(name from '[0-9]+$'); end if;
exception when others then
  log_id := null;
end $$;
comment on function etl._log_line(text, text) is 'A log line that this session keeps as a prepared statement; log_id is null when it is none.';
revoke all on function etl._log_line(text, text) from public;

-- Read as text and never executed: with the rights of the owner that would execute whatever a client has prepared under such a name.
-- Only of attempts of this very session, and of a time at which they ran. A join of any other kind would read the whole run, and make
-- serializable scopes that run side by side fail each other.
create or replace function etl._prepared_logs(run_id bigint) returns setof etl.step_logs
language plpgsql volatile set search_path = pg_catalog, pg_temp set enable_seqscan = off set enable_hashjoin = off set enable_mergejoin = off
  set plan_cache_mode = force_generic_plan set jit = off as $$
begin
  return query
    select l.log_id, l.logged_at, p.run_id, p.order_index, p.attempt, p.procedure_name, l.level, l.message, l.data,
           p.status in ('failed', 'retrying', 'rolled_back', 'cancelled')
      from pg_catalog.pg_prepared_statements s
      cross join lateral etl._log_line(s.name, s.statement) l
      join etl.procedure_runs p on p.run_id = _prepared_logs.run_id and p.order_index = l.order_index and p.attempt = l.attempt
     where s.name ~ '^b2s_log_[0-9]+$' and l.log_id is not null and l.run_id = _prepared_logs.run_id and p.worker_pid = pg_backend_pid()
       and l.logged_at between p.started_at - interval '1 day' and clock_timestamp() + interval '1 day';
end $$;
comment on function etl._prepared_logs(bigint) is 'The log lines that this session keeps for a run until their step has ended.';
revoke all on function etl._prepared_logs(bigint) from public;

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

-- A number that a step has made up may be that of another line.
create or replace function etl._keep_logs(run_id bigint) returns void
language plpgsql volatile set search_path = pg_catalog, pg_temp set plan_cache_mode = force_generic_plan as $$
declare
  v_lines etl.step_logs[] := array(select l from etl._prepared_logs(run_id) l order by l.log_id);
  v_month timestamptz;
begin
  for v_month in select distinct on (etl._log_partition(l.logged_at)) l.logged_at from unnest(v_lines) l loop
    perform etl._make_log_partition(v_month, true);
  end loop;
  insert into etl.step_logs (log_id, logged_at, run_id, order_index, attempt, procedure_name, level, message, data, is_rolled_back)
  select l.log_id, l.logged_at, l.run_id, l.order_index, l.attempt, l.procedure_name, l.level, l.message, l.data, l.is_rolled_back
    from unnest(v_lines) l
  on conflict do nothing;
  perform etl._forget_logs();
end $$;
comment on function etl._keep_logs(bigint) is 'Makes rows of etl.step_logs of the lines that this session keeps for a run.';
revoke all on function etl._keep_logs(bigint) from public;

-- Of very many lines. Whoever only says that it works for a step has nothing to keep.
create or replace function etl._keep_or_forget_logs(run_id bigint, order_index int, attempt int) returns void
language plpgsql volatile set search_path = pg_catalog, pg_temp set enable_seqscan = off set plan_cache_mode = force_generic_plan set jit = off as $$
declare
  v_run etl.runs;
begin
  if exists (select from etl.procedure_runs p
              where p.run_id = _keep_or_forget_logs.run_id and p.order_index = _keep_or_forget_logs.order_index
                and p.attempt = _keep_or_forget_logs.attempt and p.status = 'running' and p.worker_pid = pg_backend_pid()) then
    select * into v_run from etl.runs r where r.run_id = _keep_or_forget_logs.run_id;
    if etl._is_owner(v_run) or etl._is_helper(v_run) then
      perform etl._keep_logs(run_id);
      return;
    end if;
  end if;
  perform etl._forget_logs();
end $$;
comment on function etl._keep_or_forget_logs(bigint, int, int) is 'Keeps the log lines of a step that this session executes; forgets those of one that it does not.';
revoke all on function etl._keep_or_forget_logs(bigint, int, int) from public;
