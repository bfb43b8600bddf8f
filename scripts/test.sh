#!/usr/bin/env bash
# All tests, in an environment of their own making. Usage: [VENV=dir] ./scripts/test.sh [pytest arguments …]
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/environment.sh

make_environment test '.[test]'
"$VENV/bin/ruff" check --quiet .
"$VENV/bin/ruff" format --quiet --check .
exec "$VENV/bin/python" -m pytest "$@"
