"""A race: jgpt against GPT-2's recipe in PyTorch, for the same seconds on the same cores and text.

    pip install torch matplotlib           # beside jgpt
    python scripts/bench/race.py --size library-3m --seconds 900 --out race_3m
    python scripts/bench/race.py --size shakespeare --text tinyshakespeare.txt --seconds 900 --out race_shakespeare \
        --jgpt optimizer.kind=muon optimizer.schedule=wsd

jgpt is `python -m jgpt.train`, all of it: start, compilation, evaluations, checkpoints, curves. PyTorch is nanogpt.py
with nanoGPT's schedule, on the token files that jgpt wrote, evaluated on the same validation sequences. Each is asked
for as many steps as fit in its seconds at the speed of a short trial (or --steps), so that each decays its learning
rate to the end. PyTorch has --seconds, jgpt --share of them: with 0.4 the question is whether jgpt gets as far in 0.4
of the time.

Both processes live side by side, and one is stopped (SIGSTOP) while the other works, in slices of --slice seconds: so
the noise of the machine falls on both. A contestant's time is that of its slices, from its start on. Nothing here
passes or fails by a time. It writes OUT.json (every evaluation in bits per byte, with the seconds) and OUT.png.
"""

import argparse
import contextlib
import json
import math
import os
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from side_by_side import cores, machine

ROOT = Path(__file__).resolve().parents[2]
EVALUATIONS, TRIAL_EVALUATIONS = 20, 2  # of each contestant, spread over its steps
# What both have: nanoGPT's CPU config on characters; and its baby GPT's proportions on Python's own source, in BPE.
SIZES = {
    "shakespeare": {
        "tokenizer.kind": "char", "model.vocab_multiple_of": 1, "model.n_layers": 4, "model.n_heads": 4,
        "model.d_model": 128, "model.context_length": 64, "batch.global_batch_size": 12,
    },
    "library-1m": {
        "tokenizer.vocab_size": 1024, "model.n_layers": 4, "model.n_heads": 4, "model.d_model": 128,
        "model.context_length": 128, "batch.global_batch_size": 16,
    },
    "library-3m": {
        "tokenizer.vocab_size": 2048, "model.n_layers": 6, "model.n_heads": 6, "model.d_model": 192,
        "model.context_length": 128, "batch.global_batch_size": 16,
    },
    "library-10m": {
        "tokenizer.vocab_size": 4096, "model.n_layers": 6, "model.n_heads": 6, "model.d_model": 384,
        "model.context_length": 256, "batch.global_batch_size": 16,
    },
}  # fmt: skip
GPT2 = {"model.position": "learned", "model.norm": "layernorm", "model.mlp": "gelu"}  # jgpt's block, unless overridden


