#!/usr/bin/env bash
# Kills runs of the real program at random moments, resumes them, and compares what they leave, byte for byte, with an
# undisturbed run: every router with accumulation, bf16 and recomputation. Writes tests/long/kill_loop.json.
#   scripts/kill_loop.sh [BUILD] [KILLS per combination]
set -euo pipefail
cd "$(dirname "$0")/.."
program=$(realpath "${1:-build}/moelab")
kills=${2:-10}
command="scripts/kill_loop.sh ${1:-build} $kills"
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
export OMP_NUM_THREADS=1

cat > "$work/exp.toml" <<'TOML'
[model]
layers = 2
width = 32
heads = 2
context = 32
[moe]
experts = 4
[moe.expert]
width = 32
[data]
name = "markov"
validation_documents = 8
[train]
steps = 40
batch = 8
log_every = 2
[eval]
every = 10
[checkpoint]
every = 3
TOML

# Records without what a clock wrote.
timeless() { sed -E 's/"seconds":[^,}]*,?//; s/"timing":\{[^}]*\},?//' "$1/metrics.jsonl"; }

same() { diff -r "$1/ckpt" "$2/ckpt" > /dev/null && diff <(timeless "$1") <(timeless "$2") > /dev/null; }

# Starts the program, lets it live for a random part of two seconds, and kills it; false where it was done before.
start_and_kill() {
  "$program" "$@" --quiet > /dev/null 2>&1 &
  local child=$!
  sleep "$((RANDOM % 2)).$(printf %03d $((RANDOM % 1000)))"
  kill -9 "$child" 2> /dev/null || true
  ! wait "$child" 2> /dev/null
}

mkdir -p tests/long
cases=0 failures=0 start=$SECONDS
for router in noisy_topk softmax_topk switch gshard uniform random frozen; do
  for mode in train.recompute=false train.micro_batches=2 train.precision=bf16 train.recompute=true; do
    arguments=(run "$work/exp.toml" --set "moe.router.name=$router" --set "$mode")
    case $router in switch | gshard) ;; *) arguments+=(--set moe.router.k=2) ;; esac
    rm -rf "$work/whole"
    "$program" "${arguments[@]}" --out "$work/whole" --quiet > /dev/null
    killed=0
    while ((killed < kills)); do
      rm -rf "$work/run"
      next=("${arguments[@]}" --out "$work/run")
      while ((killed < kills)) && start_and_kill "${next[@]}"; do
        killed=$((killed + 1))
        [ -f "$work/run/config.resolved.toml" ] || break  # killed before there was a run
        next=(resume "$work/run")
      done
      [ -f "$work/run/config.resolved.toml" ] || continue
      "$program" resume "$work/run" --quiet > /dev/null
      same "$work/run" "$work/whole" || { failures=$((failures + 1)); echo "differs: $router $mode" >&2; }
    done
    cases=$((cases + killed))
  done
done
printf '{"commit": "%s", "command": "%s", "seconds": %d, "cases": %d, "failures": %d}\n' \
  "$(git rev-parse HEAD)" "$command" $((SECONDS - start)) "$cases" "$failures" | tee tests/long/kill_loop.json
exit $((failures > 0))
