#!/usr/bin/env bash
# All tests, in an environment of their own making, in as many processes as there are cores up to four;
# a file's tests stay together. Usage: [VENV=dir] ./scripts/test.sh [pytest arguments …]
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/environment.sh

make_environment test '.[test]'
"$VENV/bin/ruff" check --quiet .
"$VENV/bin/ruff" format --quiet --check .
exec "$VENV/bin/python" -m pytest -n auto --maxprocesses 4 --dist loadfile "$@"
