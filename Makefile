# `make demo` and `make test` are all a fresh machine needs.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
XLA_VENV := .venv-xla
COLLECTIONS_VENV := .venv-collections
# For another Python: `make test-oldest PYTHON=python3.10 OLDEST_VENV=.venv-oldest-3.10`.
OLDEST_VENV := .venv-oldest

.PHONY: venv demo test test-benchmarks test-sharded test-long test-collections test-npu-contract test-gpu test-xla test-oldest test-python test-installed newest stress stress-quick tried lint docs browser figures notebook benchmarks bench-quick bench-choose survey clean

# Where the figures of pages go.
FIGURES := docs/bench

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
	$(BIN)/python -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder --ignore tests/test_benchmarks.py

# The scripts in benchmarks/, each with tiny models.
test-benchmarks: venv
	$(BIN)/python -m pytest tests/test_benchmarks.py

# What `make test` does with one name of each kind in several processes, for all of them: our optimizers on shards, in two
# and in four; checkpoints from 1, 2 and 4 in 1, 2 and 4; pairs of optimizers under ddp.
test-sharded: venv
	LIGHTNING_OPTIM_SHARDED_TESTS=1 $(BIN)/python -m pytest tests/sharded tests/trainer/test_composite_ddp.py

# 10,000 steps, 300 fits, 2,000 parameters, four processes: nothing grows, and nothing touches each other. Five minutes.
test-long: venv
	LIGHTNING_OPTIM_LONG_TESTS=1 $(BIN)/python -m pytest tests/long

# Optimizers of the big collections, which no row describes, in an environment of their own. timm needs torchvision: see
# benchmarks/declare_torchvision_operators.py.
test-collections: $(COLLECTIONS_VENV)/.installed
	$(COLLECTIONS_VENV)/bin/python -m pytest tests/collections

$(COLLECTIONS_VENV)/.installed: pyproject.toml setup.cfg constraints.txt requirements-collections.txt
	test -x $(@D)/bin/python || $(PYTHON) -m venv $(@D)
	$(@D)/bin/python -m pip install --quiet --constraint constraints.txt torch \
	    --requirement requirements-collections.txt --editable ".[cli]"
	$(@D)/bin/python -c "import torchvision" 2> /dev/null || $(@D)/bin/python benchmarks/declare_torchvision_operators.py
	touch $@

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
	    tests/test_imports.py tests/compat tests/table/test_registry.py tests/build/test_config.py \
	    tests/optimizers/test_anyprecision.py tests/optimizers/test_adafactor.py \
	    tests/trainer/test_schedule_free.py tests/trainer/test_fused.py tests/trainer/test_xla_absent.py \
	    tests/layerwise/test_layerwise.py::TestClipping tests/layerwise/test_layerwise.py::TestLiveGradients

# The oldest versions that pyproject.toml promises. Left out is what needs torchao, which torch 2.9 is too old for, or
# transformers, and of thirty steps the longer half.
test-oldest: $(OLDEST_VENV)/.installed
	CUDA_VISIBLE_DEVICES= $(OLDEST_VENV)/bin/python -m pytest \
	    tests/test_imports.py tests/compat tests/table/test_registry.py tests/table/test_table.py \
	    tests/groups/test_param_groups.py \
	    tests/build/test_config.py tests/build/test_rules.py tests/build/test_schedules.py \
	    tests/layerwise/test_layerwise_engine.py tests/trainer/test_cli.py tests/trainer/test_doors.py \
	    tests/trainer/test_finders.py tests/trainer/test_mixin.py tests/trainer/test_packages.py \
	    tests/trainer/test_plateau.py tests/trainer/test_schedule_free.py tests/trainer/test_training.py \
	    -k "not 4bit and not torch_8bit and not torch_fp8 and not torchao and not tensor_learning_rates and not compiler \
	        and not hugging_face and not relative_step_makes_the_learning_rate2 and not lr_is_known1 \
	        and not (thirty_steps and (clip or accumulate))"

# Other versions of Python, where this machine has them: see .ci/test-python.
test-python:
	.ci/test-python 3.10 3.12 3.13

# The environments with torch 2.9, almost 5 GB each. torch is linked against CUDA's libraries; cuDNN's parts are opened
# only when a GPU computes, 1 GB less.
$(XLA_VENV)/.installed: REQUIREMENTS := requirements-xla.txt
$(OLDEST_VENV)/.installed: REQUIREMENTS := requirements-oldest.txt
$(XLA_VENV)/.installed: requirements-xla.txt
$(OLDEST_VENV)/.installed: requirements-oldest.txt
$(XLA_VENV)/.installed $(OLDEST_VENV)/.installed: requirements-torch-2.9.txt
	test -x $(@D)/bin/python || $(PYTHON) -m venv $(@D)
	$(@D)/bin/python -m pip install --quiet --no-cache-dir --no-deps --no-compile --requirement $(REQUIREMENTS)
	$(@D)/bin/python -m pip install --quiet --no-deps --editable .
	rm -f $(@D)/lib/python*/site-packages/nvidia/cudnn/lib/libcudnn_*
	touch $@

