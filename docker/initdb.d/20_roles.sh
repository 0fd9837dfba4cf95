#!/bin/sh
# The roles of b2s, and four logins, none of them a superuser; each may do what its part takes. Run once, as a superuser, by the
# entry point of the image. Passwords come from the environment; a login without one is let in by what pg_hba.conf trusts only.
set -eu

psql -X -q -v ON_ERROR_STOP=1 \
  --username "${POSTGRES_USER:-postgres}" --dbname "${POSTGRES_DB:-postgres}" \
  -v deployer="${B2S_DEPLOYER_PASSWORD:-}" -v clock="${B2S_CLOCK_PASSWORD:-}" \
  -v worker="${B2S_WORKER_PASSWORD:-}" -v exporter="${B2S_EXPORTER_PASSWORD:-}" <<'SQL'
create role etl_engine nologin;
create role etl_owner nologin;
create role etl_admin nologin;
create role etl_operator nologin;
create role etl_reader nologin;
create role etl_frontend nologin;
create role etl_retention nologin;
grant etl_reader to etl_operator;
grant etl_operator to etl_admin;
grant etl_reader to etl_owner;
grant pg_read_all_stats, pg_signal_backend to etl_engine;

-- b2s_deployer installs b2s and applies configurations, b2s_clock owns the jobs of pg_cron, b2s_worker executes runs,
-- b2s_exporter reads for Prometheus.
select format('create role b2s_deployer login password %L', nullif(:'deployer', '')) \gexec
select format('create role b2s_clock login password %L', nullif(:'clock', '')) \gexec
select format('create role b2s_worker login password %L', nullif(:'worker', '')) \gexec
select format('create role b2s_exporter login password %L', nullif(:'exporter', '')) \gexec

grant etl_engine, etl_owner, etl_admin, b2s_clock to b2s_deployer;
grant etl_retention to b2s_deployer with admin option;
grant etl_operator to b2s_clock, b2s_worker;
grant etl_reader to b2s_exporter;
grant usage on schema cron to b2s_clock, b2s_deployer;
select format('grant create on database %I to b2s_deployer', current_database()) \gexec
SQL
