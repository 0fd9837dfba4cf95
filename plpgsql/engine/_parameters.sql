-- Parameters: declared in a subset of JSON Schema, validated here and nowhere else, because requests come from any client.
create or replace function etl._is_a(value text, type_name text) returns boolean
language plpgsql stable strict set search_path = pg_catalog, pg_temp as $$
begin
  case type_name
    when 'date' then perform value::date;
    when 'date-time' then perform value::timestamptz;
    when 'bigint' then perform value::bigint;
  end case;
  return true;
exception when data_exception then
  return false;
end $$;
comment on function etl._is_a(text, text) is 'Whether a text is a date, a date-time (timestamptz) or a bigint.';
revoke all on function etl._is_a(text, text) from public;

-- What is wrong with a string, given its declaration; null when nothing is.
create or replace function etl._string_problem(declaration jsonb, value text) returns text
language sql stable set search_path = pg_catalog, pg_temp as $$
  select case
    when length(value) < (declaration->>'minLength')::int then format('is shorter than %s characters', declaration->>'minLength')
    when length(value) > (declaration->>'maxLength')::int then format('is longer than %s characters', declaration->>'maxLength')
    when value !~ (declaration->>'pattern') then format('does not match the pattern %s', declaration->>'pattern')
    when declaration->>'format' = 'date' and not (value ~ '^[0-9]{4}-[0-9]{2}-[0-9]{2}$' and etl._is_a(value, 'date'))
      then 'is not a date (YYYY-MM-DD)'
    when declaration->>'format' = 'date-time'
         and not (value ~* '^[0-9]{4}-[0-9]{2}-[0-9]{2}[t ][0-9]{2}:[0-9]{2}(:[0-9]{2}([.][0-9]+)?)?(z|[+-][0-9]{2}(:?[0-9]{2})?)$' and etl._is_a(value, 'date-time'))
      then 'is not a date-time with a time zone (YYYY-MM-DDThh:mm:ssZ)'
    when declaration->>'format' = 'uuid' and value !~* '^[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}$' then 'is not a UUID'
  end
$$;
comment on function etl._string_problem(jsonb, text) is 'What is wrong with a string parameter, or null.';
revoke all on function etl._string_problem(jsonb, text) from public;

create or replace function etl._parameter_problem(declaration jsonb, value jsonb) returns text
language plpgsql stable set search_path = pg_catalog, pg_temp as $$
declare
  v_type    text := declaration->>'type';
  v_found   text := jsonb_typeof(value);
  v_element record;
  v_problem text;
begin
  if v_type = 'integer' then
    if v_found <> 'number' or (value #>> '{}')::numeric % 1 <> 0 then return format('must be an integer, not %s', value); end if;
    if not etl._is_a(trunc((value #>> '{}')::numeric)::text, 'bigint') then return 'is outside the range of bigint'; end if;
  elsif v_found <> v_type then
    return format('must be %s %s, not %s', case when v_type = 'array' then 'an' else 'a' end, v_type, value);
  end if;
  if declaration ? 'enum' and not declaration->'enum' @> jsonb_build_array(value) then
    return format('must be one of %s, not %s', declaration->'enum', value);
  end if;
  if v_type in ('integer', 'number') then
    if (value #>> '{}')::numeric < (declaration->>'minimum')::numeric then return format('is below the minimum of %s', declaration->>'minimum'); end if;
    if (value #>> '{}')::numeric > (declaration->>'maximum')::numeric then return format('is above the maximum of %s', declaration->>'maximum'); end if;
  elsif v_type = 'string' then
    return etl._string_problem(declaration, value #>> '{}');
  elsif v_type = 'array' then
    if jsonb_array_length(value) < (declaration->>'minItems')::int then return format('has fewer than %s items', declaration->>'minItems'); end if;
    if jsonb_array_length(value) > (declaration->>'maxItems')::int then return format('has more than %s items', declaration->>'maxItems'); end if;
    for v_element in select e.item, e.n from jsonb_array_elements(value) with ordinality e(item, n) loop
      v_problem := etl._parameter_problem(declaration->'items', v_element.item);
      if v_problem is not null then return format('item %s %s', v_element.n, v_problem); end if;
    end loop;
  end if;
  return null;
end $$;
comment on function etl._parameter_problem(jsonb, jsonb) is 'What is wrong with the value of a parameter, given its declaration, or null.';
revoke all on function etl._parameter_problem(jsonb, jsonb) from public;

-- 1.0 is an integer in JSON and none in SQL.
create or replace function etl._normal_value(declaration jsonb, value jsonb) returns jsonb
language sql immutable set search_path = pg_catalog, pg_temp as $$
  select case
    when declaration->>'type' = 'integer' then to_jsonb(trunc((value #>> '{}')::numeric))
    when declaration#>>'{items,type}' = 'integer'
      then (select coalesce(jsonb_agg(trunc(e.item::numeric) order by e.n), '[]') from jsonb_array_elements(value) with ordinality e(item, n))
    else value end
$$;
comment on function etl._normal_value(jsonb, jsonb) is 'A valid value of a parameter, integers without a decimal point.';
revoke all on function etl._normal_value(jsonb, jsonb) from public;

-- A null counts as not given. Returns the values to use, defaults included, and all problems.
create or replace function etl._check_parameters(
  procedure_id int, procedure_name text, given jsonb, out parameters jsonb, out problems jsonb)
language plpgsql stable set search_path = pg_catalog, pg_temp as $$
declare
  v_declared jsonb := (select jsonb_object_agg(p.name, p.declaration) from etl.parameters p where p.procedure_id = _check_parameters.procedure_id);
begin
  if given is not null and jsonb_typeof(given) <> 'object' then
    parameters := '{}';
    problems := jsonb_build_array(jsonb_build_object('loc', jsonb_build_array('params', procedure_name), 'code', 'params.invalid',
      'message', format('params of %s must be an object like {"name": value}, not %s', procedure_name, given)));
    return;
  end if;
  given := jsonb_strip_nulls(coalesce(given, '{}'));
  select coalesce(jsonb_object_agg(d.key, etl._normal_value(d.value, coalesce(given->d.key, d.value->'default')))
           filter (where given ? d.key or d.value ? 'default'), '{}')
    into parameters
    from jsonb_each(v_declared) d
   where given->d.key is null or etl._parameter_problem(d.value, given->d.key) is null;
  select jsonb_agg(jsonb_build_object('loc', jsonb_build_array('params', procedure_name, q.name), 'code', 'params.invalid',
                                      'message', format('param %s of %s %s', q.name, procedure_name, q.problem)) order by q.name)
    into problems
    from (select g.key as name,
                 case when v_declared ? g.key then etl._parameter_problem(v_declared->g.key, g.value)
                      else coalesce('is unknown; it takes ' || (select string_agg(k, ', ' order by k) from jsonb_object_keys(v_declared) k),
                                    'is unknown; it takes none') end as problem
            from jsonb_each(given) g
          union all
          select d.key, 'is required' from jsonb_each(v_declared) d
           where (d.value->>'required')::boolean and not d.value ? 'default' and not given ? d.key) q
   where q.problem is not null;
end $$;
comment on function etl._check_parameters(int, text, jsonb) is
  'Validates the parameters given for one procedure: the values to use, and every problem found.';
revoke all on function etl._check_parameters(int, text, jsonb) from public;
