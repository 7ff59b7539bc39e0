# Each target makes an isolated environment in .venv if there is none, and installs only what changed.
#   make demo    install the core, make a picture, say where it is
#   make test    install everything that runs without a GPU, run the tests
#   make slow    the tests that take longer
#   make check   lint, format, types, import rules
# PYTHON chooses the interpreter (3.11 or newer); pip reads its usual configuration, for example PIP_INDEX_URL.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --disable-pip-version-check --quiet -c constraints.txt

# As in pyproject.toml's extra `tensorrt-rtx`, where their versions are pinned to each other.
RTX := onnxruntime-ep-nv-tensorrt-rtx-cu13==0.5.0 tensorrt-rtx-cu13-bindings==1.7.1.116
# TensorRT itself cannot be had where CI runs; its Python bindings are held against ours.
TENSORRT := tensorrt-cu13-bindings==11.4.0.106

export OMP_WAIT_POLICY := PASSIVE
# Nothing here needs a model from the network.
export HF_HUB_OFFLINE := 1

.DEFAULT_GOAL := help
.PHONY: help demo test slow check format constraints clean

help:
	@sed -n 's/^#   //p' Makefile

demo: $(VENV)/.core
	$(BIN)/tdm-serve generate "two red circles" -o demo.png
	@echo "The picture is at $(CURDIR)/demo.png"

test: $(VENV)/.test
	$(BIN)/python -m pytest

slow: $(VENV)/.test
	$(BIN)/python -m pytest -m "slow and not gpu"

check: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python
	$(BIN)/lint-imports --no-cache

format: $(VENV)/.test
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.core: pyproject.toml constraints.txt | $(BIN)/python
	$(PIP) -e .
	@touch $@

$(VENV)/.test: pyproject.toml constraints.txt | $(BIN)/python
	$(PIP) -e '.[all,test]'
	$(PIP) --no-deps --upgrade --target $(VENV)/fp8 torchao # apart, for tests/tdm_serve/test_quantise.py
	$(PIP) --no-deps --upgrade --target $(VENV)/rtx $(RTX) # apart, proprietary; for tests/tdm_exporters/test_tensorrt_rtx.py
	$(PIP) --no-deps --upgrade --target $(VENV)/tensorrt $(TENSORRT) # apart, proprietary; for tests/tdm_exporters/test_tensorrt_plugin.py
	@touch $(VENV)/.core $@

# Newest versions that fit pyproject.toml, from a fresh environment. Run the tests before committing the result.
constraints:
	rm -rf .venv-constraints
	$(PYTHON) -m venv .venv-constraints
	.venv-constraints/bin/python -m pip install --disable-pip-version-check --quiet -e '.[all,fp8,test]'
	sed '/^[^#]/d; /^$$/d' constraints.txt > .venv-constraints/new
	.venv-constraints/bin/python -m pip freeze --all --exclude-editable \
		| sed -E 's/\+[a-z0-9.]+$$//' | grep -Eiv '^(pip==|nvidia[-_]|cuda[-_])' >> .venv-constraints/new
	mv .venv-constraints/new constraints.txt
	rm -rf .venv-constraints

clean:
	rm -rf $(VENV) .venv-constraints dist build demo.png .pytest_cache .ruff_cache .import_linter_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
