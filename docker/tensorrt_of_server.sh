#!/usr/bin/env bash
# Prints the version of TensorRT that the Triton server of this container runs engines in, e.g. 10.8.0.
set -euo pipefail
backend=${TENSORRT_BACKEND:-/opt/tritonserver/backends/tensorrt/libtriton_tensorrt.so}
library=$(ldd "$backend" | awk '$1 ~ /^libnvinfer\.so/ { print $3 }')
if [ ! -e "$library" ]; then
    echo "$backend: finds no libnvinfer.so. Take an image of tritonserver that has the TensorRT backend." >&2
    exit 1
fi
basename "$(realpath "$library")" | sed 's/^libnvinfer\.so\.//'
