"""Training speed of jgpt beside PyTorch, at the two shapes that nanoGPT is known by.

    pip install torch                     # beside jgpt; torch.compile also needs a C++ compiler
    python scripts/bench/train_vs_nanogpt.py --shape both --json result.json

Contestants: jgpt's own train step (pmap over a virtual device for each core), and the same model in PyTorch
(nanogpt.py: scaled_dot_product_attention, fused AdamW), eager and by torch.compile. In fp32, as nanoGPT trains on a
CPU; and with matrix products in bf16 (precision.compute=bf16; autocast), which pays where the CPU has them (lscpu:
avx512_bf16, amx_bf16). The ratio is to the fastest PyTorch of the same precision. All train on the same windows of the
same text: Python's standard library as characters, its 64 most frequent ones and one id for the others.

Each contestant lives in a process of its own, so that idle thread pools do not disturb the one at work, and they take
turns, round by round, within one run: compare the ratios, which a busy machine disturbs less than the times. Nothing
here passes or fails by a time; the run fails where a contestant's loss does not fall.
"""

import argparse
import json
import shutil
import statistics
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from side_by_side import cores, machine, serve
from trainers import RunSteps, Shape, Trainer, devices_for, jgpt_step, take_turns, timed

SHAPES = {
    "cpu": Shape(n_layers=4, n_heads=4, d_model=128, context_length=64, batch=12, dropout=0.0),
    "baby": Shape(n_layers=6, n_heads=6, d_model=384, context_length=256, batch=64, dropout=0.2),
}
FP32 = ("torch-eager", "torch-compile", "jgpt")
CONTESTANTS = (*FP32, *(f"{name}-bf16" for name in FP32))


def jgpt_contestant(shape: Shape, micro_batch: int, compute: str = "fp32") -> RunSteps:
    """Build jgpt's train step: on a CPU a device for each core."""
    from jgpt.hardware.process import set_up_process

    set_up_process()
    from jgpt.model.precision import choose_policy

    devices = devices_for(shape.batch)
    share = shape.batch // len(devices)
    micro = next(size for size in range(min(share, micro_batch or share), 0, -1) if share % size == 0)
    return timed(
        jgpt_step(shape.model, shape.batch, devices, micro, choose_policy(compute, "fp32", "cpu", None)), shape
    )


def torch_contestant(shape: Shape, compiled: bool, compute: str) -> RunSteps:
    """Build the same model in PyTorch, trained as nanoGPT trains it."""
    import torch
    from nanogpt import GPT2, make_step

    torch.manual_seed(0)
    torch.set_num_threads(cores())
    sizes = shape.n_layers, shape.n_heads, shape.d_model, shape.context_length, shape.vocab_size
    model = GPT2(*sizes, bias=shape.bias, dropout=shape.dropout)
    return timed(make_step(model, compute=compute, compiled=compiled), shape)


def make_contestant(name: str, shape: Shape, micro_batch: int) -> RunSteps:
    """Build a contestant by its name."""
    compute = "bf16" if name.endswith("-bf16") else "fp32"
    if name.startswith("jgpt"):
        return jgpt_contestant(shape, micro_batch, compute)
    return torch_contestant(shape, "compile" in name, compute)


