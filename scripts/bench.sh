#!/usr/bin/env bash
# Runs every benchmark binary of a build with one thread; JSON lies beside the build. Ratios are printed by the binaries.
#   scripts/bench.sh BUILD [Google Benchmark options]
set -euo pipefail
build=${1:-build}
shift || true
export OMP_NUM_THREADS=1 MKL_NUM_THREADS=1
for program in "$build"/tests/bench/bench_*; do
  [ -x "$program" ] || continue
  "$program" --benchmark_out="$build/$(basename "$program").json" --benchmark_out_format=json "$@"
done
