# sparrow-serving: `make` lists what there is. Every target creates .venv and installs what it needs.
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
MAKEFLAGS += --no-print-directory

PYTHON ?= $(shell for p in python3 python3.12 python3.11; do \
	$$p -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))' 2>/dev/null && echo $$p && break; done)
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check
TORCH := 2.13.0

DEMO := docs/demo/clip.mp4
VIDEO ?= $(DEMO)
PROMPT ?= Please segment the striped blue triangle in this video.
OUT ?= build/demo
REPOSITORY ?= build/nano/onnx

# Runs a server of its own on free ports: add a repository, -- and a command.
SERVE := $(BIN)/sparrow serve --grpc-port 0 --http-port 0 --metrics-port 0

# Made where there is none on the PATH.
PERF_ANALYZER := $(if $(shell command -v perf_analyzer),,build/perf_analyzer/perf_analyzer)

CODE := $(wildcard ensemble/*.py export/*.py export/models/*.py model_repository/*/1/model.py)

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "  make %-16s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

# In eager torch: slower than ONNX Runtime, but there is nothing to trace before it starts.
demo: build/nano/torch/built  ## segment a clip through a real Triton server; VIDEO=file PROMPT="..." for your own
	$(SERVE) build/nano/torch -- $(BIN)/sparrow segment "$(VIDEO)" "$(PROMPT)" $(if $(filter $(DEMO),$(VIDEO)),--sample-fps 8) -o "$(OUT)"

test: $(VENV)/dev  ## run the tests
	$(BIN)/python -m pytest

soak: $(VENV)/dev build/tiny/onnx/built  ## ten minutes of tracking sessions that misbehave and die; keeps the figures
	$(BIN)/python -m tests.soak build/tiny/onnx

check: $(VENV)/dev  ## formatting, lint, types, generated files; changes nothing
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/hadolint Dockerfile
	$(BIN)/shellcheck benchmarks/*.sh docker/*.sh
	$(BIN)/python -m export.generate --check
	$(BIN)/python -m benchmarks.tables --check

fix: $(VENV)/dev  ## format, mend what the linter can, regenerate
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/python -m export.generate
	$(BIN)/python -m benchmarks.tables

generate: $(VENV)/export  ## write config.pbtxt, model_repository/README.md, the client's stubs and the README's tables
	$(BIN)/python -m export.generate
	$(BIN)/python -m benchmarks.tables

bench: build/nano/onnx/built  ## measure the nano model's speed through the server and keep the figures
	$(SERVE) build/nano/onnx -- $(BIN)/sparrow bench
	$(BIN)/python -m benchmarks.tables

bench-serving: $(VENV)/dev build/nano/onnx/built $(PERF_ANALYZER)  ## measure it with many callers at once, by perf_analyzer
	$(SERVE) build/nano/onnx -- $(BIN)/python -m benchmarks.load
	$(BIN)/python -m benchmarks.tables
	$(BIN)/python -m benchmarks.plots

eval: $(VENV)/dev build/nano/onnx/built  ## measure the nano model's accuracy through the server and keep the figures
	$(BIN)/python -m training.shapes_rvos build/shapes --split test --videos 40
	@rm -rf build/eval  # answers of an earlier checkpoint
	$(SERVE) build/nano/onnx -- $(BIN)/sparrow eval shapes-rvos --data build/shapes --ablations -o build/eval
	$(BIN)/python -m benchmarks.tables

verify-container:  ## build TensorRT engines in NVIDIA's container and serve them there; TRITON_IMAGE=its tritonserver
	REPOSITORY=. docker compose run --build --rm verify

serve: $(VENV)/export $(if $(filter build/nano/%,$(REPOSITORY)),$(REPOSITORY)/built)  ## run the server; REPOSITORY=folder for your own
	$(BIN)/sparrow serve "$(REPOSITORY)"

clean:  ## remove everything that was built
	rm -rf build $(VENV) *.egg-info

build/tiny/checkpoint/sparrow-finetune/config.json: $(CODE) | $(VENV)/export
	$(BIN)/python -m export.seeded build/tiny tiny

build/tiny/onnx/built: build/tiny/checkpoint/sparrow-finetune/config.json
	$(BIN)/sparrow export build/tiny/checkpoint -o $(@D)
	@touch $@

build/nano/%/built: $(CODE) $(wildcard training/nano/*/*.safetensors) | $(VENV)/export
	$(BIN)/sparrow export training/nano --engine $* -o $(@D)
	@touch $@

build/perf_analyzer/perf_analyzer: benchmarks/perf_analyzer.sh | $(VENV)/export
	PYTHON=$(abspath $(BIN))/python $< $(@D)

$(VENV)/export: pyproject.toml
	@test -n "$(PYTHON)" || { echo "Python 3.11 or 3.12 is needed, and none was found: install one, or make PYTHON=/path/to/it"; exit 1; }
	@echo "Installing into $(VENV) (once; about two minutes)"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@# Without an NVIDIA GPU the CPU build of torch is enough, where the index offers one.
	@command -v nvidia-smi >/dev/null || $(PIP) torch==$(TORCH)+cpu 2>/dev/null || true
	@$(PIP) torch==$(TORCH) -e '.[export]'
	@touch $@

$(VENV)/dev: $(VENV)/export
	@echo "Installing the test tools into $(VENV)"
	@$(PIP) torch==$(TORCH) -e '.[dev]' setuptools wheel
	@# The official SAM2, an oracle: its dependencies would bring torchvision, which has no CPU build everywhere.
	@SAM2_BUILD_CUDA=0 $(PIP) --no-deps --no-build-isolation sam2==1.1.0
	@touch $@

.PHONY: help demo test soak check fix generate bench bench-serving eval verify-container serve clean
