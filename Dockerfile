# The server in NVIDIA's Triton container, on a repository that `sparrow export` wrote.
#
#   docker build --build-arg TRITON_IMAGE=<NVIDIA's tritonserver, 25.01-py3 or later> -t sparrow-serving .
#   docker run --gpus all --shm-size 4g -p 8001:8001 -v /path/to/repository:/models:ro sparrow-serving
#
# Weights and engines are mounted, never baked in. 64 MB of shared memory, Docker's default, is too little for frame tensors.
ARG TRITON_IMAGE
FROM ${TRITON_IMAGE}
WORKDIR /opt/sparrow
COPY pyproject.toml README.md LICENSE ./
COPY client client
COPY ensemble ensemble
COPY export export
RUN pip install --no-cache-dir --break-system-packages '.[models]'
EXPOSE 8000 8001 8002
CMD ["tritonserver", "--model-repository=/models", "--disable-auto-complete-config"]
