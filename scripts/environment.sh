# Sourced by run_local.sh, test.sh and .ci/run: find a Python, make a virtual environment, install jgpt into it once.

# Print the first of the interpreters named that runs and is 3.11 or newer; by default $PYTHON, else the usual names.
# A pyenv shim may exist and yet not run, so each is tried, and pyenv's own folders are looked at as well.
find_python() {
  local name candidate
  if (($# == 0)); then
    if [[ -n ${PYTHON:-} ]]; then set -- "$PYTHON"; else set -- python3 python3.13 python3.12 python3.11 python3.14; fi
  fi
  for name in "$@"; do
    for candidate in "$(command -v "$name" || true)" "$HOME"/.pyenv/versions/*/bin/"$name"; do
      if [[ -x $candidate ]] &&
        "$candidate" -c 'import ensurepip, sys, venv; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
        echo "$candidate"
        return
      fi
    done
  done
  echo "No usable Python: tried $*. jgpt needs Python 3.11 or newer with its venv module." >&2
  echo "Install one (Debian, Ubuntu: apt install python3 python3-venv), or name it: PYTHON=/path/to/python3.12" >&2
  return 1
}

# install_jgpt VENV EXTRAS PYTHON [CONSTRAINTS]: make VENV with PYTHON if it is absent, then install this checkout into it,
# unless that was done before with the same pyproject.toml, extras and constraints.
install_jgpt() {
  local venv=$1 extras=$2 python=$3 constraints=${4:-} stamp
  stamp=$(echo "$PWD" | cat - pyproject.toml ${constraints:+"$constraints"} | cksum | tr ' ' -)
  stamp=$venv/installed-$extras-$stamp
  if [[ -e $stamp ]]; then
    return
  fi
  if [[ ! -x $venv/bin/python ]]; then
    echo "Making the virtual environment $venv with $("$python" -V)"
    "$python" -m venv "$venv"
  fi
  echo "Installing jgpt[$extras] into $venv${constraints:+ with $constraints} (some minutes the first time)"
  "$venv/bin/python" -m pip install -qq --disable-pip-version-check --editable ".[$extras]" \
    ${constraints:+--constraint "$constraints"}
  touch "$stamp"
}
