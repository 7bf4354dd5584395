#!/usr/bin/env bash
# Shows that `moelab new router` starts a router without editing any other file: the skeleton compiles and is listed, its run
# and its test fail until the rule is written, and pass afterwards. Works in a copy of the checkout, so that neither the sources
# nor the build of this one change; compiled objects come from ccache where it is found.
#
#   scripts/check_new_router.sh [preset]      default dev
set -euo pipefail
PRESET=${1:-dev}
HERE=$(cd "$(dirname "$0")/.." && pwd)
COPY=$(mktemp -d)
trap 'rm -rf "$COPY"' EXIT

say()  { printf 'check_new_router: %s\n' "$*" >&2; }
fail() { say "FAILED: $*"; exit 1; }

# The commit's files and the changes on top of it, without builds.
copy_checkout() { (cd "$HERE" && git ls-files -z --cached --others --exclude-standard | tar --null -T - -cf -) | tar -xf - -C "$COPY"; }

BUILD=$COPY/build/$PRESET
[ "$PRESET" = release ] && BUILD=$COPY/build
build() { cmake --build --preset "$PRESET" --target moelab test_routers > "$COPY/build.log" 2>&1 || { tail -40 "$COPY/build.log" >&2; fail "$1"; }; }
its_test_passes() { OMP_NUM_THREADS=1 "$BUILD/tests/test_routers" 'mine decides the worked case' > "$COPY/test.log" 2>&1; }

copy_checkout
cd "$COPY"
TORCH_DIR=${TORCH_DIR:-$("$HERE/scripts/setup.sh" --torch-dir)}
export TORCH_DIR
cmake --preset "$PRESET" -DMOELAB_BENCH=OFF > "$COPY/configure.log" 2>&1 || fail "cmake: $(tail -3 "$COPY/configure.log")"
build "the checkout does not build"
say "1. the program writes the skeleton"
"$BUILD/moelab" new router mine > /dev/null
if "$BUILD/moelab" new router mine 2> /dev/null; then fail "a second skeleton of the same name was not refused"; fi

say "2. it compiles, is listed, and refuses to run"
build "the skeleton does not compile"
"$BUILD/moelab" list routers | grep -q '^mine ' || fail "the new router is not listed"
"$BUILD/moelab" check experiments/routers/mine.toml > /dev/null || fail "its experiment does not check"
code=0; "$BUILD/moelab" run experiments/routers/mine.toml --out "$COPY/run1" > /dev/null 2> "$COPY/run.err" || code=$?
[ "$code" = 2 ] || fail "its run ended with $code, not 2: $(cat "$COPY/run.err")"
grep -q 'write the rule of mine' "$COPY/run.err" || fail "its run does not say what to do: $(cat "$COPY/run.err")"
if its_test_passes; then fail "its test passes before the rule is written"; fi

say "3. with a rule and the worked number, its test passes and it trains"
sed -i -e 's/RouteOutput route(const RouteInput&, RouteState&)/RouteOutput route(const RouteInput\& in, RouteState\&)/' \
       -e 's/^ *usage_error(.*$/    return route_topk(in, score(in), spec_.k(), SoftmaxOver::kAll);/' routers/mine.cpp
sed -i -e 's/kMineExpert = -1;.*/kMineExpert = 0;/' -e 's/kMineGate = -1;.*/kMineGate = 0.880797;/' tests/routers/mine_test.cpp
build "the router does not compile"
its_test_passes || { tail -20 "$COPY/test.log" >&2; fail "its test does not pass"; }
"$BUILD/moelab" run experiments/routers/mine.toml --quiet --out "$COPY/run2" > /dev/null || fail "it does not train"
say "ok"
