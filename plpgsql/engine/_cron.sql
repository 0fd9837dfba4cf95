-- When a cron time is due, in its own time zone. Computed here and not by whoever ticks, so that every clock, pg_cron of any
-- version and in any cron.timezone included, comes to the same slots.
--
-- Five fields as cron has them: lists, ranges, steps; where neither day begins with *, one of the two is enough. Or "30 seconds":
-- the multiples of that since 1970. When clocks are put back, an hour that is named is meant once, its second time; "*" in
-- the hours means every hour there is. When they are put forward, a time that is left out falls an hour later.

create or replace function etl._cron_numbers(field text, low int, high int) returns int[]
language sql immutable set search_path = pg_catalog, pg_temp as $$
  select array_agg(distinct n order by n)
    from regexp_split_to_table(field, ',') item
    cross join lateral regexp_match(item, '^(?:\*|(\d{1,2})(?:-(\d{1,2}))?)(?:/(\d{1,2}))?$') m
    cross join lateral generate_series(coalesce(m[1]::int, low), coalesce(m[2]::int, m[1]::int, high), coalesce(nullif(m[3]::int, 0), 1)) n
$$;
comment on function etl._cron_numbers(text, int, int) is 'The numbers that a field of a cron time stands for.';
revoke all on function etl._cron_numbers(text, int, int) from public;

create or replace function etl._cron_seconds(cron text) returns int
language sql immutable set search_path = pg_catalog, pg_temp as $$
  select substring(cron from '^(\d{1,2}) seconds?$')::int
$$;
comment on function etl._cron_seconds(text) is 'The number of a schedule of the form "30 seconds", or null.';
revoke all on function etl._cron_seconds(text) from public;

create or replace function etl._cron_problem(cron text) returns text
language plpgsql immutable set search_path = pg_catalog, pg_temp as $$
declare
  v_fields  text[] := regexp_split_to_array(btrim(cron), '\s+');
  v_problem text;
begin
  if cron is null then return 'a schedule needs a cron time'; end if;
  if etl._cron_seconds(cron) between 1 and 59 then return null; end if;
  if cardinality(v_fields) <> 5 then return format('%s is not a cron time of five fields, nor between 1 and 59 seconds', cron); end if;
  select format('%s is not a %s: it takes numbers from %s to %s, as in *, 5, 1-5, */10 or 1,15', v_fields[f.n], f.name, f.low, f.high) into v_problem
    from (values (1, 'minute', 0, 59), (2, 'hour', 0, 23), (3, 'day of month', 1, 31), (4, 'month', 1, 12), (5, 'day of week', 0, 7)) f(n, name, low, high)
    cross join lateral regexp_split_to_table(v_fields[f.n], ',') item
    left join lateral regexp_match(item, '^(?:\*|(\d{1,2})(?:-(\d{1,2}))?)(?:/(\d{1,2}))?$') m on true
   where m is null or m[1]::int not between f.low and f.high or m[2]::int not between m[1]::int and f.high or m[3]::int not between 1 and f.high
      or m[1] is not null and m[2] is null and m[3] is not null
   order by f.n limit 1;
  return v_problem;
end $$;
comment on function etl._cron_problem(text) is 'Why a text is no cron time, or null.';
revoke all on function etl._cron_problem(text) from public;

create or replace function etl._is_cron_day(fields text[], day date) returns boolean
language plpgsql immutable set search_path = pg_catalog, pg_temp as $$
declare
  v_by_month boolean;
  v_by_week  boolean;
begin
  if extract(month from day) <> all (etl._cron_numbers(fields[4], 1, 12)) then return false; end if;
  v_by_month := extract(day from day) = any (etl._cron_numbers(fields[3], 1, 31));
  v_by_week := array[extract(dow from day), extract(isodow from day)]::int[] && etl._cron_numbers(fields[5], 0, 7);
  if fields[3] like '*%' or fields[5] like '*%' then return v_by_month and v_by_week; end if;
  return v_by_month or v_by_week;
end $$;
comment on function etl._is_cron_day(text[], date) is 'Whether a cron time falls on a day.';
revoke all on function etl._is_cron_day(text[], date) from public;

