-- What keeps the column of the xid strategy true: every row that is written carries the transaction that wrote it.
--
-- The default of the column does that for an INSERT that does not name it. This trigger does it for the others: an UPDATE,
-- an INSERT or COPY that brings the value of another time (rows moved from an archive, a publisher that has the column too).
-- The column's name is fixed: setting a column by a name given to the trigger takes 1.6 times as long. Its condition,
-- when (new.etl_xid is distinct from pg_current_xact_id()), leaves rows alone that the default has filled already, at no
-- cost that could be measured; an update costs 2 us more. pg_current_xact_id() is the top transaction, in savepoints too.
create or replace function etl.touch_xid() returns trigger
language plpgsql volatile set search_path = pg_catalog, pg_temp as $$
begin
  -- Whoever stamps rows anew after a restore (etl.rebase_watermark) says which transaction they are to carry.
  if current_setting('b2s.rebase', true) is distinct from 'on' then new.etl_xid := pg_current_xact_id(); end if;
  return new;
end $$;
comment on function etl.touch_xid() is
  'Trigger, before insert or update, for each row: sets the column etl_xid to the transaction that writes the row. b2s watermark add-column creates it, '
  'enabled always, so that it works for rows that arrive by logical replication too.';
revoke all on function etl.touch_xid() from public;
grant execute on function etl.touch_xid() to etl_reader;
