#!/usr/bin/env bash
# From a fresh machine to a trained model: bash scripts/run_local.sh [--config.KEY=VALUE ...]
#
# Makes a virtual environment, installs jgpt, trains configs/quickstart.py on Python's own standard library (nothing is
# downloaded but packages) and lets the model write. Run it again to go on where it stopped.
# Environment: PYTHON (the interpreter), VENV (the folder, .venv), EXTRAS (plot; "plot,cuda12" on a machine with a GPU).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/environment.sh

VENV=${VENV:-.venv}
PYTHON=$(find_python)
install_jgpt "$VENV" "${EXTRAS:-plot}" "$PYTHON"

run_dir=$("$VENV/bin/python" -c 'from configs.quickstart import get_config; print(get_config().out_dir)')
for argument in "$@"; do
  if [[ $argument == --config.out_dir=* ]]; then run_dir=${argument#*=}; fi
done

"$VENV/bin/python" -m jgpt.train --config configs/quickstart.py "$@"

prompt='def main('
printf '\nThe model goes on from "%s":\n\n' "$prompt"
"$VENV/bin/python" -m jgpt.generate --model "$run_dir" --prompt "$prompt"

cat <<END

Everything is in $(cd "$run_dir" && pwd). Open report.html there in a browser.
Ask for more:  $VENV/bin/python -m jgpt.generate --model $run_dir --prompt "class "
Train longer:  bash scripts/run_local.sh --config.optimizer.total_steps=5000 --config.out_dir=runs/longer
END
