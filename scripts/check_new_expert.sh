#!/usr/bin/env bash
# Shows that `moelab new expert` starts a kind of expert without any other file edited: the skeleton compiles and is listed, its run
# and its test fail until the formula is written, and pass afterwards.
#
#   scripts/check_new_expert.sh [preset]           in a copy of the checkout, with a build of its own (default preset: dev)
#   scripts/check_new_expert.sh --here [preset]    in this checkout and its build, quicker; what it wrote is removed at the end
set -euo pipefail
HERE=$(cd "$(dirname "$0")/.." && pwd)
SCRATCH=$(mktemp -d)
ROOT=$SCRATCH/checkout
[ "${1:-}" = --here ] && { ROOT=$HERE; shift; }
PRESET=${1:-dev}
BUILD=$ROOT/build/$PRESET
[ "$PRESET" = release ] && BUILD=$ROOT/build
WRITTEN=()

say()  { printf 'check_new_expert: %s\n' "$*" >&2; }
fail() { say "FAILED: $*"; exit 1; }
clean_up() { rm -rf "$SCRATCH" "${WRITTEN[@]}"; }
trap clean_up EXIT

# The commit's files with the changes on top of it, without builds.
copy_checkout() { mkdir "$ROOT"; (cd "$HERE" && git ls-files -z --cached --others --exclude-standard | tar --null -T - -cf -) | tar -xf - -C "$ROOT"; }

configure() { cmake --preset "$PRESET" > "$SCRATCH/configure.log" 2>&1 || fail "cmake: $(tail -3 "$SCRATCH/configure.log")"; }
build() { cmake --build --preset "$PRESET" --target moelab test_experts > "$SCRATCH/build.log" 2>&1 || { tail -40 "$SCRATCH/build.log" >&2; fail "$1"; }; }
test_passes() { OMP_NUM_THREADS=1 "$(find "$BUILD" -name test_experts -type f)" 'mine computes the worked row' > "$SCRATCH/test.log" 2>&1; }
run_ends_with() { local code=0; "$BUILD/moelab" run experiments/experts/mine.toml --quiet --out "$SCRATCH/run$1" > /dev/null 2> "$SCRATCH/run.err" || code=$?; [ "$code" = "$1" ] || fail "its run ended with $code, not $1: $(cat "$SCRATCH/run.err")"; }

TORCH_DIR=${TORCH_DIR:-$("$HERE/scripts/setup.sh" --torch-dir)}
export TORCH_DIR
[ "$ROOT" = "$HERE" ] || copy_checkout
cd "$ROOT"
configure
build "the checkout does not build"

say "1. the program writes a skeleton"
"$BUILD/moelab" new expert mine > /dev/null || fail "no skeleton was written"
WRITTEN=("$ROOT/experts/mine.cpp" "$ROOT/tests/experts/mine_test.cpp" "$ROOT/experiments/experts/mine.toml")
if "$BUILD/moelab" new expert mine 2> /dev/null; then fail "a second skeleton of the same name was not refused"; fi

say "2. it compiles, is listed, and refuses to run"
build "the skeleton does not compile"
"$BUILD/moelab" list experts | grep -q '^mine ' || fail "the new expert is not listed"
"$BUILD/moelab" check experiments/experts/mine.toml > /dev/null || fail "its experiment does not check"
run_ends_with 2
grep -q 'write the formula of mine' "$SCRATCH/run.err" || fail "its run does not say what to do: $(cat "$SCRATCH/run.err")"
if test_passes; then fail "its test passes before the formula is written"; fi

say "3. with a formula and the worked numbers, its test passes, it holds every property and it trains"
sed -i -e 's/Tensor forward(const ExpertContext&, int)/Tensor forward(const ExpertContext\& context, int)/' \
       -e 's/const std::vector<Tensor>&, const Tensor&)/const std::vector<Tensor>\& parameters, const Tensor\& rows_ND)/' experts/mine.cpp
awk '/^ *usage_error\(/ { print ++n == 1 ? "    return grouped_linear(context.rows_ND, w_EDD_, {}, context.offsets_E1);" : "    return at::linear(rows_ND, parameters.at(0));"; next } 1' \
  experts/mine.cpp > "$SCRATCH/mine.cpp" && cp "$SCRATCH/mine.cpp" experts/mine.cpp
sed -i -e 's/kMineFirst = -1;.*/kMineFirst = 1.0;/' -e 's/kMineSecond = -1;.*/kMineSecond = 5.0;/' tests/experts/mine_test.cpp  # 3 - 2 and 9 - 4
build "the expert does not compile"
test_passes || { tail -20 "$SCRATCH/test.log" >&2; fail "its test does not pass"; }
"$BUILD/moelab" verify mine > "$SCRATCH/verify.log" 2>&1 || { tail -20 "$SCRATCH/verify.log" >&2; fail "it does not hold every property"; }
run_ends_with 0
say "ok"
[ "$ROOT" != "$HERE" ] || { rm -f "${WRITTEN[@]}"; build "the checkout no longer builds"; }  # leaves the build as it was
