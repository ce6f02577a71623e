# Each target sets up what it needs, and repeats that only when something changed.

VENV := .venv
PYTHON ?= python3
BIN := $(VENV)/bin
OUT ?= runs/gpu-check
ARGS ?=
MOE ?=
T ?=
MKDOCS := NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs
GPU_PYTHON = $(if $(wildcard $(VENV)/.installed-dev),$(BIN)/python,$(PYTHON))
GPU_PYTHON_VERSION ?= 3.12
GPU_PLATFORMS := manylinux_2_28_x86_64 manylinux_2_17_x86_64 manylinux2014_x86_64

.DEFAULT_GOAL := help
.PHONY: help install install-dev demo test test-one check docs docs-serve gpu-check gpu-wheels benchmark parity clean

help:  ## print this
	@grep -E '^[a-z-]+:.*## ' Makefile | awk -F ':.*## ' '{printf "  make %-12s %s\n", $$1, $$2}'

install: $(VENV)/.installed  ## a virtual environment in .venv with the package in it

install-dev: $(VENV)/.installed-dev  ## the same with what tests and checks need

demo: $(VENV)/.installed  ## raw text to trained model to report, in minutes; with experts: MOE=1
	$(BIN)/pretrain demo $(if $(MOE),--moe)

test: check  ## lint, types, import contracts, tests
	$(BIN)/pytest

test-one: $(VENV)/.installed-dev  ## one test file, folder or case: T=tests/pretrain/test_loss.py, T='tests/parallel -k tensor'
	$(if $(T),,$(error name what to run: make test-one T=tests/pretrain/test_loss.py))
	$(BIN)/pytest $(T)

check: $(VENV)/.installed-dev  ## lint, types and import contracts alone
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache

docs: $(VENV)/.installed-dev  ## the documentation as a site in build/docs; a broken link is an error
	$(MKDOCS) build --strict

docs-serve: $(VENV)/.installed-dev  ## the same at http://127.0.0.1:8000, rebuilt when a page changes
	$(MKDOCS) serve --strict

gpu-check:  ## everything that needs a CUDA GPU, in at most 9.5 minutes: OUT=FOLDER, ARGS='--stages smoke ...' (no network is used)
	$(GPU_PYTHON) -m benchmarks.gpu --out $(OUT) $(ARGS)

gpu-wheels:  ## fetch into .wheels/ what a stock CUDA image with PyTorch (x86-64 Linux, Python GPU_PYTHON_VERSION) lacks, to be copied there
	$(PYTHON) -m pip download --quiet --no-deps --only-binary=:all: --python-version $(GPU_PYTHON_VERSION) --implementation cp \
		$(addprefix --platform ,$(GPU_PLATFORMS)) --dest .wheels --requirement benchmarks/gpu/wheels.txt
	@du -sh .wheels

benchmark: $(VENV)/.installed-dev  ## our training step beside that of transformers, our data pipeline beside its peers
	$(BIN)/python -m benchmarks.step
	$(BIN)/python -m benchmarks.data

parity: $(VENV)/.installed-dev  ## every layout beside one process, five steps each: docs/parity.md
	$(BIN)/python -m benchmarks.parity --table docs/parity.md

clean:  ## remove the virtual environment, the caches and the demo
	rm -rf $(VENV) .pytest_cache .ruff_cache .mypy_cache build dist *.egg-info runs/demo runs/demo-moe

$(VENV)/bin/python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.12 ...")'
	$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); exit 1; }

$(VENV)/.installed: pyproject.toml | $(VENV)/bin/python
	@echo "installing into $(VENV); PyTorch is large, this takes a few minutes"
	$(BIN)/pip install --quiet --editable .
	touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(BIN)/pip install --quiet --editable '.[dev]'
	touch $@
