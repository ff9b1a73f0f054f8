#!/usr/bin/env bash
# Make the PTX of all kernels from their sources: bash jgpt/model/attention/flash/build.sh [folder, by default ptx beside this]
#
# Needs nvcc (NVCC) of CUDA 13.0 and a python3 (PYTHON). Other versions of nvcc give other PTX, which is as good; the
# version is fixed so that a test can compare. The PTX says that it needs PTX ISA 6.5, the first with these
# instructions, where nvcc would write its own version, which an older driver or ptxas refuses.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
target=${1:-$here/ptx}
mkdir -p "$target"
"${PYTHON:-python3}" "$here/shapes.py" | while read -r kernel width options; do
  # shellcheck disable=SC2086 # options are words
  (cd "$here" && "${NVCC:-nvcc}" -arch=compute_75 -ptx -O3 $options "$kernel.cu" -o -) |
    sed -E -e 's/^\.version .*/.version 6.5/' -e '/^\/\//d' -e 's/[ \t]+$//' -e '/^$/d' >"$target/flash_${kernel}_$width.ptx"
done
