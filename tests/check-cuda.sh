#!/bin/sh
# Type-checks the feature `cuda` on a machine without a GPU, with NVIDIA's compiler from PyPI. By hand: it takes minutes, and
# nothing that it builds is run.
set -eu
cd "$(dirname "$0")/.."

# One version of all parts, the newest that cudarc takes; curand has versions of its own.
CUDA=13.2
CURAND=10.4

tools="${CARGO_TARGET_DIR:-$PWD/target}/tools/cuda-$CUDA"
# The mark is set when all of it is there.
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
# Nothing here can be asked what GPU it has: 90 is an H100.
export CUDA_COMPUTE_CAP=90 CUDARC_CUDA_VERSION=13020
cargo check --release --features cuda
