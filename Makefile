# `make smoke` and `make chat` from nothing: they set up .venv, train every stage of the recipe of
# that name, and show the evidence.

PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11; do \
  $$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: setup smoke chat unit train test torture fuzz lint types docs ci bench gpu

setup: $(VENV)/.ready

$(VENV)/.ready: pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { \
	  echo "no Python 3.11 or newer here: install one, or name it: make PYTHON=/path/to/python3"; \
	  exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { \
	  echo "$(PYTHON) has no venv module: on Debian and Ubuntu, apt install python3-venv"; \
	  exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt torch
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

smoke: setup
	@$(BIN)/rlhf-recipes run smoke

chat: setup
	@$(BIN)/rlhf-recipes run chat

# The tests that need no torch: under a minute.
unit: setup
	$(BIN)/python -m pytest -q -m unit

test: setup
	$(BIN)/python -m pytest -q -n 2 --dist worksteal

# The tests whose outcome hangs on what was learned. `.ci/run` repeats them for other processors.
LEARNED := test_stages test_evaluation test_gate test_dpo test_groups test_labels test_rewards
train: setup
	$(BIN)/python -m pytest -q -n 2 --dist worksteal -m train tests/pipeline/test_induced.py \
	  $(LEARNED:%=tests/stages/%.py)

# Every fault, everywhere: a quarter of an hour, and a table of the cases tried and passed.
torture: setup
	$(BIN)/python -m pytest -q -n 2 -m torture

# 10,000 seeded mutations of the shipped recipes, for a minute: `check` answers each.
fuzz: setup
	$(BIN)/python tools/fuzz.py

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/codespell
	$(BIN)/lint-imports --no-logo

types: setup
	$(BIN)/mypy

# The documentation as a site, in build/site; a link that leads nowhere ends it.
docs: setup
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[docs]'
	$(BIN)/zensical build --strict

ci: lint types test

# The real model's part needs a folder with SmolLM2-135M-Instruct: benchmarks/README.md says how.
MODEL ?= $(RLHF_RECIPES_SMOLLM2)
bench: setup
	$(BIN)/python -m benchmarks.memory_by_size
	$(BIN)/python -m benchmarks.startup
	$(BIN)/python -m benchmarks.recipe_vs_scripts
	$(BIN)/python -m benchmarks.ppo_vs_trl --learning
	$(BIN)/python -m benchmarks.recipe_vs_scripts --real $(if $(MODEL),--model $(MODEL))
	$(BIN)/python -m benchmarks.ppo_vs_trl $(if $(MODEL),--model $(MODEL))

# What a card does, in ten minutes at most; QUICK=1 runs every item on a CPU with the smoke model.
gpu: setup
	$(BIN)/python -m benchmarks.gpu $(if $(QUICK),--quick --out build/gpu,--out benchmarks/results)
