"""Recipes side by side: the loss that each reaches in the same steps, on the same text, by `python -m jgpt.train`.

    python scripts/bench/optimizers.py muon --size library-1m --steps 500 --out muon_1m
    python scripts/bench/optimizers.py block --size library-1m --steps 500 --out block_1m

`muon`: Muon against AdamW. Both are tuned over --rates with the first seed; then the steps are cut, and the question is
in how many of them Muon reaches what AdamW reaches in all: each of Muon's runs decays its learning rate to the end, for
a share --shares of the steps.

`block`: a change at a time against the recipe as it is (--base KEY=VALUE ...), each with every seed.

Every run has a core of its own, and as many run at once as there are cores. A run that OUT.json has is not repeated:
give the same command again after a break. Losses do not depend on the machine's speed; the seconds do.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from queue import Queue
from typing import Any

from race import ROOT, SIZES, overrides
from side_by_side import cores, machine

# What `block` tries, each by itself.
CHANGES: dict[str, dict[str, Any]] = {
    "as it is": {},
    "GPT-2's block": {"model.position": "learned", "model.norm": "layernorm", "model.mlp": "gelu"},
    "QK-norm": {"model.qk_norm": True},
    "untied head": {"model.tie_embeddings": False},
    "decay to zero": {"optimizer.min_learning_rate": 0.0},
    "wsd": {"optimizer.schedule": "wsd"},
    "wsd to zero": {"optimizer.schedule": "wsd", "optimizer.min_learning_rate": 0.0},
    "wsd, 40% decay": {"optimizer.schedule": "wsd", "optimizer.decay_fraction": 0.4},
    "beta2 0.95": {"optimizer.beta2": 0.95},
    "no weight decay": {"optimizer.weight_decay": 0.0},
}


class Runs:
    """Runs of `jgpt.train`, a core for each, and their results in a file."""

    def __init__(self, options: argparse.Namespace, folder: Path) -> None:
        self.options, self.folder, self.path = options, folder, options.out.with_suffix(".json")
        self.known: dict[str, Any] = json.loads(self.path.read_text())["runs"] if self.path.exists() else {}
        self.free: Queue[int] = Queue()
        for core in sorted(os.sched_getaffinity(0))[: options.jobs]:
            self.free.put(core)
        self.settings = SIZES[options.size] | {
            "data.cache_dir": folder / "tokens",
            "eval.batches": options.eval_batches,
        }
        self.settings |= {"sample.num_samples": 0, "checkpoint.keep_best": False, "checkpoint.keep_last": 1}
        self.settings |= {"optimizer.kind": "adamw", "optimizer.schedule": "cosine", "model.qk_norm": False}
        if options.text:
            self.settings["data.text_glob"] = Path(options.text).absolute()
        if options.batch:
            self.settings["batch.global_batch_size"] = options.batch
        self.settings["execution.micro_batch_size"] = 2  # the fastest on a CPU
        self._jgpt("jgpt.prepare", self.settings | {"out_dir": folder / "none"}, None)

    def results(self, steps: int, variants: Iterable[dict[str, Any]], seeds: Iterable[int]) -> list[list[Any]]:
        """Return what each variant reached with each seed: val_loss, bits_per_byte, seconds."""
        with ThreadPoolExecutor(self.options.jobs) as pool:
            found = [[pool.submit(self._run, steps, variant, seed) for seed in seeds] for variant in variants]
            return [[future.result() for future in of_variant] for of_variant in found]

    def losses(self, steps: int, variants: Iterable[dict[str, Any]], seeds: Iterable[int]) -> list[list[float]]:
        """Return the final validation loss of each variant with each seed."""
        return [[run["val_loss"] for run in of_variant] for of_variant in self.results(steps, variants, seeds)]

    def _run(self, steps: int, variant: dict[str, Any], seed: int) -> dict[str, Any]:
        key = json.dumps([self.options.size, self.settings["batch.global_batch_size"], steps, seed, variant])
        if key in self.known:
            return self.known[key]
        core, out = self.free.get(), Path(tempfile.mkdtemp(dir=self.folder))
        settings = self.settings | {"optimizer.total_steps": steps, "optimizer.warmup_steps": max(1, steps // 20)}
        settings |= {"eval.every_steps": steps, "checkpoint.every_steps": steps, "seed": seed, "out_dir": out} | variant
        began = time.monotonic()
        try:
            self._jgpt("jgpt.train", settings, core)
        finally:
            self.free.put(core)
        lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
        last = [line for line in lines if "val_loss" in line][-1]
        result = {"val_loss": last["val_loss"], "bits_per_byte": last["bits_per_byte"]}
        result |= {"seconds": time.monotonic() - began, "train": [[m["step"], m["loss"]] for m in lines if "loss" in m]}
        self.known[key] = result
        print(f"{result['seconds']:5.0f} s  {result['val_loss']:.4f}  {key}", flush=True)
        self.write({})
        return result

    def write(self, summary: dict[str, Any]) -> None:
        """Write what is known so far."""
        text = json.dumps({"machine": machine("jax", "optax", "numpy"), "runs": self.known} | summary, indent=1)
        part = self.path.with_suffix(".part")
        part.write_text(text + "\n")
        part.replace(self.path)

    def _jgpt(self, module: str, settings: dict[str, Any], core: int | None) -> None:
        command = [sys.executable, "-m", module, f"--config={self.options.config}", *overrides(settings)]
        pinned = ["taskset", "-c", str(core)] if core is not None else []
        done = subprocess.run(
            [*pinned, *command], cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True
        )
        if done.returncode:
            sys.exit(f"{' '.join(command)} failed with exit code {done.returncode}:\n{done.stderr[-3000:]}")


def adamw(rate: float) -> dict[str, Any]:
    """Return AdamW's settings at a learning rate; it falls to a tenth."""
    return {"optimizer.kind": "adamw", "optimizer.learning_rate": rate, "optimizer.min_learning_rate": rate / 10}


