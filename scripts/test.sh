#!/usr/bin/env bash
# Sets up .venv, then lints, type-checks and tests, the wheel included: scripts/test.sh [pytest arguments]
set -euo pipefail
cd "$(dirname "$0")/.."
scripts/setup.sh dev
export OMP_NUM_THREADS=1 RAY_USAGE_STATS_ENABLED=0
.venv/bin/ruff check .
.venv/bin/ruff format --check .
.venv/bin/pyright
# Most tests that take long wait for processes to start: three at a time, the tests of a file one after the other.
exec .venv/bin/python -m pytest -n 3 --dist loadfile --no-loadscope-reorder "$@"
