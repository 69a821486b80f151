#!/usr/bin/env bash
# Sets up .venv and trains the quickstart policy: scripts/quickstart.sh [key=value ...]
set -euo pipefail
cd "$(dirname "$0")/.."
scripts/setup.sh
exec .venv/bin/cispo train recipes/quickstart.yaml "$@"
