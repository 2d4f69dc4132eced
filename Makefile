# `make run` sets up the environment, runs the default pipeline and shows the result; `make test` runs the tests.
SHELL := /bin/bash
PYTHON ?= python3
VENV := .venv
BIN := $(abspath $(VENV))/bin
export PATH := $(BIN):$(PATH)
export DAGSTER_HOME ?= $(abspath .dagster)
PORT ?= 3000
# uv installs where it is present (`make UV= run`: pip)
UV ?= $(shell command -v uv 2> /dev/null)
PYTESTS = $(BIN)/python -m pytest -q --numprocesses $(or $(JOBS),3) --dist loadfile --no-loadscope-reorder
RAY_TESTS = $(filter-out tests/test_ray_pipeline.py,$(wildcard tests/test_ray*.py))
LONG_TESTS = $(shell grep -rl --include='test_*.py' 'mark[.]long' tests | sort | awk -v part=$(or $(PART),1/1) 'split(part, p, "/") && NR % p[2] == p[1] % p[2]')
INSTALL = $(if $(UV),$(UV) pip install --quiet --python $(BIN)/python,$(BIN)/python -m pip install --quiet)

.PHONY: help run test test-long test-latest test-places test-projects lint docs site ui bench soak fuzz faults lock sbom audit-packages clean

help:            ## show this list
	@grep -E '^[a-z-]+: .*##' $(MAKEFILE_LIST) | sed -E 's/:.*##/\t/'

run: $(VENV)/ok  ## set up, run changed stages, show the summary
	@$(MAKE) --no-print-directory setup-dvc
	@mkdir -p .dvc/tmp && date +%s > .dvc/tmp/run_started
	@echo "dvc repro" && $(BIN)/dvc repro || { printf '%s\n' "" \
	  'The run stopped: see the first error above. Finished stages are kept; fix the error and run `make run` again.' >&2; \
	  [ -n "$$($(BIN)/dvc status --with-deps --quiet comparison 2>&1 || echo changed)" ] || { echo && cat data/comparison/board.md && printf '%s\n' "" \
	  'Everything up to the comparison is made. If release stopped: its checks do not let a model into data/release that is not' \
	  'surely better than the alternatives (docs/checks.md#release). Scores of the sample differ by a few points between processors.'; }; exit 1; }
	@$(BIN)/pedigree sync > /dev/null
	@$(MAKE) --no-print-directory summary

test: $(VENV)/ok ## run all tests except the longest, three at a time: tests also wait (JOBS=N: N at a time)
	@$(MAKE) --no-print-directory setup-dvc
	$(PYTESTS) -m "not long and not cluster and not projects"
	$(BIN)/python -m pytest -q -m "not long" $(RAY_TESTS)

test-long: $(VENV)/ok ## run the longest tests: whole pipelines, both front ends at once, repeated trainings. PART=1/3: a third of the test files
	@$(MAKE) --no-print-directory setup-dvc
	$(if $(filter-out $(RAY_TESTS),$(LONG_TESTS)),$(PYTESTS) -m "long and not cluster and not projects" $(filter-out $(RAY_TESTS),$(LONG_TESTS)))
	$(if $(filter $(RAY_TESTS),$(LONG_TESTS)),$(BIN)/python -m pytest -q -m long $(filter $(RAY_TESTS),$(LONG_TESTS)))

test-projects: $(VENV)/ok ## make a project with the installed wheel from each layout of a file and each recipe of examples/, and run it; prints a table. Runs the whole pipeline on Ray
	@$(MAKE) --no-print-directory setup-dvc
	$(BIN)/python -m pytest -q tests/test_projects.py tests/test_ray_pipeline.py

test-latest: $(or $(UV),build/uv/bin/uv) ## run all tests with the newest versions that pyproject.toml allows, in an environment of their own
	@$(MAKE) --no-print-directory VENV=.venv-latest LOCK= UV=$(abspath $<) test test-long

test-places: $(VENV)/ok ## run the small pipeline in odd places, each by itself: paths, repositories, environments, users, file systems, versions of Python
	@$(MAKE) --no-print-directory setup-dvc
	PEDIGREE_PLACES=1 $(BIN)/python -m pytest -q --timeout 0 -rs tests/test_places.py

lint: $(VENV)/ok ## style, types and import rules
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

docs: $(VENV)/ok ## write docs/parameters.md, its JSON Schema and the tables of docs/checks.md from the code
	$(BIN)/python -m dagster_project.commands.docs

site: $(VENV)/ok ## build the pages of docs/ as a site in build/site; warnings are errors
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

ui: $(VENV)/ok   ## open the Dagster UI on loopback, with its home in the project
	@$(MAKE) --no-print-directory setup-dvc
	$(BIN)/pedigree ui --port $(PORT)

bench: $(VENV)/ok ## measure the overhead of the front ends, impact over a long history, and near-duplicates compared with datasketch and rensa
	$(BIN)/python benchmarks/front_ends.py
	$(BIN)/python benchmarks/audit.py
	$(INSTALL) --editable '.[bench]'
	$(BIN)/python benchmarks/curation.py
	$(BIN)/python benchmarks/scaling.py

soak: $(VENV)/ok ## 2,000 random steps with both front ends, 2,000 with two stages at once; 100 on Ray with kills (RAY_STEPS=N); 3,000 random histories against the oracle of audit answers. HOURS=8: only random steps, for 8 hours; writes memory, open files and sizes to soak.csv
ifdef HOURS
	$(BIN)/python tests/test_two_front_ends.py --hours $(HOURS)
