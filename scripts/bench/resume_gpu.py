"""Is a run that was killed and started again the run that was never stopped, bit for bit, on the devices here?

    python scripts/bench/resume_gpu.py --json resume.json
    python scripts/bench/resume_gpu.py --xla_flags=--xla_gpu_deterministic_ops=true --compute fp16

Trains a small model with dropout and accumulation, once to its end and once killed (SIGKILL) some steps behind a
checkpoint and started again, both from the same command in directories of their own. Compares every record of
metrics.jsonl: those of the killed process with the whole run's (is a run the same twice?), and those of the resumed
process (is it the same after a restart?). The run fails where a record differs.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
COMPARED = ("step", "loss", "val_loss", "grad_norm", "learning_rate", "loss_scale", "skipped_steps")


def command(out_dir: Path, compute: str, steps: int, overrides: list[str]) -> list[str]:
    """Return the command that trains in `out_dir`, and goes on there."""
    own = {
        "out_dir": out_dir,
        "model.n_layers": 4,
        "model.n_heads": 4,
        "model.d_model": 256,
        "model.dropout": 0.1,
        "batch.global_batch_size": 32,
        "execution.micro_batch_size": 8,
        "optimizer.total_steps": steps,
        "optimizer.warmup_steps": 10,
        "checkpoint.every_steps": steps // 4,
        "eval.every_steps": steps // 4,
        "eval.batches": 2,
        "log_every_steps": 1,
        "precision.compute": compute,
        "precision.loss_scale_growth_steps": 20,
        "sample.num_samples": 0,
    }
    flags = [f"--config.{key}={value}" for key, value in own.items()]
    return [sys.executable, "-m", "jgpt.train", f"--config={ROOT}/configs/base.py", *flags, *overrides]


def records(run_dir: Path) -> dict[int, dict[str, Any]]:
    """Return the records of a run by their step, whole lines only."""
    try:
        lines = (run_dir / "metrics.jsonl").read_text().splitlines(keepends=True)
    except FileNotFoundError:
        return {}
    parsed = [json.loads(line) for line in lines if line.endswith("\n")]
    return {record["step"]: {key: record.get(key) for key in COMPARED} for record in parsed}


def differing(found: dict[int, dict[str, Any]], whole: dict[int, dict[str, Any]]) -> list[int]:
    """List the steps whose records differ from those of the whole run."""
    return [step for step, record in sorted(found.items()) if record != whole.get(step)]


def check(compute: str, steps: int, xla_flags: str, overrides: list[str], below: Path) -> dict[str, Any]:
    """Run the three processes; return what was found."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    environment |= {"XLA_PYTHON_CLIENT_PREALLOCATE": "false", "JAX_ENABLE_COMPILATION_CACHE": "false"}
    environment["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {xla_flags}".strip()

    def start(run_dir: Path) -> subprocess.Popen:
        log = run_dir.with_suffix(".log").open("a")
        return subprocess.Popen(command(run_dir, compute, steps, overrides), env=environment, stdout=log, stderr=log)

    whole_dir, cut_dir = below / "whole", below / "cut"
    whole, cut = start(whole_dir), start(cut_dir)
    checkpoint, kill_at = steps // 2, steps // 2 + steps // 16
    while cut.poll() is None and not (
        (cut_dir / f"checkpoints/{checkpoint}.sha256").exists() and max(records(cut_dir), default=0) >= kill_at
    ):
        time.sleep(0.02)
    finished_first = cut.poll() is not None
    cut.send_signal(signal.SIGKILL)
    cut.wait()
    before = records(cut_dir)
    resumed_code = start(cut_dir).wait()
    whole_code = whole.wait()
    if finished_first and not resumed_code:
        return {
            "compute": compute,
            "xla_flags": xla_flags,
            "failed": "the run ended before it was killed: more --steps",
        }
    if whole_code or resumed_code:
        tail = "\n".join((below / name).read_text()[-1500:] for name in ("whole.log", "cut.log"))
        return {
            "compute": compute,
            "xla_flags": xla_flags,
            "failed": f"exit codes {whole_code}, {resumed_code}",
            "log": tail,
        }
    reference, after = records(whole_dir), records(cut_dir)
    resumed_from = max(
        (int(p.stem) for p in (cut_dir / "checkpoints").glob("*.sha256") if int(p.stem) <= max(before)), default=0
    )
    return {
        "compute": compute,
        "xla_flags": xla_flags,
        "records": len(reference),
        "killed_at_step": max(before),
        "resumed_from_at_least": resumed_from,
        "differing_before_the_kill": differing(before, reference),
        "differing_in_all": differing(after, reference),
        "missing": sorted(set(reference) - set(after)),
        "last": [reference[steps], after.get(steps)],
    }


def main() -> None:
    """Check, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--compute", default="auto", help="precision.compute: auto, fp32, fp16, bf16")
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--xla_flags", default="", help="added to XLA_FLAGS of the runs")
    parser.add_argument("--json", type=Path)
    options, overrides = parser.parse_known_args()
    with tempfile.TemporaryDirectory() as folder:
        found = check(options.compute, options.steps, options.xla_flags, overrides, Path(folder))
    print(json.dumps(found, indent=2))
    if options.json:
        options.json.write_text(json.dumps(found, indent=2) + "\n")
    if found.get("failed") or found["differing_in_all"] or found["missing"]:
        sys.exit("not bit for bit: see above")


if __name__ == "__main__":
    main()
