# Everything a newcomer needs. Windows without make: see CONTRIBUTING.md.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt

.PHONY: quickstart test test-all check slither bench bench-chain bench-train bench-learning clean

quickstart: $(VENV)/installed
	$(BIN)/trainchain run recipes/quickstart/recipe.yaml

test: $(VENV)/installed-dev
	$(BIN)/python -m pytest -q -m "not long and not gpu"

test-all: $(VENV)/installed-dev
	$(BIN)/python -m pytest -q

check: $(VENV)/installed-dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# For maintainers. Needs node, npm, and Slither in an environment of its own: pipx install slither-analyzer==0.11.6
slither:
	@command -v $${SLITHER:-slither} >/dev/null || { echo "make slither [SLITHER=PATH] needs: pipx install slither-analyzer==0.11.6"; exit 2; }
	cd trainchain/chain/contracts && npm install --no-audit --no-fund --no-package-lock --silent && node slither.mjs

bench: $(VENV)/installed-dev
	@test -n "$(MODEL)" || { echo "make bench MODEL=DIR TRAIN=FILE.jsonl EVAL=FILE.jsonl [FLAGS=--quick]"; exit 2; }
	$(BIN)/python benchmarks/real_job.py --model $(MODEL) --train $(TRAIN) --eval $(EVAL) $(FLAGS)

bench-chain: $(VENV)/installed-dev
	$(BIN)/python benchmarks/chain.py $(FLAGS)

bench-train: $(VENV)/installed-bench
	@test -n "$(MODEL)" || { echo "make bench-train MODEL=DIR DATA=FILE.jsonl [FLAGS='--shape 135m']"; exit 2; }
	$(BIN)/python benchmarks/train.py --model $(MODEL) --data $(DATA) $(FLAGS)

bench-learning: $(VENV)/installed-bench
	@test -n "$(MODEL)" || { echo "make bench-learning MODEL=DIR TRAIN=FILE.jsonl EVAL=FILE.jsonl [FLAGS=--quick]"; exit 2; }
	$(BIN)/python benchmarks/learning.py --model $(MODEL) --train $(TRAIN) --eval $(EVAL) $(FLAGS)

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/installed: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(INSTALL) --editable .
	touch $@

$(VENV)/installed-dev: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(INSTALL) --editable ".[dev]"
	touch $@ $(VENV)/installed

$(VENV)/installed-bench: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(INSTALL) --editable ".[bench]"
	touch $@
