# `make run` and `make test` do all set-up themselves; everything else builds on them.
# PYTHON=/path/to/python3.12 chooses the interpreter (3.11 or newer).
SHELL := /bin/sh
BIN := .venv/bin
PYTEST_OPTIONS ?=
JOBS ?= $(shell nproc)
SEEDS ?= 300
FIRST ?=
export PYTHON

.DEFAULT_GOAL := help
.PHONY: help setup run test check perf sim sim-mutants torture powercut guest

help: ## Show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-11s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: ## Create .venv and install what is missing (the others do it by themselves)
	@scripts/setup

run: setup ## Start the node service with a mounted volume to try; Ctrl-C stops everything
	@exec $(BIN)/blockd serve --demo

test: check ## Set-up, all checks, all tests
	$(BIN)/python -m pytest --numprocesses $(JOBS) --dist loadfile $(PYTEST_OPTIONS)

check: setup ## Format, lint, types, who imports whom: all that CI checks
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy --strict
	$(BIN)/lint-imports

perf: setup ## Speed next to nbdkit and qemu-nbd, in one run
	@if [ ! -f perf/__main__.py ]; then echo "perf: perf/ holds no benchmark yet" >&2; exit 1; fi
	$(BIN)/python -m perf

sim: setup ## The deterministic simulator: SEEDS fresh seeds on all cores (300); FIRST=N repeats
	$(BIN)/python -m tests.sim $(FIRST) --count $(SEEDS) --jobs $$(nproc)

sim-mutants: setup ## Deliberate mistakes, and how many seeds the simulator needs to find each
	$(BIN)/python -m tests.sim.mutants --jobs $$(nproc)

torture: setup ## Real daemons, 200 rounds of kill -9, full disks, flipped bits; ROUNDS=, SEED=
	$(BIN)/python -m tests.torture $(if $(ROUNDS),--rounds $(ROUNDS)) $(if $(SEED),--seed $(SEED))

powercut: setup ## Power cuts at every sync of recorded histories of a replica; SEED=
	$(BIN)/python -m tests.powercut $(if $(SEED),--seed $(SEED))

guest: setup ## Real devices on a real kernel, in a QEMU guest; makes its image the first time
	BLOCKD_GUEST=all $(BIN)/python -m pytest tests/guest $(PYTEST_OPTIONS)
