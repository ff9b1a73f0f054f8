#!/usr/bin/env bash
# All that jgpt claims of a GPU, on the GPU that is here, in under 8 minutes: bash scripts/bench/gpu_check.sh OUT_DIR [PART ...]
#
# Parts, each with a JSON file of its own in OUT_DIR, by default all in this order:
#   attention  every form of attention: values, gradients, times
#   flash      the kernels of jgpt/model/attention/flash: values, gradients, determinism, times
#   sanitize   the same kernels under compute-sanitizer
#   resume     a run that was killed is the run that was not, bit for bit
#   plan       predicted and measured seconds and bytes of a step
#   train      speed beside PyTorch, where PyTorch is installed
# A part that fails does not stop the others; the exit code tells.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
out=${1:?a directory for the results}
shift
(($# > 0)) || set -- attention flash sanitize resume plan train
mkdir -p "$out"
python=${PYTHON:-python3}
export PYTHONPATH=$PWD:${PYTHONPATH:-} PYTHONUNBUFFERED=1
failed=0

run() { # NAME SECONDS SCRIPT FLAGS...
  local name=$1 limit=$2 began=$SECONDS result=passed
  shift 2
  timeout "$limit" "$python" "scripts/bench/$1" --json "$out/$name.json" "${@:2}" >"$out/$name.log" 2>&1 ||
    { result="FAILED ($?)" failed=1; }
  printf '\n=== %s: %s in %d s\n' "$name" "$result" $((SECONDS - began))
  tail -n "${LINES_SHOWN:-30}" "$out/$name.log" | cut -c1-220
}

nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader 2>/dev/null | tee "$out/gpu.txt"
for part in "$@"; do
  case $part in
    attention) run attention 130 attention_gpu.py ;;
    flash) run flash 110 flash_check.py --budget_seconds 80 ;;
    sanitize) run sanitize 130 flash_check.py --sanitize ;;
    resume) run resume 120 resume_gpu.py --compute fp16 ;;
    plan) run plan 130 plan_vs_truth.py ;;
    train)
      run train-bf16 150 train_gpu.py --rounds 3 --dtypes bf16 --micro_batches 16
      run train-fp16 150 train_gpu.py --rounds 3 --dtypes fp16 --micro_batches 16
      ;;
    *) echo "no part $part" >&2 && exit 2 ;;
  esac
done
exit $failed
