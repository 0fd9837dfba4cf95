create or replace function etl.list_procedures(pipeline text default null)
returns table (pipeline_name text, name text, type text, routine text, group_name text, tags text[], dependencies text[], default_mode text,
  allow_full_refresh boolean, transaction_scope text, parameters jsonb, watermark jsonb, mv_refresh text[], description text)
language sql stable security definer set search_path = pg_catalog, pg_temp as $$
  select l.name, p.name, p.type, p.routine_signature,
         (select g.name from etl.group_members m join etl.groups g using (group_id) where m.procedure_id = p.procedure_id),
         (select coalesce(array_agg(t.name order by t.name), '{}') from etl.procedure_tags pt join etl.tags t using (tag_id) where pt.procedure_id = p.procedure_id),
         (select coalesce(array_agg(q.name order by q.name), '{}') from etl.dependencies d join etl.procedures q on q.procedure_id = d.depends_on_id
           where d.procedure_id = p.procedure_id),
         p.default_mode, p.allow_full_refresh, p.transaction_scope,
         (select coalesce(jsonb_object_agg(d.name, d.declaration), '{}') from etl.parameters d where d.procedure_id = p.procedure_id),
         case when p.watermark_strategy is not null then jsonb_build_object('strategy', p.watermark_strategy, 'source', p.watermark_sources,
           'state_key', p.state_key, 'watermark', (select s.last_success_watermark from etl.state s where s.state_key = p.state_key)) end,
         (select coalesce(array_agg(t.name order by t.name), '{}') from etl.procedure_refresh_targets x join etl.refresh_targets t using (refresh_target_id)
           where x.procedure_id = p.procedure_id),
         p.description
    from etl.procedures p join etl.pipelines l using (pipeline_id)
   where p.is_active and (list_procedures.pipeline is null or l.name = list_procedures.pipeline)
   order by l.name, p.name
$$;
comment on function etl.list_procedures(text) is 'The configured procedures of one pipeline, or of all, with what they need and allow.';
revoke all on function etl.list_procedures(text) from public;
grant execute on function etl.list_procedures(text) to etl_reader;
