#!/usr/bin/env bash
# The full-size model on this machine's GPU: seeded weights in the original's formats, exported in bfloat16, served and measured.
# benchmarks/full_size.sh WORK [ENGINE]    needs `sparrow` installed and 40 GB of disk at WORK; adds to benchmarks/results/<gpu>
# The peers that it is compared with want sam2 1.1.0 and transformers; the one that is missing is left out.
set -euo pipefail
work=${1:?usage: benchmarks/full_size.sh WORK [ENGINE]}
engine=${2:-aoti}
cd "$(dirname "$0")/.."
[ -e "$work/checkpoint" ] || time python3 -m export.seeded "$work" full
time sparrow export "$work/checkpoint" -o "$work/$engine" --engine "$engine" --precision bfloat16
time sparrow bench "$work/$engine"
time sparrow serve --log "$work/server.log" "$work/$engine" -- sparrow bench
time python3 -m benchmarks.peers "$work/$engine"
