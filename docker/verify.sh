#!/usr/bin/env bash
# Shows that engines built here are served here: exports CHECKPOINT twice, as ENGINE and as ONNX, each behind the gate, serves both, asks both
# about CLIP, and compares their masks.
#
#   docker/verify.sh CHECKPOINT CLIP WORK      in the container that `make verify-container` builds; ends with "verified"
#   ENGINE=onnx docker/verify.sh ...           anywhere that `sparrow serve` runs: all steps, with another kind of engine
set -euo pipefail
usage="usage: docker/verify.sh CHECKPOINT CLIP WORK"
checkpoint=${1:?$usage} clip=${2:?$usage} work=${3:?$usage}
engine=${ENGINE:-tensorrt} grpc=${GRPC_PORT:-8001} http=${HTTP_PORT:-8000}
prompt=${PROMPT:-Please segment the striped blue triangle in this video.}
here=$(dirname "$(realpath "$0")")

fail() {
    echo "$1" >&2
    exit 1
}

# An engine runs in the version of TensorRT that built it, and in no other.
if [ "$engine" = tensorrt ]; then
    served_in=$("$here/tensorrt_of_server.sh")
    built_in=$(python3 -c 'import tensorrt; print(tensorrt.__version__)')
    [[ $built_in. == "$served_in".* ]] ||
        fail "TensorRT $built_in would build the engines, but the server runs them in $served_in. Install it: pip install 'tensorrt==$served_in.*'"
fi

serve() {
    if command -v tritonserver > /dev/null; then
        exec tritonserver --disable-auto-complete-config --grpc-port="$grpc" --http-port="$http" --model-repository="$1"
    else
        exec sparrow serve --grpc-port "$grpc" --http-port "$http" --metrics-port 0 "$1"
    fi
}

# ask KIND: serves WORK/KIND, asks about the clip, and writes the answer to WORK/KIND-answer.
ask() {
    serve "$work/$1" > "$work/$1.log" 2>&1 &
    server=$!
    trap 'kill "$server" 2> /dev/null' EXIT
    until curl --fail --silent "localhost:$http/v2/health/ready"; do
        kill -0 "$server" 2> /dev/null || fail "$1: the server did not start. See $work/$1.log"
        sleep 1
    done
    sparrow segment "$clip" "$prompt" --sample-fps 8 --server "localhost:$grpc" -o "$work/$1-answer"
    kill "$server"
    wait "$server" || true
    trap - EXIT
}

mkdir -p "$work"
sparrow export "$checkpoint" -o "$work/onnx" --engine onnx
[ "$engine" = onnx ] || sparrow export "$checkpoint" -o "$work/$engine" --engine "$engine" --precision float16
if [ "$engine" = tensorrt ]; then
    grep -q 'platform: "tensorrt_plan"' "$work/tensorrt/frame_encoder/config.pbtxt" || fail "frame_encoder: not served as a tensorrt_plan."
fi
ask onnx
ask "$engine"
python3 "$here/same_masks.py" "$work/onnx-answer" "$work/$engine-answer"
echo "$engine: verified"
