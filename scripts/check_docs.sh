#!/usr/bin/env bash
# Every `moelab …` command that the README files show must run; the generated tables must be fresh.
#   scripts/check_docs.sh PROGRAM
set -euo pipefail
program=$(realpath "${1:-build/moelab}")
cd "$(dirname "$0")/.."
"$program" docs --check

scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
# Lines of ```sh blocks marked `<!-- tested -->`: run as they stand, with build/moelab standing for the program.
count=0
while IFS= read -r line; do
  printf 'docs: %s\n' "$line"
  RUN="$scratch/run" OUT="$scratch" bash -euo pipefail -c "${line//build\/moelab/$program}" > "$scratch/out" 2> "$scratch/err" ||
    { cat "$scratch/out" "$scratch/err"; printf 'docs: this command of the README failed: %s\n' "$line"; exit 1; }
  count=$((count + 1))
done < <(awk '/<!-- tested -->/ { marked = 1; next } marked && /^```sh/ { inside = 1; next } /^```/ { inside = 0; marked = 0 } inside' \
           README.md ./*/README.md)
[ "$count" -gt 0 ] || { echo "docs: no tested command found in the README files"; exit 1; }
printf 'docs: %d commands ran\n' "$count"
