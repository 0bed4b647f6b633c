# Two commands for a bare machine with Python 3.11 or newer: make pretrain, make test.
# With an NVIDIA GPU, by the CUDA version of its driver: make pretrain GPU=cuda13, or GPU=cuda12.
PYTHON ?= python3
VENV   ?= .venv
BIN     = $(VENV)/bin
ARGS   ?=
GPU    ?=
EXTRA   = $(if $(GPU),[$(GPU)])
comma  := ,
ifeq ($(filter cuda12 cuda13,$(GPU))$(GPU),$(GPU))
ifneq ($(GPU),)
$(error GPU=$(GPU): choose cuda12 or cuda13, by the CUDA version that nvidia-smi shows)
endif
endif

# Tests start hundreds of processes: each would compile apr anew where bytecode is not kept.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: pretrain test gpu-test lint docs install dev clean

pretrain: install
	$(BIN)/python tools/pretrain.py $(ARGS)

# Two processes, each with whole files of tests: what a file makes once is made once. In a fresh checkout the kernels of the CPU
# are compiled beside mypy: for either, and for tests that would wait for the kernels, the other core has nothing to do.
test: dev
	$(BIN)/python -c 'import apr.backends.cpu.ops' & $(MAKE) --no-print-directory lint && wait
	$(BIN)/python -m pytest -n 2 --dist loadfile $(ARGS)

# On a machine with a GPU, with the environment that is there: nothing is installed.
gpu-test:
	$(if $(wildcard $(BIN)/python),$(BIN)/python,$(PYTHON)) tools/gpu_tests.py $(ARGS)

lint: dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

# The site in site/, from docs/ and the commands' options.
docs: $(VENV)/.docs
	$(BIN)/python tools/docs.py
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

install: $(VENV)/.installed$(GPU)
dev: $(VENV)/.dev$(GPU)

$(VENV)/bin/python:
	$(PYTHON) -c 'import sys; sys.exit(f"apr needs Python 3.11 or newer, this is {sys.version.split()[0]}: make PYTHON=python3.12 ..." if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed$(GPU): setup.cfg | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.$(EXTRA)'
	touch $@

$(VENV)/.dev$(GPU): setup.cfg tests/support/nvrtc.txt | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[dev$(if $(GPU),$(comma)$(GPU))]'
	rm -rf $(VENV)/nvrtc
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --target $(VENV)/nvrtc -r tests/support/nvrtc.txt
	touch $@ $(VENV)/.installed $(VENV)/.installed$(GPU)

$(VENV)/.docs: setup.cfg | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[docs]'
	touch $@

clean:
	rm -rf $(VENV) build dist site *.egg-info .pytest_cache .ruff_cache .mypy_cache
