#!/bin/sh
# Leaves ./.venv equal to requirements/<set>.txt (default: dev; or: runtime) with this checkout installed in it.
# Needs Python 3.11 to 3.13 with either uv, venv or pip. PYTHON=python3.12 chooses the interpreter.
set -eu
cd "$(dirname "$0")/.."

set_name=${1:-dev}
requirements=requirements/$set_name.txt
stamp_file=.venv/.stamp

say() { printf '%s\n' "$*"; }

give_up() { # one line what, one line per remedy
    say "bootstrap: $1" >&2
    shift
    for remedy in "$@"; do say "  remedy: $remedy" >&2; done
    exit 69
}

suits() {
    command -v "$1" >/dev/null 2>&1 &&
        "$1" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' >/dev/null 2>&1
}

find_python() {
    if [ -n "${PYTHON:-}" ]; then
        suits "$PYTHON" || give_up "PYTHON=$PYTHON is not Python 3.11 to 3.13" "PYTHON=/path/to/python3.12 make run"
        say "$PYTHON"
        return
    fi
    for candidate in python3 python3.13 python3.12 python3.11 python; do
        if suits "$candidate"; then say "$candidate"; return; fi
    done
    give_up "no Python 3.11 to 3.13 found" "apt-get install python3 python3-venv" "brew install python@3.12" \
        "PYTHON=/path/to/python3.12 make run"
}

# What .venv should be made from; a stamp that says the same means there is nothing to do.
wanted_stamp() {
    say "$set_name $1 $(cat "$requirements" pyproject.toml | cksum) $(pwd -P)"
}

is_current() {
    [ -f "$stamp_file" ] && [ -x .venv/bin/python ] || return 1
    version=$(.venv/bin/python --version 2>/dev/null) || return 1
    if [ -n "${PYTHON:-}" ] && [ "$("$PYTHON" --version 2>/dev/null)" != "$version" ]; then return 1; fi
    [ "$(cat "$stamp_file")" = "$(wanted_stamp "$version")" ]
}

one_at_a_time() {
    mkdir -p .tools
    if command -v flock >/dev/null 2>&1; then
        exec 9>.tools/bootstrap.lock
        flock 9
        return
    fi
    until mkdir .tools/bootstrap.lock.d 2>/dev/null; do
        holder=$(cat .tools/bootstrap.lock.d/pid 2>/dev/null || say 0)
        if [ "$holder" != 0 ] && ! kill -0 "$holder" 2>/dev/null; then rm -rf .tools/bootstrap.lock.d; fi
        sleep 1
    done
    say $$ >.tools/bootstrap.lock.d/pid
    trap 'rm -rf .tools/bootstrap.lock.d' EXIT
}

# Prints a uv: from PATH, from a tools environment, or unpacked by pip; nothing if there is none to be had.
find_uv() {
    if command -v uv >/dev/null 2>&1; then command -v uv; return; fi
    for made in .tools/uv/bin/uv .tools/uv-target/bin/uv; do
        if [ -x "$made" ] && "$made" --version >/dev/null 2>&1; then say "$made"; return; fi
    done
    rm -rf .tools/uv .tools/uv-target
    if "$python" -m venv .tools/uv >>"$log" 2>&1 &&
        .tools/uv/bin/python -m pip install --quiet --require-hashes -r requirements/uv.txt >>"$log" 2>&1; then
        say .tools/uv/bin/uv
    elif "$python" -m pip install --quiet --require-hashes --target .tools/uv-target -r requirements/uv.txt >>"$log" 2>&1; then
        rm -rf .tools/uv
        say .tools/uv-target/bin/uv
    else
        rm -rf .tools/uv .tools/uv-target
    fi
}

with_uv() {
    uv=$(find_uv)
    [ -n "$uv" ] || return 1
    if [ ! -x .venv/bin/python ] || [ "$(.venv/bin/python --version 2>&1)" != "$version" ]; then
        rm -rf .venv
        "$uv" venv --quiet --python "$python" .venv >>"$log" 2>&1 || return 1
    fi
    "$uv" pip sync --quiet --python .venv/bin/python --require-hashes "$requirements" >>"$log" 2>&1 &&
        "$uv" pip install --quiet --python .venv/bin/python --no-deps --no-build-isolation -e . >>"$log" 2>&1
}

with_pip() {
    rm -rf .venv
    "$python" -m venv .venv >>"$log" 2>&1 &&
        .venv/bin/python -m pip install --quiet --require-hashes -r "$requirements" >>"$log" 2>&1 &&
        .venv/bin/python -m pip install --quiet --no-deps --no-build-isolation -e . >>"$log" 2>&1
}

[ -f "$requirements" ] || give_up "$requirements does not exist" "scripts/bootstrap.sh dev" "scripts/bootstrap.sh runtime"
if is_current; then exit 0; fi
one_at_a_time
if is_current; then exit 0; fi # another call did it meanwhile

python=$(find_python)
version=$("$python" --version 2>&1)
log=.tools/bootstrap.log
: >"$log"
say "bootstrap: $version, $requirements"
rm -f "$stamp_file"
if with_uv || with_pip; then
    wanted_stamp "$version" >"$stamp_file"
    say "bootstrap: .venv is ready"
else
    tail -n 5 "$log" >&2
    give_up "could not install $requirements (all of it: $log)" "apt-get install python3-venv python3-pip" \
        "install uv and put it on PATH" "check the network and the index that pip is set up with"
fi
