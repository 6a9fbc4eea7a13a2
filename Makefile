.DEFAULT_GOAL := help
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
export OMP_NUM_THREADS ?= 1

$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev]"
	touch $@

.PHONY: help install demo gallery variance docs test test-slow check lint types format bench clean
help:  ## this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/' | expand -t 14

install: $(STAMP)  ## make .venv with everything needed

demo: $(STAMP)  ## train a discrete VAE on digits; writes its picture and report to out/
	$(BIN)/python examples/discrete_vae.py

gallery: $(STAMP)  ## draw the pictures of docs/gallery again
	$(BIN)/python examples/gallery.py --out docs/gallery

variance: $(STAMP)  ## measure the estimators' variances again; plots in docs/variance
	$(BIN)/python -m benchmarks.variance --out docs/variance

docs: $(STAMP)  ## the documentation as a web site in site/; warnings are errors
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[docs]"
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

test: $(STAMP)  ## the quick tests, two processes
	$(BIN)/python -m pytest -q -n 2 --dist worksteal -m "not slow"

test-slow: $(STAMP)  ## every test
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev,conformance]"
	$(BIN)/python -m pytest -q -n 2 --dist worksteal

lint: $(STAMP)  ## ruff
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(STAMP)  ## mypy --strict
	$(BIN)/mypy

check: lint types test  ## all that CI runs

format: $(STAMP)  ## rewrite the sources in the house style
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(STAMP)  ## paired timings against hand-written PyTorch and against peers
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[bench]"
	$(BIN)/python -m benchmarks.run
	$(BIN)/python -m benchmarks.peers

clean:  ## remove build products, not the environment
	rm -rf build dist out site *.egg-info .pytest_cache .mypy_cache .ruff_cache
