# Every target does all its set-up on a fresh machine: Python ≥ 3.11 with venv, and a package index that pip can reach.
#
#   make demo           convert a small checkpoint made on the spot
#   make test           lint, types, unit, property, fault and packaging tests
#   make test-clients   real transformers, Megatron-core and DeepSpeed read what we write, and we what they write
#   make soak           everything that takes hours
#   make bench          benchmarks, with `cp -r` beside each figure
#
# Variables: PYTHON (the interpreter that makes the environments), TORCH_INDEX (an index for torch alone, for example
# https://download.pytorch.org/whl/cpu where the default one would bring CUDA), PYTEST_ARGS.

PYTHON ?= python3
TORCH_INDEX ?=
PYTEST_ARGS ?=
# Tests of one run side by side; half of their time is waiting for processes and devices.
SIDE_BY_SIDE := -n 2 --dist worksteal
TORCH := torch==2.13.0
# Source only, and its setup.py imports torch: built in the environment, as Python alone, without a compiler.
DEEPSPEED := deepspeed==0.19.8
TORCH_FROM := $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX))

VENV := .venv
CLIENTS := .venv-clients
BIN := $(VENV)/bin
# Each run of pytest has a temporary folder of its own: in the shared one, runs side by side clean up after one another.
OWN_TMP = tmp=$$(mktemp -d) && trap 'rm -rf "$$tmp"' EXIT &&
CLIENTS_BIN := $(CLIENTS)/bin

.PHONY: help demo test lint unit test-clients soak bench clean

help:
	@sed -n 's/^#   //p' Makefile

# The stamps live inside the environments: deleting an environment deletes its stamp.
$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q $(TORCH_FROM) $(TORCH) $(if $(TORCH_INDEX),,-c constraints.txt)
	$(BIN)/python -m pip install -q -e ".[test]" -c constraints.txt
	@touch $@

$(CLIENTS)/.installed: pyproject.toml requirements-clients.txt
	$(PYTHON) -m venv $(CLIENTS)
	$(CLIENTS_BIN)/python -m pip install -q $(TORCH_FROM) $(TORCH) $(if $(TORCH_INDEX),,-c requirements-clients.txt)
	$(CLIENTS_BIN)/python -m pip install -q -r requirements-clients.txt
	DS_BUILD_OPS=0 $(CLIENTS_BIN)/python -m pip install -q --no-build-isolation $(DEEPSPEED) -c requirements-clients.txt
	$(CLIENTS_BIN)/python -m pip install -q -e . --no-deps
	@touch $@

demo: $(VENV)/.installed
	$(BIN)/shardwright demo

test: lint unit

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/mypy

unit: $(VENV)/.installed
	$(OWN_TMP) $(BIN)/python -m pytest --basetemp="$$tmp/pytest" -m "not clients and not soak" $(SIDE_BY_SIDE) $(PYTEST_ARGS)

test-clients: $(CLIENTS)/.installed
	$(OWN_TMP) SHARDWRIGHT_REQUIRE_CLIENTS=1 $(CLIENTS_BIN)/python -m pytest --basetemp="$$tmp/pytest" tests/clients -m "clients and not soak" $(SIDE_BY_SIDE) $(PYTEST_ARGS)

# pytest exits 5 when it finds no test; a half without soak tests is no failure.
soak: $(VENV)/.installed $(CLIENTS)/.installed
	$(OWN_TMP) { $(BIN)/python -m pytest --basetemp="$$tmp/pytest" tests -m "soak and not clients" $(PYTEST_ARGS) || [ $$? -eq 5 ]; }
	$(OWN_TMP) { SHARDWRIGHT_REQUIRE_CLIENTS=1 $(CLIENTS_BIN)/python -m pytest --basetemp="$$tmp/pytest" tests/clients -m "clients and soak" $(PYTEST_ARGS) || [ $$? -eq 5 ]; }

bench: $(VENV)/.installed
	$(BIN)/python -m benchmarks $(BENCH_ARGS)

clean:
	rm -rf $(VENV) $(CLIENTS) .mypy_cache .ruff_cache .pytest_cache .hypothesis .coverage htmlcov build dist
	find shardwright tests benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +
