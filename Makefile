# Everything from nothing but make and Python 3.10 or later:
#   make demo    adapt the shipped base model to a task it cannot do (about 3 minutes, 2 cores)
#   make test    the test suite
#   make check   ruff, mypy, the layering rules, the wheel's files, the site and test-oldest
#   make docs    the site: build/site/index.html
#   make faults  kills, full disks, damaged files: 400 cases, about half an hour (FAULTS_ARGS)
#   make fuzz    100,000 damaged files, configurations and budgets, new ones each time
#   make test-deepspeed  training by ZeRO-2 and ZeRO-3, DeepSpeed installed beside the environment
#   make test-oldest  what trains, with the oldest transformers, PEFT and TRL of pyproject.toml
#   make audit   look the locked packages up in a public database of vulnerabilities
#   make lock    resolve the locked versions again;  make licenses: the licenses of the packages
# Packages come from requirements/*.txt, whose hashes pip checks, and torch from constraints.txt.
# The pages of `tlora compare` and `tlora eval` are tested in Chromium (apt-get install chromium).
# Without one those tests are left out, and the last lines say so; TLORA_REQUIRE_BROWSER=1 makes
# that an error.
# A different package index or torch build: PIP_ARGS, as in `make test PIP_ARGS="--index-url ..."`.
PYTHON ?= python3
VENV ?= .venv
PIP_ARGS ?=
PYTEST_ARGS ?=
FAULTS_ARGS ?=
BIN := $(VENV)/bin
TOOLS := $(VENV)-tools
OLDEST := $(VENV)-oldest
OLDEST_TESTS := tests/examples/test_scripts.py tests/adapter/test_attach.py
SITE = -c "import sysconfig; print(sysconfig.get_path('purelib'))"
LOCK_ARGS ?=
CASES ?= 100000
PIP_INSTALL = -m pip install --quiet $(PIP_ARGS)
INSTALL = $(BIN)/python $(PIP_INSTALL)
LOCKED = --require-hashes --no-deps --requirement

.PHONY: demo test fuzz test-deepspeed test-oldest check docs faults lock audit licenses clean

demo: $(VENV)/ready
	rm -rf demo-run
	$(BIN)/tlora demo

test: $(VENV)/ready-dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist worksteal $(PYTEST_ARGS)

fuzz: $(VENV)/ready-dev
	TLORA_FUZZ_CASES=$(CASES) OMP_NUM_THREADS=1 \
	  $(BIN)/python -m pytest -n auto --dist worksteal $(PYTEST_ARGS) tests/fuzz

# Installed in the environment itself, accelerate would import it in every process.
test-deepspeed: $(VENV)/deepspeed/ready
	PYTHONPATH=$(VENV)/deepspeed OMP_NUM_THREADS=1 \
	  $(BIN)/python -m pytest $(PYTEST_ARGS) tests/distributed/test_deepspeed.py

test-oldest: $(OLDEST)/ready
	OMP_NUM_THREADS=1 $(OLDEST)/bin/python -m pytest -q $(PYTEST_ARGS) $(OLDEST_TESTS)

check: $(VENV)/ready-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -q tests/test_layers.py tests/packaging/test_wheel.py
	$(MAKE) docs test-oldest

# A warning (a link, an anchor or a page that is not there) is an error.
docs: $(VENV)/ready-dev
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet

faults: $(VENV)/ready-dev
	$(BIN)/python scripts/faults.py --output faults.jsonl $(FAULTS_ARGS)

lock: $(TOOLS)/ready
	$(TOOLS)/bin/python scripts/lock.py $(LOCK_ARGS)

audit: $(TOOLS)/ready
	$(TOOLS)/bin/python scripts/audit.py

licenses: $(VENV)/ready-dev
	$(BIN)/python scripts/licenses.py

# The mark is written last, so an install that was cut off is started over.
$(VENV)/ready: pyproject.toml constraints.txt requirements/compare.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	  { echo "tlora needs Python 3.10 or later; name one: make PYTHON=python3.10 $(MAKECMDGOALS)"; exit 2; }
	$(PYTHON) -m venv $(VENV)
	$(INSTALL) $(LOCKED) requirements/compare.txt
	$(INSTALL) --constraint constraints.txt torch
	$(INSTALL) --no-deps --no-build-isolation --editable .
	touch $@

# What the tests need besides: the other extras, linters, a browser's driver, quantizing libraries.
# Packages that have no wheel are built by the locked setuptools.
$(VENV)/ready-dev: $(VENV)/ready requirements/dev.txt constraints.txt
	$(INSTALL) --no-deps --constraint constraints.txt "triton; sys_platform == 'linux'"
	$(INSTALL) --no-build-isolation $(LOCKED) requirements/dev.txt
	touch $@

$(VENV)/deepspeed/ready: $(VENV)/ready-dev
	DS_BUILD_OPS=0 $(INSTALL) --no-build-isolation --no-deps --target $(VENV)/deepspeed \
	  deepspeed einops hjson msgpack ninja py-cpuinfo
	touch $@

# Whatever is not installed in it comes from the environment, torch and pytest among it.
$(OLDEST)/ready: $(VENV)/ready-dev pyproject.toml scripts/oldest.py
	$(PYTHON) -m venv $(OLDEST)
	echo "import site; site.addsitedir('$$($(BIN)/python $(SITE))')" \
	  > "$$($(OLDEST)/bin/python $(SITE))/beside.pth"
	$(OLDEST)/bin/python $(PIP_INSTALL) $$($(BIN)/python scripts/oldest.py)
	touch $@

$(TOOLS)/ready: requirements/tools.txt
	$(PYTHON) -m venv $(TOOLS)
	$(TOOLS)/bin/python $(PIP_INSTALL) $(LOCKED) requirements/tools.txt
	touch $@

clean:
	rm -rf $(VENV) $(TOOLS) $(OLDEST) build dist .pytest_cache .mypy_cache .ruff_cache