@dataclass
class Racer:
    """A contestant's process, when it ran, and what it reported."""

    name: str
    command: list[str]
    reports: Path  # a line of JSON for each evaluation
    log: Path  # its output
    slices: list[tuple[float, float]] = field(default_factory=list)
    seen: list[dict[str, Any]] = field(default_factory=list)
    process: "subprocess.Popen[bytes] | None" = None

    def start(self) -> None:
        """Start the process, stopped."""
        environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
        environment |= {"TORCHINDUCTOR_CACHE_DIR": str(self.log.parent / "inductor")}  # both compile within their time
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                self.command, stdout=log, stderr=subprocess.STDOUT, start_new_session=True, env=environment, cwd=ROOT
            )
        self._signal(signal.SIGSTOP)

    def run(self, seconds: float) -> None:
        """Let it work for a slice, and stop it again; stamp what it reports with its own seconds."""
        assert self.process is not None
        began = time.monotonic()
        self._signal(signal.SIGCONT)
        while (now := time.monotonic()) < began + seconds and self.process.poll() is None:
            self._look(now - began)
            time.sleep(0.02)
        self._signal(signal.SIGSTOP)
        now = time.monotonic()
        self._look(now - began)
        self.slices.append((began, now))

    @property
    def seconds(self) -> float:
        """Seconds of its slices so far."""
        return sum(end - start for start, end in self.slices)

    @property
    def done(self) -> bool:
        """Tell whether the process has ended."""
        assert self.process is not None
        return self.process.poll() is not None

    def end(self) -> None:
        """End it, whatever it does."""
        if self.process is not None and self.process.poll() is None:
            self._signal(signal.SIGKILL)
            self.process.wait()

    def check(self) -> None:
        """Stop the race where it failed."""
        assert self.process is not None
        if self.process.returncode or not self.seen:
            text = self.log.read_text(errors="replace")
            sys.exit(
                f"{self.name} failed with exit code {self.process.returncode}. The end of its log:\n{text[-3000:]}"
            )

    def _look(self, in_slice: float) -> None:
        """Read whole lines that are new."""
        if not self.reports.exists():
            return
        lines = [json.loads(line) for line in self.reports.read_text().splitlines(True) if line.endswith("\n")]
        new = [line for line in lines if "val_loss" in line][len(self.seen) :]
        self.seen += [
            {key: line[key] for key in ("step", "val_loss", "bits_per_byte")} | {"seconds": self.seconds + in_slice}
            for line in new
        ]

    def _signal(self, number: int) -> None:
        assert self.process is not None
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, number)


def overrides(settings: dict[str, Any]) -> list[str]:
    """Return settings as a command line has them."""
    return [f"--config.{key}={value}" for key, value in settings.items()]