# Whatever may meet in a fit, in pairs: docs/reliability.md. Ctrl-C interrupts it, and the same command goes on. The
# quick form, in which every value occurs, is a part of `make test`, too.
stress: venv
	OMP_NUM_THREADS=1 $(BIN)/python -W ignore -m tests.stress --output $(FIGURES)/stress.json

stress-quick: venv
	OMP_NUM_THREADS=1 $(BIN)/python -W ignore -m tests.stress --quick

# How many tests try what: docs/bench/tried.json, for docs/reliability.md.
tried: venv
	$(BIN)/python docs/tried.py $(FIGURES)/tried.json

# What users install: the source archive and the wheel, each where nothing of the repository is.
test-installed: venv
	.ci/test-installed $(BIN)/python

# Which versions pip finds today: docs/newest.json, for the table in docs/hardware.md. Installs nothing.
newest: venv
	$(BIN)/python docs/newest.py

lint: venv
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Warnings are errors. The snippets in the pages are executed by `make test`. All pages are written, whatever changed:
# Sphinx forgets the index entries of others, and the search does not find them any more.
docs: venv
	$(BIN)/python docs/generate.py
	$(BIN)/sphinx-build --fail-on-warning --keep-going --quiet --write-all -b html docs docs/_build

# The pages as Chromium shows them, wide and narrow, light and dark: they fit, the filter and the search find, links lead
# somewhere. Needs Chromium and its driver: apt-get install chromium chromium-driver
browser: docs
	LIGHTNING_OPTIM_BROWSER_TESTS=1 $(BIN)/python -m pytest tests/browser

# The pictures, and the tables between markers in the pages, from the files that benchmarks wrote into docs/bench/.
figures: venv
	$(BIN)/python docs/figures.py

# Executes examples/quickstart.ipynb and stores its outputs. `make test` executes a copy and compares.
notebook: venv
	$(BIN)/python examples/notebook.py

# Prints ratios of interleaved runs, with the hardware and the versions. Those that pages show go to $(FIGURES), too.
benchmarks: venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[benchmarks]"
	$(BIN)/python benchmarks/layerwise.py --output $(FIGURES)
	$(BIN)/python benchmarks/families.py --output $(FIGURES)
	$(BIN)/python benchmarks/monitor.py --output $(FIGURES)
	$(BIN)/python benchmarks/sharded.py --output $(FIGURES)
	$(BIN)/python benchmarks/dealt.py --output $(FIGURES)
	$(BIN)/python benchmarks/muon.py --output $(FIGURES)
	$(BIN)/python benchmarks/optimizers.py --output $(FIGURES)

# Optimizers side by side on a small GPT, in a few minutes; the figures and the picture of docs/bench.md, unless another
# folder is given. Its tensors are so small that threads cost more than they bring. Fails if a training diverged.
bench-quick: venv
	rm -rf build/bench-quick
	OMP_NUM_THREADS=1 $(BIN)/lightning-optim bench --quick --output build/bench-quick
	mkdir -p $(FIGURES)
	cp build/bench-quick/report.json build/bench-quick/report.txt build/bench-quick/bench.png $(FIGURES)
	LIGHTNING_OPTIM_BENCH_FIGURES=$(FIGURES) $(BIN)/python -m pytest tests/bench/test_bench.py -k figures

# What docs/choosing.md compares, on the same GPT; `make figures` then draws it. Rates are around the best that is known.
PROJECTED := rank=32,update_proj_gap=50
bench-choose: venv
	OMP_NUM_THREADS=1 $(BIN)/lightning-optim bench adamw_torch,lr=0.003 adamw_torch_layerwise,lr=0.003 \
	    adamw_8bit,lr=0.003 adamw_8bit_layerwise,lr=0.003 lion_8bit,lr=0.001 galore_adamw,lr=0.02,$(PROJECTED) \
	    galore_adamw_8bit_layerwise,lr=0.02,$(PROJECTED) apollo_mini_layerwise,lr=0.00316,update_proj_gap=50 \
	    muon,lr_scale=match_rms_adamw,lr=0.0316 adafactor,lr=0.003 adalomo,lr=0.03 \
	    schedule_free_adamw,lr=0.00316 --quick --lrs 3 --no-picture --output build/bench-choose
	cp build/bench-choose/report.json $(FIGURES)/choose.json

# Every optimizer class of torch.optim and the big collections against every promise: docs/other-optimizers.md. Ctrl-C
# interrupts it, and the same command goes on.
survey: $(COLLECTIONS_VENV)/.installed
	$(COLLECTIONS_VENV)/bin/python benchmarks/survey.py

clean:
	rm -rf $(VENV) $(XLA_VENV) $(COLLECTIONS_VENV) $(OLDEST_VENV) $(VENV)-3.* docs/_build docs/generated demo_output
