# `make demo` and `make test` do all the set-up on a fresh machine.
# SETTINGS passes section.key=value on to the demo, FAULTS parts of names to `make faults` (none: all
# of them, half an hour); VENV names another environment.
VENV ?= .venv
PYTHON ?= python3
BIN := $(VENV)/bin

.PHONY: demo test lint types bench faults

demo: $(VENV)/installed
	$(BIN)/dseqjepa demo $(SETTINGS)

test: $(VENV)/installed-dev lint types
	$(BIN)/python -m pytest -n 2

bench: $(VENV)/installed-dev
	$(BIN)/python benchmarks/report.py

faults: $(VENV)/installed-dev
	$(BIN)/python -m tests.faults $(FAULTS)

lint: $(VENV)/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/installed-dev
	$(BIN)/mypy

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/installed: pyproject.toml constraints.txt | $(BIN)/python
	$(BIN)/pip install --quiet -c constraints.txt -e .
	touch $@

$(VENV)/installed-dev: pyproject.toml constraints.txt | $(VENV)/installed
	$(BIN)/pip install --quiet -c constraints.txt -e '.[dev]'
	touch $@
