#!/usr/bin/env bash
# The main job on the embedded simulated platform: environment, every stage, the report.
# Usage: [VENV=dir] [WORKDIR=dir] ./scripts/demo.sh [--gin.NAME=VALUE …]
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/environment.sh

WORKDIR="${WORKDIR:-work/demo}"
make_environment demo .
"$VENV/bin/recexplore" run --workdir "$WORKDIR" --gin_file runs/demo.gin "$@"
echo "The report is at $(realpath "$WORKDIR/report.html")"
