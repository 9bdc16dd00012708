# make demo   set up, get the data, deploy the example to a budget of half the dense latency
# make test   set up with the test extras, run the suite
# make check  what .ci/run checks besides the tests

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# Two processes: with more, the tests that time kernels would time each other.
JOBS ?= 2
PYTEST := $(BIN)/python -m pytest -n $(JOBS) --dist loadfile
DEPLOY ?= --target rpi4 --latency 50% --example fashion-mnist

.PHONY: demo data test test-all test-slow check clean

demo: $(VENV)/.installed-all data
	$(BIN)/edgeprune deploy $(DEPLOY)

data: $(VENV)/.installed-all
	$(BIN)/python examples/fashion_mnist/get_data.py

test: $(VENV)/.installed-test data
	$(PYTEST) -m "not slow and not board"

test-all: $(VENV)/.installed-dev data
	$(PYTEST)

test-slow: $(VENV)/.installed-dev data
	$(PYTEST) -m "slow or board" --durations=25

check: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -q tests/house/test_architecture.py

# Debian splits ensurepip off into python3-venv; where that is missing and we may install it, we do.
$(BIN)/python:
	$(PYTHON) -m venv $(VENV) || { \
	  rm -rf $(VENV); \
	  echo "python3-venv is missing; installing it with apt-get"; \
	  apt-get update -qq && apt-get install -y -qq python3-venv && $(PYTHON) -m venv $(VENV); }

$(VENV)/.installed-%: pyproject.toml constraints.txt | $(BIN)/python
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt -e '.[$*]'
	touch $@

clean:
	rm -rf $(VENV) build dist runs
