# `make run` trains, `make test` tests; both need only python3 >= 3.10, git and a C++17 compiler, and put all else
# into .venv, as pinned in constraints.txt. Options pass through: make run ARGS="--nproc 2", make test ARGS="-k plan".

SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:
MAKEFLAGS += --no-print-directory

PYTHON ?= python3
VENV ?= .venv
JOBS ?= 2
ARGS ?=

PY := $(VENV)/bin/python
PIP := $(PY) -m pip --disable-pip-version-check install --quiet -c $(VENV)/constraints.txt
TORCH := $(shell sed -n 's/^\(torch==[^ ;]*\).*/\1/p' constraints.txt)
NVRTC := nvidia-cuda-nvrtc-cu12==12.9.86
CPP := $(shell find hybridcomm kernels -name '*.cpp' -o -name '*.h')
# The installed package's shape, as links: kernels/ is hybridcomm/kernels. Type checker and import linter read it.
LAYOUT := build/layout
BENCH := build/bench

export PATH := $(abspath $(VENV)/bin):$(PATH)

.PHONY: help run test lint format bench fuzz cubins verify install clean layout

help:
	@echo "make run      train on 4 ranks as 2 virtual nodes (ARGS=... passes options; ARGS=--help lists them)"
	@echo "make test     the tests (ARGS=... passes options to pytest)"
	@echo "make lint     format, lint, types, import directions"
	@echo "make format   rewrite Python and C++ sources in the project's format"
	@echo "make bench    in-host benchmarks; as root also those on the virtual cluster"
	@echo "make fuzz     libFuzzer on every decoder and on what is read from the network, 60 s each (needs clang)"
	@echo "make cubins   build the device kernels ahead of time into kernels/cubins/artefacts (no GPU needed), and the pages"
	@echo "              docs/roofline.md and docs/predicted-steps.md"
	@echo "make verify   the long run: tests, property tests, sanitizers, fuzzing, soak; writes docs/verify-report.md"
	@echo "make install  only build and install into $(VENV)"
	@echo "make clean    remove $(VENV), builds and caches"

run: $(VENV)/engine.stamp
	$(PY) -m train.run $(ARGS)

# A worker that dies ends the run: with another in its place pytest-xdist waits for ever for the group that it had.
test: $(VENV)/engine.stamp
	$(PY) -m pytest -n $(JOBS) --dist loadgroup --max-worker-restart 0 $(ARGS)

lint: $(VENV)/tools.stamp layout
	ruff format --check .
	ruff check .
	clang-format --dry-run --Werror $(CPP) $(wildcard tests/csrc/*.cpp tests/csrc/*.h tests/gpu/*.cpp tests/gpu/*.h tests/gpu/sim/*)
	cd $(LAYOUT) && mypy -p hybridcomm
	$(PY) -m tests.repository.imports $(LAYOUT)
	$(PY) -m pytest -q --noconftest tests/repository

format: $(VENV)/tools.stamp
	ruff format .
	ruff check --fix .
	clang-format -i $(CPP) $(wildcard tests/csrc/*.cpp tests/csrc/*.h tests/gpu/*.cpp tests/gpu/*.h tests/gpu/sim/*)

bench: $(VENV)/engine.stamp
	mkdir -p $(BENCH)
	$(PY) -m pytest benchmarks/bench_kernels.py --benchmark-json $(BENCH)/kernels.json $(ARGS)
	$(PY) -m pytest benchmarks/bench_inhost.py --benchmark-json $(BENCH)/inhost.json $(ARGS)
	$(PY) -m benchmarks.bench_schedules --json $(BENCH)/schedules.json
	$(PY) -m benchmarks.bench_parallel --json $(BENCH)/parallel.json
	if [ "$$(id -u)" = 0 ]; then \
	  $(PY) -m benchmarks.bench_wire --json $(BENCH)/wire.json && \
	  $(PY) -m benchmarks.bench_allreduce --rates 1gbit 200mbit --json $(BENCH)/allreduce.json && \
	  $(PY) -m benchmarks.bench_allreduce --nodes 4 --peers gloo,powersgd,ours,ours-topk,ours-reducer --json $(BENCH)/allreduce-4x2.json && \
	  $(PY) -m benchmarks.bench_crossover --json $(BENCH)/crossover.json && \
	  $(PY) -m benchmarks.bench_overlap --json $(BENCH)/overlap.json && \
	  $(PY) -m benchmarks.bench_hybrid --json $(BENCH)/hybrid.json && \
	  $(PY) -m benchmarks.bench_training --steps 320 --variants ddp,topk --json $(BENCH)/training.json && \
	  $(PY) -m benchmarks.figures --allreduce $(BENCH)/allreduce.json --training $(BENCH)/training.json --out $(BENCH); \
	else echo "not root: the benchmarks on the virtual cluster are left out"; fi

fuzz: $(VENV)/engine.stamp
	$(PY) -m tests.fuzz $(ARGS)

# NVRTC is asked for here alone: neither the wheel nor the tests of what is built need it.
cubins: $(VENV)/engine.stamp
	$(PIP) --no-deps $(NVRTC)
	$(PY) -m hybridcomm.kernels.cubins build $(ARGS)
	$(PY) -m benchmarks.roofline
	$(PY) -m benchmarks.predicted_steps
	$(PY) -m hybridcomm.kernels.cubins gate

verify: $(VENV)/engine.stamp
	$(PY) -m tests.verify $(ARGS)

install: $(VENV)/engine.stamp

layout:
	@$(PYTHON) -m tests.repository.layout $(LAYOUT)

clean:
	rm -rf $(VENV) build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache .benchmarks
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# torch goes first and alone: asked for by anything else, an index might answer with another build of it. Wheels of
# torch for CUDA pin a triton of their own, which then stays; for others (CPU) ours is installed.
$(VENV)/torch.stamp: constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "hybridcomm needs Python 3.10 or later; set PYTHON=")'
	@$(PYTHON) -c 'import ensurepip, venv' || { echo "this Python has no venv: on Debian or Ubuntu, apt-get install python3-venv"; exit 1; }
	@command -v c++ > /dev/null || { echo "no C++ compiler: on Debian or Ubuntu, apt-get install g++"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	grep -v '^triton' constraints.txt > $(VENV)/constraints.txt
	$(PIP) $(TORCH)
	$(PY) -c 'import triton' 2> /dev/null || $(PIP) "$$(grep '^triton' constraints.txt)"
	touch $@

$(VENV)/tools.stamp: $(VENV)/torch.stamp
	$(PIP) -r $(VENV)/constraints.txt
	touch $@

# Editable: Python sources are used where they lie, so only C++ changes come through here (CMake builds what changed).
$(VENV)/engine.stamp: $(VENV)/tools.stamp pyproject.toml CMakeLists.txt $(CPP)
	$(PIP) --no-build-isolation --editable '.[train,test,lint]'
	touch $@
