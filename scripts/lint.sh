#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Checks formatting (clang-format, ruff), Python lint and the source rules of tests/structure; --fix formats in place.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

bin=.venv/bin
mapfile -t cpp < <(git ls-files --cached --others --exclude-standard -- '*.h' '*.cpp' '*.cu' '*.cuh')
failed=0
if [ "${1:-}" = --fix ]; then
  "$bin/clang-format" -i "${cpp[@]}" || failed=1
  "$bin/ruff" format --quiet . || failed=1
  "$bin/ruff" check --quiet --fix . || failed=1
else
  "$bin/clang-format" --dry-run -Werror "${cpp[@]}" || failed=1
  "$bin/ruff" format --quiet --diff . || failed=1
  "$bin/ruff" check --quiet . || failed=1
  "$bin/python" -m pytest -q tests/structure || failed=1
fi
[ "$failed" = 0 ] && echo "lint: ${#cpp[@]} C++ files and all Python files are clean"
exit "$failed"
