# Three commands matter: `make demo`, `make fast` and `make test`. Each sets up what it needs, with the versions of
# constraints.txt.
# NEWEST=1 sets up the newest versions of everything, OLDEST=1 the oldest that pyproject.toml admits; both in an
# environment of their own, and for any target: `make fast OLDEST=1`.
PYTHON ?= python3
ifdef OLDEST
TORCH  ?= torch==2.5.0
VENV   ?= .venv-oldest
PINS   := .lower-bounds.txt
EXTRAS := test,bench
else ifdef NEWEST
TORCH  ?= torch
VENV   ?= .venv-newest
PINS   :=
else
# On a machine without CUDA, a CPU build is the smaller download: make setup TORCH="torch==2.13.0+cpu", with the address
# of PyTorch's CPU builds in PIP_EXTRA_INDEX_URL.
TORCH  ?= torch==2.13.0
VENV   ?= .venv
PINS   := constraints.txt
endif
EXTRAS ?= test,bench,docs
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip --disable-pip-version-check

# The tests start many Pythons, and each would compile all files anew.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: setup constraints fast test fuzz check demo demo-optimizer docs clean

setup: $(VENV)/.ready

$(VENV)/.ready: pyproject.toml Makefile constraints.txt
	$(PYTHON) -c 'import sys; sys.exit("Python >= 3.11 is needed: make PYTHON=python3.11 ..." if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv $(VENV)
	$(if $(OLDEST),$(PYTHON) scripts/lower_bounds.py > $(PINS))
	$(PIP) install --quiet $(addprefix --constraint ,$(PINS)) "$(TORCH)"
	$(PIP) install --quiet $(addprefix --constraint ,$(PINS)) --editable ".[$(EXTRAS)]"
	-$(BIN)/python -m pytest --collect-only --quiet > /dev/null  # compiles the tests: else each of their processes does
	touch $@

# Writes down what is installed, for `make setup` to install from now on. See CONTRIBUTING.md.
constraints: setup
	$(PIP) freeze --exclude-editable --exclude pip --exclude setuptools \
		| sed -e '/^nvidia-/d' -e '/^cuda-/d' -e 's/^\(torch==[0-9.]*\)+.*/\1/' > constraints.txt

check: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	PYTHONPATH=src $(BIN)/lint-imports

# Processes share the tests. Each collects all of them, which takes a while. The quick tests compute all the time; the
# slow ones wait for most of theirs, so that it takes four of them to keep two cores at work. With five it takes half a
# minute less, and a test whose rounds last seconds failed.
PYTEST := $(BIN)/python -m pytest --dist worksteal

# What to run after each change: all but the few tests that take most of the time.
fast: setup
	$(PYTEST) -n 2 -m "not slow"

# Everything. The checks run beside the tests, and let them go first.
test: setup
	@trap 'kill $$beside 2>/dev/null' EXIT; trap 'exit 130' INT TERM; \
	nice $(MAKE) --no-print-directory check > .checks.log 2>&1 & beside=$$!; \
	$(PYTEST) -n 4; tests=$$?; \
	wait $$beside; checks=$$?; \
	echo; echo "The checks, which ran beside:"; cat .checks.log; \
	exit $$((tests ? tests : checks))

# Every decoder gets changed and invented bytes, for so many seconds each. What takes new paths is kept in out/fuzz.
SECONDS ?= 10
fuzz: setup
	$(BIN)/python tests/fuzz/fuzz_decoders.py --seconds $(SECONDS) --corpus out/fuzz

# Three peers on this machine run the same Lightning script, the first hosts. One is killed, a fourth joins.
demo: setup
	$(BIN)/distro-optim testnet --peers 3 --kill 1@220 --join-at 240 --target 2.1 \
		--set global_batch_size=12 --set joiner_wait_time=5 --timeout 480 --out out/demo examples/lightning_bytes.py

# The optimizer alone, under torchrun.
demo-optimizer: setup
	$(BIN)/python examples/train_bytes.py --launch 4

# The documentation, in out/docs/index.html. A warning is an error.
docs: setup
	$(BIN)/python -m sphinx -W --keep-going -b html docs out/docs

clean:
	rm -rf .venv .venv-newest .venv-oldest .lower-bounds.txt .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .checks.log out
