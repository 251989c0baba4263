#!/usr/bin/env bash
# The full-size model on this machine's GPU: seeded weights in the original's formats, exported in bfloat16, served and measured.
# benchmarks/full_size.sh WORK [ENGINE]    needs `sparrow` installed and 40 GB of disk at WORK; adds to benchmarks/results/<gpu>
set -euo pipefail
work=${1:?usage: benchmarks/full_size.sh WORK [ENGINE]}
engine=${2:-aoti}
cd "$(dirname "$0")/.."
[ -e "$work/checkpoint" ] || time python3 -m export.seeded "$work" full
time sparrow export "$work/checkpoint" -o "$work/$engine" --engine "$engine" --precision bfloat16
time python3 -m benchmarks.components "$work/$engine"
time sparrow serve --log "$work/server.log" "$work/$engine" -- sparrow bench