def settings_of(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Return jgpt's settings but for its steps: the size, the text, the recipe."""
    settings = {"out_dir": folder / "jgpt", "data.cache_dir": folder / "tokens", "log_every_steps": 10} | GPT2
    settings |= SIZES[options.size] | {
        "sample.num_samples": 0,
        "eval.batches": options.eval_batches,
        "checkpoint.keep_last": 1,
    }
    settings["execution.micro_batch_size"] = max(1, 256 // settings["model.context_length"])  # the fastest on a CPU
    if options.text:
        settings["data.text_glob"] = Path(options.text).absolute()
    return settings | dict(pair.split("=", 1) for pair in options.jgpt)


def racers(options: argparse.Namespace, folder: Path, steps: tuple[int, int], evaluations: int) -> list[Racer]:
    """Return both contestants, with their steps."""
    settings = settings_of(options, folder)
    settings |= {"optimizer.total_steps": steps[0], "eval.every_steps": max(1, steps[0] // evaluations)}
    settings["checkpoint.every_steps"] = max(1, steps[0] // 4)
    if "optimizer.warmup_steps" not in dict(pair.split("=", 1) for pair in options.jgpt):
        settings["optimizer.warmup_steps"] = max(1, min(100, steps[0] // 20))
    jgpt = [sys.executable, "-m", "jgpt.train", f"--config={options.config}", *overrides(settings)]
    peer = [sys.executable, str(Path(__file__).resolve()), "--size", options.size, "--out", str(folder / "torch.jsonl")]
    peer += ["--peer", options.peer, "--be_the_peer", str(folder / "tokens"), "--steps", "0", str(steps[1])]
    peer += ["--evaluations", str(evaluations), "--seed", str(options.seed)]
    peer += ["--eval_batches", str(options.eval_batches)]
    return [
        Racer("jgpt", jgpt, folder / "jgpt" / "metrics.jsonl", folder / "jgpt.log"),
        Racer(f"torch-{options.peer}", peer, folder / "torch.jsonl", folder / "torch.log"),
    ]


def train_torch(options: argparse.Namespace) -> None:
    """Be the peer: train with nanoGPT's recipe on jgpt's token files, and report each evaluation."""
    sys.path.insert(0, str(ROOT))
    import numpy as np
    import torch
    from nanogpt import GPT2, make_step, mean_loss, warmup_cosine

    from jgpt.data.batches import validation_blocks
    from jgpt.data.token_files import open_token_data

    torch.manual_seed(options.seed)
    torch.set_num_threads(cores())
    size, data, steps = SIZES[options.size], open_token_data(Path(options.be_the_peer)), options.steps[1]
    context, batch = size["model.context_length"], size["batch.global_batch_size"]
    multiple = size.get("model.vocab_multiple_of", 64)
    vocabulary = math.ceil(data.tokenizer.vocab_size / multiple) * multiple
    model = GPT2(size["model.n_layers"], size["model.n_heads"], size["model.d_model"], context, vocabulary, bias=False)
    compute = "bf16" if options.peer.endswith("bf16") else "fp32"
    step = make_step(model, compute=compute, compiled=options.peer.startswith("compile"), rate=warmup_cosine(steps))
    blocks = validation_blocks(data, context, options.eval_batches * batch, length_key="model.context_length")
    rows = np.stack([b.tokens for b in blocks])
    random = np.random.default_rng(options.seed)
    with options.out.open("w", buffering=1) as reports:
        for n in range(steps + 1):
            if n % max(1, steps // options.evaluations) == 0 or n == steps:
                loss = mean_loss(model, rows, 4 * batch)
                bits = loss / math.log(2) * data.val_targets / data.meta["val_bytes"]
                reports.write(json.dumps({"step": n, "val_loss": loss, "bits_per_byte": bits}) + "\n")
            if n < steps:
                starts = random.integers(0, len(data.train) - context - 1, batch)
                step(np.stack([data.train[start : start + context + 1] for start in starts]).astype(np.int32))


def run_race(contestants: list[Racer], slice_seconds: float) -> None:
    """Let them take turns until both have ended."""
    try:
        for racer in contestants:
            racer.start()
        while not all(racer.done for racer in contestants):
            for racer in contestants:
                if not racer.done:
                    racer.run(slice_seconds)
    finally:
        for racer in contestants:
            racer.end()
    for racer in contestants:
        racer.check()


def steps_for(options: argparse.Namespace, folder: Path) -> tuple[int, int]:
    """Return how many steps each can make in its seconds, from a short race of both."""
    trial = options.trial_steps
    contestants = racers(options, folder, (trial, trial), TRIAL_EVALUATIONS)
    run_race(contestants, options.slice)
    found = []
    steps_of_an_evaluation = options.eval_batches / 3  # that take as long: a step has a backward pass too
    for racer, seconds in zip(contestants, (options.share * options.seconds, options.seconds), strict=True):
        begun, last = racer.seen[1], racer.seen[-1]  # by the first evaluation while training, all is compiled
        evaluations = len(racer.seen) - 2
        pace = (last["seconds"] - begun["seconds"]) / (
            last["step"] - begun["step"] + evaluations * steps_of_an_evaluation
        )
        start_up = begun["seconds"] - pace * (begun["step"] + steps_of_an_evaluation)
        fit = (seconds - start_up) / pace - steps_of_an_evaluation * EVALUATIONS
        found.append(max(EVALUATIONS, int(fit)))
    return found[0], found[1]


def reached(racer: Racer, bits: float) -> float | None:
    """Return the seconds after which a contestant was at `bits` per byte or below."""
    return next((report["seconds"] for report in racer.seen if report["bits_per_byte"] <= bits), None)


def draw(contestants: list[Racer], title: str, path: Path) -> None:
    """Draw bits per byte against the seconds of each."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4.5))
    for racer in contestants:
        seconds, bits = ([report[key] for report in racer.seen] for key in ("seconds", "bits_per_byte"))
        axes.plot(seconds, bits, marker=".", label=f"{racer.name}, at last {bits[-1]:.3f}")
    axes.set(xlabel="seconds of its own, from its start", ylabel="validation bits per byte", title=title)
    lowest, second = (min(r["bits_per_byte"] for r in racer.seen) for racer in contestants), contestants[-1].seen
    axes.set_ylim(min(lowest) - 0.05, second[min(1, len(second) - 1)]["bits_per_byte"] + 0.3)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=150)


def main() -> None:
    """Parse the flags; race, or be the peer."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="library-3m")
    parser.add_argument("--text", default="", help="a file or glob (default: Python's standard library)")
    parser.add_argument("--seconds", type=float, default=900.0, help="of PyTorch (default 900)")
    parser.add_argument("--share", type=float, default=1.0, help="of these seconds, jgpt's (default 1)")
    parser.add_argument("--slice", type=float, default=10.0, help="seconds of a turn (default 10)")
    parser.add_argument("--steps", type=int, nargs=2, metavar=("JGPT", "TORCH"), help="instead of --seconds")
    parser.add_argument("--trial_steps", type=int, default=60, help="of the trial that measures both speeds")
    parser.add_argument(
        "--peer",
        choices=("eager", "compile", "eager-bf16", "compile-bf16"),
        default="eager",
        help="take the fastest here, by train_vs_nanogpt.py (default: eager, in fp32)",
    )
    parser.add_argument("--config", default="base", help="jgpt's config (default base)")
    parser.add_argument("--jgpt", nargs="*", default=[], metavar="KEY=VALUE", help="overrides of jgpt's config")
    parser.add_argument("--eval_batches", type=int, default=40, help="batches of validation text (default 40)")
    parser.add_argument("--seed", type=int, default=1337, help="of the peer; jgpt's is --jgpt seed=N")
    parser.add_argument("--out", type=Path, default=Path("race"), help="writes OUT.json and OUT.png")
    parser.add_argument("--evaluations", type=int, default=EVALUATIONS, help=argparse.SUPPRESS)
    parser.add_argument("--be_the_peer", default="", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.be_the_peer:
        return train_torch(options)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("stopped by SIGTERM"))  # and the contestants with it
    description = machine("jax", "torch", "numpy")
    print(f"{description['cores']} cores of {description['cpu']}", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        prepare = [sys.executable, "-m", "jgpt.prepare", f"--config={options.config}"]
        subprocess.run(
            [*prepare, *overrides(settings_of(options, work))], check=True, cwd=ROOT, stdout=subprocess.DEVNULL,
            env=os.environ | {"PYTHONPATH": str(ROOT)},
        )  # fmt: skip
        (work / "trial").mkdir()
        if not options.steps:
            (work / "trial" / "tokens").symlink_to(work / "tokens")
            options.steps = steps_for(options, work / "trial")
        print(f"steps: jgpt {options.steps[0]}, torch {options.steps[1]}", flush=True)
        contestants = racers(options, work, tuple(options.steps), EVALUATIONS)
        run_race(contestants, options.slice)
    jgpt, peer = contestants
    final = peer.seen[-1]["bits_per_byte"]
    passed = reached(jgpt, final)
    result = {
        "machine": description,
        "size": options.size,
        "jgpt_overrides": options.jgpt,
        "steps": {racer.name: steps for racer, steps in zip(contestants, options.steps, strict=True)},
        "seconds": {racer.name: racer.seconds for racer in contestants},
        "final_bits_per_byte": {racer.name: racer.seen[-1]["bits_per_byte"] for racer in contestants},
        "jgpt_passes_after_seconds": passed,
        "share_of_peers_time": passed / peer.seconds if passed is not None else None,
        "evaluations": {racer.name: racer.seen for racer in contestants},
    }
    options.out.with_suffix(".json").write_text(json.dumps(result, indent=2) + "\n")
    draw(
        contestants,
        f"{options.size}, {description['cores']} cores of {description['cpu']}",
        options.out.with_suffix(".png"),
    )
    for racer in contestants:
        print(f"{racer.name}: {racer.seconds:.0f} s, {racer.seen[-1]['bits_per_byte']:.4f} bits per byte at last")
    share = f"after {passed:.0f} s, {passed / peer.seconds:.2f} of its time" if passed is not None else "never"
    print(f"jgpt passes {peer.name}'s last value {share}")


if __name__ == "__main__":
    main()