create or replace function etl._slots_on(fields text[], zone text, day date, since timestamptz, until timestamptz) returns setof timestamptz
language plpgsql stable set search_path = pg_catalog, pg_temp as $$
declare
  v_minutes int[] := etl._cron_numbers(fields[1], 0, 59);
  v_hours   int[] := etl._cron_numbers(fields[2], 0, 23);
begin
  if not etl._is_cron_day(fields, day) then return; end if;
  if fields[2] like '*%' then
    return query
      select t from generate_series(greatest(day::timestamp at time zone zone, date_trunc('minute', since)),
                                    least((day + 1)::timestamp at time zone zone, until), interval '1 minute') t
        cross join lateral (select t at time zone zone as wall) w
       where t between since and until and w.wall::date = day
         and extract(minute from w.wall) = any (v_minutes) and extract(hour from w.wall) = any (v_hours);
  else
    return query
      select distinct t from unnest(v_hours) h, unnest(v_minutes) m
        cross join lateral (select (day + make_interval(hours => h, mins => m)) at time zone zone as t) w
       where t between since and until;
  end if;
end $$;
comment on function etl._slots_on(text[], text, date, timestamptz, timestamptz) is
  'The moments at which a cron time is due on a day of its zone, from one moment to another, both included.';
revoke all on function etl._slots_on(text[], text, date, timestamptz, timestamptz) from public;

-- A day comes back after 40 years at the latest: a Sunday that is February 29. Most schedules are due again within the hour.
create or replace function etl._next_slot(cron text, zone text, after timestamptz) returns timestamptz
language plpgsql stable set search_path = pg_catalog, pg_temp as $$
declare
  v_fields text[] := regexp_split_to_array(btrim(cron), '\s+');
  v_since  timestamptz := after + interval '1 microsecond';
  v_first  date := (after at time zone zone)::date;
  v_slot   timestamptz;
begin
  if etl._cron_seconds(cron) is not null then
    return to_timestamp((floor(extract(epoch from after) / etl._cron_seconds(cron)) + 1) * etl._cron_seconds(cron));
  end if;
  select min(t) into v_slot
    from unnest(array[v_first - 1, v_first, v_first + 1]) day cross join lateral etl._slots_on(v_fields, zone, day, v_since, after + interval '1 hour') t;
  for v_day in -1 .. 15000 loop
    exit when v_slot is not null;
    v_slot := (select min(t) from etl._slots_on(v_fields, zone, v_first + v_day, v_since, 'infinity') t);
  end loop;
  return coalesce(v_slot, 'infinity');
end $$;
comment on function etl._next_slot(text, text, timestamptz) is 'The first moment after another one at which a cron time is due; infinity: there is none within 40 years.';
revoke all on function etl._next_slot(text, text, timestamptz) from public;

-- since is a slot itself. Of a clock that stood still for years, the slots of the last one are counted.
create or replace function etl._due_slots(cron text, zone text, since timestamptz, until timestamptz, out last_at timestamptz, out slot_count int)
language plpgsql stable set search_path = pg_catalog, pg_temp as $$
declare
  v_fields text[] := regexp_split_to_array(btrim(cron), '\s+');
  v_since  timestamptz := greatest(since, until - interval '1 year');
begin
  if etl._cron_seconds(cron) is not null then
    last_at := to_timestamp(floor(extract(epoch from until) / etl._cron_seconds(cron)) * etl._cron_seconds(cron));
    slot_count := floor(extract(epoch from last_at - v_since) / etl._cron_seconds(cron)) + 1;
  else
    select max(t), count(*) into last_at, slot_count
      from generate_series(((v_since at time zone zone)::date - 1)::timestamp, ((until at time zone zone)::date + 1)::timestamp, interval '1 day') day
      cross join lateral etl._slots_on(v_fields, zone, day::date, v_since, until) t;
  end if;
  last_at := coalesce(last_at, since);
  slot_count := greatest(slot_count, 1);
end $$;
comment on function etl._due_slots(text, text, timestamptz, timestamptz) is
  'The last moment at which a cron time was due, from one at which it was to another moment, both included, and how many there were.';
revoke all on function etl._due_slots(text, text, timestamptz, timestamptz) from public;
