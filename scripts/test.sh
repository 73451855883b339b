#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Runs the C++ tests (ctest) and the Python tests (pytest) of a build folder, each even where the other fails.
# Slow ones (a GoogleTest name with "Slow", pytest's mark "slow") only with --all.
#   scripts/test.sh build [--all]
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

build=${1:?the build folder is expected as the first argument}
fast_cpp=(-E Slow) fast_python=(-m "not slow")
[ "${2:-}" = --all ] && fast_cpp=() fast_python=()

# Two processes side by side must not spin for each other's cores.
export OMP_WAIT_POLICY=PASSIVE
failed=0
started=$SECONDS
ctest --test-dir "$build" --output-on-failure --parallel "$(nproc)" ${fast_cpp[@]+"${fast_cpp[@]}"} </dev/null || failed=1
GDN_LIBRARY="$PWD/$build/libgdn.so" .venv/bin/python -m pytest -q ${fast_python[@]+"${fast_python[@]}"} </dev/null || failed=1
echo "testing took $((SECONDS - started)) seconds"
exit "$failed"
