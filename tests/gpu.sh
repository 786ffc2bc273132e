#!/bin/sh
# On a machine with an NVIDIA GPU and the CUDA toolkit: the test body of every backend, `smoke` with learner and actor on the GPU, and the benchmarks
# beside those of the CPU. `sh tests/gpu.sh [OUT]` leaves the figures in OUT, by default target/gpu.
set -eu
cd "$(dirname "$0")/.."
out=${1:-"${CARGO_TARGET_DIR:-$PWD/target}/gpu"}
mkdir -p "$out"
command -v nvidia-smi >/dev/null 2>&1 || { echo "expected a machine with an NVIDIA GPU, found no nvidia-smi" >&2; exit 1; }
nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader | tee "$out/gpu.txt"
optimised="profile.release.package.candle-core.opt-level=3"
cargo test --release --features cuda --config "$optimised" --package autodidact-policy --test backends 2>&1 | tee "$out/backends.txt"
cargo build --release --features cuda --config "$optimised"
autodidact="${CARGO_TARGET_DIR:-$PWD/target}/release/autodidact"
rm -rf "$out/smoke"
"$autodidact" train smoke --run-dir "$out/smoke" --set learner.device=cuda --set actor.device=cuda --json | tee "$out/smoke.json"
for what in decode train; do
    for device in cpu cuda; do
        "$autodidact" bench "$what" --device "$device" --threads 0 --d-model 512 --batch 256 --json | tee "$out/bench-$what-$device.json"
    done
done
