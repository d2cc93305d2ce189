# `make` lists the targets. Everything runs in .venv, which `make build` creates.
#   SOURCE=URI   where the demo's bits come from   (make demo SOURCE=replay:FILE)
PYTHON ?= python3
SOURCE ?= sim:seed=7
VENV   := .venv
PY     := $(VENV)/bin/python
STAMP  := $(VENV)/.installed
SYSTEM_TORCH := $(shell $(PYTHON) -c "import torch" 2>/dev/null && echo --system-site-packages)
TORCH  ?= torch==2.13.0
SANITIZER := $(shell command -v compute-sanitizer || ls /usr/local/cuda/bin/compute-sanitizer 2>/dev/null)

.DEFAULT_GOAL := help
.PHONY: help build demo test test-gpu bench bench-gpu soak lint clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "  make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

$(STAMP): pyproject.toml
	$(PYTHON) -m venv $(SYSTEM_TORCH) $(VENV)
	$(PY) -c "import torch" 2>/dev/null || $(PY) -m pip install -q $(TORCH)
	$(PY) -c "import pybind11, setuptools" 2>/dev/null || $(PY) -m pip install -q "setuptools>=68" "pybind11>=2.12"
	touch $@

build: $(STAMP) ## create .venv and install the package in place (compiles C++, and CUDA where nvcc is found)
	$(PY) -m pip install -q --no-build-isolation -e ".[test]"

demo: build ## train a small transformer with quantum dropout beside torch's, and sample text (SOURCE=URI)
	$(PY) -m everett_cuda.demo --source "$(SOURCE)"

test: build ## run the test suite on two workers (no GPU and no device needed)
	$(PY) -m pytest -q -n 2 --dist loadfile

test-gpu: build ## run the tests that need an NVIDIA GPU, also under compute-sanitizer where it is found
	$(PY) -m pytest -q -m gpu tests/gpu
	@if [ -z "$(SANITIZER)" ]; then echo "compute-sanitizer not found: memcheck, racecheck and initcheck were not run"; exit 0; fi; \
	for tool in memcheck racecheck initcheck; do \
	  echo "compute-sanitizer --tool $$tool"; \
	  $(SANITIZER) --tool $$tool --error-exitcode 1 $(PY) tests/gpu/sanitizer_driver.py || exit 1; \
	done

bench: build ## run the CPU benchmarks and write their rows to benchmarks/results
	$(PY) -m benchmarks.run --device cpu

bench-gpu: build ## run the GPU benchmarks and write their rows to benchmarks/results
	$(PY) -m benchmarks.run --device cuda

soak: build ## the broker: clients and brokers killed at random, 10,000 connections, 10^8 blocks; none may come twice
	cd tests && ../$(PY) broker_soak.py

lint: $(STAMP) ## check style (ruff)
	$(PY) -c "import ruff" 2>/dev/null || $(PY) -m pip install -q ruff
	$(PY) -m ruff check .

clean: ## remove everything that was built
	rm -rf $(VENV) build dist *.egg-info everett_cuda/*.so demo
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
