# SPDX-License-Identifier: Apache-2.0
# Every command sets up what it needs first; `make help` lists them.
.DEFAULT_GOAL := help
.PHONY: help setup build demo test test-all bench asan lint format clean

BUILD := build
PYTHON := .venv/bin/python
# Jobs: one per core, but no more than memory carries at about 1.2 GB for a source that includes torch.
JOBS ?= $(shell awk -v cores="$$(nproc)" '/^MemAvailable/ {n = int($$2 / 1258291); print n < 1 ? 1 : n < cores ? n : cores}' /proc/meminfo)
# The slow tests are for `make test-all`.
ASAN_TESTS := -E Slow
NINJA = cmake --build $(1) --parallel $(JOBS)

help:  ## list the commands
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "make %-10s %s\n", $$1, $$2}'

setup:  ## install what is missing: distribution packages and .venv with torch
	@scripts/setup.sh

$(BUILD)/build.ninja: CMakePresets.json | setup
	cmake --preset release -DGDN_PCH=ON

build: setup $(BUILD)/build.ninja  ## set up and build the program build/bin/gdn and libgdn
	$(call NINJA,$(BUILD)) --target gdn_program

demo: build  ## train on the embedded stories, show what was learned, generate
	$(BUILD)/bin/gdn demo

test: setup $(BUILD)/build.ninja  ## set up, build, run the C++ and Python tests
	$(call NINJA,$(BUILD))
	scripts/test.sh $(BUILD)

test-all: setup $(BUILD)/build.ninja  ## the same with the slow tests, and the memory-safety build
	$(call NINJA,$(BUILD))
	scripts/test.sh $(BUILD) --all
	$(MAKE) asan ASAN_TESTS=

bench: setup  ## run all benchmarks (tens of minutes): bench/results/, tables of docs/performance.md and README.md, pictures
	cmake --preset release -DGDN_PCH=ON -DGDN_BENCH=ON
	$(call NINJA,$(BUILD))
	$(PYTHON) tools/bench.py run --build $(BUILD)
	$(PYTHON) tools/bench.py report

asan: setup  ## AddressSanitizer and UBSan: torch-free kernels, parsers, short fuzzing
	cmake --preset asan
	$(call NINJA,build-asan)
	ctest --test-dir build-asan --output-on-failure --parallel $(JOBS) $(ASAN_TESTS)

lint:  ## formatting, ruff and banned includes, without changing anything
	@scripts/setup.sh lint
	scripts/lint.sh

format:  ## format all C++ and Python sources
	@scripts/setup.sh lint
	scripts/lint.sh --fix

clean:  ## remove the build folders (.venv and runs stay)
	rm -rf build build-*
