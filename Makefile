# Everything from nothing but make and Python 3.11 or later:
#   make demo    adapt the shipped base model to a task it cannot do (about 2 minutes, 2 cores)
#   make test    the test suite
#   make check   ruff, mypy and the layering rules
# The page of `tlora compare` is tested in a browser: make test needs Chromium (apt-get install
# chromium), or leaves it out: make test PYTEST_ARGS='-m "not browser"'.
# A different package index or torch build: PIP_ARGS, as in `make test PIP_ARGS="--index-url ..."`.
PYTHON ?= python3
VENV ?= .venv
PIP_ARGS ?=
PYTEST_ARGS ?=
BIN := $(VENV)/bin

.PHONY: demo test check clean

demo: $(VENV)/ready
	rm -rf demo-run
	$(BIN)/tlora demo

test: $(VENV)/ready-dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist worksteal $(PYTEST_ARGS)

check: $(VENV)/ready-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -q tests/test_layers.py

# The mark is written last, so an install that was cut off is started over.
$(VENV)/ready: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "tlora needs Python 3.11 or later; name one: make PYTHON=python3.11 $(MAKECMDGOALS)"; exit 2; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet $(PIP_ARGS) --constraint constraints.txt --editable .
	touch $@

# What the tests need besides: linters, a browser's driver, and the quantising libraries.
$(VENV)/ready-dev: $(VENV)/ready
	$(BIN)/python -m pip install --quiet $(PIP_ARGS) --constraint constraints.txt --editable ".[dev]"
	touch $@

clean:
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache
