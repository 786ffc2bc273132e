#!/bin/sh
# Fuzzes the handling of messages, guided by coverage: `sh tests/fuzz.sh MINUTES`. Needs a nightly Rust. Run it by hand: CI only
# replays the corpus (verifier/tests/untrusted.rs). It writes failing inputs to target/fuzz/artifacts: add them to
# tests/fuzz/corpus/messages with the fix. After a change of the wire format, write new seed messages with
# `cargo run -p autodidact-verifier --example fuzz_seeds -- tests/fuzz/corpus/messages`.
set -eu
cd "$(dirname "$0")/.."
minutes=${1:-10}
target="${CARGO_TARGET_DIR:-$PWD/target}/fuzz"
command -v cargo-fuzz >/dev/null 2>&1 || cargo install --locked --quiet cargo-fuzz
mkdir -p "$target/corpus" "$target/artifacts"
# New inputs go to the first folder. No sanitizer, because the code has no unsafe part. The first input of a domain is slow,
# because it builds the domain's tables.
cargo +nightly fuzz run --sanitizer none --fuzz-dir tests/fuzz --target-dir "$target" messages \
    "$target/corpus" tests/fuzz/corpus/messages -- \
    -max_total_time="$((minutes * 60))" -max_len=4096 -rss_limit_mb=1024 -timeout=20 \
    -artifact_prefix="$target/artifacts/"
