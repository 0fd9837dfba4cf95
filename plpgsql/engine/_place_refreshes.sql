-- Materialized views that a materialized view reads, directly, through views, or through each other.
create or replace function etl._mv_reads(mv oid) returns oid[]
language sql stable set search_path = pg_catalog, pg_temp as $$
  with recursive reads(oid) as (
    select mv
    union
    select d.refobjid
      from reads r
      join pg_catalog.pg_rewrite w on w.ev_class = r.oid
      join pg_catalog.pg_depend d on d.classid = 'pg_rewrite'::regclass and d.objid = w.oid and d.refclassid = 'pg_class'::regclass
      join pg_catalog.pg_class c on c.oid = d.refobjid and c.relkind in ('v', 'm')
  )
  select coalesce(array_agg(c.oid), '{}') from reads join pg_catalog.pg_class c using (oid) where c.relkind = 'm' and c.oid <> mv
$$;
comment on function etl._mv_reads(oid) is 'The materialized views that one reads, transitively, from pg_depend.';
revoke all on function etl._mv_reads(oid) from public;

-- The refreshes that a plan's steps lead to. base is the scope they follow; run-level ones follow the barrier at the end.
-- choice: null or true: as configured; false: none; a list: those only.
create or replace function etl._plan_refreshes(pipeline_id int, steps etl.plan_item[], choice jsonb)
returns setof etl.plan_item
language sql stable set search_path = pg_catalog, pg_temp as $$
  with fed as (
    select t.refresh_target_id, t.name, prt.refresh_after, prt.refresh_on, prt.concurrency, s.order_index, s.scope_index,
           case prt.refresh_after when 'procedure' then s.scope_index when 'group' then -m.group_id else 0 end as trigger
      from unnest(steps) s
      join etl.procedure_refresh_targets prt on prt.procedure_id = s.procedure_id
      join etl.refresh_targets t on t.refresh_target_id = prt.refresh_target_id
      left join etl.group_members m on m.procedure_id = s.procedure_id
     where coalesce(choice, 'true') = 'true' or choice ? t.name
    union all
    select t.refresh_target_id, t.name, 'run', 'success', 'auto', s.order_index, s.scope_index, 0
      from etl.refresh_targets t cross join unnest(steps) s
     where t.pipeline_id = _plan_refreshes.pipeline_id and s.kind = 'steps' and choice ? t.name
       and not exists (select from etl.procedure_refresh_targets prt join unnest(steps) u on u.procedure_id = prt.procedure_id
                        where prt.refresh_target_id = t.refresh_target_id)
  )
  select row(null, 'refresh', null, null, null, null, null, f.refresh_target_id, f.name, f.refresh_after,
         case when 'always' = any (array_agg(f.refresh_on)) then 'always' else 'success' end,
         case when 'false' = any (array_agg(f.concurrency)) then 'false' when 'true' = any (array_agg(f.concurrency)) then 'true' else 'auto' end,
         array_agg(f.order_index order by f.order_index), null,
         case when f.refresh_after = 'run' then (select max(s.scope_index) + 2 from unnest(steps) s) else max(f.scope_index) end,
         (select count(distinct o.name)::int from fed o where etl._relation(o.name) = any (etl._mv_reads(etl._relation(f.name)))))::etl.plan_item
    from fed f
   where choice is distinct from 'false'
   group by f.refresh_target_id, f.name, f.refresh_after, f.trigger
$$;
comment on function etl._plan_refreshes(int, etl.plan_item[], jsonb) is 'The refreshes that the steps of a plan lead to, not yet numbered.';
revoke all on function etl._plan_refreshes(int, etl.plan_item[], jsonb) from public;

create or replace function etl._place_refreshes(pipeline_id int, steps etl.plan_item[], choice jsonb) returns etl.plan_item[]
language plpgsql stable set search_path = pg_catalog, pg_temp as $$
declare
  v_items etl.plan_item[] := (select array_agg(r) from etl._plan_refreshes(pipeline_id, steps, choice) r);
  v_end   int := (select max(s.scope_index) + 1 from unnest(steps) s);
begin
  if v_items is null then return steps; end if;
  if exists (select from unnest(v_items) i where i.refresh_after = 'run') then
    v_items := v_items || row(v_end, 'barrier', null, null, null, null, null, null, null, null, null, null, null, null, v_end, 0)::etl.plan_item;
  end if;
  select array_agg(row(q.number, (q.i).kind, (q.i).order_index, (q.i).procedure_id, (q.i).tx_scope, (q.i).mode, (q.i).parameters,
           (q.i).refresh_target_id, (q.i).mv_name, (q.i).refresh_after, (q.i).refresh_on, (q.i).concurrency, (q.i).feeders,
           null, (q.i).base, (q.i).depth)::etl.plan_item order by q.number, (q.i).order_index)
    into v_items
    from (select u.i, dense_rank() over (order by (u.i).base, (u.i).kind = 'refresh', (u.i).depth, (u.i).mv_name, (u.i).refresh_after) as number
            from (select s as i from unnest(steps || v_items) s) u) q;
  -- A refresh waits for the latest refresh before it of each view that it reads from.
  return (
    select array_agg(case when i.kind <> 'refresh' then i else
             row(i.scope_index, i.kind, i.order_index, i.procedure_id, i.tx_scope, i.mode, i.parameters, i.refresh_target_id, i.mv_name,
                 i.refresh_after, i.refresh_on, i.concurrency, i.feeders,
                 (select coalesce(array_agg(q.scope_index), '{}')
                    from (select max(o.scope_index) as scope_index from unnest(v_items) o
                           where o.kind = 'refresh' and o.scope_index < i.scope_index
                             and etl._relation(o.mv_name) = any (etl._mv_reads(etl._relation(i.mv_name)))
                           group by o.mv_name) q),
                 i.base, i.depth)::etl.plan_item end order by i.scope_index, i.order_index)
      from unnest(v_items) i);
end $$;
comment on function etl._place_refreshes(int, etl.plan_item[], jsonb) is
  'Adds the refreshes of materialized views to a plan, each after what it waits for, and numbers all scopes anew.';
revoke all on function etl._place_refreshes(int, etl.plan_item[], jsonb) from public;
