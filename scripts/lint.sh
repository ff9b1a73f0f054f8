#!/usr/bin/env bash
# The static checks, in one list: pre-commit and .ci/run both call this. The tools come from PATH (the [dev] extra).
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 1

failed=0
check() {
  echo "+ $*"
  "$@" || failed=1
}

check ruff format --check .
check ruff check .
check pyright --pythonpath "$(command -v python)"
check lint-imports --no-cache
exit $failed
