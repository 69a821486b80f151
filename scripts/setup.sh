#!/usr/bin/env bash
# Makes .venv from the lock file; does nothing where it is up to date. Sourced or called by quickstart.sh and test.sh.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

lock=requirements-cpu.lock
stamp=.venv/installed
wanted=$(cat "$lock" pyproject.toml | sha256sum)
if [ "$(cat "$stamp" 2>/dev/null)" = "$wanted" ]; then return 0 2>/dev/null || exit 0; fi

python=${PYTHON:-}
for candidate in $python python3.11 python3; do
  if "$candidate" -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' 2>/dev/null; then python=$candidate; break; fi
  python=
done
if [ -z "$python" ]; then
  echo "setup: Python 3.11 was not found; install it, or set PYTHON to its path" >&2
  exit 2
fi

echo "setup: installing $(grep -c == "$lock") packages into .venv (once; about two minutes)"
[ -x .venv/bin/python ] || "$python" -m venv .venv
pip() { .venv/bin/python -m pip --disable-pip-version-check -qq install --progress-bar off "$@"; }
torch=$(grep '^torch==' "$lock")
# PyPI has no +cpu builds: where the configured index lacks it too, it comes from PyTorch's own.
pip --no-deps "$torch" 2>/dev/null || pip --no-deps --index-url https://download.pytorch.org/whl/cpu "$torch"
pip --no-deps -r "$lock"
pip --no-deps --no-build-isolation -e .
echo "$wanted" > "$stamp"
