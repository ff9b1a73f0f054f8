#!/usr/bin/env bash
# One run in several processes on this machine, to try out what a cluster does: bash scripts/launch_local.sh N -- ARGS
#
#   bash scripts/launch_local.sh 2 -- --config quickstart --config.execution.parallel=fsdp
#   bash scripts/launch_local.sh 2 -- evaluate --model runs/quickstart
#
# ARGS are those of `python -m jgpt.train`, or the name of another command that takes part in such runs (evaluate) and
# its own. Each line is printed with the number of the process before it. SIGTERM, SIGHUP and Ctrl-C go to every process;
# training then saves and stops. The exit code is that of the first process that failed, else 0.
# GPUs are divided among the processes. On CPUs each process has a device for each core, or JAX_NUM_CPU_DEVICES of them.
# Environment: PYTHON (the interpreter with jgpt, python).
set -euo pipefail

usage() {
  sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p}' "${BASH_SOURCE[0]}"
}

if [[ ${1:-} == -h || ${1:-} == --help ]]; then
  usage
  exit 0
fi
if [[ ! ${1:-} =~ ^[1-9][0-9]*$ || ${2:-} != -- ]]; then
  echo "launch_local.sh: got '$*'. It needs the number of processes, then --, then the arguments of the command:" >&2
  usage >&2
  exit 2
fi
n=$1
shift 2
command=train
if [[ ${1:-} =~ ^[a-z] ]]; then
  command=$1
  shift
fi

python=${PYTHON:-python}
port=$("$python" -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')
export JAX_COORDINATOR_ADDRESS=127.0.0.1:$port JAX_NUM_PROCESSES=$n
gpus=$(nvidia-smi --list-gpus 2>/dev/null | grep -c . || true)
pipes=$(mktemp -d)
trap 'rm -rf "$pipes"' EXIT

set -m # each process in a group of its own: a Ctrl-C comes to this script, which passes it on once
pids=() printers=()
for ((i = 0; i < n; i++)); do
  mkfifo "$pipes/$i"
  sed -u "s/^/[$i] /" <"$pipes/$i" &
  printers+=($!)
  export JAX_PROCESS_ID=$i
  if ((gpus >= n)); then
    JAX_LOCAL_DEVICE_IDS=$(seq -s, $((i * (gpus / n))) $(((i + 1) * (gpus / n) - 1)))
    export JAX_LOCAL_DEVICE_IDS
  fi
  "$python" -m "jgpt.$command" "$@" >"$pipes/$i" 2>&1 &
  pids+=($!)
done
for name in TERM HUP INT; do
  # shellcheck disable=SC2064
  trap "kill -$name \"\${pids[@]}\" 2>/dev/null || true" "$name"
done

code=0
while ((${#pids[@]} > 0)); do
  ended=
  wait -n -p ended "${pids[@]}" && status=0 || status=$?
  if [[ -z $ended ]]; then continue; fi # a signal came, which the trap has passed on
  if ((status != 0 && code == 0)); then code=$status; fi
  left=()
  for pid in "${pids[@]}"; do
    if [[ $pid != "$ended" ]]; then left+=("$pid"); fi
  done
  pids=("${left[@]}")
done
wait "${printers[@]}" 2>/dev/null || true
exit "$code"
