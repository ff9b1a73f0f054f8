"""Predicted over measured seconds of a training step, for three configs on the GPU that is here: what a plan is worth.

    python scripts/bench/plan_vs_truth.py [--steps 5] [--json plan_vs_truth.json]

Predicted: what `jgpt.plan --device this` says of the compiled step, with the rates of this card in hardware/chips.py.
Measured: that same step on random tokens, the median of so many steps after one that warms up. The memory is XLA's
analysis beside the most that JAX's allocator has held so far, which only grows: so the config that needs most
memory comes last.
"""

import argparse
import json
import statistics
import time

import jax
import numpy as np

from jgpt.config.defaults import default_config
from jgpt.data.batches import Batch
from jgpt.hardware.process import set_up_process
from jgpt.model.shapes import model_config
from jgpt.parallel.build import Parts
from jgpt.parallel.devices import training_devices
from jgpt.planning.devices import Target, this_machine
from jgpt.planning.estimate import estimate
from jgpt.wording import GIB

IDS = 50_257
# name: layers, heads, width, context, micro-batch, remat. The one that takes most memory comes last.
CONFIGS = {
    "34M, short context": (8, 8, 384, 256, 32, "none"),
    "GPT-2 124M, remat block": (12, 12, 768, 1024, 8, "block"),
    "GPT-2 124M": (12, 12, 768, 1024, 8, "none"),
}


def main() -> None:
    """Compile, predict, run, compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=5, help="steps that are timed, after one that is not")
    parser.add_argument("--json", default="", help="also write the table into this file")
    flags = parser.parse_args()
    set_up_process()
    target = this_machine(jax.local_devices())
    if target.rates is None:
        raise SystemExit(
            f"no prediction to compare: the rates of a {target.chip.name} are not known. Run this on a GPU that "
            "hardware/chips.py knows."
        )
    print(f"{target.kind}: {target.constants()}\n")
    print(f"{'config':<26}{'predicted ms':>14}{'measured ms':>14}{'ratio':>8}{'plan GiB':>10}{'seen GiB':>10}")
    rows = [compare(name, target, flags.steps) for name in CONFIGS]
    if flags.json:
        with open(flags.json, "w", encoding="utf-8") as file:
            json.dump({"device": target.kind, "jax": jax.__version__, "rows": rows}, file, indent=2)


def compare(name: str, target: Target, steps: int) -> dict[str, float | str]:
    """Predict and measure one config; print its row."""
    layers, heads, width, context, micro, remat = CONFIGS[name]
    config = default_config()
    config.model.update({"n_layers": layers, "n_heads": heads, "d_model": width, "context_length": context})
    config.batch.global_batch_size = 8 * micro * len(target.devices)
    config.execution.update({"micro_batch_size": micro, "remat": remat})
    found = estimate(config, model_config(config.model, IDS), this_machine(training_devices(config)))
    assert found.seconds is not None
    measured = seconds_per_step(found.parts, steps)
    seen = (target.devices[0].memory_stats() or {}).get("peak_bytes_in_use", 0)
    print(
        f"{name:<26}{found.seconds * 1e3:14.1f}{measured * 1e3:14.1f}{found.seconds / measured:8.2f}"
        f"{found.peak / GIB:10.2f}{seen / GIB:10.2f}",
        flush=True,
    )
    return {"config": name, "predicted": found.seconds, "measured": measured, "planned": found.peak, "seen": seen}


def seconds_per_step(parts: Parts, steps: int) -> float:
    """Run the step on random tokens; return the median seconds."""
    tokens = np.random.default_rng(0).integers(0, IDS, parts.abstract_batch().tokens.shape, np.int32)
    batch = parts.strategy.place_batch(Batch(tokens), parts.accumulation)
    state = parts.strategy.place_state(jax.jit(parts.init)())
    seconds = []
    for _ in range(1 + steps):
        start = time.perf_counter()
        state, numbers = parts.train_step(state, {}, batch)
        jax.block_until_ready((state, numbers))
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds[1:])


if __name__ == "__main__":
    main()
