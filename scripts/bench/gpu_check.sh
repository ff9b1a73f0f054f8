#!/usr/bin/env bash
# All that jgpt claims of a GPU, on the GPU that is here, in under 8 minutes: bash scripts/bench/gpu_check.sh OUT_DIR
#
# Results, one JSON file each: attention.json (values, gradients and times of every form), resume-*.json (a run that was
# killed is the run that was not, bit for bit), plan.json (predicted and measured), train-*.json (speed beside PyTorch,
# where PyTorch is installed). A part that fails does not stop the others; the exit code tells.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
out=${1:?a directory for the results}
mkdir -p "$out"
python=${PYTHON:-python3}
export PYTHONPATH=$PWD:${PYTHONPATH:-} PYTHONUNBUFFERED=1
failed=0

part() { # NAME SECONDS COMMAND...
  local name=$1 limit=$2 began=$SECONDS
  shift 2
  if timeout "$limit" "$@" >"$out/$name.log" 2>&1; then result=passed; else result="FAILED ($?)" failed=1; fi
  printf '\n=== %s: %s in %d s\n' "$name" "$result" $((SECONDS - began))
  tail -n "${LINES_SHOWN:-30}" "$out/$name.log" | cut -c1-220
}

nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader 2>/dev/null | tee "$out/gpu.txt"
part attention 120 "$python" scripts/bench/attention_gpu.py --json "$out/attention.json"
(part resume-fp16 150 "$python" scripts/bench/resume_gpu.py --compute fp16 --json "$out/resume-fp16.json"; exit $failed) >"$out/r1" &
first=$!
(part resume-deterministic 150 "$python" scripts/bench/resume_gpu.py --compute fp16 \
  --xla_flags=--xla_gpu_deterministic_ops=true --json "$out/resume-deterministic.json"; exit $failed) >"$out/r2" &
second=$!
wait $first || failed=1
wait $second || failed=1
cat "$out/r1" "$out/r2" && rm "$out/r1" "$out/r2"
part plan 120 "$python" scripts/bench/plan_vs_truth.py --json "$out/plan.json"
train() { # NAME SECONDS FLAGS...
  part "$1" "$2" "$python" scripts/bench/train_gpu.py --rounds 3 --json "$out/$1.json" "${@:3}"
}
train train-bf16 100 --dtypes bf16 --micro_batches 16
train train-fp16 100 --dtypes fp16 --micro_batches 16
exit $failed
