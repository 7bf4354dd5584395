#!/usr/bin/env bash
# Long sweeps, by hand. Each leaves its counts in tests/long/.
#   scripts/test_long.sh [BUILD]
set -euo pipefail
cd "$(dirname "$0")/.."
for sweep in scripts/*_loop.sh; do
  echo "$sweep"
  "$sweep" "${1:-build}"
done
