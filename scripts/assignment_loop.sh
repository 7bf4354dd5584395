#!/usr/bin/env bash
# Solves 10,000 random and adversarial assignment problems, cold and warm, and demands a proven optimum of each (a dual gap of 0;
# brute force agrees where the problem is small). Writes tests/long/assignment_loop.json.
#   scripts/assignment_loop.sh [BUILD]
set -euo pipefail
cd "$(dirname "$0")/.."
build=${1:-build}
sweep='10,000 random and adversarial problems*'
start=$SECONDS failures=0
OMP_NUM_THREADS=1 "$build/tests/test_core" "$(sed 's/,/\\,/' <<< "$sweep")" || failures=1
OMP_NUM_THREADS=1 "$build/tests/test_core" 'the exact assignment equals brute force*' || failures=$((failures + 1))
mkdir -p tests/long
printf '{"commit": "%s", "command": "%s", "seconds": %d, "cases": 10000, "failures": %d}\n' \
  "$(git rev-parse HEAD)" "scripts/assignment_loop.sh $build" $((SECONDS - start)) "$failures" | tee tests/long/assignment_loop.json
exit $((failures > 0))
