-- Gives the rows of a source the transaction ids of this cluster (etl.rebase_watermark).
create or replace function etl._restamp_source(source text, read_before text[], restored_at xid8) returns bigint
language plpgsql volatile security definer set search_path = pg_catalog, pg_temp as $$
declare
  v_column text[];
  v_count  bigint;
begin
  if current_user operator(pg_catalog.<>) 'etl_owner' then perform etl._fail_altered('etl._restamp_source'); end if;
  v_column := parse_ident(source);
  execute format('lock table %I.%I in share row exclusive mode', v_column[1], v_column[2]);
  execute format(
    'update %1$I.%2$I set %3$I = case when %4$s then ''3''::xid8 else pg_current_xact_id() end '
    'where not %4$s or %3$I >= pg_snapshot_xmin(pg_current_snapshot())', v_column[1], v_column[2], v_column[3],
    format('(%I < $2 and not exists (select from unnest($1) w where not pg_visible_in_snapshot(%1$I, w::pg_snapshot)))', v_column[3]))
    using read_before, restored_at;
  get diagnostics v_count = row_count;
  set constraints all immediate;
  return v_count;
exception when insufficient_privilege then
  perform etl._fail('PT403', 'watermark.cannot_restamp', format('%s cannot be given new transaction ids: %s', source, sqlerrm),
    format('for as long as this takes: grant select, update on %I.%I to etl_owner', v_column[1], v_column[2]));
end $$;
comment on function etl._restamp_source(text, text[], xid8) is
  'Gives the rows of a source ids of this cluster: read rows one that is older than any, the others that of this transaction. Returns how many changed.';
revoke all on function etl._restamp_source(text, text[], xid8) from public;
grant execute on function etl._restamp_source(text, text[], xid8) to etl_engine;