def compare(shape_name: str, shape: Shape, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Run all contestants at one shape, print their table and return its rows."""
    names = options.contestants.split(",")
    if any("compile" in name for name in names) and not any(
        shutil.which(compiler) for compiler in ("c++", "g++", "clang++")
    ):
        print("torch-compile is left out: no C++ compiler here")
        names = [name for name in names if "compile" not in name]
    arguments = ["--shape", shape_name, "--batch", str(shape.batch), "--micro_batch", str(options.micro_batch)]
    contestants = [Trainer(__file__, name, arguments) for name in names]
    take_turns(contestants, options.rounds, options.steps_per_round, shape_name)
    tokens = shape.batch * shape.context_length
    rows = [
        {
            "shape": shape_name,
            "contestant": contestant.name,
            "first_step_seconds": contestant.first_step_seconds,
            "min_ms": 1e3 * min(contestant.seconds),
            "median_ms": 1e3 * statistics.median(contestant.seconds),
            "tokens_per_second": tokens / min(contestant.seconds),
            "first_loss": contestant.losses[0],
            "last_loss": contestant.losses[-1],
            "steps": len(contestant.losses),
        }
        for contestant in contestants
    ]
    for contestant in contestants:
        contestant.close()
    print(f"\n{shape_name}: {shape}")
    print(f"{'':19}{'first step s':>13}{'min ms':>10}{'median ms':>11}{'tokens/s':>10}{'to torch':>10}{'loss':>16}")
    for row in rows:
        narrow = row["contestant"].endswith("-bf16")
        peers = [
            peer for peer in rows if "torch" in peer["contestant"] and peer["contestant"].endswith("-bf16") == narrow
        ]
        best = max((peer["tokens_per_second"] for peer in peers), default=None)
        row["ratio_to_torch"] = row["tokens_per_second"] / best if best else None
        ratio = f"{row['ratio_to_torch']:10.2f}" if best else f"{'-':>10}"
        print(
            f"{row['contestant']:19}{row['first_step_seconds']:13.1f}{row['min_ms']:10.1f}{row['median_ms']:11.1f}"
            f"{row['tokens_per_second']:10.0f}{ratio}{row['first_loss']:8.3f} ->{row['last_loss']:6.3f}"
        )
    return rows


def main() -> None:
    """Parse the flags; be the parent, or one of its children."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--shape",
        choices=[*SHAPES, "both"],
        default="both",
        help="cpu: nanoGPT's CPU config (4 layers, 4 heads, width 128, context 64, batch 12, no dropout); "
        "baby: its baby GPT (6, 6, 384, 256, 64, dropout 0.2: minutes; --batch and --micro_batch shrink its memory)",
    )
    parser.add_argument("--rounds", type=int, default=5, help="turns of each contestant (default 5)")
    parser.add_argument(
        "--steps_per_round", type=int, default=0, help="steps in a turn (default: 20 for cpu, 2 for baby)"
    )
    parser.add_argument("--batch", type=int, default=0, help="sequences a step, for instance 8 to shrink the baby's 64")
    parser.add_argument(
        "--micro_batch",
        type=int,
        default=0,
        help="jgpt: at most so many sequences on a device at a time, the rest by gradient accumulation (default: all)",
    )
    parser.add_argument(
        "--contestants",
        default=",".join(CONTESTANTS),
        help=f"some of {','.join(CONTESTANTS)}, in the order of the turns",
    )
    parser.add_argument("--json", type=Path, metavar="OUT", help="also write the machine and the rows there")
    parser.add_argument("--contestant", choices=CONTESTANTS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if unknown := set(options.contestants.split(",")) - set(CONTESTANTS):
        parser.error(f"--contestants: {', '.join(sorted(unknown))} is not one of {', '.join(CONTESTANTS)}")

    chosen = {name: shape for name, shape in SHAPES.items() if options.shape in (name, "both")}
    if options.batch:
        chosen = {name: Shape(**{**asdict(shape), "batch": options.batch}) for name, shape in chosen.items()}
    if options.contestant:
        return serve(lambda: make_contestant(options.contestant, chosen[options.shape], options.micro_batch))

    description = machine("jax", "flax", "optax", "torch", "numpy")
    print(f"{description['cores']} cores of {description['cpu']}, {description['system']}")
    print(", ".join(f"{package} {number}" for package, number in description["versions"].items()))
    rows = []
    default_steps, default_rounds = {"cpu": 20, "baby": 2}, options.rounds
    for name, shape in chosen.items():
        turn = argparse.Namespace(**{**vars(options), "rounds": default_rounds})
        turn.steps_per_round = options.steps_per_round or default_steps[name]
        rows += compare(name, shape, turn)
    if options.json:
        options.json.write_text(json.dumps({"machine": description, "rows": rows}, indent=2) + "\n")
    still = [row["contestant"] for row in rows if not row["last_loss"] < row["first_loss"]]
    if still:
        sys.exit(f"the loss did not fall: {', '.join(still)}")


if __name__ == "__main__":
    main()
