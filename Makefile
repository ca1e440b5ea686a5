# Everything runs from .venv. `make demo` installs there what the services need, the other targets the development
# tools as well.
PYTHON ?= python3
BIN := .venv/bin
DEMO_STAMP := .venv/.demo
STAMP := .venv/.installed

# Where machines without a GPU get torch from: PyPI's torch for Linux brings gigabytes of CUDA packages.
TORCH_INDEX_URL ?= https://download.pytorch.org/whl/cpu
GPU := $(shell command -v nvidia-smi)
PIP_INSTALL = $(BIN)/pip install --disable-pip-version-check --constraint constraints.txt

# What `make bench` measures on a GPU. A folder in build/models that does not exist is made, with random weights of the
# size in its name; that takes the tokenizer.json of a Qwen3.
MODELS ?= build/models/0.6b build/models/8b
TOKENIZER ?=
# SAMPLING is temperature or qwen3; BENCH_FLAGS are further flags of the benchmark.
SAMPLING ?= temperature
BENCH_FLAGS ?=
# What bench-scaling measures. Sizes with more ranks than there are GPUs are left out.
SCALING_MODELS ?= build/models/8b build/models/32b
TP_SIZES ?= 1 2 4 8

# The processes that share the tests. A file's tests are run by one of them.
TEST_PROCESSES ?= 2

.PHONY: help demo test test-slow check protos docs bench bench-serve bench-gateway bench-gaps bench-sampling bench-scaling bench-scheduler bench-capacity bench-costly bench-plot chaos compose-test clean

help:  ## Lists the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 16

# $(call install,EXTRA) installs Tandem with an extra. Without a GPU torch comes first, and alone, from TORCH_INDEX_URL.
define install
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Tandem needs Python 3.11 or newer; make PYTHON=...")'
	@echo "Installing Tandem[$(1)] into .venv"
	@$(PYTHON) -m venv .venv
	$(if $(GPU),,@if problem=$$($(FIND_TORCH) 2>&1); then \
		echo "No GPU found; taking torch for CPUs from $(TORCH_INDEX_URL)"; \
		$(TORCH_INDEX_ALONE) $(PIP_INSTALL) --no-deps --index-url "$(TORCH_INDEX_URL)" torch; \
	else \
		echo "$$problem" | tail -n 1; \
		echo "Found no torch at $(TORCH_INDEX_URL); taking it from pip's own index (make TORCH_INDEX_URL=... names another)"; \
	fi)
	$(PIP_INSTALL) --editable '.[$(1)]'
endef
# pip itself looks, so that its proxies, certificates and passwords count, and the index may be a folder. The variable
# stands before extra indexes in pip's configuration, which may have other builds.
TORCH_INDEX_ALONE = PIP_EXTRA_INDEX_URL="$(TORCH_INDEX_URL)"
FIND_TORCH = $(TORCH_INDEX_ALONE) $(BIN)/pip index versions --disable-pip-version-check --retries 0 --timeout 5 \
	--index-url "$(TORCH_INDEX_URL)" torch

$(DEMO_STAMP): pyproject.toml constraints.txt
	$(call install,worker)
	@touch $@

$(STAMP): pyproject.toml constraints.txt
	$(call install,dev)
	@touch $(DEMO_STAMP) $@

demo: $(DEMO_STAMP)  ## Both services on this machine, streaming text from the embedded model
	$(BIN)/tandem demo

test: check  ## The checks, then the tests (10 minutes at most on 2 cores)
	$(BIN)/python -m pytest -n $(TEST_PROCESSES) --dist loadfile

test-slow: $(STAMP)  ## The long tests (40 minutes at most on 2 cores)
	$(BIN)/python -m pytest -m slow -n $(TEST_PROCESSES) --dist loadfile

check: $(STAMP)  ## Format, lint, types, import rules, protos, generated documents
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/buf lint protos
	$(BIN)/python -m tools.generate_stubs --check
	$(BIN)/python -m tools.api_reference --check
	$(BIN)/python -m tools.settings_reference --check

protos: $(STAMP)  ## Generates the stubs in tandem and docs/api.md from protos
	$(BIN)/buf lint protos
	$(BIN)/python -m tools.generate_stubs
	$(BIN)/python -m tools.api_reference

docs: $(STAMP)  ## Generates docs/api.md and docs/settings.md
	$(BIN)/python -m tools.api_reference
	$(BIN)/python -m tools.settings_reference

ifneq ($(GPU),)
BENCH_MODELS := $(MODELS:%=%/config.json)
endif

bench: $(STAMP) $(BENCH_MODELS)  ## The speed table, on a GPU if there is one; writes benchmarks/results
ifneq ($(GPU),)
	for model in $(MODELS); do $(BIN)/python -m benchmarks.throughput $$model --sampling $(SAMPLING) $(BENCH_FLAGS) \
		--out benchmarks/results/throughput_$$(basename $$model)_$(SAMPLING).json || exit 1; done
else
	$(BIN)/python -m benchmarks.throughput embedded --scale 10 --sampling $(SAMPLING) $(BENCH_FLAGS) \
		--out benchmarks/results/throughput_cpu.json
endif

