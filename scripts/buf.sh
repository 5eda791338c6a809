#!/bin/sh
# Runs buf, a pinned one from npm that is kept under .tools/.
set -eu
root=$(cd "$(dirname "$0")/.." && pwd)
version=1.75.0
home=$root/.tools/buf-$version
buf=$home/node_modules/.bin/buf
if [ ! -x "$buf" ]; then
    if ! command -v npm >/dev/null 2>&1; then
        printf 'buf: npm is missing, so the protos cannot be linted\n  remedy: install Node.js (apt-get install npm)\n' >&2
        exit 69
    fi
    mkdir -p "$home"
    npm install --prefix "$home" --no-save --no-audit --no-fund --loglevel=error "@bufbuild/buf@$version" >&2
fi
exec "$buf" "$@"
