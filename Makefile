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

VIDEO ?= build/tiny/clip.mp4
PROMPT ?= Please segment the moving shape in this video.
OUT ?= build/demo
REPOSITORY ?= build/tiny/repository

# Runs a command against a server of its own on free ports.
ON_TINY_SERVER := $(BIN)/sparrow serve --grpc-port 0 --http-port 0 --metrics-port 0 build/tiny/repository --

CODE := $(wildcard ensemble/*.py export/*.py export/models/*.py model_repository/*/1/model.py)

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "  make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

demo: build/tiny/repository/built  ## segment a clip through a real Triton server; VIDEO=file PROMPT="..." for your own
	$(ON_TINY_SERVER) $(BIN)/sparrow segment "$(VIDEO)" "$(PROMPT)" -o "$(OUT)"

test: $(VENV)/dev  ## run the tests
	$(BIN)/python -m pytest

soak: $(VENV)/dev build/tiny/repository/built  ## ten minutes of tracking sessions that misbehave and die; keeps the figures
	$(BIN)/python -m tests.soak build/tiny/repository

check: $(VENV)/dev  ## formatting, lint, types, generated files; changes nothing
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
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

bench: build/tiny/repository/built  ## measure the tiny model through the server and keep the figures
	$(ON_TINY_SERVER) $(BIN)/sparrow bench
	$(BIN)/python -m benchmarks.tables

serve: $(VENV)/export $(if $(filter build/tiny/%,$(REPOSITORY)),build/tiny/repository/built)  ## run the server; REPOSITORY=folder for your own
	$(BIN)/sparrow serve "$(REPOSITORY)"

clean:  ## remove everything that was built
	rm -rf build $(VENV) *.egg-info

build/tiny/checkpoint/sparrow-finetune/config.json: $(CODE) | $(VENV)/export
	$(BIN)/python -m export.seeded build/tiny tiny

build/tiny/repository/built: build/tiny/checkpoint/sparrow-finetune/config.json
	$(BIN)/sparrow export build/tiny/checkpoint -o build/tiny/repository
	@touch $@

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

.PHONY: help demo test soak check fix generate bench serve clean
