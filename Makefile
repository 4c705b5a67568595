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

# Flower's folder and port of this project's own: nothing of the user's is touched or met.
export FLWR_HOME := $(CURDIR)/.flwr
export FLWR_LOCAL_SUPERLINK_HTTP_API_PORT ?= 39191
# The app runs in .venv; without this, Flower installs it once more, for every run.
export FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION := 1
# Ray's tip about a future version, printed at every start.
export PYTHONWARNINGS := ignore:Tip:FutureWarning
# Else make run | tee log shows nothing before the end.
export PYTHONUNBUFFERED := 1

.PHONY: help setup setup-dev run test check bench bench-scaling lab notebooks address book figures stop clean
help:
	@echo "make run      train on $(NODES) simulated nodes (NODES=20, CONFIG=\"num-server-rounds=3\", PROCESSES=2)"
	@echo "make test     run all tests        make check    lint, types, spelling"
	@echo "make lab      open the notebooks   make notebooks  execute them, save outputs"
	@echo "make book     build the course as a site in .book/html"
	@echo "make address  write a fork's address (REPOSITORY=https://github.com/you/your-fork) for Colab"
	@echo "make bench    time a round against a bare loop (10 min)   make bench-scaling  up to 1,000 nodes"
	@echo "make figures  draw _static/ again"
	@echo "make stop     end a run that goes on, here or in another terminal"
	@echo "make clean    remove .venv, the book and Flower's folder (outputs/ stays)"

setup: $(VENV)/.installed
$(VENV)/.installed: requirements.txt fedlib/pyproject.toml
	@command -v $(PYTHON) > /dev/null || { \
	  echo "$(PYTHON): expected Python 3.11 to 3.14, found no such command; try: make PYTHON=python3.12"; exit 1; }
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(not (3, 11) <= v < (3, 15) and \
	  "Python: expected 3.11 to 3.14, got %d.%d; try: make PYTHON=python3.12" % v)'
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { \
	  echo "Python: expected the venv module; on Debian: apt install python3-venv"; exit 1; }
	@$(PYTHON) tests/machine.py setup $(VENV)
	@mkdir -p .flwr; exec 9> .flwr/setup.lock; $(PYTHON) tests/machine.py alone 9 setup && \
	echo "Installing into $(VENV): some 6 GB on Linux, much less elsewhere ..." && \
	$(PYTHON) -m venv $(VENV) && \
	{ $(BIN)/python -m pip install -qq --disable-pip-version-check uv || { \
	  echo "pip: expected to get uv from PyPI, got the above; is there a network, or a proxy (HTTPS_PROXY)?"; exit 1; }; } && \
	$(BIN)/uv pip install --quiet --python $(BIN)/python -r requirements.txt
	@touch $@

# What a learner does not need: tests, checks, the book.
setup-dev: $(VENV)/.installed-dev
$(VENV)/.installed-dev: $(VENV)/.installed tests/requirements.txt
	$(BIN)/uv pip install --quiet --python $(BIN)/python -r tests/requirements.txt
	@touch $@

# flwr run exits with 0 even when the run fails: the newest run's status tells. Ctrl-C ends only
# its log, so the SuperLink, and with it the training, is stopped however this ends. It is also
# stopped before: one is left where nobody could (kill -9, a power cut).
run: setup
	@mkdir -p .flwr; exec 9> .flwr/run.lock; $(BIN)/python tests/machine.py alone 9 run || exit 1; \
	$(MAKE) --no-print-directory stop; \
	$(BIN)/python tests/machine.py run "$(FLWR_LOCAL_SUPERLINK_HTTP_API_PORT)" "$(PROCESSES)" || exit 1; \
	trap 'exit 130' INT HUP; trap '$(MAKE) --no-print-directory stop' EXIT; \
	PATH="$(CURDIR)/$(BIN):$$PATH"; export PATH; \
	flwr run fedlib --stream \
	  --federation-config "num-supernodes=$(NODES) client-resources-num-cpus=1 $(PROCESSES:%=init-args-num-cpus=%)" \
	  --run-config "output-dir='$(CURDIR)/outputs'" --run-config "$(CONFIG)" 9>&- && \
	flwr list local --format json | grep '"status"' | head -n 1 | grep -q completed

# flwr run leaves a SuperLink in the background, and one stopped leaves a run that was going on.
stop:
	@[ ! -e $(VENV)/.installed ] || $(BIN)/python -m fedlib.processes "$(FLWR_HOME)"

test: setup-dev
	$(BIN)/python -m pytest
	$(BIN)/python -m pytest --nbmake --nbmake-timeout=600 notebooks

# The hooks of .pre-commit-config.yaml, here over everything and also without git; and types.
check: setup-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/codespell --check-hidden .ci .github _static fedlib notebooks tests *.md *.yaml *.toml *.txt .*.yaml Makefile
	$(BIN)/python .ci/files.py
	$(BIN)/mypy

lab: setup
	$(BIN)/jupyter lab --ServerApp.root_dir=. notebooks/00-start-here.ipynb

# One: make notebooks ONLY=05-one-round.ipynb
notebooks: setup-dev
	$(BIN)/python notebooks/refresh.py $(ONLY)

# A fork's own: make address REPOSITORY=https://github.com/you/your-fork BRANCH=main
# None again: make address REPOSITORY=none
address: setup
	@$(BIN)/python notebooks/address.py -- "$(REPOSITORY)" "$(BRANCH)"

# From the committed outputs: nothing is executed, nothing fetched.
book: setup-dev
	$(BIN)/python _static/book/build.py

bench: setup
	$(BIN)/python _static/make_benchmark.py

bench-scaling: setup
	$(BIN)/python _static/make_benchmark.py scaling

figures: setup
	$(BIN)/python _static/make_figures.py

clean: stop
	rm -rf $(VENV) .flwr .book
