#!/usr/bin/env bash
# Runs every benchmark binary of a build and joins their tables of ratios into one Markdown file, BUILD/bench_report.md. Ratios
# are those of medians, and beside them of the shortest, of interleaved repetitions within one process; take them on a machine that
# does nothing else.
#   scripts/bench_report.sh BUILD [Google Benchmark options]
set -euo pipefail
build=${1:-build}
shift || true
report="$build/bench_report.md"
parts=$(mktemp -d)
trap 'rm -rf "$parts"' EXIT
export MKL_NUM_THREADS=2 OMP_NUM_THREADS=2
{
  printf '# Benchmarks of %s\n\n' "$(git -C "$(dirname "$0")/.." rev-parse --short HEAD)"
  printf '%s, %s cores, load average %s before the run. One thread: processor time; two threads: the clock.\n' \
    "$(sed -n 's/^model name[^:]*: //p' /proc/cpuinfo | head -1)" "$(nproc)" "$(cut -d' ' -f1 /proc/loadavg)"
} > "$report"
for program in "$build"/tests/bench/bench_*; do
  [ -x "$program" ] || continue
  name=$(basename "$program")
  MOELAB_BENCH_MARKDOWN="$parts/$name.md" "$program" --benchmark_out="$build/$name.json" --benchmark_out_format=json "$@" \
      > "$parts/$name.log" ||
    { cat "$parts/$name.log"; printf 'bench: %s failed\n' "$name"; exit 1; }
  [ -f "$parts/$name.md" ] && { printf '\n## %s\n\n' "${name#bench_}"; cat "$parts/$name.md"; } >> "$report"
done
printf 'bench: %s\n' "$report"
