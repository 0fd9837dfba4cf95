-- Runs a request to its end in this session.
--
-- These two procedures are the only code that ends transactions, and they do nothing else: a procedure that COMMITs
-- can neither be security definer nor pin its search_path, so everything that touches a table is in the guarded
-- helpers they call. The run lock passes hand over hand across every COMMIT and ROLLBACK (engine/_lock.sql).
-- It runs with the caller's search_path: operators only between values of one built-in type, the rest as pg_catalog functions,
-- or an operator that somebody put on that path could run as the caller. A step that has set a path, which outlives every function, is
-- not to choose it: the caller's is put back before anything is looked up.
-- SET TRANSACTION must directly follow the COMMIT: even an IF in between would take a snapshot.
create or replace procedure etl._walk(run_id bigint, lock_key int, pause_ms int default 0, wants_helpers boolean default false)
language plpgsql as $$
declare
  v_next         etl.run_scopes;
  v_result       jsonb;
  v_done         record;
  v_seen         bigint[] := etl._change_baseline();
  v_path         pg_catalog.text := pg_catalog.current_setting('search_path');
  v_delay        pg_catalog.float8;
  v_interruption text;
  v_is_held      boolean;
  v_has_helpers  boolean := false;
begin
  v_is_held := etl._hold(lock_key); commit; set transaction isolation level read committed, read write; v_is_held := etl._rehold(lock_key);
  if wants_helpers then v_has_helpers := etl._open_helpers(run_id); end if;
  loop
    v_next := etl._claim(run_id, v_result, pg_catalog.cardinality(v_next.required_by) + pg_catalog.cardinality(v_next.precedes) > 0);
    v_path := pg_catalog.set_config('search_path', v_path, false);
    v_is_held := etl._hold(lock_key);
    if v_next.scope_index is null then
      commit; v_is_held := pg_catalog.pg_advisory_unlock_shared(6435444, lock_key);
      if v_has_helpers then perform etl._close_helpers(); end if;
      return;
    end if;
    if v_next.scope_index = 0 then
      -- Others execute what is left: look again in a moment, holding no snapshot meanwhile.
      commit; set transaction isolation level read committed, read write; v_is_held := etl._rehold(lock_key);
      v_result := null;
      v_next := null;
      v_delay := 100;
    else
      if v_next.isolation = 'serializable' then commit; set transaction isolation level serializable, read write;
      elsif v_next.isolation = 'repeatable read' then commit; set transaction isolation level repeatable read, read write;
      else commit; set transaction isolation level read committed, read write; end if;
      v_is_held := etl._rehold(lock_key);
      if v_next.kind::pg_catalog.text = 'refresh' then v_result := etl._execute_refresh(run_id, v_next.scope_index);
      else
        v_done := etl._execute_scope(run_id, v_next.first_order_index, v_next.last_order_index, v_seen);
        v_result := v_done.result; v_seen := v_done.seen;
      end if;
      v_path := pg_catalog.set_config('search_path', v_path, false);
      v_is_held := etl._hold(lock_key);
      if pg_catalog.jsonb_exists(v_result, 'failure') then
        rollback; set transaction isolation level read committed, read write; v_is_held := etl._rehold(lock_key);
        v_delay := etl._record_failure(run_id, v_next.scope_index, pg_catalog.jsonb_object_field(v_result, 'failure'));
        v_seen := etl._change_baseline();
        v_result := null;
        v_next := null;
        v_is_held := etl._hold(lock_key); commit; set transaction isolation level read committed, read write; v_is_held := etl._rehold(lock_key);
      else
        commit; set transaction isolation level read committed, read write; v_is_held := etl._rehold(lock_key);
        v_delay := pause_ms;
      end if;
    end if;
    while v_delay > 0::pg_catalog.float8 loop
      v_interruption := null;
      begin
        perform pg_catalog.pg_sleep(least(v_delay, 500) / 1000::pg_catalog.float8);
      exception when query_canceled then v_interruption := sqlerrm;
      end;
      v_delay := case when etl._is_cancelled(run_id, v_interruption) then 0 else v_delay - 500::pg_catalog.float8 end;
      v_is_held := etl._hold(lock_key); commit; set transaction isolation level read committed, read write; v_is_held := etl._rehold(lock_key);
    end loop;
  end loop;
end $$;
comment on procedure etl._walk(bigint, int, int, boolean) is 'Executes the scopes of a run that this session owns until none is left. Called by the engine only.';
revoke all on procedure etl._walk(bigint, int, int, boolean) from public;
grant execute on procedure etl._walk(bigint, int, int, boolean) to etl_operator;

create or replace procedure etl.start_run(
  mode text default null, procedures text[] default null, groups text[] default null, tags text[] default null,
  with_upstream boolean default false, with_downstream boolean default false,
  as_of timestamptz default null, params jsonb default null,
  transaction_scope text default null, mv_refresh jsonb default null,
  idempotency_key text default null, dry_run etl.dry_run default 'false',
  confirm_full_refresh boolean default false, approved_by text default null, reason text default null,
  max_concurrency int default null, pipeline text default null,
  inout run_id bigint default null, inout status text default null)
language plpgsql as $$
declare
  v_request jsonb;
  v_run     record;
  v_atomic  text;
begin
  begin commit; exception when invalid_transaction_termination then v_atomic := sqlerrm; end;
  if v_atomic = etl._atomic_message() then perform etl._fail_in_transaction('etl.start_run'); end if;
  commit; set transaction isolation level read committed;
  v_request := etl._request(mode, procedures, groups, tags, with_upstream, with_downstream, as_of, params, transaction_scope,
    mv_refresh, idempotency_key, confirm_full_refresh, approved_by, reason, max_concurrency, pipeline);
  if dry_run::pg_catalog.text in ('t', 'true', 'execute') then
    perform etl._report_plan(v_request, dry_run::pg_catalog.text = 'execute');
    run_id := null; status := 'planned';
    return;
  end if;
  select * into v_run from etl._begin_run(v_request);
  run_id := v_run.run_id;
  if v_run.is_new then
    call etl._walk(v_run.run_id, v_run.lock_key, wants_helpers => true);
  end if;
  status := etl._run_status(v_run.run_id);
end $$;
comment on procedure etl.start_run(text, text[], text[], text[], boolean, boolean, timestamptz, jsonb, text, jsonb, text, etl.dry_run,
  boolean, text, text, int, text, bigint, text) is
  'Plans a request and runs it to its end in this session; returns run_id and the final status. CALL it alone, with autocommit on. '
  'Selection: procedures, groups, tags (their union; nothing: all), with_upstream, with_downstream. mode: incremental, full, or null for each '
  'procedure''s own. mv_refresh: ''true'', ''false'' or ''["mart.mv"]''. dry_run: true shows the plan, ''execute'' runs and rolls back. '
  'Raises PT400, PT403, PT404, PT409 or PT422 with {"code": ...} in DETAIL before anything is done; a failed step does not raise, see status.';
revoke all on procedure etl.start_run(text, text[], text[], text[], boolean, boolean, timestamptz, jsonb, text, jsonb, text, etl.dry_run,
  boolean, text, text, int, text, bigint, text) from public;
grant execute on procedure etl.start_run(text, text[], text[], text[], boolean, boolean, timestamptz, jsonb, text, jsonb, text, etl.dry_run,
  boolean, text, text, int, text, bigint, text) to etl_operator;
