"""Training speed of jgpt on one GPU, beside a PyTorch GPT-2 made for speed: GPT-2 124M at T=1024.

    pip install torch        # beside jgpt, with CUDA
    python scripts/bench/train_gpu.py --json result.json
    python scripts/bench/train_gpu.py --device cpu --shape tiny        # the whole comparison in miniature, anywhere

Contestants: jgpt's own train step, without remat, with the attention that `auto` chooses ("jgpt": deterministic, as
training runs; "jgpt-autotuned": without that promise, XLA free to try algorithms); and the same model in PyTorch
(nanogpt.py: scaled_dot_product_attention, fused AdamW, autocast, GradScaler in fp16), eager and by torch.compile.
For every dtype and micro-batch (a step is one micro-batch) all train on the same batches of the same text, each in a
process of its own, taking turns round by round: compare the ratios of the fastest steps. All share the card, so a card
must hold all of them: where it does not, run some at a time (--contestants). What runs out of memory is reported as
such. The data sheet's peak, and a product of large square matrices measured beside the steps, are what MFU refers to.

The run fails where the first losses of jgpt and PyTorch differ by more than 0.2, or a loss does not fall. So far this
has run on CPUs only (--device cpu), never on a GPU: its numbers for GPUs are still to be measured.
"""

import argparse
import json
import os
import shutil
import statistics
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from side_by_side import cores, machine, serve
from trainers import Shape, Trainer, jgpt_step, take_turns, timed

SHAPES = {
    "gpt2": Shape(12, 12, 768, context_length=1024, batch=8, vocab_size=50_304, bias=True),
    "tiny": Shape(2, 2, 64, context_length=64, batch=4, vocab_size=512, bias=True),
}
CONTESTANTS = ("jgpt", "jgpt-autotuned", "torch-eager", "torch-compile")
DEFAULTS = {"gpu": ("fp16,bf16", "4,8,16,32"), "cpu": ("fp32", "4")}  # dtypes, micro-batches
PRODUCT_SIDE = {"gpu": 8192, "cpu": 512}  # of the matrices whose product is measured
AGREE = 0.2  # nats: two random initialisations of one model differ by less

Answer = Callable[[Any], Any]  # how many steps -> (seconds, loss) of each; "peak" -> bytes; "machine" -> a description


def jgpt_contestant(shape: Shape, device: str, compute: str, deterministic: bool) -> Answer:
    """Build jgpt's train step on one device."""
    os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"  # the others need memory of the card as well
    from jgpt.hardware.devices import chip_of
    from jgpt.hardware.process import set_up_process

    set_up_process(deterministic)
    import jax

    from jgpt.hardware.speed import matmul_flops
    from jgpt.model.parameters import flops_per_token
    from jgpt.model.precision import DTYPES, Policy

    chosen = jax.local_devices(backend=device)[:1]
    policy = Policy(compute=DTYPES[compute])
    run_steps = timed(
        jgpt_step(shape.model, shape.batch, chosen, shape.batch, policy, deterministic=deterministic), shape
    )

    def answer(request: Any) -> Any:
        if request == "peak":
            return (chosen[0].memory_stats() or {}).get("peak_bytes_in_use")
        if request == "machine":
            return {
                "device": chosen[0].device_kind,
                "sheet_flops": chip_of(chosen[0]).peak_flops[compute],
                "measured_flops": matmul_flops(chosen[0], DTYPES[compute], PRODUCT_SIDE[device], seconds=2.0),
                "flops_per_token": flops_per_token(shape.model),
            }
        return run_steps(request)

    return answer


def torch_contestant(shape: Shape, device: str, compute: str, compiled: bool) -> Answer:
    """Build the same model in PyTorch."""
    import torch
    from nanogpt import GPT2, make_step

    torch.manual_seed(0)
    torch.set_num_threads(cores())
    torch.set_float32_matmul_precision("high")
    model = GPT2(shape.n_layers, shape.n_heads, shape.d_model, shape.context_length, shape.vocab_size)
    place = "cuda" if device == "gpu" else "cpu"
    run_steps = timed(make_step(model, place, compute, compiled), shape)

    def answer(request: Any) -> Any:
        if request == "peak":
            return torch.cuda.max_memory_allocated() if device == "gpu" else None
        return run_steps(request)

    return answer


def make_contestant(name: str, shape: Shape, device: str, compute: str) -> Answer:
    """Build a contestant by its name."""
    if name.startswith("jgpt"):
        return jgpt_contestant(shape, device, compute, deterministic=name == "jgpt")
    return torch_contestant(shape, device, compute, compiled=name == "torch-compile")


def compare(shape: Shape, compute: str, names: list[str], options: argparse.Namespace) -> list[dict[str, Any]]:
    """Run the contestants at one dtype and micro-batch; return a row for each, also for those that did not fit."""
    arguments = ["--shape", options.shape, "--device", options.device]
    arguments += ["--dtypes", compute, "--micro_batches", str(shape.batch)]
    common, trainers = {"dtype": compute, "micro_batch": shape.batch}, []
    rows: list[dict[str, Any]] = []
    for name in names:
        try:
            trainers.append(Trainer(__file__, name, arguments))
        except RuntimeError as error:  # its own words are above, on stderr: out of memory, as a rule
            rows.append({**common, "contestant": name, "failed": str(error)})
    take_turns(trainers, options.rounds, options.steps_per_round, f"{compute} B={shape.batch}")
    about = {}
    for trainer in trainers:
        seconds, peak = min(trainer.seconds), trainer.ask("peak")
        about = trainer.ask("machine") if trainer.name == "jgpt" else about
        rows.append(
            {
                **common,
                "contestant": trainer.name,
                "first_step_seconds": trainer.first_step_seconds,
                "min_ms": 1e3 * seconds,
                "median_ms": 1e3 * statistics.median(trainer.seconds),
                "tokens_per_second": shape.batch * shape.context_length / seconds,
                "peak_bytes": peak,
                "first_loss": trainer.losses[0],
                "last_loss": trainer.losses[-1],
            }
        )
    for trainer in trainers:
        trainer.close()
    best = max(
        (row["tokens_per_second"] for row in rows if not row["contestant"].startswith("jgpt") and "min_ms" in row),
        default=0,
    )
    for row in (row for row in rows if "min_ms" in row):
        flops = row["tokens_per_second"] * about["flops_per_token"] if about else None
        row["mfu_sheet"] = flops / about["sheet_flops"] if flops and about["sheet_flops"] else None
        row["mfu_measured"] = flops / about["measured_flops"] if flops else None
        row["ratio_to_best_torch"] = row["tokens_per_second"] / best if best else None
        row |= {key: about[key] for key in ("device", "sheet_flops", "measured_flops") if about}
    return rows


