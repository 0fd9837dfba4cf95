-- The pipeline a request means: the one it names, else the only one there is.
create or replace function etl._pipeline(name text) returns etl.pipelines
language plpgsql stable set search_path = pg_catalog, pg_temp as $$
declare
  v_pipeline etl.pipelines;
  v_names    text[] := (select array_agg(p.name order by p.name) from etl.pipelines p);
begin
  select * into v_pipeline from etl.pipelines p
   where p.name = coalesce(_pipeline.name, case when cardinality(v_names) = 1 then v_names[1] else 'bronze_to_silver' end);
  if v_pipeline.pipeline_id is not null then return v_pipeline; end if;
  if v_names is null then
    perform etl._fail('PT404', 'pipeline.unknown', 'no pipeline is configured in this database', 'apply a configuration: b2s sync-config');
  end if;
  perform etl._fail('PT404', 'pipeline.unknown', format('there is no pipeline %s', coalesce(name, 'bronze_to_silver')),
    format('name one of: pipeline => ''%s''', array_to_string(v_names, ''', ''')), jsonb_build_object('pipelines', v_names));
end $$;
comment on function etl._pipeline(text) is 'The pipeline of that name, or the only one. Raises PT404 pipeline.unknown.';
revoke all on function etl._pipeline(text) from public;

-- Names that a request mentions and the catalog does not have.
create or replace function etl._unknown_names(kind text, given jsonb, known text[]) returns jsonb
language sql stable set search_path = pg_catalog, pg_temp as $$
  select jsonb_agg(jsonb_build_object('loc', jsonb_build_array(kind || 's', g.name), 'code', kind || '.unknown',
           'message', format('there is no %s %s', kind, g.name)) order by g.name)
    from jsonb_array_elements_text(given) g(name)
   where g.name <> all (coalesce(known, '{}'))
$$;
comment on function etl._unknown_names(text, jsonb, text[]) is 'Problems for the names of a request that are not configured.';
revoke all on function etl._unknown_names(text, jsonb, text[]) from public;

create or replace function etl._select_procedures(pipeline_id int, request jsonb, out selected int[], out problems jsonb)
language plpgsql stable set search_path = pg_catalog, pg_temp as $$
begin
  problems := coalesce(etl._unknown_names('procedure', request->'procedures',
      (select array_agg(p.name) from etl.procedures p where p.pipeline_id = _select_procedures.pipeline_id and p.is_active)), '[]')
    || coalesce(etl._unknown_names('group', request->'groups',
      (select array_agg(g.name) from etl.groups g where g.pipeline_id = _select_procedures.pipeline_id and g.is_active)), '[]')
    || coalesce(etl._unknown_names('tag', request->'tags',
      (select array_agg(distinct t.name) from etl.tags t join etl.procedure_tags pt using (tag_id)
         join etl.procedures p using (procedure_id) where p.pipeline_id = _select_procedures.pipeline_id and p.is_active)), '[]');
  select array_agg(p.procedure_id) into selected
    from etl.procedures p
   where p.pipeline_id = _select_procedures.pipeline_id and p.is_active
     and (not (request ?| array['procedures', 'groups', 'tags'])
          or request->'procedures' ? p.name
          or exists (select from etl.group_members m join etl.groups g using (group_id)
                      where m.procedure_id = p.procedure_id and request->'groups' ? g.name)
          or exists (select from etl.procedure_tags pt join etl.tags t using (tag_id)
                      where pt.procedure_id = p.procedure_id and request->'tags' ? t.name));
  if request->'with_upstream' = 'true' then
    with recursive up(id) as (
      select unnest(selected) union select d.depends_on_id from up join etl.dependencies d on d.procedure_id = up.id)
    select array_agg(up.id) into selected from up join etl.procedures p on p.procedure_id = up.id and p.is_active;
  end if;
  if request->'with_downstream' = 'true' then
    with recursive down(id) as (
      select unnest(selected) union select d.procedure_id from down join etl.dependencies d on d.depends_on_id = down.id)
    select array_agg(down.id) into selected from down join etl.procedures p on p.procedure_id = down.id and p.is_active;
  end if;
  if selected is null and problems = '[]' then
    problems := jsonb_build_array(jsonb_build_object('loc', jsonb_build_array('procedures'), 'code', 'selection.empty',
      'message', 'the request selects no procedure'));
  end if;
end $$;
comment on function etl._select_procedures(int, jsonb) is
  'The procedures that a request selects by name, group and tag, and the names it has that do not exist.';
revoke all on function etl._select_procedures(int, jsonb) from public;
