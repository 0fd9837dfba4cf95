-- From a configured routine to the statement that calls it: read from pg_proc what the routine declares, pass that, by name, typed.

create or replace function etl._config_problem(loc jsonb, message text, hint text) returns jsonb
language sql immutable set search_path = pg_catalog, pg_temp as $$
  select jsonb_build_object('loc', loc, 'message', message, 'hint', hint)
$$;
comment on function etl._config_problem(jsonb, text, text) is 'A problem of a configuration: the place in the document, the cause and the remedy.';
revoke all on function etl._config_problem(jsonb, text, text) from public;

-- Not to_regclass: that raises an error for a schema that etl_owner may not use.
create or replace function etl._relation(name text) returns oid
language plpgsql stable set search_path = pg_catalog, pg_temp as $$
declare
  v_name name[] := parse_ident(name);
begin
  return (select c.oid from pg_catalog.pg_class c
           where c.relname = v_name[2] and c.relnamespace = (select n.oid from pg_catalog.pg_namespace n where n.nspname = v_name[1]) and v_name[3] is null);
end $$;
comment on function etl._relation(text) is 'The oid of the relation that a qualified name means, or null.';
revoke all on function etl._relation(text) from public;
grant execute on function etl._relation(text) to etl_owner;

-- The routine that a name means, or why there is none.
create or replace function etl._resolve_routine(routine text, out oid oid, out message text, out hint text)
language plpgsql stable set search_path = pg_catalog, pg_temp as $$
declare
  v_parts text[];
  v_found text[];
begin
  if position('(' in routine) > 0 then
    oid := etl._find_routine(routine);
    if oid is null then
      message := format('routine %s does not exist', routine);
      hint := 'write the signature as \df shows it, e.g. silver.load_sales(text, timestamptz)';
    end if;
    return;
  end if;
  v_parts := parse_ident(routine);
  if cardinality(v_parts) <> 2 then
    message := format('routine %s must be written schema.name', routine);
    hint := format('e.g. routine: silver.%s', v_parts[cardinality(v_parts)]);
    return;
  end if;
  select array_agg(p.oid::regprocedure::text order by p.oid::regprocedure::text), min(p.oid::bigint)::oid into v_found, oid
    from pg_catalog.pg_proc p join pg_catalog.pg_namespace n on n.oid = p.pronamespace
   where n.nspname = v_parts[1] and p.proname = v_parts[2] and p.prokind in ('f', 'p');
  if v_found is null then
    message := format('routine %s does not exist', routine);
    hint := 'create it before you run b2s sync-config, or correct the name'
      || coalesce((select format('; schema %s has %s', v_parts[1], string_agg(q.proname, ', ')) from (
           select distinct p.proname from pg_catalog.pg_proc p join pg_catalog.pg_namespace n on n.oid = p.pronamespace
            where n.nspname = v_parts[1] and p.prokind in ('f', 'p') order by 1 limit 8) q), '');
  elsif cardinality(v_found) > 1 then
    oid := null;
    message := format('routine %s is overloaded: %s', routine, array_to_string(v_found, ', '));
    hint := format('say which one: routine: "%s"', v_found[1]);
  end if;
end $$;
comment on function etl._resolve_routine(text) is 'The oid of the routine that a configured name means, or a message and a hint.';
revoke all on function etl._resolve_routine(text) from public;

-- With the search_path of its callers, so that the planner inlines it there.
create or replace function etl._routine_arguments(routine oid)
returns table (ordinal int, name text, is_input boolean, is_output boolean, type text, type_oid oid, default_sql text)
language sql stable as $$
  select a.ord::int, coalesce(a.name, ''), coalesce(a.mode, 'i') in ('i', 'b', 'v'), coalesce(a.mode, 'i') in ('o', 'b', 't'),
         format_type(a.typ, null), a.typ, pg_get_function_arg_default(p.oid, a.ord::int)
    from pg_catalog.pg_proc p,
         unnest(coalesce(p.proallargtypes, p.proargtypes::oid[]), p.proargnames, p.proargmodes::text[]) with ordinality a(typ, name, mode, ord)
   where p.oid = routine and a.typ is not null
$$;
comment on function etl._routine_arguments(oid) is 'The arguments of a routine, from pg_proc.';
revoke all on function etl._routine_arguments(oid) from public;

-- What an argument of a routine receives: a contract name, a parameter, or nothing.
create or replace function etl._binding(argument text, procedure jsonb) returns text
language sql immutable set search_path = pg_catalog, pg_temp as $$
  select coalesce(
    (select a.key from jsonb_each_text(procedure->'args') a where a.value = argument and a.key <> 'rows'),
    case when argument in ('p_mode', 'p_since', 'p_until', 'p_run_id') and not procedure->'args' ? argument then argument end,
    (select p->>'name' from jsonb_array_elements(procedure->'params') p
      where p->>'name' in (argument, substring(argument from '^p_(.+)$')) and not procedure->'args' ? (p->>'name')
      order by p->>'name' <> argument limit 1))
$$;
comment on function etl._binding(text, jsonb) is 'The contract name or parameter that an argument of a routine receives, or null.';
revoke all on function etl._binding(text, jsonb) from public;

