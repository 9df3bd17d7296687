# `make demo` and `make test` need nothing but Python >= 3.11 and make their own environment.
PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch==2.13.0
BIN := $(VENV)/bin

.PHONY: install demo check test test-slow docs dist

install: $(VENV)/.installed

# torch first, so that pip does not pick another build of it for a later package.
$(VENV)/.installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet $(TORCH)
	$(BIN)/pip install --quiet --editable '.[dev]'
	touch $@

demo: install
	$(BIN)/tve-hf explain

check: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test: install
	$(BIN)/python -m pytest

test-slow: install
	$(BIN)/python -m pytest -m slow

# Every code block of README and of the cards.
docs: install
	$(BIN)/python -m pytest tests/test_readme.py tests/test_checkpoints.py

dist: install
	$(BIN)/pip install --quiet build
	$(BIN)/python -m build
