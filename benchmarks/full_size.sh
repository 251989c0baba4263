#!/usr/bin/env bash
# The full-size model on this machine's GPU: seeded weights in the original's formats, exported in bfloat16, served and measured.
# benchmarks/full_size.sh WORK      needs `sparrow` installed and 40 GB of disk at WORK; adds to benchmarks/results/<gpu>/serving.jsonl
set -euo pipefail
work=${1:?usage: benchmarks/full_size.sh WORK}
cd "$(dirname "$0")/.."
time python3 -m export.seeded "$work" full
time sparrow export "$work/checkpoint" -o "$work/repository" --engine torch --precision bfloat16
time sparrow serve --log "$work/server.log" "$work/repository" -- sparrow bench
