-- Lineage for people and programs.

create or replace view etl.lineage as
select l.pipeline, l.name, l.kind, l.relation, l.access, l.source, l.via, l.columns, l.derived_from, l.written_rows, l.is_current,
       l.first_seen_at, l.last_seen_at, l.first_run_id, l.last_run_id
  from etl._lineage() l;
comment on view etl.lineage is
  'What each active procedure and each materialized view reads and writes. access: read, write, reference (rows locked by a foreign key) or use (the catalog does not say which). source: static (the SQL says so), observed (a step locked it), catalog (via: the view it is read through). is_current: the routine is still the one that was looked at.';

create or replace view etl.lineage_findings as
select f.pipeline, f.finding, f.severity, f.name, f.relation, f.detail, f.remedy, f.sources from etl._lineage_findings() f;
comment on view etl.lineage_findings is
  'Where what is declared and what is done differ: undeclared_read, fact_in_dimension (error), two_writers (warning), unused_dependency (info). sources: how it is known.';

grant select on etl.lineage, etl.lineage_findings, etl.lineage_edges, etl.lineage_scans, etl.lineage_cursors to etl_reader;
