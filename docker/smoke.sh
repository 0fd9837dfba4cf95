#!/bin/sh
# Builds the images, starts everything, and looks at it from outside; ends with what it has started gone. Needs a Docker
# daemon with compose, and curl. Run from anywhere.
set -eu
cd "$(dirname "$0")"

compose() { docker compose --project-directory . --env-file "$settings" "$@"; }
settings=$(mktemp)
cp .env.example "$settings"
trap 'compose down --volumes --timeout 30; rm -f "$settings"' EXIT

compose up --build --wait --wait-timeout 300

in_database() { compose exec -T database psql -X -A -t -U postgres -d shop -c "$1"; }
test "$(in_database "select count(*) from pg_extension where extname = 'pg_cron'")" = 1
test "$(in_database "select current_setting('cron.use_background_workers')")" = off
test "$(in_database "select count(*) from etl.installation")" = 1
test "$(in_database "select count(*) from etl.heartbeats where name = 'clock'")" = 1
for service in database worker exporter prometheus grafana; do
  user=$(compose exec -T "$service" id -u)
  test "$user" != 0 || { echo "$service runs as root" >&2; exit 1; }
done
curl --fail --silent http://127.0.0.1:9090/api/v1/targets | grep --quiet '"health":"up"'
curl --fail --silent http://127.0.0.1:3000/api/health | grep --quiet '"database": *"ok"'
echo "everything is up"
