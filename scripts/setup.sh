#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Installs what building and testing gdn needs and is not there yet: distribution packages (as root or by sudo), and a
# virtual environment in .venv with torch. Safe to run again; the second run only looks.
#
#   scripts/setup.sh          everything that `make build`, `make demo` and `make test` need
#   scripts/setup.sh lint     also the formatter and the linter, into .venv
#
# pip's own settings apply (pip.conf, PIP_INDEX_URL, PIP_EXTRA_INDEX_URL, PIP_FIND_LINKS ...): point them at a folder
# or an index of CPU wheels to keep the CUDA libraries out. PYTHON names the interpreter that .venv is made with.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

TORCH_VERSION=2.13.0
PYTHON_PACKAGES=("torch==${TORCH_VERSION}" "numpy>=1.26" "pytest>=8" "matplotlib>=3.8")
# For some Python tests, which are skipped without them: to compare with, to train by, to check types, to make a wheel.
PEER_PACKAGES=("transformers==5.23.*" "accelerate>=1.1" "peft>=0.15" "mypy>=1.11" "scikit-build-core>=0.10")
LINT_PACKAGES=("clang-format==14.0.6" "ruff>=0.6")
LOG=.cache/setup.log
OPTIONAL_TRIED=.cache/setup-optional-tried

say() { printf 'setup: %s\n' "$*" >&2; }
die() {
  printf 'setup: error: %s\n' "$*" >&2
  exit 1
}

# --- what the distribution provides -------------------------------------------------------------------------------

# Each line: package, then how its presence shows: cmd:NAME (a program) or inc:HEADER (found by the compiler).
REQUIRED="
g++ cmd:g++
cmake cmd:cmake
ninja-build cmd:ninja
pkg-config cmd:pkg-config
libhwy-dev inc:hwy/highway.h
libcli11-dev inc:CLI/CLI.hpp
nlohmann-json3-dev inc:nlohmann/json.hpp
libtomlplusplus-dev inc:toml++/toml.h
libpcre2-dev inc:pcre2.h
libutf8proc-dev inc:utf8proc.h
libgtest-dev inc:gtest/gtest.h
libgmock-dev inc:gmock/gmock.h
libbenchmark-dev inc:benchmark/benchmark.h
"
# Faster builds where they can be had; nothing depends on them.
OPTIONAL="
ccache cmd:ccache
mold cmd:mold
"

# Prints the packages of the list $1 whose sign is absent. All headers are looked up by one run of the preprocessor.
missing_packages() {
  local package sign header probe="#define PCRE2_CODE_UNIT_WIDTH 8"$'\n' absent=""
  while read -r package sign; do
    case "$sign" in
      cmd:*) command -v "${sign#cmd:}" >/dev/null 2>&1 || echo "$package" ;;
      inc:*) probe+="#if !__has_include(<${sign#inc:}>)"$'\n'"missing ${package}"$'\n'"#endif"$'\n' ;;
    esac
  done <<<"$1"
  if command -v g++ >/dev/null 2>&1; then
    absent=$(g++ -std=c++20 -E -P -x c++ - <<<"$probe" 2>/dev/null | sed -n 's/^missing //p' | tr -d ' ') || true
  else
    absent=$(sed -n 's/ inc:.*//p' <<<"$1")
  fi
  [ -z "$absent" ] || echo "$absent"
}

# The interpreter for .venv: PYTHON, python3 of the path, or the system's; it must be 3.10 or newer.
# Sets python_bin, and python_needs_venv=1 where it lacks the module that makes environments.
choose_python() {
  local candidate
  python_bin="" python_needs_venv=0
  for candidate in "${PYTHON:-python3}" /usr/bin/python3; do
    command -v "$candidate" >/dev/null 2>&1 || continue
    "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null || continue
    if "$candidate" -c 'import venv, ensurepip' 2>/dev/null; then
      python_bin=$candidate python_needs_venv=0
      return
    fi
    # Only the distribution's own python can be completed by a distribution package.
    case "$(readlink -f "$(command -v "$candidate")")" in
      /usr/bin/*) python_bin=$candidate python_needs_venv=1 ;;
    esac
  done
}

by_hand() {
  die "$1; install by hand: $2, then run this again (README.md, section \"By hand\")"
}

install_packages() {
  local packages=("$@") as_root=()
  command -v apt-get >/dev/null 2>&1 || by_hand "no apt-get on this system" "${packages[*]}"
  if [ "$(id -u)" -ne 0 ]; then
    command -v sudo >/dev/null 2>&1 || by_hand "not root and no sudo" "apt-get install ${packages[*]}"
    if [ ! -t 0 ] && ! sudo -n true 2>/dev/null; then
      by_hand "sudo asks for a password and there is no terminal" "sudo apt-get install ${packages[*]}"
    fi
    as_root=(sudo)
  fi
  say "installing ${packages[*]}"
  local apt=("${as_root[@]}" env DEBIAN_FRONTEND=noninteractive apt-get -o Acquire::Retries=2 -o DPkg::Lock::Timeout=300)
  local install=("${apt[@]}" install -y --no-install-recommends "${packages[@]}")
  # Package lists that are there may do; update them only when they do not.
  if ! "${install[@]}" >"$LOG" 2>&1 </dev/null; then
    "${apt[@]}" update >>"$LOG" 2>&1 </dev/null || true
    if ! "${install[@]}" >>"$LOG" 2>&1 </dev/null; then
      die "apt-get could not install ${packages[*]}: $(grep -E '^(E|Err)' "$LOG" | tail -n 1) (is the network up? log: $LOG)"
    fi
  fi
}

version_at_least() { # version_at_least 3.25.1 3.25
  [ "$(printf '%s\n%s\n' "$1" "$2" | sort -V | head -n 1)" = "$2" ]
}

setup_system() {
  local missing optional
  missing=$(missing_packages "$REQUIRED")
  optional=$(missing_packages "$OPTIONAL")
  if [ ! -x .venv/bin/python ]; then
    choose_python
    if [ "$python_needs_venv" = 1 ]; then
      missing+=$'\n'python3-venv
    elif [ -z "$python_bin" ]; then
      by_hand "no python3 of 3.10 or newer that can make a virtual environment" "python3 python3-venv"
    fi
    # torch.compile of the tests compiles against Python's headers.
    "$python_bin" -c 'import os, sys, sysconfig; p = sysconfig.get_path("include"); sys.exit(not os.path.exists(p + "/Python.h"))' ||
      case "$(readlink -f "$(command -v "$python_bin")")" in /usr/bin/*) missing+=$'\n'python3-dev ;; esac
  fi
  missing=$(sed '/^$/d' <<<"$missing")
  if [ -n "$missing" ]; then
    # shellcheck disable=SC2086 # one word per package
    install_packages $missing $optional
    missing=$(missing_packages "$REQUIRED")
    [ -z "$missing" ] || die "still missing after the installation: $(tr '\n' ' ' <<<"$missing")"
  elif [ -n "$optional" ] && [ ! -e "$OPTIONAL_TRIED" ]; then
    # shellcheck disable=SC2086
    (install_packages $optional) 2>/dev/null || say "going on without" $optional "(they only make building faster)"
  fi
  : >"$OPTIONAL_TRIED"

  local version
  version=$(cmake --version | sed -n '1s/.*version //p')
  version_at_least "$version" 3.25 || die "cmake 3.25 or newer is needed, found $version"
  version=$(g++ -dumpfullversion -dumpversion)
  version_at_least "$version" 12 || die "g++ 12 or newer is needed, found $version"
}

# --- .venv --------------------------------------------------------------------------------------------------------

pip_install() {
  if ! .venv/bin/python -m pip install --disable-pip-version-check --no-input --prefer-binary "$@" >>"$LOG" 2>&1 </dev/null; then
    die "pip could not install $*: $(grep -E '^ERROR' "$LOG" | tail -n 1) (is the network up? do pip's settings offer it? log: $LOG)"
  fi
}

setup_venv() {
  local lint=$1 stamp key
  # The stamp lies in the environment and names what was asked of it, so another environment or list starts afresh.
  key=$(printf '%s\n' "${PYTHON_PACKAGES[@]}" "${PEER_PACKAGES[@]}" | cksum | tr ' ' -)
  stamp=.venv/.gdn-setup-$key
  if [ ! -e "$stamp" ] || ! .venv/bin/python -c '' 2>/dev/null; then
    if ! .venv/bin/python -m pip --version >/dev/null 2>&1; then
      choose_python
      [ -n "$python_bin" ] || by_hand "no python3 of 3.10 or newer that can make a virtual environment" "python3 python3-venv"
      say "making .venv with $("$python_bin" --version 2>&1)"
      [ -L .venv ] || rm -rf .venv
      "$python_bin" -m venv .venv >>"$LOG" 2>&1 </dev/null || die "$python_bin -m venv .venv failed: $(tail -n 1 "$LOG")"
    fi
    say "installing ${PYTHON_PACKAGES[*]} into .venv"
    pip_install "${PYTHON_PACKAGES[@]}"
    (pip_install "${PEER_PACKAGES[@]}") 2>/dev/null ||
      say "going on without ${PEER_PACKAGES[*]} (the tests that need them are skipped)"
    : >"$stamp"
  fi
  if [ "$lint" = 1 ]; then
    key=$(printf '%s\n' "${LINT_PACKAGES[@]}" | cksum | tr ' ' -)
    stamp=.venv/.gdn-lint-$key
    if [ ! -e "$stamp" ]; then
      pip_install "${LINT_PACKAGES[@]}"
      : >"$stamp"
    fi
  fi
}

lint=0
case "${1:-}" in
  "") ;;
  lint) lint=1 ;;
  -h | --help) sed -n '3,12s/^# \{0,1\}//p' "${BASH_SOURCE[0]}" && exit 0 ;;
  *) die "unknown argument \"$1\": nothing or \"lint\" is expected" ;;
esac
mkdir -p "$(dirname "$LOG")"
: >"$LOG"
setup_system
setup_venv "$lint"
