# Every command sets up what it needs: a virtual environment with the pinned versions.
#
#   make demo    run the probes on the embedded model, write demo/report.html
#   make test    the test suite            make lint    formatting, style, types
#   make browser the dashboard in Chromium  make coverage   the suite, and which lines ran
#   make slow    the tests of minutes      make picture draw the README's picture
#   make bench   measure speed and memory  make docs    the documentation site, into site/
#   make notebooks   run and save the notebooks  make clean   remove what was made here
#
# PYTHON=/path/to/python chooses the interpreter (3.11 or newer).

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
TORCH := $(shell grep '^torch==' constraints.txt)

.DEFAULT_GOAL := help
.PHONY: help demo test slow coverage browser lint bench docs picture notebooks clean

help:
	@sed -n '3,8s/^# *//p' Makefile

# The newest Python we know to work; a plain python3 if it is new enough.
PYTHON ?= $(shell for name in python3.13 python3.12 python3.11 python3 python; do \
	$$name -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$name && break; \
	done)

$(STAMP): constraints.txt pyproject.toml
	@test -n "$(PYTHON)" || { echo "Python 3.11 or newer is needed and none was found; install it, or say make PYTHON=..." >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Python 3.11 or newer is needed; $(PYTHON) is older" >&2; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "installing the pinned versions into $(VENV) (a minute or two)"
	@# torch first and alone: nothing after it may choose another one. Python compiles what is imported by
	@# itself; compiling all of it here takes a minute, most of it for modules that nothing imports.
	@$(BIN)/python -m pip install --quiet --no-compile $(TORCH)
	@$(BIN)/python -m pip install --quiet --no-compile -c constraints.txt -e '.[dev,images]'
	@touch $@

demo: $(STAMP)
	@$(BIN)/workbench demo -o demo

# A process a core; one thread each, or they would wait for each other.
FAST := -q -n auto -m "not slow and not gpu and not browser"

test: $(STAMP)
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(FAST)

# What the fast suite leaves out for its time, pages of the documentation among it: half an hour and more.
slow: $(STAMP)
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -m "slow and not gpu and not browser"

# The fast suite, and which lines ran: a fifth slower.
coverage: $(STAMP)
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(FAST) --cov --cov-report=term:skip-covered

# What a person does in the dashboard, in a real Chromium; minutes.
browser: $(STAMP)
	@$(BIN)/python -m pytest -q -m browser tests/browser

lint: $(STAMP)
	@$(BIN)/ruff format --check .
	@$(BIN)/ruff check .
	@$(BIN)/mypy

# Every benchmark writes its numbers into benchmarks/out; those replace the kept ones, and the
# pages and pictures (which need Chromium) are drawn from them.
bench: $(STAMP)
	@$(BIN)/python benchmarks/everything.py

# Links that lead nowhere and pages that nothing leads to are errors.
docs: $(STAMP)
	@NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

# The picture at the top of the README; needs Chromium.
picture: $(STAMP)
	@mkdir -p docs/images
	@$(BIN)/workbench run attention-sinks --model demo --data builtin:natural --n-pos 64 \
		--cache off -o docs/images/sinks.svg

# As they ran, with figures as pictures; needs Chromium.
notebooks: $(STAMP)
	@$(BIN)/python notebooks/execute.py

clean:
	rm -rf $(VENV) demo build site .pytest_cache .ruff_cache .mypy_cache .hypothesis .coverage
