-- Lineage as it is: what the SQL says and what was observed (etl.lineage_edges), and what the catalog knows about views,
-- materialized views and functions with a parsed body.

-- Relations with a query of their own, and what that query reads.
create or replace function etl._view_reads() returns table (view oid, relation oid, columns text[])
language sql stable set search_path = pg_catalog, pg_temp as $$
  select r.ev_class, d.refobjid, array_agg(distinct a.attname::text) filter (where a.attname is not null)
    from pg_catalog.pg_rewrite r
    join pg_catalog.pg_class v on v.oid = r.ev_class and v.relkind in ('v', 'm') and v.oid >= 16384
    join pg_catalog.pg_depend d on d.classid = 'pg_rewrite'::regclass and d.objid = r.oid and d.refclassid = 'pg_class'::regclass and d.refobjid <> r.ev_class
    join pg_catalog.pg_class c on c.oid = d.refobjid and c.relkind in ('r', 'p', 'v', 'm', 'f')
    left join pg_catalog.pg_attribute a on a.attrelid = d.refobjid and a.attnum = d.refobjsubid and a.attnum > 0
   group by r.ev_class, d.refobjid
$$;
comment on function etl._view_reads() is 'What each view and materialized view reads, from pg_rewrite and pg_depend.';
revoke all on function etl._view_reads() from public;

-- Bodies in the SQL standard's form are parsed when they are created, and the catalog knows what they need.
create or replace function etl._routine_uses(routine oid) returns table (relation oid, columns text[])
language sql stable set search_path = pg_catalog, pg_temp as $$
  with recursive called(oid) as (
    select routine
    union
    select d.refobjid from called c
      join pg_catalog.pg_depend d on d.classid = 'pg_proc'::regclass and d.objid = c.oid and d.refclassid = 'pg_proc'::regclass
  )
  select d.refobjid, array_agg(distinct a.attname::text) filter (where a.attname is not null)
    from called f
    join pg_catalog.pg_depend d on d.classid = 'pg_proc'::regclass and d.objid = f.oid and d.refclassid = 'pg_class'::regclass
    join pg_catalog.pg_class c on c.oid = d.refobjid and c.relkind in ('r', 'p', 'v', 'm', 'f')
    left join pg_catalog.pg_attribute a on a.attrelid = d.refobjid and a.attnum = d.refobjsubid and a.attnum > 0
   group by d.refobjid
$$;
comment on function etl._routine_uses(oid) is 'Relations that a routine with a parsed body needs, and those of routines that it calls.';
revoke all on function etl._routine_uses(oid) from public;

create or replace function etl._relation_name(relation oid) returns text
language sql stable set search_path = pg_catalog, pg_temp as $$
  select format('%I.%I', n.nspname, c.relname)
    from pg_catalog.pg_class c join pg_catalog.pg_namespace n on n.oid = c.relnamespace where c.oid = relation
$$;
comment on function etl._relation_name(oid) is 'The qualified name of a relation, quoted where needed.';
revoke all on function etl._relation_name(oid) from public;

-- A view is looked through, a materialized view is not: who reads it reads what its last refresh left there.
create or replace function etl._reads_through_views(relations text[]) returns table (relation text, via text, behind text, columns text[])
language sql stable set search_path = pg_catalog, pg_temp as $$
  with recursive reads as materialized (
    select * from etl._view_reads()
  ), seen(top, view, relation, columns) as (
    select t.name, r.view, r.relation, r.columns
      from unnest(relations) t(name)
      join pg_catalog.pg_class c on c.oid = etl._relation(t.name) and c.relkind = 'v'
      join reads r on r.view = c.oid
    union
    select s.top, r.view, r.relation, r.columns
      from seen s join pg_catalog.pg_class c on c.oid = s.relation and c.relkind = 'v' join reads r on r.view = s.relation
  )
  select s.top, etl._relation_name(s.view), etl._relation_name(s.relation), s.columns from seen s
$$;
comment on function etl._reads_through_views(text[]) is 'What is read by whoever reads one of these relations and it is a view: via is the innermost view.';
revoke all on function etl._reads_through_views(text[]) from public;

