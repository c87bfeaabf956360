# Both set-up commands, `make demo` and `make test`, build the environment they need from nothing.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
RUN ?= runs/demo
# a third of the suite's time is waiting, so one more worker than cores
JOBS ?= 3

# Hundreds of processes of a test run import the same modules; each would compile them again.
unexport PYTHONDONTWRITEBYTECODE

.DEFAULT_GOAL := help
.PHONY: help demo test drill test-gpu lint types fmt bench docs clean

help:  ## show this list
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

$(STAMP): pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "benthic needs Python 3.11 or newer")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[dev]'
	touch $@

demo: $(STAMP)  ## train a small model on this machine's Python sources, serve it and talk to it
	$(BIN)/python examples/demo.py --run $(RUN)

test: $(STAMP)  ## run every test that needs no GPU
	$(BIN)/python -m pytest -n $(JOBS) --dist worksteal -m "not gpu and not multigpu and not drill"

drill: $(STAMP)  ## kill serving instances at random moments, for minutes
	$(BIN)/python -m pytest -m "drill"
	$(BIN)/python benchmarks/serve_drill.py

test-gpu: $(STAMP)  ## run the tests that need a CUDA GPU
	$(BIN)/python -m pytest -m "gpu"

lint: $(STAMP)  ## style, import contracts
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports

types: $(STAMP)  ## static types
	$(BIN)/mypy

fmt: $(STAMP)  ## format the code in place
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: $(STAMP)  ## run the CPU benchmarks and write benchmarks/results/
	$(BIN)/python benchmarks/scheduler.py
	$(BIN)/python benchmarks/serve_cpu.py

docs: $(STAMP)  ## build the manual into build/docs
	$(BIN)/mkdocs build --strict --quiet --site-dir build/docs

clean:  ## remove the environment and everything built
	rm -rf $(VENV) build dist .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis
