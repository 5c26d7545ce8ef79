# Everything a developer types. Each target makes .venv from plain PyPI packages if it is missing.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test test-all check format tables bench
demo: .venv/ready           ## learn ten digits two at a time and compare four methods (4 minutes on two cores with bf16, 10 without)
	$(BIN)/lamina demo

test: .venv/ready           ## the fast tests (some seven minutes on two cores)
	$(BIN)/python -m pytest -n logical --maxprocesses 8 --dist loadgroup -m "not slow and not gpu"

test-all: .venv/ready       ## the slow ones, too
	$(BIN)/python -m pytest

check: .venv/ready          ## lint, format, types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: .venv/ready
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

tables: .venv/ready         ## rewrite the tables of README.md from benchmarks/results
	$(BIN)/python benchmarks/tables.py

bench: .venv/ready          ## speed against the bare frozen tower (10 minutes)
	$(BIN)/python benchmarks/speed.py

.venv/ready: pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable ".[dev]"
	@touch $@
