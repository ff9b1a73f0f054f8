#!/usr/bin/env bash
# All that jgpt claims of a GPU, on the GPU that is here, in under 8 minutes: bash scripts/bench/gpu_check.sh OUT_DIR [PART ...]
#
# Parts, by default all:
#   flash      the kernels of jgpt/model/attention/flash: values at every width, gradients, determinism, times
#   plan       predicted and measured seconds and bytes of a step
#   train      speed beside PyTorch, where PyTorch is installed
#   attention  every form of attention: values, gradients, times
#   sanitize   the kernels of flash under compute-sanitizer
#   resume     a run that was killed is the run that was not, bit for bit
# The last two time nothing: they run side by side, after the others. Each part has a limit, and all have SECONDS_ALLOWED
# (470) together. A part that fails, or is cut off, does not stop the others. OUT_DIR/gpu_check.json has the card, how each
# part ended, and what it found, of earlier calls too; the exit code is 1 where one of this call did not pass.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
out=${1:?a directory for the results}
shift
(($# > 0)) || set -- flash plan train attention sanitize resume
for part in "$@"; do
  case $part in
    flash | plan | train | attention | sanitize | resume) ;;
    *) echo "no part $part: flash plan train attention sanitize resume" >&2 && exit 2 ;;
  esac
done
mkdir -p "$out"
python=${PYTHON:-python3}
export PYTHONPATH=$PWD:${PYTHONPATH:-} PYTHONUNBUFFERED=1
SECONDS=0
allowed=${SECONDS_ALLOWED:-470}
for part in "$@"; do rm -f "$out/$part".{json,log,end}; done

run() { # NAME SECONDS SCRIPT FLAGS...
  local name=$1 limit=$2 left=$((allowed - SECONDS)) began=$SECONDS result=passed
  shift 2
  if ((left < 5)); then
    echo "left out: no time" | tee "$out/$name.end"
    return
  fi
  timeout "$((limit < left ? limit : left))" "$python" "scripts/bench/$1" --json "$out/$name.json" "${@:2}" \
    >"$out/$name.log" 2>&1 || result="failed ($?)" # 124: cut off
  echo "$result in $((SECONDS - began)) s" >"$out/$name.end"
  printf '\n=== %s: %s\n' "$name" "$(cat "$out/$name.end")"
  tail -n "${LINES_SHOWN:-30}" "$out/$name.log" | cut -c1-220
}

nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader 2>/dev/null | tee "$out/gpu.txt"
for part in "$@"; do
  case $part in
    flash) run flash 110 flash_check.py --budget_seconds 90 ;;
    plan) run plan 90 plan_vs_truth.py ;;
    train) run train 105 train_gpu.py --rounds 2 --dtypes fp16 --micro_batches 8 ;;
    attention) run attention 50 attention_gpu.py --repeats 10 ;;
    # Side by side, so neither may take all of the memory at its start.
    sanitize) XLA_PYTHON_CLIENT_PREALLOCATE=false run sanitize 115 flash_check.py --sanitize --sanitize_seconds 54 & ;;
    resume) XLA_PYTHON_CLIENT_PREALLOCATE=false run resume 90 resume_gpu.py --compute fp16 --steps 200 & ;;
  esac
done
wait

"$python" - "$out" <<'PYTHON'
import importlib.metadata, json, sys, time
from pathlib import Path

out = Path(sys.argv[1])
packages = ("jax", "jaxlib", "jax-cuda12-plugin", "jax-cuda13-plugin", "torch", "numpy")
installed = {d.metadata["Name"]: d.version for d in importlib.metadata.distributions()}
found = {"card": (out / "gpu.txt").read_text().strip(), "date": time.strftime("%Y-%m-%d")}
found["versions"] = {name: installed[name] for name in packages if name in installed}
for end in sorted(out.glob("*.end")):
    part = out / f"{end.stem}.json"
    try:
        result = json.loads(part.read_text())
    except (OSError, ValueError):  # cut off before, or while, it wrote
        result = {"log": end.with_suffix(".log").read_text()[-1500:] if end.with_suffix(".log").exists() else ""}
    found[end.stem] = {"ended": end.read_text().strip(), "found": result}
(out / "gpu_check.json").write_text(json.dumps(found, indent=1) + "\n")
PYTHON
echo "All in $SECONDS s: $out/gpu_check.json"
for part in "$@"; do grep -q '^passed' "$out/$part.end" || exit 1; done
