#!/usr/bin/env bash
# Makes .venv from the lock files and does nothing where it is up to date: scripts/setup.sh [dev]
set -euo pipefail
cd "$(dirname "$0")/.."

pip() { .venv/bin/python -m pip --disable-pip-version-check -qq install --no-deps --progress-bar off "$@"; }

python_311() {
  for candidate in ${PYTHON:-} python3.11 python3; do
    if "$candidate" -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' 2>/dev/null; then
      echo "$candidate"
      return
    fi
  done
  echo "setup: Python 3.11 was not found; install it, or set PYTHON to its path" >&2
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

install_cpu() {
  echo "setup: installing $(grep -c == requirements-cpu.lock) packages into .venv (once; about two minutes)"
  local torch
  torch=$(grep '^torch==' requirements-cpu.lock)
  # PyPI has no +cpu builds: where the configured index lacks it too, it comes from PyTorch's own.
  pip "$torch" 2>/dev/null || pip --index-url https://download.pytorch.org/whl/cpu "$torch"
  pip -r requirements-cpu.lock
  pip --no-build-isolation -e .
}

install_dev() {
  pip -r requirements-dev.lock
}

if [ ! -x .venv/bin/python ]; then
  python=$(python_311)
  "$python" -m venv .venv
fi
install cpu requirements-cpu.lock pyproject.toml setup.py
if [ "${1:-}" = dev ]; then install dev requirements-dev.lock; fi
