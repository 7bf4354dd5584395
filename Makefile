# The few commands of daily life. Everything they need is installed by scripts/setup.sh.
BUILD := build
JOBS  := $(shell nproc)
export CTEST_OUTPUT_ON_FAILURE = 1

.PHONY: quickstart configure program build tests test test-long bench bench-report lint asan docs setup clean

quickstart: program ## install, build, train on real text, print the verdict and where everything lies
	$(BUILD)/moelab data prepare kjv
	$(BUILD)/moelab run experiments/quickstart.toml

setup:              ## install what is missing (a second call takes seconds)
	scripts/setup.sh

configure: setup
	cmake --preset release > $(BUILD).configure.log 2>&1 || { cat $(BUILD).configure.log; exit 1; }
	@mv $(BUILD).configure.log $(BUILD)/configure.log

program: configure  ## the program alone, at build/moelab: a third of the whole build
	cmake --build --preset release -j $(JOBS) --target moelab

build: configure    ## the program, the tests and the benchmarks
	cmake --build --preset release -j $(JOBS)

tests: configure    ## the program and the tests, without the benchmarks
	cmake --build --preset release -j $(JOBS) --target moelab_tests

test: tests         ## what CI runs
	cd $(BUILD) && ctest --no-tests=error -j $(JOBS)
	@$(BUILD)/tests/test_cuda 'CUDA: * twice' --reporter compact | grep skipped || true  # why, where ctest skipped them
	scripts/check_docs.sh $(BUILD)/moelab
	scripts/check_package.sh $(BUILD)
	scripts/check_skeletons.sh --here release

test-long: build    ## kill loops and wide sweeps, by hand; leaves counts in tests/long/
	scripts/test_long.sh $(BUILD)

bench: build        ## benchmarks; JSON beside the build, out of git
	scripts/bench.sh $(BUILD)

bench-report: build ## the same, joined into one Markdown table of ratios with the machine's ceilings: build/bench_report.md
	scripts/bench_report.sh $(BUILD)

asan: setup         ## the tests under address and undefined-behaviour sanitizers
	cmake --preset asan && cmake --build --preset asan -j $(JOBS) && ctest --preset asan --no-tests=error

lint: setup         ## every header alone, warnings as errors
	cmake --preset lint && cmake --build --preset lint -j $(JOBS)

docs: build         ## regenerate the generated tables
	$(BUILD)/moelab docs

clean:
	cmake -E rm -rf $(BUILD)
