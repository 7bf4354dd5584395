#!/usr/bin/env bash
# Shows that `moelab new router` and `moelab new expert` start a method without any other file edited: the skeletons compile and are
# listed, their runs and tests fail until the rule and the formula are written, and pass afterwards.
#
#   scripts/check_skeletons.sh [preset]           in a copy of the checkout, with a build of its own (default preset: dev)
#   scripts/check_skeletons.sh --here [preset]    in this checkout and its build, quicker; what it wrote is removed at the end
set -euo pipefail
HERE=$(cd "$(dirname "$0")/.." && pwd)
SCRATCH=$(mktemp -d)
ROOT=$SCRATCH/checkout
[ "${1:-}" = --here ] && { ROOT=$HERE; shift; }
PRESET=${1:-dev}
BUILD=$ROOT/build/$PRESET
[ "$PRESET" = release ] && BUILD=$ROOT/build
# Their names, z_router and z_expert, come last in the unity batches: the others stay as they were built.
WRITTEN=()

say()  { printf 'check_skeletons: %s\n' "$*" >&2; }
fail() { say "FAILED: $*"; exit 1; }
clean_up() { rm -rf "$SCRATCH" "${WRITTEN[@]}"; }
trap clean_up EXIT

# The commit's files with the changes on top of it, without builds.
copy_checkout() { mkdir "$ROOT"; (cd "$HERE" && git ls-files -z --cached --others --exclude-standard | tar --null -T - -cf -) | tar -xf - -C "$ROOT"; }

configure() { cmake --preset "$PRESET" > "$SCRATCH/configure.log" 2>&1 || fail "cmake: $(tail -3 "$SCRATCH/configure.log")"; }
build() {
  cmake --build --preset "$PRESET" -j "$(nproc)" --target moelab test_routers test_experts > "$SCRATCH/build.log" 2>&1 ||
    { tail -40 "$SCRATCH/build.log" >&2; fail "$1"; }
}
# test_passes KIND
test_passes() { OMP_NUM_THREADS=1 "$BUILD/tests/test_$1s" "z_$1 *" > "$SCRATCH/$1.log" 2>&1; }
# run_ends_with KIND CODE
run_ends_with() {
  local code=0
  "$BUILD/moelab" run "experiments/$1s/z_$1.toml" --quiet --out "$SCRATCH/$1$2" > /dev/null 2> "$SCRATCH/run.err" || code=$?
  [ "$code" = "$2" ] || fail "the run of the new $1 ended with $code, not $2: $(cat "$SCRATCH/run.err")"
}

write_skeleton() {
  WRITTEN+=("$ROOT/$1s/z_$1.cpp" "$ROOT/tests/$1s/z_$1_test.cpp" "$ROOT/experiments/$1s/z_$1.toml")
  "$BUILD/moelab" new "$1" "z_$1" > /dev/null || fail "no skeleton of $1 was written"
  if "$BUILD/moelab" new "$1" "z_$1" 2> /dev/null; then fail "a second $1 of the same name was not refused"; fi
}
# asks_for KIND WHAT
asks_for() {
  "$BUILD/moelab" list "$1s" | grep -q "^z_$1 " || fail "the new $1 is not listed"
  "$BUILD/moelab" check "experiments/$1s/z_$1.toml" > /dev/null || fail "the experiment of the new $1 does not check"
  run_ends_with "$1" 2
  grep -q "write the $2 of z_$1" "$SCRATCH/run.err" || fail "its run does not say what to do: $(cat "$SCRATCH/run.err")"
  if test_passes "$1"; then fail "the test of the new $1 passes before the $2 is written"; fi
}
works() {
  test_passes "$1" || { tail -20 "$SCRATCH/$1.log" >&2; fail "the test of the new $1 does not pass"; }
  run_ends_with "$1" 0
}

write_rule() {
  sed -i -e 's/RouteOutput route(const RouteInput&, RouteState&)/RouteOutput route(const RouteInput\& in, RouteState\&)/' \
         -e 's/^ *usage_error(.*$/    return route_topk(in, score(in), spec_.k(), SoftmaxOver::kAll);/' routers/z_router.cpp
  sed -i -e 's/Expert = -1;.*/Expert = 0;/' -e 's/Gate = -1;.*/Gate = 0.880797;/' tests/routers/z_router_test.cpp
}
write_formula() {
  sed -i -e 's/Tensor forward(const ExpertContext&, int)/Tensor forward(const ExpertContext\& context, int)/' \
         -e 's/const std::vector<Tensor>&, const Tensor&)/const std::vector<Tensor>\& parameters, const Tensor\& rows_ND)/' experts/z_expert.cpp
  awk '/^ *usage_error\(/ { print ++n == 1 ? "    return grouped_linear(context.rows_ND, w_EDD_, {}, context.offsets_E1);" : "    return at::linear(rows_ND, parameters.at(0));"; next } 1' \
    experts/z_expert.cpp > "$SCRATCH/expert.cpp" && cp "$SCRATCH/expert.cpp" experts/z_expert.cpp
  sed -i -e 's/First = -1;.*/First = 1.0;/' -e 's/Second = -1;.*/Second = 5.0;/' tests/experts/z_expert_test.cpp  # 3 - 2 and 9 - 4
}

TORCH_DIR=${TORCH_DIR:-$("$HERE/scripts/setup.sh" --torch-dir)}
export TORCH_DIR
[ "$ROOT" = "$HERE" ] || copy_checkout
cd "$ROOT"
configure
build "the checkout does not build"

say "1. the program writes skeletons of a router and of a kind of expert"
write_skeleton router
write_skeleton expert

say "2. they compile, are listed, and refuse to run"
build "the skeletons do not compile"
asks_for router rule
asks_for expert formula

say "3. with rule, formula and worked numbers their tests pass and they train; the expert holds every property of the kit"
write_rule
write_formula
build "they do not compile"
works router
works expert
"$BUILD/moelab" verify z_expert > "$SCRATCH/verify.log" 2>&1 || { tail -20 "$SCRATCH/verify.log" >&2; fail "a property does not hold"; }
say "ok"
[ "$ROOT" != "$HERE" ] || { rm -f "${WRITTEN[@]}"; build "the checkout no longer builds"; }  # leaves the build as it was
