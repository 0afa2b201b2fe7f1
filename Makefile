# Everything sets itself up: Python 3.11 or newer and make are enough.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALL = $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

.PHONY: help demo test test-fast bench quality style clean
help:  ## Show this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "Python 3.11 or newer is needed; say which with: make PYTHON=/path/to/python3 ..."; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/.demo: setup.cfg pyproject.toml constraints.txt | $(BIN)/python
	@echo "Installing hf_distill and its libraries into $(VENV) (about two minutes) ..."
	@$(INSTALL) -e ".[demo]"
	@touch $@

$(VENV)/.test: $(VENV)/.demo
	@echo "Installing what the tests need ..."
	@$(INSTALL) -e ".[demo,test]"
	@touch $@

demo: $(VENV)/.demo  ## Distil a small retriever from a real teacher, and compare (about twelve minutes on two cores)
	$(BIN)/hf-distill demo

test: $(VENV)/.test  ## Run the whole test suite, offline
	$(BIN)/python -m pytest -n 2 --dist worksteal -q

test-fast: $(VENV)/.test  ## Run the tests that are neither slow nor distributed
	$(BIN)/python -m pytest -n 2 --dist worksteal -q -m "not slow and not distributed"

bench: $(VENV)/.test  ## Measure against sentence-transformers and write benchmarks/RESULTS.md
	$(BIN)/python benchmarks/run.py

quality: $(VENV)/.test  ## Check style
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

style: $(VENV)/.test  ## Mend style
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:  ## Remove what can be made again
	rm -rf outputs build dist *.egg-info .pytest_cache .ruff_cache
