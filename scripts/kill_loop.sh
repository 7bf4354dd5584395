#!/usr/bin/env bash
# Ends runs of the real program at random moments, by SIGKILL and SIGTERM in turn, resumes them, and compares what they leave,
# byte for byte, with an undisturbed run: every router with accumulation, bf16 and recomputation. Methods with stages pass them
# all within the 40 steps.
# Writes tests/long/kill_loop.json where no routers are named.
#   scripts/kill_loop.sh [BUILD] [KILLS per combination] [ROUTER…]
set -euo pipefail
cd "$(dirname "$0")/.."
program=$(realpath "${1:-build}/moelab")
kills=${2:-10}
command="scripts/kill_loop.sh ${1:-build} $kills"
routers=("${@:3}")
if [ ${#routers[@]} = 0 ]; then
  routers=()
  for source in routers/*.cpp; do routers+=("$(basename "$source" .cpp)"); done
fi
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
export OMP_NUM_THREADS=1

cat > "$work/common.toml" <<'TOML'
[model]
layers = 2
width = 32
[moe]
experts = 4
[moe.expert]
width = 32
[train]
steps = 40
batch = 8
log_every = 2
[eval]
every = 10
[checkpoint]
every = 3
TOML

cat > "$work/text.toml" <<'TOML'
extends = "common.toml"
[model]
heads = 2
context = 32
[data]
name = "markov"
validation_documents = 8
TOML

# For routers that no causal model takes.
cat > "$work/vectors.toml" <<'TOML'
extends = "common.toml"
[model]
name = "mlp"
[data]
name = "clusters"
validation_vectors = 64
TOML

# The experiment file, then what is set in it.
experiment_of() {
  local set=()
  case $1 in
    noisy_topk | softmax_topk | uniform | random | frozen | vmoe) set=(moe.router.k=2) ;;
    sigmoid_topk) set=(moe.router.k=2 moe.router.selection_bias=true moe.router.bias_rate=0.01) ;;
    base) set=(train.allow_noncausal_training=true) ;;
    stablemoe) set=(moe.router.stage1_steps=20) ;;
    dynmoe)
      set=(moe.max_experts=6 moe.router.window_start=2 moe.router.window_update=8 moe.router.window_period=12) ;;
    lory) set=(moe.router.segment_length=8 moe.router.warmup_steps=15) ;;
    thor) set=(objective.name=paired_consistency moe.router.pair=distinct) ;;
    domain) set=(data.sources=4 moe.router.domains=4) ;;
  esac
  case $1 in expert_choice | soft_moe | smear) echo vectors.toml ;; *) echo text.toml ;; esac
  printf '%s\n' "moe.router.name=$1" "${set[@]}"
}

# Records without what a clock wrote.
timeless() { sed -E 's/"seconds":[^,}]*,?//; s/"timing":\{[^}]*\},?//' "$1/metrics.jsonl"; }

same() { diff -r "$1/ckpt" "$2/ckpt" > /dev/null && diff <(timeless "$1") <(timeless "$2") > /dev/null; }

# Starts the program, lets it live for a random part of two seconds, and ends it; false where it was done before.
start_and_kill() {
  "$program" "$@" --quiet > /dev/null 2>&1 &
  local child=$!
  sleep "$((RANDOM % 2)).$(printf %03d $((RANDOM % 1000)))"
  kill -s "${signals[killed % 2]}" "$child" 2> /dev/null || true
  ! wait "$child" 2> /dev/null
}

signals=(KILL TERM)
cases=0 failures=0 start=$SECONDS
for router in "${routers[@]}"; do
  mapfile -t experiment < <(experiment_of "$router")
  for mode in train.recompute=false train.micro_batches=2 train.precision=bf16 train.recompute=true; do
    arguments=(run "$work/${experiment[0]}")
    for value in "${experiment[@]:1}" "$mode"; do arguments+=(--set "$value"); done
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
result=$(printf '{"commit": "%s", "command": "%s", "seconds": %d, "cases": %d, "failures": %d}' \
  "$(git rev-parse HEAD)" "$command" $((SECONDS - start)) "$cases" "$failures")
echo "$result"
if [ $# -le 2 ]; then
  mkdir -p tests/long
  echo "$result" > tests/long/kill_loop.json
fi
exit $((failures > 0))
