# Every target does its own set-up: a virtual environment in .venv, packages at the versions of constraints.txt.
# Nothing has to be activated. Another interpreter: make test PYTHON=python3.12

PYTHON ?= python3
TORCH := 2.13.0
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
LOCKED := pyproject.toml constraints.txt
# In an environment of their own: cyclonedx-bom wants an older chardet than lm-eval.
RELEASE_TOOLS := build==1.6.1 twine==7.0.0 cyclonedx-bom==7.5.0

# `make demo` needs the core alone; where the development tools are installed already, they include it.
CORE := $(if $(wildcard $(VENV)/.dev),$(VENV)/.dev,$(VENV)/.core)

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help demo test test-slow check format snapshots bench docs release-check lock clean

help: ## show this help
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-10s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

demo: $(CORE) ## see a small model learn a new field, offline, in about two minutes (ARGS="--out DIR")
	$(BIN)/deepen demo $(ARGS)

test: $(VENV)/.dev ## run the tests (ARGS="-k name")
	$(BIN)/python -m pytest -n auto --maxprocesses 4 --dist loadfile $(ARGS)

test-slow: $(VENV)/.dev ## run the tests that take minutes
	$(BIN)/python -m pytest -m slow $(ARGS)

check: $(VENV)/.dev ## lint, format, types, import contracts, public surface, docs
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python -m pytest tests/test_surface.py tests/test_docs.py tests/test_house.py -q

format: $(VENV)/.dev ## put the code in the project's format
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

snapshots: $(VENV)/.dev ## accept the public names and commands as they are now
	$(BIN)/python tests/test_surface.py

bench: $(CORE) ## time `deepen expand` against `cp` (ARGS="--gigabytes 2 --directory DIR")
	$(BIN)/python benchmarks/expand.py $(ARGS)

docs: $(VENV)/.docs ## write the generated pages and build the documentation into site/
	$(BIN)/python docs/generate.py
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

release-check: ## build wheel and sdist, try the wheel in an empty environment, write the SBOM; all into dist/
	rm -rf dist $(VENV)-release $(VENV)-empty
	$(PYTHON) -m venv $(VENV)-release
	$(VENV)-release/bin/python -m pip install --quiet $(RELEASE_TOOLS)
	$(VENV)-release/bin/python -m build
	$(VENV)-release/bin/twine check --strict dist/*.whl dist/*.tar.gz
	$(PYTHON) -m venv $(VENV)-empty
	$(VENV)-empty/bin/python -m pip install --quiet -c constraints.txt dist/*.whl
	$(VENV)-release/bin/cyclonedx-py environment --output-reproducible --pyproject pyproject.toml \
	  --output-file dist/sbom.cdx.json $(VENV)-empty/bin/python
	cd dist && ../$(VENV)-empty/bin/deepen --version
	cd dist && HF_HUB_OFFLINE=1 ../$(VENV)-empty/bin/deepen demo --out $(CURDIR)/$(VENV)-empty/demo
	rm -rf $(VENV)-release $(VENV)-empty

lock: ## write constraints.txt anew from the newest versions pyproject.toml allows
	$(PYTHON) -m venv --clear $(VENV)-lock
	$(VENV)-lock/bin/python -m pip --quiet install torch==$(TORCH) '.[dev,docs]'
	$(VENV)-lock/bin/python -m pip freeze --all --exclude pip --exclude deepen > $(VENV)-lock/frozen
	{ sed '/^[^#]/,$$d' constraints.txt; sed -E 's/\+[^ ]*$$//' $(VENV)-lock/frozen | LC_ALL=C sort -f; } \
	  > $(VENV)-lock/constraints.txt
	mv $(VENV)-lock/constraints.txt constraints.txt
	rm -rf $(VENV)-lock

clean: ## remove the environment, caches and the built site; runs and demos stay
	rm -rf $(VENV) $(VENV)-lock $(VENV)-release $(VENV)-empty dist site .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis
	find src tests docs benchmarks studies -name __pycache__ -type d -prune -exec rm -rf {} +

$(BIN)/python:
	@command -v $(PYTHON) > /dev/null || { echo "deepen needs Python 3.11 or newer; there is no $(PYTHON)"; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "deepen needs Python 3.11 or newer; $(PYTHON) is $$($(PYTHON) -V 2>&1). Try: make PYTHON=python3.12"; exit 1; }
	$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); exit 1; }

$(VENV)/.core: $(LOCKED) | $(BIN)/python
	$(PIP) install -c constraints.txt -e .
	@touch $@

$(VENV)/.dev: $(LOCKED) | $(BIN)/python
	$(PIP) install -c constraints.txt -e '.[dev]'
	@touch $@

$(VENV)/.docs: $(LOCKED) | $(BIN)/python
	$(PIP) install -c constraints.txt -e '.[docs]'
	@touch $@
