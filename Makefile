# `make` alone lists what there is. Each target first sets up .venv when that is needed.

EXPERIMENT ?= experiments/digits_cnn.toml
NP         ?= 1
SILOS      ?= 3
RUNS       ?= $(patsubst %/experiment.toml,%,$(wildcard runs/*/experiment.toml runs/*/*/experiment.toml))
OUTPUT     ?= runs/report.html

# The first that really runs and is 3.11 or 3.12 (a pyenv shim may exist and fail); else any, which then says what to do.
PYTHON ?= $(shell for python in .venv/bin/python python3 python3.12 python3.11; do \
    $$python -c 'import sys; sys.exit(sys.version_info[:2] not in ((3, 11), (3, 12)))' 2>/dev/null && echo $$python && exit; \
  done; python3 -c '' 2>/dev/null && echo python3)
BIN    := .venv/bin
LAUNCH  = $(if $(filter-out 1,$(NP)),$(BIN)/horovodrun -np $(NP)) $(BIN)/python
EXTRAS  = $(if $(RUN_DIR),--run-dir $(RUN_DIR)) $(if $(RESUME),--resume) $(addprefix --set ,$(SET))

unexport PYTHONDONTWRITEBYTECODE # bytecode on disk makes every start seconds quicker
export TF_CPP_MIN_LOG_LEVEL   ?= 2
export FLWR_TELEMETRY_ENABLED ?= 0

.DEFAULT_GOAL := help
.PHONY: help setup demo train federate report test test-slow test-mutations bench-distributed bench-scaling bench-federation bench-cluster-silo lint format clean distclean

help: ## list the targets and the variables
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-18s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))
	@echo
	@echo '  Variables: EXPERIMENT=FILE  NP=ranks  SILOS=silos  RUN_DIR=DIR  RESUME=1'
	@echo '             SET="section.key=value ..."'
	@echo '             RUNS="DIR ..."  OUTPUT=FILE  ARGS="for pytest or the benchmark"  MPI=1  GPU=1  PYTHON=python3.12'

setup: ## make .venv with the pinned packages and Horovod (MPI=1: with MPI too; GPU=1: for GPUs)
	@$(or $(PYTHON),$(error Archipelago needs Python 3.11 or 3.12 and found none: run apt-get install python3.11 python3.11-venv)) \
	  tools/bootstrap.py $(if $(MPI),--mpi) $(if $(GPU),--gpu)

demo: setup ## the short tour
	$(BIN)/python -m tools.demo

train: setup ## train EXPERIMENT= on NP= ranks
	$(LAUNCH) -m dist_train $(EXPERIMENT) $(EXTRAS)

federate: setup ## train EXPERIMENT= across SILOS= silos
	$(BIN)/python -m fl_app.launch $(EXPERIMENT) --silos $(SILOS) $(EXTRAS)

report: setup ## compare RUNS= on one page, OUTPUT=
	$(BIN)/python -m shared.report $(RUNS) -o $(OUTPUT)

test: setup ## prove every law and promise, quick tests first (ARGS="-k name" for some)
	$(BIN)/python -m pytest -m "not slow" $(ARGS)

test-slow: setup ## prove them again where it takes long: all matrices, two hosts, the pages as printed
	$(BIN)/python -m pytest -m slow $(ARGS)

test-mutations: setup ## plant known mistakes and check that the tests find them
	$(BIN)/python -m tests.mutations.run

bench-distributed: setup ## compare the speed of training on ranks with others' (ARGS="--slices 3" for a quick look)
	$(BIN)/python -m benchmarks.distributed $(ARGS)

bench-scaling: setup ## what ranks cost as the model grows: step, memory, start-up
	$(BIN)/python -m benchmarks.distributed_scaling $(ARGS)

bench-federation: setup ## compare the seconds of a federated round with others' (ARGS="--repetitions 1" for a quick look)
	$(BIN)/python -m benchmarks.federation $(ARGS)

bench-cluster-silo: setup ## what it gains and costs that a silo is a cluster of two ranks
	$(BIN)/python -m benchmarks.cluster_silo $(ARGS)

lint: setup ## check format, style, types, Flower's copy of the defaults and the reference pages
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/python -m tools.flower_config --check
	$(BIN)/python -m tools.reference --check
	$(BIN)/mypy

format: setup ## put the code into the one format; write Flower's copy of the defaults and the reference
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .
	$(BIN)/python -m tools.flower_config --write
	$(BIN)/python -m tools.reference --write

clean: ## remove caches and build leftovers; runs/ and .venv stay
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
	find . \( -name .git -o -name ".venv*" -o -name runs \) -prune -o -name __pycache__ -type d -exec rm -rf {} +

distclean: clean ## remove .venv and the benchmarks' environments too
	rm -rf .venv .venv-torch .venv-nvflare