bench-serve: $(STAMP) $(BENCH_MODELS)  ## Latencies under load, streams against unary calls; writes benchmarks/results
ifneq ($(GPU),)
	for model in $(MODELS); do \
		$(BIN)/python -m benchmarks.serve $$model --sampling $(SAMPLING) --rates 4 8 16 24 inf $(BENCH_FLAGS) \
			--out benchmarks/results/serve_$$(basename $$model)_$(SAMPLING).json && \
		$(BIN)/python -m benchmarks.serve $$model --sampling $(SAMPLING) --compare-unary $(BENCH_FLAGS) \
			--out benchmarks/results/stream_$$(basename $$model)_$(SAMPLING).json || exit 1; done
else
	$(BIN)/python -m benchmarks.serve embedded --scale 10 --clients 2 --rates 4 16 inf --sampling $(SAMPLING) $(BENCH_FLAGS) \
		--out benchmarks/results/serve_cpu.json
endif

bench-gateway: $(STAMP) $(firstword $(BENCH_MODELS))  ## Streams through HTTP beside streams through gRPC; writes benchmarks/results
ifneq ($(GPU),)
	$(BIN)/python -m benchmarks.gateway $(firstword $(MODELS)) $(BENCH_FLAGS) \
		--out benchmarks/results/gateway_$$(basename $(firstword $(MODELS))).json
else
	$(BIN)/python -m benchmarks.gateway embedded --steady-step-ms 20 --num-requests 32 --rate 4 --num-rate-requests 16 \
		--input-len 16-64 --output-len 50-200 $(BENCH_FLAGS) --out benchmarks/results/gateway_cpu.json
endif

bench-gaps: $(STAMP) $(BENCH_MODELS)  ## How long the GPU is idle between steps; writes benchmarks/results
ifneq ($(GPU),)
	for model in $(MODELS); do $(BIN)/python -m benchmarks.gaps $$model --sampling $(SAMPLING) $(BENCH_FLAGS) \
		--out benchmarks/results/gaps_$$(basename $$model)_$(SAMPLING).json || exit 1; done
else
	$(BIN)/python -m benchmarks.gaps embedded --scale 10 --sampling $(SAMPLING) $(BENCH_FLAGS) \
		--out benchmarks/results/gaps_cpu.json
endif

bench-sampling: $(STAMP) $(BENCH_MODELS)  ## What rows cost that ask more of sampling; writes benchmarks/results
ifneq ($(GPU),)
	for model in $(MODELS); do \
		$(BIN)/python -m benchmarks.sampling_costs $$model $(BENCH_FLAGS) \
			--out benchmarks/results/sampling_costs_$$(basename $$model).json || exit 1; \
		for schema in array short_strings; do \
			$(BIN)/python -m benchmarks.structured_output $$model --schema $$schema --sampling $(SAMPLING) $(BENCH_FLAGS) \
				--out benchmarks/results/structured_output_$$(basename $$model)_$$schema.json || exit 1; done; done
else
	$(BIN)/python -m benchmarks.sampling_costs embedded --batches 16 --context 64 --steps 16 --pairs 3 $(BENCH_FLAGS) \
		--out benchmarks/results/sampling_costs_cpu.json
	$(BIN)/python -m benchmarks.structured_output embedded --scale 4 --sampling $(SAMPLING) $(BENCH_FLAGS) \
		--out benchmarks/results/structured_output_cpu.json
endif

bench-scaling: $(STAMP) $(if $(GPU),$(SCALING_MODELS:%=%/config.json))  ## Speed with TP_SIZES ranks; writes benchmarks/results
ifneq ($(GPU),)
	$(BIN)/python -m benchmarks.scaling $(SCALING_MODELS) --tp-sizes $(TP_SIZES) --sampling $(SAMPLING) $(BENCH_FLAGS)
else
	$(BIN)/python -m benchmarks.scaling embedded --tp-sizes $(TP_SIZES) --sampling $(SAMPLING) --scale 64 --repeats 1 \
		--results build/scaling $(BENCH_FLAGS)
endif

bench-scheduler: $(STAMP)  ## The scheduler's CPU time per step; writes benchmarks/results
	$(BIN)/python -m benchmarks.scheduler_cpu

bench-capacity: $(STAMP)  ## What one scheduler carries before a worker that computes nothing; writes benchmarks/results
	$(BIN)/python -m benchmarks.capacity $(BENCH_FLAGS)

bench-costly: $(STAMP)  ## The costliest requests beside streams: gaps and memory; writes benchmarks/results
	$(BIN)/python -m benchmarks.costly_requests $(if $(TOKENIZER),--tokenizer $(dir $(TOKENIZER)))

bench-plot: $(STAMP)  ## Draws docs/images, and the tables that summarise, from benchmarks/results
	$(BIN)/python -m benchmarks.plot
	$(BIN)/python -m benchmarks.summary

build/models/%/config.json: | $(STAMP)
	$(BIN)/python -m benchmarks.checkpoint $* $(@D) $(TOKENIZER)

# The parts that `make chaos` runs; all by default. CHAOS_FLAGS=--afresh begins again where there are results.
PARTS ?=
CHAOS_FLAGS ?=

chaos: $(STAMP)  ## Tries for hours to break the promises of docs/reliability.md, and writes there what it found
	$(BIN)/python -m tests.chaos $(PARTS) $(CHAOS_FLAGS)

compose-test: $(STAMP)  ## Runs docker-compose.yml with podman and kills its worker under a stream
	$(BIN)/python -m tests.e2e.compose_test

clean:  ## Removes what the other targets made
	rm -rf .venv build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
