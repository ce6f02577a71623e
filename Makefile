# What there is to do here. Each target sets up what it needs, and does it again only when something changed.

VENV := .venv
PYTHON ?= python3
BIN := $(VENV)/bin
JSON ?= benchmarks/results/$(shell date +%F)-gpu.json

.DEFAULT_GOAL := help
.PHONY: help install demo test check gpu-check benchmark parity clean

help:  ## print this
	@grep -E '^[a-z-]+:.*## ' Makefile | awk -F ':.*## ' '{printf "  make %-12s %s\n", $$1, $$2}'

install: $(VENV)/.installed  ## a virtual environment in .venv with the package in it

demo: $(VENV)/.installed  ## raw text to trained model to report, in minutes
	$(BIN)/pretrain demo

test: check  ## lint, types, import contracts, tests
	$(BIN)/pytest

check: $(VENV)/.installed-dev  ## lint, types and import contracts alone
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache

gpu-check:  ## the checks and measurements that need a CUDA GPU (rows into JSON=FILE, in benchmarks/results/ by default); says so where there is none
	@if $(PYTHON) -c 'import pytest, pretrain.cli, pretrain.train.run, data_pipeline.tokenizing.tokenize' 2>/dev/null; \
	then python=$(PYTHON); else $(MAKE) $(VENV)/.installed-dev && python=$(BIN)/python; fi && set -x && \
	$$python -m pytest -o addopts='-ra --strict-markers' tests/gpu && $$python -m benchmarks.gpu --json $(JSON)

benchmark: $(VENV)/.installed-dev  ## our training step beside that of transformers, our data pipeline beside its peers
	$(BIN)/python -m benchmarks.step
	$(BIN)/python -m benchmarks.data

parity: $(VENV)/.installed-dev  ## every layout beside one process, five steps each: docs/parity.md
	$(BIN)/python -m benchmarks.parity --table docs/parity.md

clean:  ## remove the virtual environment, the caches and the demo
	rm -rf $(VENV) .pytest_cache .ruff_cache .mypy_cache build dist *.egg-info runs/demo

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
