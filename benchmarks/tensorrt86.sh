#!/usr/bin/env bash
# Real TensorRT engines of every graph at nano size, and of some at full size: built, gated and measured with TensorRT 8.6 on this GPU.
#   python -m export.proof prepare build/proof       before, where torch, onnx and onnxscript are; carry build/proof to the GPU
#   benchmarks/tensorrt86.sh BUNDLE OUT [OPTIONS]    BUNDLE: the unpacked TensorRT 8.6 with its Python 3.10 (env.sh in it); ten minutes;
#                                                    OPTIONS: of benchmarks.tensorrt86, as --case NAME
set -euo pipefail
bundle=$(realpath "${1:?usage: benchmarks/tensorrt86.sh BUNDLE OUT}")
out=${2:?usage: benchmarks/tensorrt86.sh BUNDLE OUT [OPTIONS]}
cd "$(dirname "$0")/.."
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cp -r build/proof "$work/cases"
# What the parser asks for when a graph needs a plugin (RoiAlign) is no library of PyPI's; the same plugins are in this one.
ln -sf libnvinfer_plugin.so.8 "$bundle/site/tensorrt/libnvinfer_vc_plugin.so.8"
python3 -m benchmarks.tensorrt86 "$work/cases" -o "$out" "${@:3}" -- env CUDA_MODULE_LOADING=LAZY PYTHONHOME="$bundle/python" PYTHONPATH="$PWD:$bundle/site" \
  LD_LIBRARY_PATH="$bundle/python/lib:$bundle/site/tensorrt${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}" "$bundle/python/python3.10"
