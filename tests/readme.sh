#!/bin/sh
# Runs every command of the README, in order, in a copy of the checkout, so that no example breaks unnoticed.
# AUTODIDACT_CI=1 shortens the runs. The test command itself is left out, since it calls this script.
set -eu
cd "$(dirname "$0")/.."
commands=$(awk '/^```sh$/ { inside = 1; next } /^```/ { inside = 0 } inside' README.md | grep -v '^sh tests/run.sh$')
[ -n "$commands" ] || { echo "README.md: expected commands in sh blocks, found none" >&2; exit 1; }

copy=$(mktemp -d)
trap 'rm -rf "$copy"' EXIT
git ls-files -z --cached --others --exclude-standard | xargs -0 cp --parents -t "$copy" 2>/dev/null
export CARGO_TARGET_DIR="${CARGO_TARGET_DIR:-$PWD/target}" AUTODIDACT_CI=1
PATH="$CARGO_TARGET_DIR/release:$PATH"
cd "$copy"
echo "$commands" | while IFS= read -r line; do
    [ -n "$line" ] || continue
    echo "\$ $line"
    sh -euc "$line" </dev/null || { echo "README.md: this command failed: $line" >&2; exit 1; }
done
