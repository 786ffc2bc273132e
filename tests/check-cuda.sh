#!/bin/sh
# Type-checks the feature `cuda` on a machine without a GPU, with NVIDIA's compiler from PyPI. Run it by hand: it takes
# minutes, and none of its output is executed.
set -eu
cd "$(dirname "$0")/.."

# One version for all parts, the newest that cudarc supports; curand has its own versions.
CUDA=13.2
CURAND=10.4

tools="${CARGO_TARGET_DIR:-$PWD/target}/tools/cuda-$CUDA"
# This file marks a complete installation.
if [ ! -e "$tools/installed" ]; then
    command -v python3 >/dev/null 2>&1 || { echo "expected python3, to install CUDA $CUDA from PyPI" >&2; exit 1; }
    echo "installing CUDA $CUDA into $tools"
    python3 -m pip install --quiet --disable-pip-version-check --root-user-action=ignore --no-deps --upgrade --target "$tools" \
        "nvidia-cuda-nvcc==$CUDA.*" "nvidia-cuda-crt==$CUDA.*" "nvidia-cuda-runtime==$CUDA.*" \
        "nvidia-cuda-cccl==$CUDA.*" "nvidia-nvvm==$CUDA.*" "nvidia-curand==$CURAND.*"
    touch "$tools/installed"
fi

root="$tools/nvidia/cu13"
export CUDA_HOME="$root" CUDA_PATH="$root" CUDA_TOOLKIT_ROOT_DIR="$root" PATH="$root/bin:$PATH"
# No GPU to query for its compute capability: 90 is an H100.
export CUDA_COMPUTE_CAP=90 CUDARC_CUDA_VERSION=13020
cargo check --release --features cuda --tests