def muon(rate: float) -> dict[str, Any]:
    """Return Muon's settings at a learning rate, which embeddings and norms have too."""
    return adamw(rate) | {"optimizer.kind": "muon", "optimizer.muon_learning_rate": rate}


def compare_muon(runs: Runs, options: argparse.Namespace) -> dict[str, Any]:
    """Tune both, then find in which share of the steps Muon reaches AdamW's loss, for each seed."""
    adamws = [options.base | adamw(rate) for rate in options.rates]
    muons = [options.base | muon(rate) for rate in options.muon_rates]
    tuned = [losses[0] for losses in runs.losses(options.steps, adamws, options.seeds[:1])]
    best_adamw = adamws[tuned.index(min(tuned))]
    steps = [round(share * options.steps) for share in sorted(options.shares)]
    tried = [losses[0] for losses in runs.losses(steps[-1], muons, options.seeds[:1])]
    best_muon = muons[tried.index(min(tried))]
    goals = runs.losses(options.steps, [best_adamw], options.seeds)[0]
    by_steps = [runs.losses(n, [best_muon], options.seeds)[0] for n in steps]
    shares = [reached(steps, [losses[i] for losses in by_steps], goal) for i, goal in enumerate(goals)]
    return {
        "base": options.base,
        "adamw_by_rate": dict(zip(map(str, options.rates), tuned, strict=True)),
        "muon_by_rate": dict(zip(map(str, options.muon_rates), tried, strict=True)),
        "adamw_loss": goals,
        "muon_loss_by_steps": dict(zip(map(str, steps), by_steps, strict=True)),
        "share_of_adamw_steps": [None if n is None else n / options.steps for n in shares],
    }


def reached(steps: list[int], losses: list[float], goal: float) -> float | None:
    """Return the steps at which a line through (steps, losses) is at the goal.

    None where the most steps do not reach it; the fewest steps where these reach it, and fewer might.
    """
    if goal >= losses[0]:
        return steps[0]
    for (n, high), (m, low) in pairwise(zip(steps, losses, strict=True)):
        if low <= goal < high:
            return n + (high - goal) / (high - low) * (m - n)
    return None


def compare_block(runs: Runs, options: argparse.Namespace) -> dict[str, Any]:
    """Train each change with every seed."""
    names = options.changes or list(CHANGES)
    results = runs.results(options.steps, [options.base | CHANGES[name] for name in names], options.seeds)
    losses, seconds = ([[run[key] for run in of_change] for of_change in results] for key in ("val_loss", "seconds"))
    for name, of_change, times in zip(names, losses, seconds, strict=True):
        spread = statistics.stdev(of_change) if len(of_change) > 1 else 0.0
        print(f"{name:20} {statistics.mean(of_change):.4f} +- {spread:.4f}   {statistics.mean(times):.0f} s")
    return {
        "base": options.base,
        "losses": dict(zip(names, losses, strict=True)),
        "seconds": dict(zip(names, seconds, strict=True)),
    }


def main() -> None:
    """Parse the flags and compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("question", choices=("muon", "block"))
    parser.add_argument("--size", choices=SIZES, default="library-1m")
    parser.add_argument("--text", default="", help="a file or glob (default: Python's standard library)")
    parser.add_argument("--batch", type=int, default=0, help="sequences a step, instead of the size's own")
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1337, 1338, 1339])
    parser.add_argument("--rates", type=float, nargs="+", default=[1e-3, 2e-3, 4e-3, 8e-3], help="AdamW's")
    parser.add_argument("--muon_rates", type=float, nargs="+", default=[2e-3, 4e-3, 8e-3, 16e-3])
    parser.add_argument("--shares", type=float, nargs="+", default=[0.5, 0.7], help="of AdamW's steps, Muon's runs")
    parser.add_argument("--base", nargs="*", default=[], metavar="KEY=VALUE", help="overrides of all runs")
    parser.add_argument("--changes", nargs="*", choices=CHANGES, help="block: some of its changes")
    parser.add_argument("--config", default="base", help="jgpt's config (default base)")
    parser.add_argument("--eval_batches", type=int, default=40, help="batches of validation text (default 40)")
    parser.add_argument("--jobs", type=int, default=cores(), help="runs at once (default: a run for each core)")
    parser.add_argument("--out", type=Path, default=Path("optimizers"), help="writes OUT.json")
    options = parser.parse_args()
    options.base = dict(pair.split("=", 1) for pair in options.base)
    with tempfile.TemporaryDirectory() as folder:
        runs = Runs(options, Path(folder))
        summary = (compare_muon if options.question == "muon" else compare_block)(runs, options)
        runs.write({options.question: summary})
    print(json.dumps(summary, indent=1))


if __name__ == "__main__":
    main()
