# The two commands of the README, and what CI and contributors call.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test check lint setup bench

setup: .venv/.installed

.venv/.installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --editable '.[dev,hf]' --constraint constraints.txt
	touch $@

lint: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
