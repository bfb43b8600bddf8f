#!/usr/bin/env bash
# The whole system on the embedded simulated platform: environment, every stage, the experiment, the
# report. Small; `recexplore run --gin_file runs/experiment.gin` without --quick is the whole of it.
# Usage: [VENV=dir] [WORKDIR=dir] ./scripts/demo.sh [--gin.NAME=VALUE …]
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/environment.sh

WORKDIR="${WORKDIR:-work/demo}"
make_environment demo .
"$VENV/bin/recexplore" run --workdir "$WORKDIR" --gin_file runs/experiment.gin --quick "$@"
echo "The report is at $(realpath "$WORKDIR/report.html")"
