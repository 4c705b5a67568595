# On a machine with Python 3.11 to 3.14 and make:  make run,  make test.
VENV := .venv
ifeq ($(OS),Windows_NT) # with Git Bash
PYTHON ?= python
BIN := $(VENV)/Scripts
else
PYTHON ?= python3
BIN := $(VENV)/bin
endif
NODES ?= 50
PROCESSES ?=
CONFIG ?=
ONLY ?=
INSTALL := $(BIN)/uv pip install --quiet --python $(BIN)/python -c constraints.txt
PYTEST := $(BIN)/python -m pytest
NBMAKE := $(PYTEST) --nbmake --nbmake-timeout=600
# Those that take longest, or start processes of Flower's own: make test-all executes them.
SLOW_NOTEBOOKS = $(foreach number,09 11 12 13 14 15 16 17 18,$(wildcard notebooks/$(number)-*.ipynb))
QUICK_NOTEBOOKS ?= $(filter-out $(SLOW_NOTEBOOKS),$(wildcard notebooks/[0-9][0-9]-*.ipynb))

.PHONY: help setup setup-dev run stop test test-all check bench bench-scaling lab lab-results notebooks address \
  book figures clean
help:
	@echo "make run      train on $(NODES) simulated nodes (NODES=20, CONFIG=\"num-server-rounds=3\", PROCESSES=2)"
	@echo "make stop     end what runs and notebooks have started and could not end (after a crash)"
	@echo "make lab      open the notebooks   make notebooks  execute them, save outputs"
	@echo "make check    lint, types, spelling"
	@echo "make test     what tells that a change is right   make test-all  what takes longer"
	@echo "make book     build the course as a site in .book/html"
	@echo "make address  write a fork's address (REPOSITORY=https://github.com/you/your-fork) for Colab"
	@echo "make bench    time a round against a bare loop (10 min)   make bench-scaling  up to 1,000 nodes"
	@echo "make lab-results   make the labs' saved results again (up to 15 min each; ONLY=masks)"
	@echo "make figures  draw _static/ again"
	@echo "make clean    remove .venv and the book (outputs/ stays)"

setup: $(VENV)/.installed
$(VENV)/.installed: requirements.txt constraints.txt fedlib/pyproject.toml
	@command -v $(PYTHON) > /dev/null || { \
	  echo "$(PYTHON): expected Python 3.11 to 3.14, found no such command; try: make PYTHON=python3.12"; exit 1; }
	@$(PYTHON) tools/machine.py
	@echo "Installing into $(VENV): some 6 GB on Linux, much less elsewhere ..."
	@$(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install -qq --disable-pip-version-check -c constraints.txt uv || { \
	  echo "pip: expected to get uv from PyPI, got the above; is there a network, or a proxy (HTTPS_PROXY)?"; exit 1; }
	@$(INSTALL) -r requirements.txt
	@touch $@

# What a learner does not need: tests, checks, the book.
setup-dev: $(VENV)/.installed-dev
$(VENV)/.installed-dev: $(VENV)/.installed tests/requirements.txt
	$(INSTALL) -r tests/requirements.txt
	@touch $@

run: setup
	@$(BIN)/python tools/run.py --nodes "$(NODES)" --processes "$(PROCESSES)" --config "$(CONFIG)"

# All of this user's: also a run that is going on, and a notebook's federation.
stop: setup
	@$(BIN)/python -P notebooks/course/watcher.py

test: setup-dev
	$(PYTEST)
	$(NBMAKE) $(QUICK_NOTEBOOKS)

# What make test leaves out: browsers, killed processes, deployments, and the notebooks with these.
test-all: setup-dev
	$(PYTEST) tests/slow
	$(NBMAKE) $(SLOW_NOTEBOOKS)

# The hooks of .pre-commit-config.yaml, here over everything and also without git; and types.
check: setup-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/codespell --check-hidden .ci .github _static docs fedlib notebooks tests tools *.md *.yaml *.toml *.txt .*.yaml Makefile
	$(BIN)/python .ci/files.py
	$(BIN)/check-jsonschema --builtin-schema vendor.compose-spec compose.yaml
	$(BIN)/check-jsonschema --builtin-schema vendor.github-workflows .github/workflows/*.yml
	$(BIN)/mypy
	$(BIN)/mypy --platform win32

lab: setup
	$(BIN)/jupyter lab --ServerApp.root_dir=. notebooks/00-start-here.ipynb

# One: make notebooks ONLY=05-one-round.ipynb
notebooks: setup-dev
	$(BIN)/python tools/refresh.py $(ONLY)

# A fork's own: make address REPOSITORY=https://github.com/you/your-fork BRANCH=main
# None again: make address REPOSITORY=none
address: setup
	@$(BIN)/python tools/address.py -- "$(REPOSITORY)" "$(BRANCH)"

# From the committed outputs: nothing is executed, nothing fetched.
book: setup-dev
	$(BIN)/python docs/book/build.py

bench: setup
	$(BIN)/python tools/benchmark.py

bench-scaling: setup
	$(BIN)/python tools/benchmark.py scaling

# One: make lab-results ONLY=one_more_record
lab-results: setup
	$(BIN)/python tools/labs.py $(ONLY)

figures: setup
	$(BIN)/python tools/diagrams.py
	$(BIN)/python tools/figures.py

clean:
	rm -rf $(VENV) .book
