# `make demo` and `make test` work on a fresh clone with Python 3.11+ and nothing else: they create .venv themselves.
# A different interpreter: make test PYTHON=python3.12 (remove .venv to switch).

PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin

# Without an NVIDIA driver torch is installed first, at the version the CPU path is tested with. PyPI's Linux wheels
# carry CUDA libraries that such a machine has no use for: `make TORCH_ARGS="--index-url
# https://download.pytorch.org/whl/cpu" …` takes the small CPU build where the package index does not offer it.
DRIVER := $(shell command -v nvidia-smi || (ldconfig -p || /sbin/ldconfig -p) 2>/dev/null | grep -m1 'libcuda\.so\.1')
TORCH  ?= $(if $(DRIVER),,torch==2.13.0)
TORCH_ARGS ?=
# Tests on the CPU run on all cores, each on one: operators that share cores wait for one another. With a GPU they share it,
# and what they build is built in parallel as it is.
PYTEST   := $(if $(DRIVER),,OMP_NUM_THREADS=1) $(BIN)/python -m pytest
PARALLEL := $(if $(DRIVER),,--numprocesses auto --dist worksteal)

PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check

.DEFAULT_GOAL := help
.PHONY: help demo test test-compile lint format types generate check-generated hooks wheel clean

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 18

demo: $(VENV)/.demo  ## run the demo: a real sentence encoder in NVFP4
	$(BIN)/fp4gemm demo

test: $(VENV)/.dev  ## unit tests, kernels emulated on the CPU, and the GPU tests where there is a GPU
	$(PYTEST) $(PARALLEL)

test-compile: $(VENV)/.dev  ## compile every default variant with NVRTC and inspect it (minutes; no GPU needed)
	$(BIN)/python -m pytest tests/compile

lint: $(VENV)/.dev  ## ruff and clang-format, without changing anything
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	find templates/include tests/emulated -name '*.hpp' -exec $(BIN)/clang-format --dry-run --Werror {} +

format: $(VENV)/.dev  ## let ruff and clang-format rewrite the sources
	find templates/include tests/emulated -name '*.hpp' -exec $(BIN)/clang-format -i {} +
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

types: $(VENV)/.dev  ## mypy --strict on fp4gemm/
	$(BIN)/mypy

generate: $(VENV)/.dev  ## render generated/ and the tables of README from their sources
	$(BIN)/python tools/render.py

check-generated: $(VENV)/.dev  ## fail when generated/ or README's tables are out of date
	$(BIN)/python tools/render.py --check

hooks: $(VENV)/.dev  ## install the pre-commit hooks
	$(BIN)/pre-commit install

wheel: $(VENV)/.dev  ## build the wheel and the sdist into dist/
	$(BIN)/python -m build

clean:  ## remove the environment and every cache of the tools
	rm -rf $(VENV) dist build .mypy_cache .pytest_cache .ruff_cache .hypothesis

# --- environments: one virtual environment, a stamp file for each set of extras ---

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "error: $(PYTHON) is $$($(PYTHON) --version 2>&1); fp4gemm needs Python 3.11 or newer: make PYTHON=python3.x" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/.torch: | $(BIN)/python
	$(if $(TORCH),$(PIP) $(TORCH) $(TORCH_ARGS))
	@touch $@

$(VENV)/.demo: pyproject.toml $(VENV)/.torch
	$(PIP) -e '.[cuda13,demo]'
	@touch $@

$(VENV)/.dev: pyproject.toml $(VENV)/.torch
	$(PIP) -e '.[dev]'
	@touch $@ $(VENV)/.demo