def show(rows: list[dict[str, Any]]) -> None:
    """Print the table."""
    print(
        f"{'':14}{'dtype':>6}{'B':>4}{'min ms':>9}{'median':>9}{'tokens/s':>10}{'MFU sheet':>10}{'of GEMM':>9}"
        f"{'peak GiB':>9}{'to torch':>9}{'loss':>17}"
    )
    for row in rows:
        head = f"{row['contestant']:14}{row['dtype']:>6}{row['micro_batch']:4}"
        if "failed" in row:
            print(f"{head}  {row['failed']}")
            continue
        shares = "".join(
            f"{row[key]:{width}.1%}" if row[key] else f"{'-':>{width}}"
            for key, width in (("mfu_sheet", 10), ("mfu_measured", 9))
        )
        peak = f"{row['peak_bytes'] / 2**30:9.2f}" if row["peak_bytes"] else f"{'-':>9}"
        ratio = f"{row['ratio_to_best_torch']:9.2f}" if row["ratio_to_best_torch"] else f"{'-':>9}"
        print(
            f"{head}{row['min_ms']:9.1f}{row['median_ms']:9.1f}{row['tokens_per_second']:10.0f}{shares}{peak}{ratio}"
            f"{row['first_loss']:9.3f} ->{row['last_loss']:6.3f}"
        )


def problems(rows: list[dict[str, Any]]) -> list[str]:
    """List where the contestants do not do the same work: their first losses differ, or one does not fall."""
    ran = [row for row in rows if "failed" not in row]
    found = [f"the loss of {row['contestant']} did not fall" for row in ran if not row["last_loss"] < row["first_loss"]]
    for dtype, size in {(row["dtype"], row["micro_batch"]) for row in ran}:
        first = [row["first_loss"] for row in ran if (row["dtype"], row["micro_batch"]) == (dtype, size)]
        if max(first) - min(first) > AGREE:
            found.append(f"the first losses at {dtype}, B={size} differ: {', '.join(f'{loss:.3f}' for loss in first)}")
    return found


def main() -> None:
    """Parse the flags; be the parent, or one of its children."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("gpu", "cpu"), default="gpu")
    parser.add_argument(
        "--shape", choices=SHAPES, default="gpt2", help="gpt2: 124M, T=1024; tiny: a check of the script"
    )
    parser.add_argument("--dtypes", default="", help="some of fp32,fp16,bf16 (default: fp16,bf16; fp32 on a CPU)")
    parser.add_argument("--micro_batches", default="", help="sequences (default: 4,8,16,32; 4 on a CPU)")
    parser.add_argument("--rounds", type=int, default=5, help="turns of each contestant (default 5)")
    parser.add_argument("--steps_per_round", type=int, default=10, help="steps in a turn (default 10)")
    parser.add_argument("--contestants", default=",".join(CONTESTANTS), help=f"some of {','.join(CONTESTANTS)}")
    parser.add_argument("--json", type=Path, metavar="OUT", help="also write the machine and the rows there")
    parser.add_argument("--contestant", choices=CONTESTANTS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    dtypes, sizes = DEFAULTS[options.device]
    dtypes, sizes = (options.dtypes or dtypes).split(","), [int(n) for n in (options.micro_batches or sizes).split(",")]
    if options.contestant:
        shape = replace(SHAPES[options.shape], batch=sizes[0])
        return serve(lambda: make_contestant(options.contestant, shape, options.device, dtypes[0]))

    names = options.contestants.split(",")
    if unknown := set(names) - set(CONTESTANTS):
        parser.error(f"--contestants: {', '.join(sorted(unknown))} is not one of {', '.join(CONTESTANTS)}")
    if options.device == "gpu" and not shutil.which("nvidia-smi"):
        sys.exit("there is no GPU here (no nvidia-smi). To try the script itself: --device cpu --shape tiny")
    if "torch-compile" in names and not any(shutil.which(compiler) for compiler in ("c++", "g++", "clang++")):
        print("torch-compile is left out: no C++ compiler here")
        names.remove("torch-compile")
    description = machine("jax", "flax", "optax", "torch", "numpy")
    rows = []
    for dtype in dtypes:
        for size in sizes:
            rows += compare(replace(SHAPES[options.shape], batch=size), dtype, names, options)
    device = next((row["device"] for row in rows if "device" in row), options.device)
    print(f"{options.shape} on {device}; {description['cores']} cores of {description['cpu']}")
    print(", ".join(f"{package} {number}" for package, number in description["versions"].items()))
    show(rows)
    if options.json:
        options.json.write_text(json.dumps({"machine": description, "rows": rows}, indent=2) + "\n")
    if found := problems(rows):
        sys.exit("\n".join(found))


if __name__ == "__main__":
    main()
