# Everything from nothing but make and Python 3.10 or later:
#   make demo    adapt the shipped base model to a task it cannot do (about 2 minutes, 2 cores)
#   make test    the test suite
#   make check   ruff, mypy and the layering rules
# The pages of `tlora compare` and `tlora eval` are tested in Chromium (apt-get install chromium).
# Without one those tests are left out, and the last lines say so; TLORA_REQUIRE_BROWSER=1 makes
# that an error.
# A different package index or torch build: PIP_ARGS, as in `make test PIP_ARGS="--index-url ..."`.
PYTHON ?= python3
VENV ?= .venv
PIP_ARGS ?=
PYTEST_ARGS ?=
BIN := $(VENV)/bin
INSTALL = $(BIN)/python -m pip install --quiet $(PIP_ARGS) --constraint constraints.txt

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
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	  { echo "tlora needs Python 3.10 or later; name one: make PYTHON=python3.10 $(MAKECMDGOALS)"; exit 2; }
	$(PYTHON) -m venv $(VENV)
	$(INSTALL) --editable ".[compare]"
	touch $@

# What the tests need besides: the other extras, linters, a browser's driver, quantizing libraries.
$(VENV)/ready-dev: $(VENV)/ready
	$(INSTALL) --editable ".[dev]"
	touch $@

clean:
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache
