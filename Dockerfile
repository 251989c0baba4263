# The server in NVIDIA's Triton container, on a repository that `sparrow export` wrote.
#
#   docker build --build-arg TRITON_IMAGE=<NVIDIA's tritonserver, 25.01-py3 or later> -t sparrow-serving .
#   docker run --gpus all --shm-size 4g -p 8001:8001 -v /path/to/repository:/models:ro sparrow-serving
#
# A repository of TensorRT plans needs the Python package of the image's own TensorRT as well: --build-arg TENSORRT=<its version>.
# Weights and engines are mounted, never baked in. 64 MB of shared memory, Docker's default, is too little for frame tensors.
# Its models share the GPU by time slices; README.md says how to have them share it by MPS.
# The target `builder` makes TensorRT engines for this server: it is the same image, and takes the TensorRT that is in it.
ARG TRITON_IMAGE

FROM ${TRITON_IMAGE} AS wheel
WORKDIR /build
COPY . .
RUN pip wheel --no-cache-dir --no-deps --wheel-dir /wheels .

FROM ${TRITON_IMAGE} AS server
ARG TENSORRT
COPY --from=wheel /wheels /wheels
RUN pip install --no-cache-dir --break-system-packages "$(ls /wheels/*.whl)[models]" ${TENSORRT:+"tensorrt==${TENSORRT}"} \
    && useradd --uid 10001 --create-home --shell /usr/sbin/nologin sparrow
USER 10001
EXPOSE 8000 8001 8002
HEALTHCHECK --interval=10s --timeout=5s --start-period=120s --retries=3 CMD ["curl", "--fail", "--silent", "localhost:8000/v2/health/ready"]
CMD ["tritonserver", "--model-repository=/models", "--disable-auto-complete-config"]

FROM server AS builder
COPY docker /docker
USER 0
RUN pip install --no-cache-dir --break-system-packages "$(ls /wheels/*.whl)[build]" "tensorrt==$(/docker/tensorrt_of_server.sh).*"
USER 10001
WORKDIR /home/sparrow
CMD ["/docker/verify.sh", "/checkpoint", "/clip.mp4", "work"]

FROM server
