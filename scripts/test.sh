#!/usr/bin/env bash
# From a fresh machine to passed tests: bash scripts/test.sh [pytest's arguments]
#
# Environment: PYTHON (the interpreter), VENV (the folder, .venv), EXTRAS (test), CONSTRAINTS (a pip constraints file).
# At least 90% of the lines of jgpt/ must be covered; arguments, which pick some of the tests, lift that.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/environment.sh

VENV=${VENV:-.venv}
PYTHON=$(find_python)
install_jgpt "$VENV" "${EXTRAS:-test}" "$PYTHON" "${CONSTRAINTS:-}"

(($# > 0)) || set -- --cov=jgpt --cov-report=term --cov-fail-under=90
export JAX_PLATFORMS=cpu # the tests fake two devices on the CPU and must not depend on the machine
exec "$VENV/bin/python" -m pytest -q "$@"
