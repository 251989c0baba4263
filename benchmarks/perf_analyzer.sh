#!/usr/bin/env bash
# NVIDIA's perf_analyzer where there is none: the one of the wheel tritonclient 2.50.0, the last that runs on glibc 2.35 and 2.36, with the
# two libraries that it needs.
# benchmarks/perf_analyzer.sh FOLDER      makes FOLDER/perf_analyzer; needs pip, and apt-get with its lists (Debian, Ubuntu)
set -euo pipefail
folder=$(realpath -m "${1:?usage: benchmarks/perf_analyzer.sh FOLDER}")
mkdir -p "$folder"
cd "$folder"
"${PYTHON:-python3}" -m pip install --quiet --disable-pip-version-check --no-deps --target . tritonclient==2.50.0 nvidia-cuda-runtime-cu12==12.9.79
apt-get download -qq libb64-0d
dpkg -x libb64-0d_*.deb .
chmod +x bin/perf_analyzer
cat > perf_analyzer <<WRAPPER
#!/bin/sh
LD_LIBRARY_PATH=$folder/nvidia/cuda_runtime/lib:$folder/usr/lib/$(uname -m)-linux-gnu exec $folder/bin/perf_analyzer "\$@"
WRAPPER
chmod +x perf_analyzer
