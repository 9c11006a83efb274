# `make demo` and `make test` are all a fresh machine needs.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: venv demo test lint docs benchmarks clean

venv: $(VENV)/.installed

# Everything this machine can run. The constraints pin the versions that were tested.
$(VENV)/.installed: pyproject.toml setup.cfg constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[test,docs,examples]"
	touch $@

# Trains the GPT of examples/ with adamw_torch, adamw_torch_layerwise and adamw_8bit on text that ships with Python.
demo: venv
	$(BIN)/python examples/demo.py

# A file stays in one process: its fixtures, and what torchao compiles for it, are made once.
test: venv
	$(BIN)/python -m pytest --numprocesses 2 --dist loadfile

lint: venv
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Warnings are errors. The snippets in the pages are executed by `make test`.
docs: venv
	$(BIN)/python docs/generate.py
	$(BIN)/sphinx-build --fail-on-warning --keep-going --quiet -b html docs docs/_build

# Prints ratios of interleaved runs, with the hardware and the versions.
benchmarks: venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[benchmarks]"
	$(BIN)/python benchmarks/layerwise.py
	$(BIN)/python benchmarks/optimizers.py

clean:
	rm -rf $(VENV) docs/_build docs/generated demo_output
