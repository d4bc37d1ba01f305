# The front door for developers: what CI does, and everything that leads up to it.
#
# Each target sets up what it needs in a virtual environment, which takes a minute once and nothing after that. The
# variable PYTHON chooses another interpreter (make test PYTHON=python3.12), VENV another place, COUNT how many rounds
# there are of make torture, TESTS which tests to run.

PYTHON ?= python3
VENV ?= .venv
COUNT ?= 200
TESTS ?=
BIN := $(VENV)/bin
PROGRAM := $(VENV)/.stamp-program

.DEFAULT_GOAL := help
.PHONY: help demo test lowest coverage check docs benchmark torture clean
# A target that is interrupted leaves no half-made file behind.
.DELETE_ON_ERROR:
# One pip at a time.
.NOTPARALLEL:

help: ## Show what can be made
	@sed -n 's/^\([a-z]*\):.*## \(.*\)/\1\t\2/p' $(firstword $(MAKEFILE_LIST)) | while IFS="$$(printf '\t')" read -r name text; \
		do printf 'make %-10s %s\n' "$$name" "$$text"; done

demo: $(PROGRAM) ## Synchronize a large file with an older copy on loopback (takes less than a minute)
	@$(BIN)/python scripts/demo.py

# Most tests wait for processes to start and to end, so several of them at a time keep two cores busy.
test: $(VENV)/.stamp-tests ## Run all tests (takes some minutes)
	@$(BIN)/python -m pytest -q -n 4 $(TESTS)

lowest: ## Those that have to do with libraries, with the oldest ones that are admitted
	@mkdir -p $(VENV)-lowest
	@$(PYTHON) scripts/lowest.py requirements.txt requirements-client.txt requirements-server.txt >$(VENV)-lowest/constraints.txt
	@PIP_CONSTRAINT=$(abspath $(VENV)-lowest/constraints.txt) $(MAKE) --no-print-directory test VENV=$(VENV)-lowest \
		TESTS="tests/client tests/server tests/test_cli.py tests/test_interop.py tests/test_mp.py tests/test_replica.py"

coverage: $(VENV)/.stamp-tests ## The same, and show what they leave out (takes three times as long)
	@$(BIN)/python -m pytest -q -n 4 --cov

check: $(VENV)/.stamp-checks ## Let ruff and mypy look for mistakes, and compare the code with its picture
	@$(BIN)/ruff check
	@$(BIN)/ruff format --check --quiet
	@$(BIN)/mypy
	@$(BIN)/python scripts/picture.py

docs: $(VENV)/.stamp-docs ## Build the documentation in docs/_build/html (warnings are errors)
	@$(BIN)/sphinx-build -W --keep-going -q -b html docs docs/_build/html
	@echo "The documentation begins at docs/_build/html/index.html"

benchmark: $(VENV)/.stamp-tests ## Compare with rsync and with the limits of this machine
	@$(BIN)/python -m benchmarks

torture: $(VENV)/.stamp-tests ## Attack random runs at random moments, for a long time
	@$(BIN)/python -m tests.torture --count $(COUNT)

clean: ## Remove whatever was made here, the virtual environment included
	rm -rf $(VENV) $(VENV)-lowest .tox .coverage .coverage.* .pytest_cache .mypy_cache .ruff_cache .hypothesis htmlcov
	rm -rf build dist pdiffcopy.egg-info docs/_build
	find pdiffcopy tests docs -name __pycache__ -prune -exec rm -rf {} +

$(PROGRAM): setup.py requirements.txt requirements-client.txt requirements-server.txt
	@$(PYTHON) -c 'import sys; sys.exit("pdiffcopy needs Python 3.10 or newer" if sys.version_info < (3, 10) else 0)'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --editable '.[client,server]'
	@touch $@

$(VENV)/.stamp-%: requirements-%.txt $(PROGRAM)
	$(BIN)/pip install --quiet --requirement $<
	@touch $@
