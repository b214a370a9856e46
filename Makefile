# make demo | test | torture | check | bench | clean; each installs what it lacks into .venv first.
PYTHON ?= python3.11
BIN := .venv/bin
export PATH := $(CURDIR)/$(BIN):$(PATH)

.PHONY: demo test torture check lint bench clean

.venv/installed: pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	touch $@

# One rank a GPU where there are any, else two on the CPU.
RANKS = $(shell $(BIN)/python -c "import torch; print(min(2, torch.cuda.device_count()) or 2)")

demo: .venv/installed
	$(BIN)/deepspeed --num_accelerators $(RANKS) launchers/cifar_mergenet.py --variant digits \
	    --compare none noise shuffled --seeds 0 1 2

# A file's tests stay together: they share what was started for them.
test: .venv/installed
	$(BIN)/python -m pytest -m "not slow" --numprocesses logical --maxprocesses 4 --dist loadfile

# A small run, killed a hundred times; a quarter of an hour or two.
torture: .venv/installed
	$(BIN)/python tests/torture.py --kills 100

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

check: lint test

# Peers to be compared with. Where they cannot be installed their rows say so.
.venv/peers: .venv/installed
	$(BIN)/python -m pip install --quiet --editable '.[bench]' || echo "no peers: their rows stay empty"
	touch $@

bench: .venv/peers
	$(BIN)/python benchmarks/bench.py

clean:
	rm -rf .venv build *.egg-info .pytest_cache .mypy_cache .ruff_cache
