# Everything a newcomer needs. `make run` sets up, runs the default pipeline and shows the result; `make test` tests.
SHELL := /bin/bash
PYTHON ?= python3
VENV := .venv
BIN := $(abspath $(VENV))/bin
export PATH := $(BIN):$(PATH)
export DAGSTER_HOME ?= $(abspath .dagster)
PORT ?= 3000

.PHONY: help run test lint ui bench soak clean

help:            ## show this list
	@grep -E '^[a-z]+: .*##' $(MAKEFILE_LIST) | sed -E 's/:.*##/\t/'

run: $(VENV)/ok  ## set up, run what has changed, show the summary
	@$(MAKE) --no-print-directory setup-dvc
	$(BIN)/dvc repro
	@$(BIN)/pedigree sync > /dev/null
	@echo && cat data/comparison/board.md && echo
	@$(BIN)/pedigree audit merged@lora | sed '/^parameters/,$$d'
	@echo "Open the Dagster UI with: make ui     (http://127.0.0.1:$(PORT))"
	@echo "Ask what made the model:  .venv/bin/pedigree audit merged@lora"

test: $(VENV)/ok ## run all tests, two at a time (JOBS=N: N at a time)
	@$(MAKE) --no-print-directory setup-dvc
	$(BIN)/python -m pytest -q --numprocesses $(or $(JOBS),2) --dist worksteal

lint: $(VENV)/ok ## style, types and import rules
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

ui: $(VENV)/ok   ## open Dagster on loopback, its home inside the project
	@$(MAKE) --no-print-directory setup-dvc
	$(BIN)/pedigree ui --port $(PORT)

bench: $(VENV)/ok ## print what the doors cost, as ratios, and near-duplicates beside datasketch and rensa, and impact over a long history
	$(BIN)/python benchmarks/doors.py
	$(BIN)/python benchmarks/audit.py
	$(BIN)/python -m pip install --quiet --editable '.[bench]'
	$(BIN)/python benchmarks/curation.py

soak: $(VENV)/ok ## play 2,000 random steps at both doors and compare after each
	$(BIN)/python tests/test_two_doors.py $(or $(STEPS),2000) $(SEED)

clean:           ## remove what can be made again (never sources, reports or dvc.lock)
	rm -rf .dagster .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis build screenshots dvc_plots
	rm -rf data/base_model data/raw_examples data/instructions data/splits data/tokenized data/adapter data/merged
	rm -rf data/raw_preferences data/preferences data/reward_model data/aligned/* data/merged_aligned/*
	rm -rf data/baselines data/evaluation data/evaluation_aligned/* data/comparison data/release data/plots data/live/*

.PHONY: setup-dvc
setup-dvc:
	@git rev-parse --git-dir > /dev/null 2>&1 || git init -q
	@[ -f .dvc/config ] || $(BIN)/dvc init -q

$(VENV)/ok: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Python 3.11 or newer is needed; set PYTHON=python3.11"; exit 2; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	touch $@
