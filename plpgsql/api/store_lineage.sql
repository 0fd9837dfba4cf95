-- Stores what the SQL of the configured routines says they read and write. The database cannot parse it itself: b2s sync-config
-- and b2s lineage --scan call this, with what the parser of b2s lint has found.

create or replace function etl.store_lineage(lineage jsonb, pipeline text default null) returns int
language plpgsql volatile security definer set search_path = pg_catalog, pg_temp as $$
declare
  v_pipeline_id int := (etl._pipeline(pipeline)).pipeline_id;
  v_count       int;
begin
  with scanned as materialized (
    select p.procedure_id, etl._definition(p) as definition, s.value as found
      from jsonb_each(lineage) s
      join etl.procedures p on p.pipeline_id = v_pipeline_id and p.name = s.key and p.is_active
  ), edge as (
    insert into etl.lineage_edges (procedure_id, relation, access, source, columns, derived_from, definition)
    select s.procedure_id, e->>'relation', e->>'access', 'static',
           case when jsonb_typeof(e->'columns') = 'array' then etl._text_array(e->'columns') end, nullif(e->'derived_from', 'null'), s.definition
      from scanned s cross join lateral jsonb_array_elements(s.found->'relations') e
    on conflict on constraint lineage_edges_pkey do update
      set columns = excluded.columns, derived_from = excluded.derived_from, definition = excluded.definition, last_seen_at = clock_timestamp()
    returning procedure_id
  ), scan as (
    insert into etl.lineage_scans (procedure_id, source, definition, is_complete)
    select s.procedure_id, 'static', s.definition, (s.found->>'is_complete')::boolean from scanned s
    on conflict on constraint lineage_scans_pkey do update
      set definition = excluded.definition, is_complete = excluded.is_complete, scanned_at = clock_timestamp()
  )
  select count(*) into v_count from edge;
  delete from etl.lineage_edges e
   using etl.procedures p
   where e.source = 'static' and p.procedure_id = e.procedure_id and p.pipeline_id = v_pipeline_id and lineage ? p.name
     and not exists (select from jsonb_array_elements(lineage->p.name->'relations') x
                      where x->>'relation' = e.relation and x->>'access' = e.access);
  return v_count;
end $$;
comment on function etl.store_lineage(jsonb, text) is
  'Replaces what is known from the SQL of procedures: {"silver.orders": {"is_complete": true, "relations": [{"relation", "access": "read" or "write", "columns", "derived_from"}]}}. Returns the number of edges.';
revoke all on function etl.store_lineage(jsonb, text) from public;
grant execute on function etl.store_lineage(jsonb, text) to etl_admin;
