# Two commands matter: `make demo` and `make test`. Each sets up what it needs.
PYTHON ?= python3
# On a machine without CUDA, a CPU build is the smaller download:
# `PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu make setup TORCH="torch==2.13.0+cpu"`.
TORCH  ?= torch==2.13.0
VENV   ?= .venv
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip --disable-pip-version-check

.PHONY: setup test check demo demo-optimizer clean

setup: $(VENV)/.ready

$(VENV)/.ready: pyproject.toml Makefile
	$(PYTHON) -c 'import sys; sys.exit("Python >= 3.11 is needed: make PYTHON=python3.11 ..." if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv $(VENV)
	$(PIP) install --quiet "$(TORCH)"
	$(PIP) install --quiet --editable ".[test,bench]"
	touch $@

check: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	PYTHONPATH=src $(BIN)/lint-imports

# Tests that only compute run beside those that wait for processes and sockets, and let them go first.
test: check
	@trap 'kill $$beside 2>/dev/null' EXIT; trap 'exit 130' INT TERM; \
	OMP_NUM_THREADS=1 nice $(BIN)/python -m pytest -p no:cacheprovider -m "not waiting" > .computing-tests.log 2>&1 & beside=$$!; \
	$(BIN)/python -m pytest -m waiting; waiting=$$?; \
	wait $$beside; computing=$$?; \
	echo; echo "The tests that only compute, which ran beside:"; cat .computing-tests.log; \
	exit $$((waiting ? waiting : computing))

# Three peers on this machine run the same Lightning script, the first hosts. One is killed, a fourth joins.
demo: setup
	$(BIN)/distro-optim testnet --peers 3 --kill 1@220 --join-at 240 --target 2.4 \
		--set global_batch_size=12 --set joiner_wait_time=5 --timeout 480 --out out/demo examples/lightning_bytes.py

# The optimizer alone, under torchrun.
demo-optimizer: setup
	$(BIN)/python examples/train_bytes.py --launch 4

clean:
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .computing-tests.log out
