#!/bin/sh
# Fuzzes what processes do with messages, guided by coverage: `sh tests/fuzz.sh MINUTES`. Needs a nightly Rust; by hand, not
# in CI, which replays the corpus (verifier/tests/untrusted.rs). What it finds is a file in target/fuzz/artifacts: put it into
# tests/fuzz/corpus/messages with the fix. After a change of the wire format, `cargo run -p autodidact-verifier --example fuzz_seeds --
# tests/fuzz/corpus/messages` writes the messages that it starts from anew.
set -eu
cd "$(dirname "$0")/.."
minutes=${1:-10}
target="${CARGO_TARGET_DIR:-$PWD/target}/fuzz"
command -v cargo-fuzz >/dev/null 2>&1 || cargo install --locked --quiet cargo-fuzz
mkdir -p "$target/corpus" "$target/artifacts"
# New inputs go to the first folder. The code has no unsafe part, so no sanitizer; the first input of a domain waits for its
# tables.
cargo +nightly fuzz run --sanitizer none --fuzz-dir tests/fuzz --target-dir "$target" messages \
    "$target/corpus" tests/fuzz/corpus/messages -- \
    -max_total_time="$((minutes * 60))" -max_len=4096 -rss_limit_mb=1024 -timeout=20 \
    -artifact_prefix="$target/artifacts/"
