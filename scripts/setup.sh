#!/usr/bin/env bash
# Installs everything that moelab needs on Debian 12: system packages (CMake and Catch2 from backports) and LibTorch (the
# PyPI wheel, unpacked into a cache that every clone shares). Safe to run again: a second run takes seconds.
#
#   scripts/setup.sh              install what is missing
#   scripts/setup.sh --check      install nothing; exit 5 and name what is missing
#   scripts/setup.sh --torch-dir  print the LibTorch folder that the build uses, and nothing else
#
# TORCH_DIR=…     use this LibTorch (the folder that holds include/ and lib/) instead of the wheel
# MOELAB_CACHE=…  where the wheel and the data sets are kept (default: $XDG_CACHE_HOME/moelab or ~/.cache/moelab)
set -euo pipefail

readonly TORCH_VERSION=2.11.0
readonly PACKAGES=(g++ make ninja-build mold ccache git ca-certificates curl python3 python3-venv
                   libtomlplusplus-dev libeigen3-dev libbenchmark-dev nlohmann-json3-dev libcli11-dev
                   libspdlog-dev libfmt-dev libxxhash-dev zlib1g-dev liblemon-dev libsentencepiece-dev)
readonly BACKPORTS=(cmake libcatch2-dev catch2)   # spdlog's headers conflict with Debian's own catch2: both come from backports
readonly CACHE="${MOELAB_CACHE:-${XDG_CACHE_HOME:-${HOME:-/var/tmp}/.cache}/moelab}"
readonly VENV="$CACHE/torch-$TORCH_VERSION"

say()  { printf 'setup: %s\n' "$*" >&2; }
fail() { say "$*"; exit 5; }

installed()      { [ "$(dpkg-query -W -f='${db:Status-Status}' "$1" 2>/dev/null)" = installed ]; }
version_of()     { dpkg-query -W -f='${Version}' "$1" 2>/dev/null || echo 0; }
recent_enough()  { dpkg --compare-versions "$(version_of cmake)" ge 3.26 && dpkg --compare-versions "$(version_of libcatch2-dev)" ge 3.0; }

missing_packages() {
  local name
  for name in "${PACKAGES[@]}"; do installed "$name" || printf '%s ' "$name"; done
  recent_enough || for name in "${BACKPORTS[@]}"; do printf '%s/%s-backports ' "$name" "$CODENAME"; done
}

# Root runs a command as it is; others through sudo, where they have it.
as_root() {
  if [ "$(id -u)" = 0 ]; then "$@"
  elif command -v sudo >/dev/null && sudo -n true 2>/dev/null; then sudo -n "$@"
  elif command -v sudo >/dev/null && [ -t 0 ]; then sudo "$@"
  else return 1; fi
}

# The backports suite lies beside the suite this machine already uses, on the same mirror and with the same key: the
# source is derived from the machine's own, so no host is named here.
backports_source() {
  local deb822 classic=/etc/apt/sources.list
  for deb822 in /etc/apt/sources.list.d/*.sources; do
    [ -f "$deb822" ] || continue
    awk -v suite="$CODENAME" 'BEGIN { RS = ""; FS = "\n" }
      $0 ~ "(^|\n)Suites:[^\n]*[[:space:]]" suite "([[:space:]]|\n|$)" { print; exit }' "$deb822" |
      grep -v '^#' | sed "s/^Suites:.*/Suites: $CODENAME-backports/" | grep . && return 0
  done
  [ -f "$classic" ] || return 1
  awk -v suite="$CODENAME" '$1 == "deb" && $0 ~ "[[:space:]]" suite "[[:space:]]" { print; exit }' "$classic" |
    sed "s/[[:space:]]$CODENAME[[:space:]]/ $CODENAME-backports /" | grep .
}

add_backports() {
  local text file
  apt-cache policy 2>/dev/null | grep -q "n=$CODENAME-backports" && return 0
  text=$(backports_source) || fail "cannot derive a backports source: no entry for suite '$CODENAME' in /etc/apt"
  case "$text" in Types:*) file=moelab-backports.sources ;; *) file=moelab-backports.list ;; esac
  printf '%s\n' "$text" | as_root tee "/etc/apt/sources.list.d/$file" >/dev/null
}

install_packages() {
  local missing; missing=$(missing_packages)
  [ -n "$missing" ] || return 0
  [ "$MODE" = install ] || fail "missing Debian packages: $missing(install them, or run scripts/setup.sh as root)"
  as_root true || fail "missing Debian packages, and no right to install them (be root or have sudo): $missing"
  say "installing Debian packages: $missing"
  recent_enough || add_backports
  as_root apt-get update -q >&2
  # shellcheck disable=SC2086  # a list of package names
  as_root env DEBIAN_FRONTEND=noninteractive apt-get install -y -q --no-install-recommends $missing >&2
}

site_packages() { printf '%s/lib/python3.11/site-packages' "$VENV"; }
has_library()   { ldconfig -p 2>/dev/null | grep -q "$1"; }

# LibTorch's CPU library is linked against two NVIDIA runtime libraries even where no GPU is: they come as small wheels
# unless a CUDA 13 tree is in the loader's cache.
wheels() {
  printf 'torch==%s\n' "$TORCH_VERSION"
  has_library libcudart.so.13 || printf 'nvidia-cuda-runtime==13.0.96\n'
  has_library libcupti.so.13  || printf 'nvidia-cuda-cupti==13.0.85\n'
}

install_torch() {
  local stamp="$VENV/moelab.stamp" want; want=$(wheels)
  [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$want" ] && return 0
  [ "$MODE" = install ] || fail "LibTorch $TORCH_VERSION is not in $VENV (run scripts/setup.sh, or set TORCH_DIR)"
  say "installing LibTorch $TORCH_VERSION into $VENV (530 MB to download, once)"
  mkdir -p "$CACHE" || fail "cannot write to $CACHE (set MOELAB_CACHE)"
  [ -x "$VENV/bin/pip" ] || /usr/bin/python3 -m venv "$VENV" || fail "python3 -m venv failed: is python3-venv installed?"
  # shellcheck disable=SC2086
  "$VENV/bin/pip" install -q --no-deps --no-compile $want >&2 || fail "pip could not install: $(echo $want)"
  check_libraries "$(site_packages)/torch"
  printf '%s\n' "$want" > "$stamp"
}

check_libraries() {
  local lost; lost=$(ldd "$1/lib/libtorch_cpu.so" "$1/lib/libc10.so" | awk '/not found/ { print $1 }' | sort -u)
  [ -z "$lost" ] || fail "LibTorch in $1 misses $(echo $lost)"
}

torch_dir() { printf '%s\n' "${TORCH_DIR:-$(site_packages)/torch}"; }

MODE=install
CODENAME=$(. /etc/os-release && printf '%s' "${VERSION_CODENAME:-}")
case "${1:-}" in
  --torch-dir) torch_dir; exit 0 ;;
  --check)     MODE=check ;;
  "")          ;;
  *)           sed -n '2,12s/^# \{0,1\}//p' "$0" >&2; exit 2 ;;
esac
command -v dpkg-query >/dev/null || fail "this is not Debian; install the packages listed in scripts/setup.sh and set TORCH_DIR"
install_packages
if [ -n "${TORCH_DIR:-}" ]; then
  [ -f "$TORCH_DIR/lib/libtorch_cpu.so" ] || fail "TORCH_DIR=$TORCH_DIR holds no lib/libtorch_cpu.so"
  check_libraries "$TORCH_DIR"
else
  install_torch
fi
say "ready: LibTorch in $(torch_dir)"
