#!/usr/bin/env bash
# CUDA's compiler for machines that have none: what building with the `cuda` feature takes, from PyPI, and the libraries of
# scripts/emulated_gpu.sh to link with. To run on a GPU, libcuda and cuBLAS 13 must be there instead.
#
#   eval "$(scripts/cuda_toolkit.sh)"              install if needed, then set the variables of a build
#
#   scripts/cuda_toolkit.sh FOLDER                 install into FOLDER, 270 MB; default: target/cuda
#   scripts/cuda_toolkit.sh --checks [FOLDER]      leave out candle's own kernels: builds in a fraction of the time that
#                                                  run on the emulated GPU alone
#
# Standard output holds `export` lines and nothing else. Needs x86-64 Linux, g++ (at most 15), and python3 with pip. PYTHON:
# another one to use.
set -euo pipefail

WHEELS='
nvidia-cuda-nvcc==13.0.88    --hash=sha256:56fe502eb77625a12f25172caa3cdddb4e4c8ba2c8c17dba44b164761b380f03
nvidia-nvvm==13.0.88         --hash=sha256:c5f41ffeb6466944a026dfa5317d7d85355c119bbec279205d22f1869d1054e0
nvidia-cuda-crt==13.0.88     --hash=sha256:2c8043c7c9e02492716426e9919fc78d2c5b3b2a7a768a88e952676b08aa55a4
nvidia-cuda-runtime==13.0.96 --hash=sha256:7f82250d7782aa23b6cfe765ecc7db554bd3c2870c43f3d1821f1d18aebf0548
nvidia-cuda-cccl==13.0.85    --hash=sha256:e0da7ad981f3a8aff08241b5bfc1af868742a63e2762f53a5171c492ef242649'

root=$(cd "$(dirname "$0")/.." && pwd)
checks=''
if [ "${1:-}" = --checks ]; then checks=yes; shift; fi
folder=${1:-${CARGO_TARGET_DIR:-$root/target}/cuda}

if [ "$(cat "$folder/.wheels" 2>/dev/null)" != "$WHEELS" ]; then
    echo "downloading CUDA's compiler (100 MB)" >&2
    # What is there gets replaced, so it must be ours.
    [ ! -e "$folder" ] || [ -e "$folder/.wheels" ] || { echo "$folder holds something else" >&2; exit 1; }
    new=$folder.new
    rm -rf "$new"
    mkdir -p "$new/wheels"
    printf '%s' "$WHEELS" >"$new/wheels.txt"
    "${PYTHON:-python3}" -m pip download --quiet --disable-pip-version-check --no-deps --only-binary=:all: --require-hashes \
        --dest "$new/wheels" -r "$new/wheels.txt" >&2
    for wheel in "$new"/wheels/*.whl; do "${PYTHON:-python3}" -m zipfile -e "$wheel" "$new/all" >&2; done
    mv "$new"/all/nvidia/cu13/* "$new/"
    rm -rf "$new/wheels" "$new/all"
    chmod -R u+x "$new/bin" "$new/nvvm/bin"
    ln -s lib "$new/lib64"
    # The static runtime, so that a program needs no libcudart.so.
    printf 'INPUT(libcudart_static.a -ldl -lrt -lpthread)\n' >"$new/lib/libcudart.so"
    printf '%s' "$WHEELS" >"$new/.wheels"
    rm -rf "$folder"
    mv "$new" "$folder"
fi
folder=$(cd "$folder" && pwd)
"$root/scripts/emulated_gpu.sh" >/dev/null
rm -rf "$folder/lib/stubs"
ln -s "$(cd "${CARGO_TARGET_DIR:-$root/target}/emulated_gpu" && pwd)" "$folder/lib/stubs"

export_line() { printf 'export %s=%q\n' "$1" "$2"; }
export_line CUDA_HOME "$folder"
printf 'export PATH=%q:$PATH\n' "$folder/bin"
export_line CUDARC_CUDA_VERSION 13000
if [ "$checks" ]; then
    export_line NVCC "$root/tests/emulated_gpu/nvcc"
    # No card that titan is built for: builds that are to run on one take nothing from these.
    export_line CUDA_COMPUTE_CAP 87
else
    export_line NVCC "$folder/bin/nvcc"
    export_line CUDA_COMPUTE_CAP "${CUDA_COMPUTE_CAP:-80}"
fi
