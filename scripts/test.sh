#!/usr/bin/env bash
# From a fresh machine to passed tests: bash scripts/test.sh [pytest's arguments]
#
# Environment: PYTHON (the interpreter), VENV (the folder, .venv), EXTRAS (test), CONSTRAINTS (a pip constraints file).
# A worker for each core, four at most, as each takes 2 to 3 GB; -n 0 runs everything in one process.
# Without arguments the long tests (marked slow) are left out; .ci/run runs those as well, and asks for coverage.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/environment.sh

VENV=${VENV:-.venv}
PYTHON=$(find_python)
install_jgpt "$VENV" "${EXTRAS:-test}" "$PYTHON" "${CONSTRAINTS:-}"

if (($# == 0)); then set -- -m 'not slow'; fi
# Python 3.12 and later can report lines to coverage at nearly no cost; the default costs a quarter of the time.
if "$VENV/bin/python" -c 'import sys; sys.exit(sys.version_info < (3, 12))'; then export COVERAGE_CORE=sysmon; fi
export JAX_PLATFORMS=cpu # the tests fake two devices on the CPU and must not depend on the machine
exec "$VENV/bin/python" -m pytest -q --numprocesses auto --maxprocesses 4 --dist worksteal "$@"
