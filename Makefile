# `make demo` and `make test` need nothing but python3 (3.10 or newer) and a package index.
PYTHON ?= python3
BIN := .venv/bin
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

.PHONY: demo test test-versions check fuzz gpu lint schema docs clean

demo: .venv/.installed  ## distil SmolLM2-135M into half of its layers, on two CPU cores
	$(BIN)/distillab train quickstart --resume

# Each worker takes half of the files in order, so that fixtures of a module are made once; the one that
# is done first takes over from the other. torch computes with one thread in each.
PYTEST := $(BIN)/python -m pytest -n 2 --dist worksteal

test: .venv/.installed-dev  ## the whole test suite
	$(PYTEST)

check: lint  ## lint, types, and the tests of what changed since main
	$(PYTEST) $$($(BIN)/python tests/changed.py)

# Not part of CI: PyPI's PyTorch for Linux is the one for CUDA, about 6 GB in each environment.
test-versions:  ## what needs no other project, with the oldest, a middle and the newest PyTorch
	$(PYTHON) tests/versions

MINUTES ?= 10
fuzz: .venv/.installed-dev  ## damaged inputs for every reader, MINUTES=10 in all
	$(BIN)/python tests/fuzz --minutes $(MINUTES)

gpu: MINUTES = 8
gpu: .venv/.installed-dev  ## what one GPU does: checks and measurements, MINUTES=8 in all
	$(BIN)/python benchmarks/gpu.py --minutes $(MINUTES)

lint: .venv/.installed-dev  ## formatting, lint rules, types, and the recipe schema
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/distillab schema | diff recipes/schema.json -

schema: .venv/.installed  ## write recipes/schema.json again after a change of config.py
	$(BIN)/distillab schema > recipes/schema.json

# Not with --quiet: it hides the warnings that strict counts.
docs: .venv/.installed-docs  ## the guides, into site/; a broken link or a missing docstring fails
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build

clean:
	rm -rf .venv .venv-versions build dist site .pytest_cache .ruff_cache .mypy_cache .hypothesis

.venv/bin/python:
	$(PYTHON) -m venv .venv

.venv/.installed: .venv/bin/python pyproject.toml constraints.txt
	$(INSTALL) -e .
	touch $@

.venv/.installed-docs: .venv/bin/python pyproject.toml constraints.txt
	$(INSTALL) -e '.[docs]'
	touch $@ .venv/.installed

.venv/.installed-dev: .venv/bin/python pyproject.toml constraints.txt
	$(INSTALL) -e '.[dev]'
	touch $@ .venv/.installed
