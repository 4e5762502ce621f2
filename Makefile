# `make demo` and `make test` set up everything on a fresh machine.
# SETTINGS passes section.key=value to the demo; FAULTS selects faults by parts of their names (by
# default all, two and a half hours); VENV names another environment.
VENV ?= .venv
PYTHON ?= python3
BIN := $(VENV)/bin

.PHONY: demo test lint types browser bench gpu faults site

demo: $(VENV)/installed
	$(BIN)/dseqjepa demo $(SETTINGS)

test: $(VENV)/installed-dev lint types browser
	$(BIN)/python -m pytest -n 2 --durations=100 --durations-min=5

bench: $(VENV)/installed-dev
	$(BIN)/python benchmarks/report.py

gpu: $(VENV)/installed-dev
	$(BIN)/python benchmarks/gpu.py --json gpu.json --table gpu.md

faults: $(VENV)/installed-dev
	$(BIN)/python -m tests.faults $(FAULTS)

# A folder of HTML files; `python -m http.server -d build/site` serves it with its search.
site: $(VENV)/installed-dev
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

lint: $(VENV)/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/installed-dev
	$(BIN)/mypy

# The report is tested in a browser: Debian's, installed here if permitted.
browser:
	@command -v chromium >/dev/null || { [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null \
	  && apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq \
	  --no-install-recommends chromium fonts-liberation >/dev/null; } \
	  || echo "NOTICE: no chromium here, the tests of the report in a browser are skipped"

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/installed: pyproject.toml constraints.txt | $(BIN)/python
	$(BIN)/pip install --quiet -c constraints.txt -e '.[report]'
	touch $@

$(VENV)/installed-dev: pyproject.toml constraints.txt | $(VENV)/installed
	$(BIN)/pip install --quiet -c constraints.txt -e '.[dev]'
	touch $@
