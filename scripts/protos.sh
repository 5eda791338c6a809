#!/bin/sh
# Generates the stubs under netra/ from protos/; with --check generates elsewhere and fails on a difference.
set -eu
cd "$(dirname "$0")/.."
python=.venv/bin/python
# mypy-protobuf's plugins are found on PATH
PATH=$(cd .venv/bin 2>/dev/null && pwd):$PATH
export PATH

generate() {
    # shellcheck disable=SC2046  # our proto paths have no blanks
    "$python" -m grpc_tools.protoc -Iprotos --python_out="$1" --grpc_python_out="$1" \
        --mypy_out=quiet:"$1" --mypy_grpc_out=quiet:"$1" $(find protos -name '*.proto' | sort)
}

stubs() {
    (cd "$1" && find netra -name '*_pb2*.py*' -not -path '*/__pycache__/*' | sort)
}

if [ "${1:-}" != --check ]; then
    generate .
    exit 0
fi

fresh=$(mktemp -d)
trap 'rm -rf "$fresh"' EXIT
generate "$fresh"
{ stubs . && stubs "$fresh"; } | sort -u >"$fresh/names"
drift=0
while read -r name; do
    if ! cmp -s "$name" "$fresh/$name"; then
        printf 'protos: %s differs from what protos/ says\n' "$name" >&2
        drift=1
    fi
done <"$fresh/names"
if [ $drift -ne 0 ]; then
    printf '  remedy: make protos, then commit the result\n' >&2
    exit 1
fi
