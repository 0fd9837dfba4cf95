-- Reads a past range again, chunk by chunk, beside the runs of the pipeline: executed like a run (api/start_run.sql), under a
-- lock of its own, and with windows that move no watermark (engine/_backfill.sql). Thin for the same reason: it commits.
create or replace procedure etl.backfill(
  procedures text[] default null, from_ text default null, until text default null, chunk text default null, params jsonb default null,
  pause interval default null, reason text default null, resume bigint default null, idempotency_key text default null,
  pipeline text default null,
  inout run_id bigint default null, inout status text default null)
language plpgsql as $$
declare
  v_run    record;
  v_atomic text;
begin
  begin commit; exception when invalid_transaction_termination then v_atomic := sqlerrm; end;
  if v_atomic = etl._atomic_message() then perform etl._fail_in_transaction('etl.backfill'); end if;
  commit; set transaction isolation level read committed;
  select * into v_run from etl._begin_backfill(etl._backfill_request(procedures, from_, until, chunk, params, pause, reason, resume,
    idempotency_key, pipeline));
  run_id := v_run.run_id;
  if v_run.is_new then
    call etl._walk(v_run.run_id, v_run.lock_key, v_run.pause_ms);
  end if;
  status := etl._run_status(v_run.run_id);
end $$;
comment on procedure etl.backfill(text[], text, text, text, jsonb, interval, text, bigint, text, text, bigint, text) is
  'Reads rows of the past again, in chunks that are a transaction each; returns run_id and the final status. CALL it alone, with autocommit on. '
  'from_ (inclusive; default: the first row) and until (exclusive; default: the watermark) are times, ids or numbers of transactions, by strategy; '
  'chunk is ''1 day'' or ''100000''; pause is waited after each chunk. resume: the number of a backfill that did not succeed; what is left of it is done. '
  'Runs go on beside it, and the watermarks stay where they are. Admins only. Raises PT404, PT409 or PT422 with {"code": ...} in DETAIL before '
  'anything is done; a chunk that fails does not raise, see status.';
revoke all on procedure etl.backfill(text[], text, text, text, jsonb, interval, text, bigint, text, text, bigint, text) from public;
grant execute on procedure etl.backfill(text[], text, text, text, jsonb, interval, text, bigint, text, text, bigint, text) to etl_admin;
