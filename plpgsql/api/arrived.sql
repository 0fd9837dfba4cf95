-- The window of the xid strategy: a row belongs to it when its transaction is visible in the later snapshot and not in
-- the earlier one, that is, when it had not begun then, or was still running. Both can be looked up in an index, so that a
-- transaction which stays open for hours does not make every window read those hours again. Where the planner does not know
-- the snapshots (a routine in SQL), it has the range between them. It inlines all of it: parsed here once, so that no
-- search_path can change what it means.
create or replace function etl._unfinished(snapshot pg_snapshot) returns xid8[]
language sql immutable parallel safe set search_path = pg_catalog, pg_temp as $$
  select coalesce(array_agg(x), '{}') from pg_snapshot_xip(snapshot) x
$$;
comment on function etl._unfinished(pg_snapshot) is 'The transactions that were running when a snapshot was taken.';
revoke all on function etl._unfinished(pg_snapshot) from public;
grant execute on function etl._unfinished(pg_snapshot) to etl_reader;

create or replace function etl.arrived(xid xid8, since pg_snapshot, until pg_snapshot) returns boolean
language sql stable parallel safe
return xid >= coalesce(pg_snapshot_xmin(since), '0') and xid < pg_snapshot_xmax(until) and pg_visible_in_snapshot(xid, until)
   and (xid >= coalesce(pg_snapshot_xmax(since), '0') or xid = any (etl._unfinished(since)));
comment on function etl.arrived(xid8, pg_snapshot, pg_snapshot) is
  'Whether a row whose column holds its inserting or updating transaction became visible between two snapshots; since null: ever before until.';
revoke all on function etl.arrived(xid8, pg_snapshot, pg_snapshot) from public;
grant execute on function etl.arrived(xid8, pg_snapshot, pg_snapshot) to etl_reader;