-- The expression that passes a binding, cast to the argument's own type.
create or replace function etl._argument_sql(binding text, type text, default_sql text, procedure jsonb) returns text
language sql stable set search_path = pg_catalog, pg_temp as $$
  select case binding
    when 'p_mode' then format('$1::%s', type)
    when 'p_since' then format('$2::%s', type)
    when 'p_until' then format('$3::%s', type)
    when 'p_run_id' then format('$4::%s', type)
    else (
      select case when default_sql is not null and not p ? 'default'
               then format('case when $5 ? %L then %s else %s end', binding, e.value_sql, default_sql) else e.value_sql end
        from jsonb_array_elements(procedure->'params') p,
             lateral (select case when type in ('json', 'jsonb') then format('($5->%L)::%s', binding, type)
                                  when p->>'type' = 'array' then format('etl._text_array($5->%L)::%s', binding, type)
                                  else format('($5->>%L)::%s', binding, type) end as value_sql) e
       where p->>'name' = binding)
  end
$$;
comment on function etl._argument_sql(text, text, text, jsonb) is 'The SQL that passes one argument of a compiled call.';
revoke all on function etl._argument_sql(text, text, text, jsonb) from public;

create or replace function etl._text_array(value jsonb) returns text[]
language sql immutable strict set search_path = pg_catalog, pg_temp as $$
  select coalesce(array_agg(e order by n), '{}') from jsonb_array_elements_text(value) with ordinality a(e, n)
$$;
comment on function etl._text_array(jsonb) is 'A jsonb array as text[]; CALL takes no subquery among its arguments.';
revoke all on function etl._text_array(jsonb) from public;
grant execute on function etl._text_array(jsonb) to etl_owner;

-- Which output holds the number of rows: the one named in args.rows, else p_rows or rows, else the only one; integers only.
create or replace function etl._rows_output(routine oid, procedure jsonb) returns text
language sql stable set search_path = pg_catalog, pg_temp as $$
  select coalesce(max(a.name) filter (where a.name = procedure#>>'{args,rows}'),
                  case when not procedure->'args' ? 'rows' then coalesce(max(a.name) filter (where a.name in ('p_rows', 'rows')),
                                                                        case when count(*) = 1 then max(a.name) end) end)
    from etl._routine_arguments(routine) a
   where a.is_output and a.type in ('smallint', 'integer', 'bigint', 'numeric')
$$;
comment on function etl._rows_output(oid, jsonb) is 'The name of the output argument that reports rows, or null.';
revoke all on function etl._rows_output(oid, jsonb) from public;

-- How the call looks around its arguments, by kind of routine and what it returns.
create or replace function etl._call_shape(routine oid, procedure jsonb, arguments text, out call_sql text, out rows_column text)
language plpgsql stable set search_path = pg_catalog, pg_temp as $$
declare
  v_proc    pg_catalog.pg_proc;
  v_outputs int := (select count(*) from etl._routine_arguments(routine) a where a.is_output);
  v_name    text;
begin
  select * into strict v_proc from pg_catalog.pg_proc p where p.oid = routine;
  v_name := (select format('%I.%I', n.nspname, v_proc.proname) from pg_catalog.pg_namespace n where n.oid = v_proc.pronamespace);
  rows_column := etl._rows_output(routine, procedure);
  if v_proc.prokind = 'p' then
    call_sql := format('call %s(%s)', v_name, arguments);
  elsif v_proc.proretset then
    -- All of a set must be read: a function in SQL stops where its reader stops.
    call_sql := format('select pg_catalog.count(*) as result_rows from %s(%s)', v_name, arguments);
    rows_column := null;
  elsif v_outputs > 0 then
    call_sql := format('select * from %s(%s)', v_name, arguments);
    if v_outputs = 1 and rows_column is not null then call_sql := format('select %s(%s) as %I', v_name, arguments, rows_column); end if;
  else
    call_sql := format('select %s(%s) as rows', v_name, arguments);
    rows_column := case when v_proc.prorettype in ('int2'::regtype, 'int4'::regtype, 'int8'::regtype, 'numeric'::regtype) then 'rows' end;
  end if;
end $$;
comment on function etl._call_shape(oid, jsonb, text) is 'The statement that calls a routine, and the output column that reports rows.';
revoke all on function etl._call_shape(oid, jsonb, text) from public;

-- Compiles one procedure of a configuration. problems: everything that makes the routine unusable as configured.
create or replace function etl._compile_call(procedure jsonb, out routine_signature text, out call_sql text, out rows_column text, out problems jsonb)
language plpgsql stable set search_path = pg_catalog, pg_temp as $$
declare
  v_loc       jsonb := jsonb_build_array('procedures', procedure->>'name', 'routine');
  v_routine   record := etl._resolve_routine(procedure->>'routine');
  v_arguments text;
  v_shape     record;
begin
  if v_routine.oid is null then
    problems := jsonb_build_array(etl._config_problem(v_loc, v_routine.message, v_routine.hint));
    return;
  end if;
  routine_signature := v_routine.oid::regprocedure::text;
  problems := etl._routine_problems(v_routine.oid, procedure);
  select string_agg(format(case when p.proargmodes[a.ordinal] = 'v' then 'variadic %I => %s' else '%I => %s' end, a.name,
           case when b.binding is not null then etl._argument_sql(b.binding, a.type, a.default_sql, procedure) else format('null::%s', a.type) end),
           ', ' order by a.ordinal)
    into v_arguments
    from etl._routine_arguments(v_routine.oid) a
    cross join lateral (select case when a.is_input then etl._binding(a.name, procedure) end as binding) b
    join pg_catalog.pg_proc p on p.oid = v_routine.oid
   where b.binding is not null or (a.is_output and (p.prokind = 'p' or (a.is_input and a.default_sql is null)));
  v_shape := etl._call_shape(v_routine.oid, procedure, coalesce(v_arguments, ''));
  call_sql := v_shape.call_sql;
  rows_column := v_shape.rows_column;
end $$;
comment on function etl._compile_call(jsonb) is 'The call statement of a configured procedure, and every problem its routine has.';
revoke all on function etl._compile_call(jsonb) from public;
