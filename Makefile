# Everything runs from .venv, which the first target that needs it makes.
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed
PROTOS := $(wildcard protos/tandem/v1/*.proto)

.PHONY: help demo test test-slow check protos bench compose-test clean

help:  ## Lists the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 16

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Tandem needs Python 3.11 or newer; make PYTHON=...")'
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	touch $@

demo: $(STAMP)  ## Both services on this machine's CPU, streaming text from the embedded model
	$(BIN)/python -m tandem.demo

test: check  ## The checks, then the tests (10 minutes at most on 2 cores)
	$(BIN)/python -m pytest

test-slow: $(STAMP)  ## The long tests (30 minutes at most on 2 cores)
	$(BIN)/python -m pytest -m slow

check: $(STAMP)  ## Format, lint, types, import rules, protos
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/buf lint protos
	$(BIN)/python -m tools.generate_stubs --check

protos: $(STAMP)  ## Generates the stubs in tandem/v1 from protos
	$(BIN)/buf lint protos
	$(BIN)/python -m tools.generate_stubs

bench: $(STAMP)  ## The scheduler's CPU cost a step; writes benchmarks/results
	$(BIN)/python -m benchmarks.scheduler_cpu

compose-test: $(STAMP)  ## docker-compose.yml brought up for real, its worker killed under a stream
	$(BIN)/python -m tests.e2e.compose_test

clean:  ## Removes what the other targets made
	rm -rf .venv build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
