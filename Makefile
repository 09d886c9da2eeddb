# vswapd: everything a clone can do. Needs python3 (3.11 or newer, with venv) and make.
#
# `make` alone lists the targets. What the demo, the tests and the checks need is put into .venv,
# nothing outside the clone is touched; only `make install` writes elsewhere.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/stamp

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.SUFFIXES:

# -- development ----------------------------------------------------------------------------------

.PHONY: help
help: ## list the targets
	@awk -F ':.*## ' '/^[a-z][a-z-]*:.*## / { printf "  make %-10s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

# The stamp is newer than pyproject.toml when the installed dependencies are the ones named there.
# The interpreter's own pip may be too old for --group (pip 25.1), so it is replaced first.
$(STAMP): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --upgrade 'pip>=25.1'
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable . --group dev
	touch $@

.PHONY: venv
venv: $(STAMP) ## install everything into .venv

.PHONY: demo
demo: $(STAMP) ## offload real memory to a daemon of its own and load it back
	$(BIN)/python -m vswapd.demo

.PHONY: test
test: $(STAMP) ## run the whole test suite
	$(BIN)/python -m pytest

.PHONY: check
check: $(STAMP) ## formatting, lint and types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

.PHONY: bench
bench: $(STAMP) ## run the benchmarks, each beside its target
	$(BIN)/python -m bench