else
	$(BIN)/python tests/test_two_front_ends.py $(or $(STEPS),2000) $(SEED)
	$(BIN)/python tests/test_two_front_ends.py $(or $(STEPS),2000) $(SEED) --at-once
	PEDIGREE_RAY_STEPS=$(or $(RAY_STEPS),100) PEDIGREE_RAY_SEED=$(or $(SEED),3) $(BIN)/python -m pytest -q -s --timeout 0 tests/test_ray_kills.py
	PEDIGREE_HISTORIES=$(or $(HISTORIES),3000) $(BIN)/python tests/test_random_histories.py
endif

fuzz: $(VENV)/ok ## random and damaged input for every reader, 18,500 cases, then a training killed at each pass and write; SURFACE=histories SEED=3 CASES=200: fewer; CASE=17: one of them; REPLAY=FOLDER: kept cases
	PYTHONPATH=$(CURDIR)/tests:$(CURDIR) $(BIN)/python -m fuzz $(SURFACE) --seed $(or $(SEED),0) \
	  $(if $(CASES),--cases $(CASES)) $(if $(CASE),--case $(CASE)) $(if $(REPLAY),--replay $(REPLAY))
ifeq ($(SURFACE)$(CASES)$(CASE)$(REPLAY),)
	PEDIGREE_FUZZ=1 $(BIN)/python -m pytest -q --timeout 0 tests/test_privacy.py tests/test_resume.py
endif

faults: $(VENV)/ok ## break one thing at a time in a small real project (kills, full disks, damaged files, ...) and compare with an undisturbed run; ONLY=kill: one class or case
	PYTHONPATH=$(CURDIR):$(CURDIR)/tests $(BIN)/python -m faults --jobs $(or $(JOBS),2) $(if $(ONLY),--only $(ONLY)) $(if $(SHARE),--share $(SHARE))

build/uv/bin/uv: # pip tries versions one by one, for longer than 20 minutes, where uv needs seconds
	$(PYTHON) -m venv build/uv && build/uv/bin/python -m pip install --quiet uv

lock: $(or $(UV),build/uv/bin/uv) ## write requirements.lock: locked versions that still fit pyproject.toml stay; UPGRADE=--upgrade: the newest allowed
	$< pip compile --quiet --universal --python-version 3.11 --extra dev --no-annotate --no-header \
	  $(UPGRADE) --output-file requirements.lock pyproject.toml
	@{ printf '%s\n' '# Written by `make lock`: exact versions of all that pyproject.toml names with [dev], for each platform and Python from 3.11.' \
	  '# CUDA and triton are not here: each build of torch names its own, and the installer adds them.'; \
	  grep -vE '^(#|cuda-|nvidia-|triton)' requirements.lock; } > requirements.lock.new && mv requirements.lock.new requirements.lock

sbom:            ## write build/sbom.json, the bill of materials of Pedigree itself (CycloneDX): every package of requirements.lock
	@$(PYTHON) -m venv build/sbom && build/sbom/bin/python -m pip install --quiet 'cyclonedx-bom>=7,<8'
	build/sbom/bin/cyclonedx-py requirements --pyproject pyproject.toml --output-reproducible --of JSON --output-file build/sbom.json requirements.lock

audit-packages:  ## look up requirements.lock in the database of known vulnerabilities (pip-audit)
	@$(PYTHON) -m venv build/pip-audit && build/pip-audit/bin/python -m pip install --quiet 'pip-audit>=2.9,<3'
	build/pip-audit/bin/pip-audit --strict --disable-pip --no-deps --requirement requirements.lock

clean:           ## remove everything that can be produced again (never sources, reports or dvc.lock)
	rm -rf .dagster .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis build screenshots dvc_plots
	rm -rf data/base_model data/raw_examples data/instructions data/splits data/tokenized data/adapter data/merged
	rm -rf data/raw_preferences data/preferences data/reward_model data/aligned/* data/merged_aligned/*
	rm -rf data/baselines data/evaluation data/evaluation_aligned/* data/comparison data/release data/plots data/live/*

define ASK
from transformers import pipeline
ask = pipeline("text-generation", "data/release")
print(ask([{"role": "user", "content": "Hello!"}], max_new_tokens=64)[0]["generated_text"][-1]["content"])
endef
export ASK

.PHONY: setup-dvc summary
summary:
	@echo && cat data/comparison/board.md && echo
	@$(BIN)/pedigree audit release | sed '/^parameters/,$$d'
	@took=$$(($$(date +%s) - $$(cat .dvc/tmp/run_started))); echo "took          $$((took / 60)) min $$((took % 60)) s, without the installation"
	@echo "disk used     $$(du -shc data .dvc | tail -1 | cut -f1) by data and DVC's cache, $$(du -sh $(VENV) | cut -f1) by $(VENV)"
	@echo "the model     data/release"
	@echo "its lineage   .venv/bin/pedigree audit release"
	@echo "the UI        make ui     (http://127.0.0.1:$(PORT))"
	@echo "commit        git add params.yaml dvc.lock data/sources data/reports && git commit -m 'Run the pipeline'"
	@echo "query it      .venv/bin/python -c '$$ASK'"

setup-dvc:
	@git rev-parse --git-dir > /dev/null 2>&1 || git init -q
	@[ -f .dvc/config ] || $(BIN)/dvc init -q

LOCK ?= requirements.lock
$(VENV)/ok: pyproject.toml $(LOCK)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Python 3.11 or newer is needed; set PYTHON=python3.11"; exit 2; }
	$(PYTHON) -m venv $(VENV)
	$(if $(UV),,$(BIN)/python -m pip install --quiet --upgrade pip)
	$(if $(LOCK),$(INSTALL) --requirement $(LOCK))
	$(INSTALL) $(if $(LOCK),--no-deps --editable .,--upgrade --editable '.[dev]')
	touch $@
