#!/bin/sh
# Starts all of Netra in containers, waits until it is healthy, and says what to do next.
set -eu
cd "$(dirname "$0")/.."

give_up() { # one line what, one line per remedy
    printf 'up: %s\n' "$1" >&2
    shift
    for remedy in "$@"; do printf '  remedy: %s\n' "$remedy" >&2; done
    exit 69
}

docker compose version >/dev/null 2>&1 || give_up "docker compose is not installed" \
    "install Docker with compose (2.24 or newer)" "make run needs no containers"
docker version >/dev/null 2>&1 || give_up "no Docker engine answers" "start it, or set DOCKER_HOST" "make run needs no containers"

if ! docker compose up --detach --build --wait; then
    docker compose ps --all
    give_up "not everything came up" "docker compose logs <service>"
fi

address=$(docker compose port gateway 8080)
email=${NETRA_BOOTSTRAP_ADMIN:-admin@netra.example}
netra=.venv/bin/netra
[ -x "$netra" ] || netra="docker compose exec gateway netra" # no Python on this machine is needed
url=
case $netra:$address in .venv*:*:8080) ;; .venv*) url=" --url http://$address" ;; esac
cat <<END

Netra is up.
  gateway   http://$address   WebSocket ws://$address/ws
  login     $netra login$url --email $email
  password  docker compose exec auth cat /secrets/bootstrap_admin
  next      $netra run$url --file standalone/sample/usage.csv --request "Where does the money go?"
  stop      make down (the data stays; docker compose down --volumes deletes it)

END
