#!/usr/bin/env bash
# Shows that `moelab new router` starts a router without any other file edited: the skeleton compiles and is listed, its run
# and its test fail until the rule is written, and pass afterwards.
#
#   scripts/check_new_router.sh [preset]           in a copy of the checkout, with a build of its own (default preset: dev)
#   scripts/check_new_router.sh --here [preset]    in this checkout and its build, quicker; what it wrote is removed at the end
set -euo pipefail
HERE=$(cd "$(dirname "$0")/.." && pwd)
SCRATCH=$(mktemp -d)
ROOT=$SCRATCH/checkout
[ "${1:-}" = --here ] && { ROOT=$HERE; shift; }
PRESET=${1:-dev}
BUILD=$ROOT/build/$PRESET
[ "$PRESET" = release ] && BUILD=$ROOT/build
WRITTEN=()

say()  { printf 'check_new_router: %s\n' "$*" >&2; }
fail() { say "FAILED: $*"; exit 1; }
clean_up() { rm -rf "$SCRATCH" "${WRITTEN[@]}"; }
trap clean_up EXIT

# The commit's files with the changes on top of it, without builds.
copy_checkout() { mkdir "$ROOT"; (cd "$HERE" && git ls-files -z --cached --others --exclude-standard | tar --null -T - -cf -) | tar -xf - -C "$ROOT"; }

configure() { cmake --preset "$PRESET" > "$SCRATCH/configure.log" 2>&1 || fail "cmake: $(tail -3 "$SCRATCH/configure.log")"; }
build() { cmake --build --preset "$PRESET" --target moelab test_routers > "$SCRATCH/build.log" 2>&1 || { tail -40 "$SCRATCH/build.log" >&2; fail "$1"; }; }
test_passes() { OMP_NUM_THREADS=1 "$(find "$BUILD" -name test_routers -type f)" 'mine decides the worked case' > "$SCRATCH/test.log" 2>&1; }
run_ends_with() { local code=0; "$BUILD/moelab" run experiments/routers/mine.toml --quiet --out "$SCRATCH/run$1" > /dev/null 2> "$SCRATCH/run.err" || code=$?; [ "$code" = "$1" ] || fail "its run ended with $code, not $1: $(cat "$SCRATCH/run.err")"; }

TORCH_DIR=${TORCH_DIR:-$("$HERE/scripts/setup.sh" --torch-dir)}
export TORCH_DIR
[ "$ROOT" = "$HERE" ] || copy_checkout
cd "$ROOT"
configure
build "the checkout does not build"

say "1. the program writes a skeleton"
"$BUILD/moelab" new router mine > /dev/null || fail "no skeleton was written"
WRITTEN=("$ROOT/routers/mine.cpp" "$ROOT/tests/routers/mine_test.cpp" "$ROOT/experiments/routers/mine.toml")
if "$BUILD/moelab" new router mine 2> /dev/null; then fail "a second skeleton of the same name was not refused"; fi

say "2. it compiles, is listed, and refuses to run"
build "the skeleton does not compile"
"$BUILD/moelab" list routers | grep -q '^mine ' || fail "the new router is not listed"
"$BUILD/moelab" check experiments/routers/mine.toml > /dev/null || fail "its experiment does not check"
run_ends_with 2
grep -q 'write the rule of mine' "$SCRATCH/run.err" || fail "its run does not say what to do: $(cat "$SCRATCH/run.err")"
if test_passes; then fail "its test passes before the rule is written"; fi

say "3. with a rule and the worked number, its test passes and it trains"
sed -i -e 's/RouteOutput route(const RouteInput&, RouteState&)/RouteOutput route(const RouteInput\& in, RouteState\&)/' \
       -e 's/^ *usage_error(.*$/    return route_topk(in, score(in), spec_.k(), SoftmaxOver::kAll);/' routers/mine.cpp
sed -i -e 's/kMineExpert = -1;.*/kMineExpert = 0;/' -e 's/kMineGate = -1;.*/kMineGate = 0.880797;/' tests/routers/mine_test.cpp
build "the router does not compile"
test_passes || { tail -20 "$SCRATCH/test.log" >&2; fail "its test does not pass"; }
run_ends_with 0
say "ok"
[ "$ROOT" != "$HERE" ] || { rm -f "${WRITTEN[@]}"; build "the checkout no longer builds"; }  # leaves the build as it was
