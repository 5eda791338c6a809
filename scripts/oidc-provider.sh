#!/bin/sh
# Runs a real OpenID provider for tests, a pinned one from npm that is kept under .tools/. Arguments: port, client id, client
# secret, callback address. It serves on 127.0.0.1 and says `listening` when it does.
set -eu
root=$(cd "$(dirname "$0")/.." && pwd)
version=8.8.1
home=$root/.tools/oidc-provider-$version
if [ ! -d "$home/node_modules" ]; then
    if ! command -v npm >/dev/null 2>&1; then
        printf 'oidc-provider: npm is missing\n  remedy: install Node.js (apt-get install npm)\n' >&2
        exit 69
    fi
    # others may do the same at the same time: whoever is done first moves it into its place
    mkdir -p "$root/.tools"
    draft=$(mktemp -d "$root/.tools/oidc-provider.XXXXXX")
    npm install --prefix "$draft" --no-save --no-audit --no-fund --loglevel=error "oidc-provider@$version" >&2
    mv -T "$draft" "$home" 2>/dev/null || rm -rf "$draft"
fi
cp "$root/tests/fixtures/oidc_provider.mjs" "$home/provider.$$.mjs"
exec node "$home/provider.$$.mjs" "$@"
