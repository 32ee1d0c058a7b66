# Two commands matter on a fresh machine: `make quickstart` and `make test`. Each installs what it needs first.
.DEFAULT_GOAL := help
SHELL := /bin/bash

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PINS := requirements/torch.txt requirements/locked.txt
STAMP := $(VENV)/.installed
WHEELS := $(VENV)/wheels
TORCHAO := $(VENV)/torchao
PIP := -m pip --disable-pip-version-check --no-input
# --no-compile: bytecode for the few modules that are imported comes by itself, for the rest it takes a minute
# ... also where a container's environment would have none written, and every process spend 10 seconds more on imports
unexport PYTHONDONTWRITEBYTECODE

# Models in the tests are tiny: a second thread only gets in the way of the second worker.
export OMP_NUM_THREADS ?= 1
PYTEST := $(BIN)/python -m pytest -q
# What is not for a GPU sees none: with one in sight torch trains in no forked process, and bases would lie there.
test test-fast test-engine test-lowest guards: export CUDA_VISIBLE_DEVICES :=

.PHONY: help install quickstart study test test-fast test-engine test-gpu test-lowest guards lint types wheel wheel-check bench bench-gpu

help: ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

install: $(STAMP) ## make .venv with the tested versions (the other targets do this too)

# python3 -m venv is harmless on an existing environment; torch goes first and alone (see requirements/torch.txt).
$(STAMP): pyproject.toml $(PINS)
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' || \
	  { echo "lorafocal needs Python 3.11 to 3.13, and $(PYTHON) is $$($(PYTHON) --version 2>&1). Name another: make PYTHON=python3.12 ..." >&2; exit 2; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python $(PIP) install -q --no-compile -r requirements/torch.txt
	$(BIN)/python $(PIP) install -q --no-compile -c requirements/torch.txt -r requirements/locked.txt
	$(BIN)/python $(PIP) install -q --no-compile --no-deps --no-build-isolation -e .
	@touch $@

# The pinned unsloth (34 MB), whose sources a test reads; it is neither installed nor run.
$(WHEELS): requirements/unsloth.txt | $(STAMP)
	rm -rf $@
	$(BIN)/python $(PIP) download -q --no-deps --dest $@ $$(grep '^unsloth' requirements/unsloth.txt)
	@touch $@

# Apart from the rest: PEFT imports torchao wherever it finds it.
$(TORCHAO): requirements/torchao.txt | $(STAMP)
	rm -rf $@
	$(BIN)/python $(PIP) install -q --no-compile --no-deps --target $@ -r requirements/torchao.txt
	@touch $@

quickstart: $(STAMP) ## train, evaluate, merge and check a tiny model; prints a table (minutes)
	$(BIN)/python examples/01_quickstart.py

study: $(STAMP) ## whether FocalPO's weighting helps: 507 tiny trainings, compared on one page (within an hour)
	$(BIN)/python examples/study/run.py

test: $(STAMP) $(WHEELS) ## the whole suite, offline, on CPUs (test-gpu: what needs a GPU)
	$(PYTEST) -n 2 --dist worksteal

test-fast: $(STAMP) $(WHEELS) ## the working loop: all but slow tests
	$(PYTEST) -n 2 -m "not slow and not engine and not gpu"

test-engine: $(STAMP) $(TORCHAO) ## tests that start several processes, compile, or train whole sweeps
	$(PYTEST) -n 2 --dist loadfile -m "engine and not gpu"

test-gpu: $(STAMP) ## tests that need a CUDA device
	$(PYTEST) -m gpu

test-lowest: .venv-lowest/.installed ## the suite on the oldest versions the bounds allow
	.venv-lowest/bin/python -m pytest -q -n 2 -m "not engine and not gpu and not newest"
	.venv-lowest/bin/python -m pytest -q -m "not gpu and not newest" tests/test_killed_runs.py

.venv-lowest/.installed: pyproject.toml requirements/torch.txt requirements/lowest.txt
	$(PYTHON) -m venv .venv-lowest
	.venv-lowest/bin/python $(PIP) install -q --no-compile -r requirements/torch.txt
	.venv-lowest/bin/python $(PIP) install -q --no-compile -c requirements/torch.txt -c requirements/lowest.txt -e '.[dev]'
	@touch $@

guards: $(STAMP) ## switch every guard off and see its test fail
	$(BIN)/python -m tests.check_guards

lint: $(STAMP) ## ruff: rules and format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(STAMP) ## mypy
	$(BIN)/mypy

wheel: $(STAMP) ## build dist/*.whl
	rm -rf dist
	$(BIN)/python $(PIP) wheel -q --no-deps --no-build-isolation --wheel-dir dist .

# Only the core dependencies: what the wheel itself declares, at the tested versions.
wheel-check: wheel ## install the wheel into a clean environment and look inside
	$(PYTHON) -m venv --clear .venv-wheel
	.venv-wheel/bin/python $(PIP) install -q --no-compile -r requirements/torch.txt
	.venv-wheel/bin/python $(PIP) install -q --no-compile -c requirements/torch.txt -c requirements/locked.txt dist/*.whl
	cd .venv-wheel && bin/python -I ../tests/check_wheel.py

bench: $(STAMP) ## every benchmark on this CPU, beside TRL and plain PEFT (minutes)
	$(BIN)/python benchmarks/run_all.py

bench-gpu: $(STAMP) ## every benchmark on one GPU, within 8 minutes
	$(BIN)/python benchmarks/run_all.py --device cuda --minutes 8
