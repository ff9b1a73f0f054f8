"""Seconds until a config's first step is done: compiled anew, and with JAX's persistent cache of compiled programs.

    python scripts/bench/compile_time.py configs/gpt2_124m.py --layers 2,6,12
    python scripts/bench/compile_time.py configs/kaggle_t4.py --t4        # compiled for two T4s on any machine

Every measurement is a process of its own: one with an empty cache directory (cold), then one with what that left
(warm); rounds are repeated, and the minima count. "first step" begins with tracing and ends when the step's numbers
are there. With --t4 nothing runs: it is tracing, lowering and compiling for two T4s, which needs the wheels
jax-cuda12-plugin and jax-cuda12-pjrt of jax's version (0.10 or newer), and no driver.
"""

import argparse
import json
import runpy
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from side_by_side import Contestant, machine, serve
from trainers import jgpt_step

CONTESTANTS = ("cold", "warm")
GPT2_IDS = 50_257  # of a pretrained tokenizer, which is not made here


def measure(config_file: str, layers: int, cache: str, t4: bool) -> Callable[[Any], float]:
    """Return a function that does the first step of a config with so many layers, and returns its seconds."""
    import jax
    import numpy as np

    from jgpt.hardware.devices import compute_capability
    from jgpt.hardware.process import set_up_process
    from jgpt.model.precision import choose_policy
    from jgpt.model.shapes import model_config
    from jgpt.parallel.devices import training_devices

    set_up_process()
    jax.config.update("jax_compilation_cache_dir", cache)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    config = runpy.run_path(config_file)["get_config"]()
    config.model.n_layers = layers
    n_ids = config.tokenizer.vocab_size if config.tokenizer.kind == "bpe" else GPT2_IDS
    shapes = model_config(config.model, n_ids)
    devices = t4_devices() if t4 else training_devices(config)
    platform, capability = ("gpu", (7, 5)) if t4 else (devices[0].platform, compute_capability(devices[0]))
    policy = choose_policy(config.precision.compute, config.precision.params, platform, capability)
    share = config.batch.global_batch_size // len(devices)
    rows = max(n for n in range(1, min(config.execution.micro_batch_size, share) + 1) if share % n == 0)
    size = (config.batch.global_batch_size, (config.batch.sequence_length or shapes.context_length) + 1)

    def first_step(_: Any) -> float:
        step = jgpt_step(shapes, size[0], devices, rows, policy, config.execution.remat, compile_only=t4)
        began = time.perf_counter()
        step(np.zeros(size, np.int32))
        return time.perf_counter() - began

    return first_step


def t4_devices() -> list[Any]:
    """Return two compile-only T4s."""
    from jax.experimental import topologies

    target = (Path(__file__).parent / "t4_target_config.txt").read_text()
    return topologies.get_topology_desc(platform="cuda", target_config=target, topology="1x1x2").devices


def main() -> None:
    """Parse the flags; be the parent, or one of its children."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", help="a config file")
    parser.add_argument("--layers", default="2,6,12", help="depths, the rest of the config as it is (default: 2,6,12)")
    parser.add_argument("--rounds", type=int, default=2, help="measurements of each (default 2)")
    parser.add_argument("--t4", action="store_true", help="compile for two T4s, which need not be here")
    parser.add_argument("--json", type=Path, metavar="OUT", help="also write the machine and the rows there")
    parser.add_argument("--contestant", choices=CONTESTANTS, help=argparse.SUPPRESS)
    parser.add_argument("--cache", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.contestant:
        return serve(lambda: measure(options.config, int(options.layers), options.cache, options.t4))

    rows = []
    for layers in map(int, options.layers.split(",")):
        seconds: dict[str, list[float]] = {name: [] for name in CONTESTANTS}
        for _ in range(options.rounds):
            with tempfile.TemporaryDirectory() as cache:
                for name in CONTESTANTS:
                    arguments = [options.config, "--layers", str(layers), "--cache", cache, *["--t4"] * options.t4]
                    contestant = Contestant(__file__, name, arguments)
                    seconds[name].append(contestant.ask("first step"))
                    contestant.close()
        rows.append({"layers": layers, **{name: min(found) for name, found in seconds.items()}})
        print(f"{layers:3} layers   cold {rows[-1]['cold']:7.1f} s   warm {rows[-1]['warm']:7.1f} s", flush=True)
    if options.json:
        about = {"machine": machine("jax", "flax"), "config": options.config, "t4": options.t4}
        options.json.write_text(json.dumps({**about, "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    sys.exit(main())
