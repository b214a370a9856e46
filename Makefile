# make demo | test | all | torture | floors | other-python | check | bench | clean; each installs what it lacks into .venv first.
PYTHON ?= python3.11
BIN := .venv/bin
export PATH := $(CURDIR)/$(BIN):$(PATH)

.PHONY: demo test all torture floors other-python check lint bench clean

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

# Everything, with the further forms that .ci/run leaves out; about two hours on two cores.
all: lint test
	$(BIN)/python -m pytest -m "slow or nightly" --numprocesses 2 --dist loadfile

# A small run, killed a hundred times; a quarter of an hour or two.
torture: .venv/installed
	$(BIN)/python tests/torture.py --kills 100

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

check: lint test

# The fast part of the suite that tests/floors.txt lists, on the lowest versions that pyproject.toml allows.
FLOORS := .venv-floors
$(FLOORS)/installed: pyproject.toml .venv/installed
	$(BIN)/uv venv --quiet --clear --python $(PYTHON) $(FLOORS)
	$(BIN)/uv pip install --quiet --python $(FLOORS)/bin/python --resolution lowest-direct --editable '.[test]'
	touch $@

floors: $(FLOORS)/installed
	$(call listed,$(FLOORS))

# The same on the newest versions and another Python, which uv finds or installs: make other-python OTHER=3.13
OTHER ?= 3.12
OTHERS := .venv-other-python
other-python: .venv/installed
	$(BIN)/uv venv --quiet --clear --python $(OTHER) $(OTHERS)
	$(BIN)/uv pip install --quiet --python $(OTHERS)/bin/python --editable '.[test]'
	$(call listed,$(OTHERS))

# Compiled files are written even where the environment forbids it: a new environment has none, and each rank would
# compile half of torch again.
listed = PATH="$(CURDIR)/$(1)/bin:$$PATH" PYTHONDONTWRITEBYTECODE= \
    $(1)/bin/python -m pytest -p no:cacheprovider @tests/floors.txt

# Peers to be compared with. Where they cannot be installed their rows say so.
.venv/peers: .venv/installed
	$(BIN)/python -m pip install --quiet --editable '.[bench]' || echo "no peers: their rows stay empty"
	touch $@

bench: .venv/peers
	$(BIN)/python benchmarks/bench.py

clean:
	rm -rf .venv $(FLOORS) $(OTHERS) build *.egg-info .pytest_cache .mypy_cache .ruff_cache
