#!/usr/bin/env bash
# Makes .venv from the lock files and does nothing where it is up to date: scripts/setup.sh [gpu] [dev]
set -euo pipefail
cd "$(dirname "$0")/.."

pip() { .venv/bin/python -m pip --disable-pip-version-check -qq install --no-deps --progress-bar off "$@"; }

find_python() {
  for candidate in ${PYTHON:-} python3.11 python3.12 python3.13 python3; do
    if "$candidate" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null; then
      echo "$candidate"
      return
    fi
  done
  echo "setup: no Python 3.11, 3.12 or 3.13 was found; install one, or set PYTHON to its path" >&2
  exit 2
}

# install NAME FILE...: runs install_NAME unless it ran before with these files as they are.
install() {
  local stamp=.venv/installed-$1 wanted
  wanted=$(cat "${@:2}" | sha256sum)
  [ "$(cat "$stamp" 2>/dev/null)" = "$wanted" ] && return
  "install_$1"
  echo "$wanted" > "$stamp"
}

announce() {
  echo "setup: installing $(grep -c '^[^# ].*==' "$1") packages into .venv (once; about $2 minutes)"
}

install_cpu() {
  announce requirements-cpu.lock two
  local torch
  torch=$(grep -o 'torch==[^ ]*+cpu' requirements-cpu.lock)
  # PyPI has no +cpu builds: where the configured index lacks it too, it comes from PyTorch's own. Without a hash.
  pip "$torch" 2>/dev/null || pip --index-url https://download.pytorch.org/whl/cpu "$torch"
  pip --require-hashes -r requirements-cpu.lock
  pip --no-build-isolation -e .
}

install_gpu() {
  announce requirements-gpu.lock ten
  pip --require-hashes -r requirements-gpu.lock
  pip --no-build-isolation -e .
}

install_dev() {
  pip --require-hashes -r requirements-dev.lock
}

kind=cpu dev=
for word in "$@"; do
  case $word in
    cpu | gpu) kind=$word ;;
    dev) dev=yes ;;
    *) echo "setup: '$word' is none of cpu, gpu, dev" >&2; exit 2 ;;
  esac
done
if [ "$(uname -s)" != Linux ]; then
  echo "setup: the lock files are for Linux; on Windows use WSL" >&2
  exit 2
fi
if [ ! -x .venv/bin/python ]; then
  python=$(find_python)
  "$python" -m venv .venv
fi
install $kind requirements-$kind.lock pyproject.toml setup.py
if [ "$dev" ]; then install dev requirements-dev.lock; fi
