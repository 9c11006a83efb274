# `make demo` and `make test` are all a fresh machine needs.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
XLA_VENV := .venv-xla

.PHONY: venv demo test test-npu-contract test-gpu test-xla lint docs benchmarks clean

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

# A file stays in one process: its fixtures, and what torchao compiles for it, are made once. Files are taken in turn:
# xdist would leave those of few tests to the end, which take longest.
test: venv
	$(BIN)/python -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder

# Needs a CUDA GPU and a torch built for it, and fails without.
test-gpu: venv
	LIGHTNING_OPTIM_GPU_TESTS_DEVICE=cuda $(BIN)/python -m pytest tests/gpu

# Reads the real torch_npu without importing it: without Ascend's CANN it cannot be imported. 43 MB.
test-npu-contract: venv
	$(BIN)/python -m pip download --quiet --no-deps --dest build/torch_npu torch-npu==2.13.0
	TORCH_NPU_WHEEL=$$(ls build/torch_npu/*.whl) $(BIN)/python -m pytest tests/trainer/test_npu.py -k real_one

# Trains on an XLA device, PJRT on the host's CPU: torch_xla needs a torch of its own, hence an environment of its own.
# Some files of the ordinary tests show that the package works with that torch, too.
test-xla: $(XLA_VENV)/.installed
	CUDA_VISIBLE_DEVICES= LIGHTNING_OPTIM_XLA_TESTS=1 $(XLA_VENV)/bin/python -m pytest tests/xla \
	    tests/test_imports.py tests/table/test_registry.py tests/build/test_config.py \
	    tests/optimizers/test_anyprecision.py tests/optimizers/test_adafactor.py \
	    tests/trainer/test_schedule_free.py tests/trainer/test_fused.py tests/trainer/test_xla_absent.py \
	    tests/layerwise/test_layerwise.py::TestClipping tests/layerwise/test_layerwise.py::TestLiveGradients

# 4.9 GB. torch is linked against CUDA's libraries; cuDNN's parts are opened only when a GPU computes, 1 GB less.
$(XLA_VENV)/.installed: requirements-xla.txt
	test -x $(XLA_VENV)/bin/python || $(PYTHON) -m venv $(XLA_VENV)
	$(XLA_VENV)/bin/python -m pip install --quiet --no-cache-dir --no-deps --no-compile --requirement requirements-xla.txt
	$(XLA_VENV)/bin/python -m pip install --quiet --no-deps --editable .
	rm -f $(XLA_VENV)/lib/python*/site-packages/nvidia/cudnn/lib/libcudnn_*
	touch $@

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
	rm -rf $(VENV) $(XLA_VENV) docs/_build docs/generated demo_output
