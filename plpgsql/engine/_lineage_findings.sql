-- Where what is declared and what is done differ. Names, severities and wording follow the rules of b2s lint: B301 to B304 judge the SQL alone,
-- these judge what was seen as well.

create or replace function etl._some_names(names text[]) returns text
language sql immutable set search_path = pg_catalog, pg_temp as $$
  select array_to_string(names[1:6], ', ') || case when cardinality(names) > 6 then format(' and %s more', cardinality(names) - 6) else '' end
$$;
comment on function etl._some_names(text[]) is 'Names for a message: the first six, and how many more.';
revoke all on function etl._some_names(text[]) from public;

-- Only where enough is known: what the other one writes, and all that this one does. That a fact comes after its dimensions is an order
-- worth having for foreign keys alone.
create or replace function etl._unused_dependencies() returns table (pipeline text, name text, needed text, sources text[])
language sql stable set search_path = pg_catalog, pg_temp as $$
  with edge as materialized (
    select e.procedure_id, array_agg(e.relation) as used, array_agg(e.relation) filter (where e.access = 'write') as written
      from etl._lineage() e where e.is_current and e.procedure_id is not null group by e.procedure_id
  ), known as materialized (
    select s.procedure_id, array_agg(distinct s.source order by s.source) as sources
      from etl.lineage_scans s join (select p.procedure_id, etl._definition(p) as definition from etl.procedures p where p.is_active) p using (procedure_id)
     where s.is_complete and s.definition is not distinct from p.definition group by s.procedure_id
  )
  select l.name, p.name, q.name, k.sources
    from etl.dependencies d
    join etl.procedures p on p.procedure_id = d.procedure_id and p.is_active
    join etl.procedures q on q.procedure_id = d.depends_on_id and q.is_active
    join etl.pipelines l on l.pipeline_id = p.pipeline_id
    join known k on k.procedure_id = p.procedure_id
    join edge w on w.procedure_id = q.procedure_id and w.written is not null
    left join edge u on u.procedure_id = p.procedure_id
   where not (p.type = 'fact' and q.type = 'dimension') and not coalesce(u.used && w.written, false)
$$;
comment on function etl._unused_dependencies() is 'Dependencies between procedures of which the one uses nothing that the other writes.';
revoke all on function etl._unused_dependencies() from public;

create or replace function etl._lineage_findings()
returns table (pipeline text, finding text, severity text, name text, relation text, detail text, remedy text, sources text[])
language sql stable security definer set search_path = pg_catalog, pg_temp as $$
  with edge as materialized (
    select e.pipeline, e.procedure_id, e.name, p.type, p.allow_fact_dependency, e.relation, e.access, e.source, e.via
      from etl._lineage() e join etl.procedures p using (procedure_id) where e.is_current
  ), writer as materialized (
    select e.relation, array_agg(distinct e.procedure_id) as ids, array_agg(distinct e.name order by e.name) as names,
           array_agg(distinct e.name order by e.name) filter (where e.type = 'fact') as facts,
           array_agg(distinct e.source order by e.source) as sources
      from edge e where e.access = 'write' group by e.relation
  ), reading as materialized (
    select e.pipeline, e.procedure_id, e.name, e.type, e.allow_fact_dependency, e.relation, array_agg(distinct e.source order by e.source) as sources,
           max(e.via) as via
      from edge e where e.access = 'read'
     group by e.pipeline, e.procedure_id, e.name, e.type, e.allow_fact_dependency, e.relation
  ), foreign_read as materialized (
    select r.*, w.names, w.facts, w.ids, etl._requires(r.procedure_id, w.ids) as is_declared
      from reading r join writer w using (relation) where r.procedure_id <> all (w.ids)
  )
  select r.pipeline, 'undeclared_read', 'error', r.name, r.relation,
         format('%s reads %s%s, which %s writes, and does not depend on it', r.name, r.relation, ' through ' || r.via, etl._some_names(r.names)),
         format('add to %s: dependencies: [%s]', r.name, r.names[1]), r.sources
    from foreign_read r where not r.is_declared
  union all
  select r.pipeline, 'fact_in_dimension', 'error', r.name, r.relation,
         format('dimension %s reads %s%s, which fact %s writes: it is one run behind', r.name, r.relation, ' through ' || r.via, etl._some_names(r.facts)),
         'take the rows from Bronze, make it a fact, or declare the dependency together with allow_fact_dependency: true', r.sources
    from foreign_read r where r.type = 'dimension' and r.facts is not null and not (r.allow_fact_dependency and r.is_declared)
  union all
  select e.pipeline, 'two_writers', 'warning', e.name, w.relation, format('%s is written by %s', w.relation, etl._some_names(w.names)),
         'one procedure per table', w.sources
    from writer w
    join (select e.pipeline, e.relation, min(e.name) as name from edge e where e.access = 'write' group by e.pipeline, e.relation) e using (relation)
   where cardinality(w.ids) > 1
  union all
  select u.pipeline, 'unused_dependency', 'info', u.name, null, format('%s depends on %s and uses nothing that it writes', u.name, u.needed),
         format('remove %s from its dependencies, unless the order is meant', u.needed), u.sources
    from etl._unused_dependencies() u
$$;
comment on function etl._lineage_findings() is 'The rows of etl.lineage_findings.';
revoke all on function etl._lineage_findings() from public;
grant execute on function etl._lineage_findings() to etl_reader;
