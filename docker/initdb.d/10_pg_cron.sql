-- pg_cron, in the database that cron.database_name names. It must be in shared_preload_libraries.
create extension if not exists pg_cron;
