-- Notes which runs were sent to whoever collects lineage, so that a clock can call b2s lineage --openlineage --cursor.
--
-- Runs end in another order than they begin, so the cursor is a set. Behind the floor nothing is kept: what is older than an hour, has ended
-- and was sent. A number without a run may still be one of a transaction that is open, so the floor keeps that hour's distance.

create or replace function etl.move_lineage_cursor(cursor_name text, emitted bigint[] default '{}', floor_run_id bigint default null) returns void
language plpgsql volatile security definer set search_path = pg_catalog, pg_temp as $$
declare
  v_cursor etl.lineage_cursors;
begin
  insert into etl.lineage_cursors (name, floor_run_id) values (cursor_name, coalesce(move_lineage_cursor.floor_run_id, 0)) on conflict (name) do nothing;
  select * into v_cursor from etl.lineage_cursors c where c.name = cursor_name for update;
  v_cursor.emitted_run_ids := array(select distinct e from unnest(v_cursor.emitted_run_ids || emitted) e where e > v_cursor.floor_run_id order by e);
  select coalesce(max(r.run_id), v_cursor.floor_run_id) into v_cursor.floor_run_id
    from etl.runs r
   where r.run_id > v_cursor.floor_run_id
     and r.run_id < all (select o.run_id from etl.runs o
                          where o.run_id > v_cursor.floor_run_id
                            and (o.ended_at is null or o.submitted_at > clock_timestamp() - interval '1 hour' or o.run_id <> all (v_cursor.emitted_run_ids)));
  update etl.lineage_cursors c
     set floor_run_id = v_cursor.floor_run_id, moved_at = clock_timestamp(),
         emitted_run_ids = array(select e from unnest(v_cursor.emitted_run_ids) e where e > v_cursor.floor_run_id order by e)
   where c.name = cursor_name;
end $$;
comment on function etl.move_lineage_cursor(text, bigint[], bigint) is
  'Notes that runs were sent under a cursor; a cursor that is new begins after floor_run_id. Idempotent.';
revoke all on function etl.move_lineage_cursor(text, bigint[], bigint) from public;
grant execute on function etl.move_lineage_cursor(text, bigint[], bigint) to etl_operator;