-- What the catalog adds to the edges of procedures, and the edges of materialized views.
create or replace function etl._catalog_lineage()
returns table (procedure_id int, mv_name text, relation text, access text, via text, columns text[])
language sql stable set search_path = pg_catalog, pg_temp as $$
  with used as materialized (
    select p.procedure_id, etl._relation_name(u.relation) as relation, u.columns
      from etl.procedures p
      join pg_catalog.pg_proc f on f.prosqlbody is not null and f.oid::regprocedure::text = p.routine_signature
      cross join lateral etl._routine_uses(f.oid) u
     where p.is_active
  ), known as materialized (
    select e.procedure_id, e.relation from etl.lineage_edges e join etl.procedures p using (procedure_id) where e.access = 'read' and p.is_active
    union select u.procedure_id, u.relation from used u
  ), behind as materialized (
    select * from etl._reads_through_views((select array_agg(distinct k.relation) from known k))
  )
  select u.procedure_id, null, u.relation, 'use', null, u.columns from used u
  union all
  select distinct k.procedure_id, null, b.behind, 'read', b.via, b.columns from known k join behind b using (relation)
  union all
  select null, t.name, etl._relation_name(v.relation), 'read', null, v.columns
    from (select distinct x.name from etl.refresh_targets x
            join etl.procedure_refresh_targets y using (refresh_target_id) join etl.procedures p using (procedure_id) where p.is_active) t
    join etl._view_reads() v on v.view = etl._relation(t.name)
$$;
comment on function etl._catalog_lineage() is
  'What the catalog knows: relations behind views, relations that a parsed body uses, and what materialized views read.';
revoke all on function etl._catalog_lineage() from public;

create or replace function etl._lineage()
returns table (pipeline text, name text, kind text, relation text, access text, source text, via text, columns text[], derived_from jsonb,
               written_rows bigint, is_current boolean, first_seen_at timestamptz, last_seen_at timestamptz, first_run_id bigint, last_run_id bigint,
               procedure_id int)
language sql stable security definer set search_path = pg_catalog, pg_temp as $$
  with procedure as materialized (
    select l.name as pipeline, p.name, p.procedure_id, etl._definition(p) as definition
      from etl.procedures p join etl.pipelines l using (pipeline_id) where p.is_active
  ), catalog as materialized (
    select * from etl._catalog_lineage()
  )
  select p.pipeline, p.name, 'procedure', e.relation, e.access, e.source, null, e.columns, e.derived_from, e.written_rows,
         e.definition is not distinct from p.definition, e.first_seen_at, e.last_seen_at, e.first_run_id, e.last_run_id, p.procedure_id
    from etl.lineage_edges e join procedure p using (procedure_id)
  union all
  select p.pipeline, p.name, 'procedure', c.relation, c.access, 'catalog', c.via, c.columns, null, null, true, null, null, null, null, p.procedure_id
    from catalog c join procedure p using (procedure_id)
  union all
  select l.name, c.mv_name, 'materialized view', c.relation, c.access, 'catalog', null, c.columns, null, null, true, null, null, null, null, null
    from catalog c
    join etl.refresh_targets t on t.name = c.mv_name
    join etl.pipelines l using (pipeline_id)
   where exists (select from etl.procedure_refresh_targets x join etl.procedures p using (procedure_id)
                  where x.refresh_target_id = t.refresh_target_id and p.is_active)
$$;
comment on function etl._lineage() is 'The rows of etl.lineage.';
revoke all on function etl._lineage() from public;
grant execute on function etl._lineage() to etl_reader;

create or replace function etl._requires(procedure_id int, needed int[]) returns boolean
language sql stable set search_path = pg_catalog, pg_temp as $$
  with recursive upstream(id) as (
    select d.depends_on_id from etl.dependencies d where d.procedure_id = _requires.procedure_id
    union select d.depends_on_id from upstream u join etl.dependencies d on d.procedure_id = u.id
  )
  select exists (select from upstream u where u.id = any (needed))
$$;
comment on function etl._requires(int, int[]) is 'Whether a procedure depends on one of others, directly or not.';
revoke all on function etl._requires(int, int[]) from public;
