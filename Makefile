# Every target sets up what it needs: `make quickstart` and `make test` work on a bare machine with Python 3.11+.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Named after the content of the packaging files: a changed dependency installs again, an unchanged one costs nothing.
STAMP := $(VENV)/installed-$(shell cat setup.cfg pyproject.toml | cksum | cut -d ' ' -f 1)
WORKERS ?= auto
PYTEST_ARGS ?=

.PHONY: help setup quickstart test test-distributed test-vllm check format schema clean

help:
	@echo "make quickstart  train SFT, a reward model and REINFORCE on this machine (minutes)"
	@echo "make test        all tests but the slow and the GPU ones, two-rank tests included"
	@echo "make test-distributed  every test of several processes, the slow ones included"
	@echo "make test-vllm   the tests of rollout.engine=vllm, with vLLM for this processor in .venv-vllm (5 GB)"
	@echo "make check       format, lint, types, layering"
	@echo "make format      put the code into the format that make check wants"

# --no-compile: most modules of these packages are never imported; Python compiles the others when they are.
setup: $(STAMP)

$(STAMP):
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile -e ".[dev]"
	rm -f $(VENV)/installed-*
	touch $@

quickstart: $(STAMP)
	$(BIN)/rlhf quickstart

# One thread per worker: the workers share the cores, and sums come out the same whatever the machine. All extras are
# there (but vLLM), so a test that lacks one fails.
test: $(STAMP)
	OMP_NUM_THREADS=1 RLHF_TEST_EXTRAS=all \
	  $(BIN)/python -m pytest -m "not slow and not gpu" -n $(WORKERS) --dist loadfile $(PYTEST_ARGS)

# All of tests/ranks, the slow ones included: two real processes under DDP, ZeRO-1 to 3 and FSDP2. Minutes.
test-distributed: $(STAMP)
	OMP_NUM_THREADS=1 RLHF_TEST_EXTRAS=all $(BIN)/python -m pytest -m ranks tests/ranks $(PYTEST_ARGS)

VLLM := .venv-vllm
VLLM_STAMP := $(VLLM)/installed-$(shell cat setup.cfg tests/vllm/install.py | cksum | cut -d ' ' -f 1)

$(VLLM_STAMP):
	$(PYTHON) tests/vllm/install.py $(VLLM)
	touch $@

# Warnings are vLLM's own, by the dozen.
test-vllm: $(VLLM_STAMP)
	OMP_NUM_THREADS=1 $(VLLM)/bin/python -m pytest -W default --show-capture=stderr tests/vllm $(PYTEST_ARGS)

check: $(STAMP)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -q tests/test_layering.py

format: $(STAMP)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# What editors complete and check recipes with; tests/recipe fails where it is stale.
schema: $(STAMP)
	$(BIN)/python -c "from rlhf.recipe.schema import json_schema; print(json_schema(), end='')" > docs/recipe.schema.json

clean:
	rm -rf $(VENV) $(VLLM) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
