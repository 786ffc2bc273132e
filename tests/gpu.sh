#!/bin/sh
# Runs the tests of the backends and of tiny models of every family, five steps of a network with the shape of Qwen3 0.6B, `smoke`
# with learner and actor on the GPU, and the benchmarks of GPU and CPU. Needs an NVIDIA GPU and the CUDA toolkit. `sh tests/gpu.sh [OUT]` writes the results to OUT, by default target/gpu.
set -eu
mkdir -p "${1:-.}"
given=$(cd "${1:-.}" && pwd)
cd "$(dirname "$0")/.."
target="${CARGO_TARGET_DIR:-$PWD/target}"
out="$target/gpu"
[ $# -eq 0 ] || out=$given
mkdir -p "$out"
command -v nvidia-smi >/dev/null 2>&1 || { echo "expected a machine with an NVIDIA GPU, found no nvidia-smi" >&2; exit 1; }

# Saves and prints the output of a command, and exits if the command fails.
keep() {
    file="$out/$1"
    shift
    "$@" >"$file" 2>&1 || { cat "$file" >&2; exit 1; }
    cat "$file"
}

optimised="profile.release.package.candle-core.opt-level=3"
keep gpu.txt nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader
keep backends.txt cargo test --release --features cuda --config "$optimised" --package autodidact-policy \
    --test backends --test reference --test adapter
cargo build --release --features cuda --config "$optimised"
keep qwen.txt cargo test --release --features cuda --config "$optimised" --test e2e -- pretrained_run::an_adapter
rm -rf "$out/smoke"
keep smoke.json "$target/release/autodidact" train smoke --run-dir "$out/smoke" --set learner.device=cuda --set actor.device=cuda --json
for what in decode train; do
    for device in cpu cuda; do
        keep "bench-$what-$device.json" \
            "$target/release/autodidact" bench "$what" --device "$device" --threads 0 --d-model 512 --batch 256 --json
    done
done
