# Everything makes its own environment: a machine needs Python 3.11 and make.
#
#   make demo                     the whole pipeline on the embedded default
#   make demo METHOD=forward_kl   another method, into a workdir of its own
#   make test                     all tests
#   make lint                     ruff and pyright

PYTHON ?= python3
VENV ?= .venv
METHOD ?=
ENGINE ?= jax
CONFIG ?= configs/demo.py
WORKDIR ?= runs/demo$(if $(METHOD),-$(METHOD))

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check
OVERRIDES := --config.engine.name=$(ENGINE) \
  $(if $(METHOD),--config.method=$(METHOD))

.PHONY: demo test lint clean help
.DEFAULT_GOAL := help

help:
	@sed -n 's/^# \{0,1\}//p' Makefile | head -6

demo: $(VENV)/.runtime
	@$(BIN)/python -m trd_jax.pipeline --config=$(CONFIG) \
	  --workdir=$(WORKDIR) $(OVERRIDES)

test: $(VENV)/.test
	@$(BIN)/python -m pytest

lint: $(VENV)/.dev
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/pyright --pythonpath $(BIN)/python

# A stamp is as old as the last install, which is repeated when setup.py is
# newer. The package itself is installed in place: its files need no install.
$(VENV)/.runtime: setup.py
	@echo "installing trd-jax into $(VENV) (once; about a minute)"
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "trd-jax needs Python 3.11 or newer: make PYTHON=python3.11" >&2; \
	    exit 2; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(PIP) -e .
	@touch $@

$(VENV)/.test: $(VENV)/.runtime
	@echo "installing what the tests need into $(VENV) (once)"
	@$(PIP) torch==2.13.0
	@$(PIP) -e '.[test]'
	@touch $@

$(VENV)/.dev: $(VENV)/.test
	@echo "installing ruff and pyright into $(VENV) (once)"
	@$(PIP) -e '.[dev]'
	@touch $@

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .ruff_cache .hypothesis
