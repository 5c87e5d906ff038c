# Requires Python 3.11 or newer with pip, and make. Everything else is installed into $(VENV).

PYTHON ?= python3
VENV ?= .venv
BENCH_VENV ?= .venv-bench
# Options for the benchmarks: BENCH="--workload step --contender ptacc"
BENCH ?=

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet --constraint constraints.txt
BENCH_PYTHON := $(BENCH_VENV)/bin/python
BENCH_PIP := $(BENCH_PYTHON) -m pip --disable-pip-version-check
STUBBED := accelerate deepspeed fsspec

define REPORT_TORCH
import os, torch
print("torch", torch.__version__)
assert torch.version.cuda is None or os.environ.get("CI") != "true", "CI requires the CPU build of torch"
endef
export REPORT_TORCH

# Otherwise pyright checks for a newer version over the network in every run.
export PYRIGHT_PYTHON_IGNORE_WARNINGS := 1

.DEFAULT_GOAL := help
# The steps share one environment and run from the fastest to the slowest check.
.NOTPARALLEL:
.PHONY: help quickstart test check docs prove examples bench figures format clean

help: ## list the targets
	@sed -n 's/^\([a-z]*\):.*## /\1\t/p' $(MAKEFILE_LIST)

quickstart: $(VENV)/.installed-examples ## install the library and train on the digits
	$(BIN)/python examples/digits.py

test: check docs ## run all checks: static checks, documentation, tests
	$(BIN)/python -m pytest --numprocesses 2 --dist worksteal

check: $(VENV)/.installed-dev ## run the static checks only
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/pyright --pythonpath $(BIN)/python
	MYPYPATH=stubs $(BIN)/python -m mypy.stubtest $(STUBBED) --concise --ignore-missing-stub --mypy-config-file mypy.ini

docs: $(VENV)/.installed-dev ## build the documentation; warnings are errors
	$(BIN)/sphinx-build -W --keep-going -n -q -b html docs docs/_build/html

prove: $(VENV)/.installed-dev ## run the long tests
	$(BIN)/python -m pytest -m prove

examples: $(VENV)/.installed-dev ## run the examples and write the table of docs/guides/examples.md
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.examples.qualities

bench: $(BENCH_VENV)/.installed ## compare the speed of ptacc, plain PyTorch and other trainers
	$(BENCH_PYTHON) -m benchmarks.speed $(BENCH)

figures: $(BENCH_VENV)/.installed ## measure the figures of docs/reference/speed.md again
	$(BENCH_PYTHON) -m benchmarks.speed --out docs/reference/speed $(BENCH)
	OMP_NUM_THREADS=1 $(BENCH_PYTHON) -m benchmarks.checkpoints --out docs/reference/speed/checkpoints.txt

format: $(VENV)/.installed-dev ## format the code
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean: ## remove build outputs and caches, but not the environment
	rm -rf docs/_build dist build .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find src tests examples -name __pycache__ -type d -prune -exec rm -rf {} +

# torch is installed first and pinned. Resolved together with the rest, pip can select a build with gigabytes of CUDA.
$(VENV)/.installed-torch: constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) torch
	@touch $@

$(VENV)/.installed-examples: $(VENV)/.installed-torch pyproject.toml
	$(PIP) --editable ".[examples]"
	@$(BIN)/python -c "$$REPORT_TORCH"
	@touch $@

# timm and torchvision have a folder of their own, which tests/vision/environment.py adds to the path: torchmetrics,
# transformers and Accelerate's launcher import them if they are installed, and the wheel of torchvision cannot be imported
# beside a CPU build of torch as it is. Without --no-deps, pip could replace torch.
$(VENV)/.installed-dev: $(VENV)/.installed-torch pyproject.toml
	$(PIP) --editable ".[dev,docs,examples]"
	$(PIP) --no-deps --upgrade --target $(VENV)/vision timm torchvision
	@$(BIN)/python -c "$$REPORT_TORCH"
	@touch $@

$(BENCH_VENV)/.installed: constraints.txt benchmarks/requirements.txt pyproject.toml
	$(PYTHON) -m venv $(BENCH_VENV)
	$(BENCH_PIP) install --quiet --constraint constraints.txt torch
	$(BENCH_PIP) install --quiet --constraint constraints.txt --requirement benchmarks/requirements.txt --editable .
	$(BENCH_PIP) uninstall --quiet --yes torchvision
	@touch $@
