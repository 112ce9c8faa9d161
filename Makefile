# make demo    the block on real images; make test    the tests. Both set up .venv, install and build what is missing first.
#
# Variables: PYTHON (python3), VENV (.venv), TORCH (what pip installs as torch: a version, or a version and an index),
# ARGS (more arguments for the command).

PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch==2.13.0
ARGS ?=

export PATH := $(abspath $(VENV))/bin:$(PATH)
export PIP_DISABLE_PIP_VERSION_CHECK := 1

SOURCES := $(shell find csrc -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh') setup.py pyproject.toml \
	gcnet_ext/_build.py gcnet_ext/_version.py
# The name says which torch is installed, so that another TORCH= installs and builds again.
TAG := $(shell printf '%s' '$(TORCH)' | tr -c 'A-Za-z0-9.' '-')
INSTALLED := $(VENV)/installed-$(TAG)
BUILT := $(VENV)/built-$(TAG)

.PHONY: demo test lint format bench build clean

demo: $(BUILT)
	$(VENV)/bin/python -m gcnet_ext demo $(ARGS)

test: $(BUILT)
	$(VENV)/bin/python -m pytest $(ARGS)

bench: $(BUILT)
	$(VENV)/bin/python bench/global_context.py $(ARGS)

build: $(BUILT)

lint: $(INSTALLED)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/clang-format --dry-run --Werror $(filter csrc/%,$(SOURCES))

format: $(INSTALLED)
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .
	$(VENV)/bin/clang-format -i $(filter csrc/%,$(SOURCES))

$(INSTALLED): requirements-dev.txt
	test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	rm -f $(VENV)/installed-* $(VENV)/built-*
	$(VENV)/bin/pip install --quiet $(TORCH)
	$(VENV)/bin/pip install --quiet -r requirements-dev.txt
	touch $@

$(BUILT): $(INSTALLED) $(SOURCES)
	$(VENV)/bin/pip install --quiet --no-build-isolation --no-deps -e .
	touch $@

clean:
	rm -rf build dist *.egg-info gcnet_ext/*.so $(VENV)/built-*
