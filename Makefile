# `make demo` and `make test` set up all they need; a second call does only what has changed.
PYTHON ?= python3
VENV ?= .venv
PY := $(VENV)/bin/python
# Test workers share the cores: one thread each, but as many workers as cores.
WORKERS ?= $(shell nproc 2>/dev/null || echo 1)
CPU_SOURCES := setup.py anomem/ops/sources.py csrc/checks.h $(wildcard csrc/cpu/*)
CUDA_SOURCES := setup.py anomem/ops/sources.py csrc/checks.h $(wildcard csrc/cuda/*)

.PHONY: help setup build demo test test-gpu test-ptx test-ahead test-floor lint bench report sanitize clean

help:
	@echo 'make setup     a virtual environment with the kernels built'
	@echo 'make demo      train AnoMem on real images, print the table, draw the figures (a few minutes)'
	@echo 'make test      the whole test suite, without a GPU'
	@echo 'make lint      ruff and mypy'
	@echo 'make bench     kernels against plain PyTorch and its rivals, on this machine'
	@echo 'make report    tables and pictures from the committed rows of benchmarks/results'
	@echo 'make test-gpu  the tests that need a CUDA GPU'
	@echo 'make test-ptx  execute every compiled Triton kernel on the CPU (about an hour on two cores)'
	@echo 'make test-ahead  compile every shipped tile of every Triton kernel and compare with the committed rows'
	@echo 'make test-floor  kernels and functions with the oldest torch and Triton'
	@echo 'make sanitize  the CPU kernels under AddressSanitizer and UndefinedBehaviorSanitizer'
	@echo 'make clean     everything that was built (the virtual environment stays)'

setup: $(VENV)/.installed build

# Modules are compiled as they are imported: an installation would compile thousands that nobody imports.
INSTALL := -m pip install --quiet --no-compile

# All that a build needs, so that compilers and the rest of the installation run side by side.
$(VENV)/.torch:
	$(PYTHON) -m venv $(VENV)
	$(PY) $(INSTALL) --upgrade pip
	$(PY) $(INSTALL) torch torchvision 'setuptools>=77' wheel ninja packaging
	@touch $@

$(VENV)/.installed: pyproject.toml $(VENV)/.torch
	ANOMEM_BUILD=none $(PY) $(INSTALL) --no-build-isolation --editable '.[dev,lab,export,peers,pretrained,elpv]'
	@touch $@

build: anomem/_C.so anomem/_C_cuda.so

anomem/_C.so: $(CPU_SOURCES) | $(VENV)/.torch
	ANOMEM_BUILD=cpu $(PY) setup.py --quiet build_ext --inplace
	@touch $@

# Without nvcc this builds nothing and prints a line; that is not an error.
anomem/_C_cuda.so: $(CUDA_SOURCES) | anomem/_C.so
	ANOMEM_BUILD=auto $(PY) setup.py --quiet build_ext --inplace

demo: $(VENV)/.installed anomem/_C.so
	$(PY) -m anomem.demo

test: setup
	OMP_NUM_THREADS=1 $(PY) -m pytest -n $(WORKERS) --dist loadgroup tests

test-gpu: setup
	$(PY) -m pytest -m gpu tests

# The test suite executes one launch of each kernel; this executes all that are shipped.
test-ptx: $(VENV)/.installed
	OMP_NUM_THREADS=1 TRITON_CACHE_DIR=build/ptx $(PY) -m tests.ptx

# The test suite compiles what differs from its committed row and a sample of the rest.
test-ahead: $(VENV)/.installed
	OMP_NUM_THREADS=1 $(PY) -m anomem.kernels.ahead_of_time --check --all --processes $(WORKERS)

# The oldest supported torch and the Triton that came with it run what was built with the newest torch: the library is
# built for the stable ABI of the oldest (setup.py). This torch needs setuptools before 82. What depends on the kernels
# alone is not repeated: accuracy, large sizes, other instruction sets and GPUs; nor is the training loop on a stand-in.
FLOOR := build/floor
ON_KERNELS_ALONE := --ignore=tests/kernels/test_large.py --ignore=tests/native/test_instruction_sets.py \
  --ignore-glob='tests/operators/test_*_accuracy.py' --deselect='tests/stand_in/test_stand_in.py::test_cases[range]' \
  --deselect='tests/stand_in/test_stand_in.py::test_cases[training]' \
  -k 'not (within_budget and not few_rows) and not test_other_gpus and not test_gpu_tests_reach_their_kernels'
test-floor: setup $(FLOOR)/.installed
	$(PY) -c "from tests.stand_in import build; build.obstacle() or build.build()"
	OMP_NUM_THREADS=1 $(FLOOR)/bin/python -m pytest -n $(WORKERS) --dist loadgroup $(ON_KERNELS_ALONE) \
	  tests/operators tests/kernels tests/stand_in tests/functional tests/nn tests/native tests/test_packaging.py

$(FLOOR)/.torch:
	$(PYTHON) -m venv $(FLOOR)
	$(FLOOR)/bin/python $(INSTALL) --upgrade pip
	$(FLOOR)/bin/python $(INSTALL) 'torch==2.11.*' 'torchvision==0.26.*' 'setuptools>=77,<82' wheel ninja
	@touch $@

# After the other environment: both write the package's metadata beside its sources.
$(FLOOR)/.installed: pyproject.toml $(FLOOR)/.torch | $(VENV)/.installed
	ANOMEM_BUILD=none $(FLOOR)/bin/python $(INSTALL) --no-build-isolation --editable '.[dev,lab]'
	@touch $@

# Without mypy's cache: it does not always see that an installed package has changed.
lint: $(VENV)/.installed
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy --no-incremental

bench: setup
	$(PY) -m benchmarks.run --suite kernels --json build/bench.jsonl

report: $(VENV)/.installed
	$(PY) -m benchmarks.report

# Python itself is not instrumented, so the sanitizers' runtime is preloaded, with libstdc++: it looks up the functions
# behind C++ exceptions. --capture=sys keeps a sanitizer's last message visible when it ends the process. Memory that was
# not written is NaN.
sanitize: $(VENV)/.installed
	ANOMEM_BUILD=cpu ANOMEM_SANITIZE=address,undefined $(PY) setup.py --quiet build_ext --force \
	  --build-temp build/sanitized/objects --build-lib build/sanitized
	ANOMEM_LIBRARY=build/sanitized/anomem ASAN_OPTIONS=detect_leaks=0:max_malloc_fill_size=1073741824:malloc_fill_byte=255 \
	  UBSAN_OPTIONS=halt_on_error=1 \
	  LD_PRELOAD="$$(for name in asan ubsan stdc++; do $(CXX) -print-file-name=lib$$name.so; done | tr '\n' ' ')" \
	  $(PY) -m pytest -p no:xdist --capture=sys -k native tests/native tests/operators

clean:
	rm -rf build dist *.egg-info anomem/_C*.so runs .pytest_cache .mypy_cache .ruff_cache .benchmarks
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +
