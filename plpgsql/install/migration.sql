-- Runs one migration when this database does not have it yet (psql only; b2s migrate does the same in Python).
select etl._begin_migration(:'migration', :'sha256') as is_pending \gset
\if :is_pending
\echo applying migration :migration
\ir ../../migrations/:migration.sql
\endif
