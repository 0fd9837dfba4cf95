-- The window of the xid strategy: a row belongs to it when its transaction is visible in the later snapshot and not in
-- the earlier one. The comparison of ids uses an index on the column, the two visibility tests filter. The planner
-- inlines it: parsed here once, so that no search_path can change what it means.
create or replace function etl.arrived(xid xid8, since pg_snapshot, until pg_snapshot) returns boolean
language sql stable parallel safe
return (since is null or xid >= pg_snapshot_xmin(since)) and xid < pg_snapshot_xmax(until)
   and pg_visible_in_snapshot(xid, until) and (since is null or not pg_visible_in_snapshot(xid, since));
comment on function etl.arrived(xid8, pg_snapshot, pg_snapshot) is
  'Whether a row whose column holds its inserting or updating transaction became visible between two snapshots; since null: ever before until.';
revoke all on function etl.arrived(xid8, pg_snapshot, pg_snapshot) from public;
grant execute on function etl.arrived(xid8, pg_snapshot, pg_snapshot) to etl_reader;
