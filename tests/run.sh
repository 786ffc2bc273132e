#!/bin/sh
# Runs all checks that must pass before a change lands: format, lints, tests, documentation, every command of the README, and
# the files in deploy/.
# Needs Rust, a C compiler and Python; installs its other dependencies.
set -eu
cd "$(dirname "$0")/.."

need() {
    command -v "$1" >/dev/null 2>&1 || { echo "tests need $1: $2" >&2; exit 1; }
}
need cargo "install Rust from https://rustup.rs"
need cc "install a C compiler, for example: apt-get install gcc"
for tool in fmt:rustfmt clippy:clippy; do
    cargo "${tool%:*}" --version >/dev/null 2>&1 || rustup component add "${tool#*:}" ||
        { echo "tests need ${tool#*:}: install it with your Rust" >&2; exit 1; }
done

sh tests/setup.sh

step() {
    echo
    echo "== $*"
    "$@"
}

export AUTODIDACT_CI=
step cargo fmt --all --check
step cargo test --release --config tests/checked.toml --workspace
step cargo clippy --release --workspace --all-targets -- -D warnings
RUSTDOCFLAGS="-D warnings" step cargo doc --release --workspace --no-deps --quiet
step sh tests/readme.sh
step sh tests/deploy.sh
echo
echo "all of it holds"
