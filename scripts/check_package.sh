#!/usr/bin/env bash
# Installs a build into a scratch folder, builds a router outside the tree against it with find_package(moelab), and trains
# with it: what a user of the installed package does.
#   scripts/check_package.sh BUILD
set -euo pipefail
build=$(realpath "${1:-build}")
source=$(realpath "$(dirname "$0")/..")
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT

cmake --install "$build" --prefix "$scratch/moelab" > "$scratch/install.log"
mkdir "$scratch/plugin"
cp "$source/tests/plugins/first_expert.cpp" "$scratch/plugin/"
cat > "$scratch/plugin/CMakeLists.txt" <<'CMAKE'
cmake_minimum_required(VERSION 3.26)
project(outside LANGUAGES CXX)
find_package(moelab REQUIRED)
add_library(first_expert MODULE first_expert.cpp)
target_link_libraries(first_expert PRIVATE moelab::moelab)
set_target_properties(first_expert PROPERTIES PREFIX "")
CMAKE
cmake -G Ninja -S "$scratch/plugin" -B "$scratch/plugin/build" -DCMAKE_BUILD_TYPE=Release \
  -DCMAKE_PREFIX_PATH="$scratch/moelab" > "$scratch/configure.log" || { cat "$scratch/configure.log"; exit 1; }
cmake --build "$scratch/plugin/build" > "$scratch/build.log" || { cat "$scratch/build.log"; exit 1; }
"$scratch/moelab/bin/moelab" run "$source/experiments/base/lm_tiny.toml" --quiet --out "$scratch/run" \
  --set train.steps=2 --set "plugins=$scratch/plugin/build/first_expert.so" --set moe.router.name=first_expert > "$scratch/run.log"
grep -q first_expert "$scratch/run.log" || { cat "$scratch/run.log"; exit 1; }
echo "package: installed, a router outside the tree was built, loaded and trained"
