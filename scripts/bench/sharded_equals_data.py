"""A state split over four devices trains as a copy on each does: losses, bytes on a device, an overflow on one of them.

    python scripts/bench/sharded_equals_data.py [--steps 60]

Four virtual devices of a CPU, a GPT-2 of 0.2 M with dropout, two micro-batches a step. In fp32 `fsdp` with
gather=step and gather=layer run beside `data` on the same random tokens: the largest difference of a loss, relative.
Then one step in fp16 whose gradients overflow on one device alone, by an infinite row of the embedding that only its
share of the batch has: nothing of the state may change on any device.
"""

import argparse
import os

os.environ["JAX_PLATFORMS"] = "cpu"  # before JAX is imported

import jax
import numpy as np
from ml_collections import ConfigDict

from jgpt.config.defaults import default_config
from jgpt.data.batches import Batch
from jgpt.model.shapes import model_config
from jgpt.parallel.build import Parts, make_parts

V, T, DEVICES = 256, 64, 4
WAYS = {"data": ("data", "step"), "fsdp, gather=step": ("fsdp", "step"), "fsdp, gather=layer": ("fsdp", "layer")}


def config_of(parallel: str, gather: str, compute: str) -> ConfigDict:
    """Return the config of a way."""
    config = default_config()
    config.model.update(n_layers=4, n_heads=4, d_model=64, context_length=T, dropout=0.1, bias=True)
    config.model.update(mlp="gelu", position="learned", norm="layernorm")
    config.model.tie_embeddings = compute == "fp32"  # an infinite row of the output layer would meet every token
    config.optimizer.update(warmup_steps=5, total_steps=1000, learning_rate=1e-3)
    config.batch.global_batch_size = 2 * DEVICES * 2
    config.execution.update(micro_batch_size=2, parallel=parallel, gather=gather)
    config.precision.compute, config.precision.gradient_average = compute, compute
    config.precision.loss_scale = 8.0
    return config


def parts_of(way: str, compute: str = "fp32") -> Parts:
    """Build the parts of a way."""
    config = config_of(*WAYS[way], compute)
    return make_parts(config, model_config(config.model, V), jax.local_devices())


def tokens(step: int, ids: int = V) -> np.ndarray:
    """Return random text that can be learned: each token is the one before it, or the next."""
    random = np.random.default_rng(step)
    first, steps = random.integers(0, ids, (2 * DEVICES * 2, 1)), random.integers(0, 2, (2 * DEVICES * 2, T))
    return (np.concatenate([first, first + np.cumsum(steps, axis=1)], axis=1) % ids).astype(np.int32)


def train(way: str, steps: int) -> tuple[list[float], list[int], int]:
    """Train; return the losses, the bytes of the state on each device, and those of all of it."""
    p = parts_of(way)
    state, losses = p.first_state(), []
    for step in range(steps):
        state, numbers = p.train_step(state, {}, p.strategy.place_batch(Batch(tokens(step)), p.accumulation))
        losses.append(float(p.strategy.on_host(numbers)["loss"]))
    leaves = jax.tree.leaves(state)
    on_each = [
        sum(shard.data.nbytes for x in leaves for shard in x.addressable_shards if shard.device == device)
        for device in p.strategy.devices
    ]
    return losses, on_each, sum(x.nbytes for x in leaves)


def overflow(way: str, hot_device: int) -> bool:
    """Tell whether a step that overflows on one device changes no part of the state, and the next one trains."""
    p = parts_of(way, "fp16")
    start = p.strategy.on_host(p.first_state())
    table = np.array(start.params["wte"]["embedding"])
    table[V - 1] = np.inf
    start = start._replace(params=start.params | {"wte": {"embedding": table}})
    hot = tokens(0, V - 1)
    hot[hot_device * len(hot) // DEVICES, 3] = V - 1
    state, _ = p.train_step(p.strategy.place_state(start), {}, p.strategy.place_batch(Batch(hot), p.accumulation))
    after = p.strategy.on_host(state)
    same = jax.tree.map(lambda x, y: x.tobytes() == y.tobytes(), (after.params, after.opt_state),
                        (start.params, start.opt_state))  # fmt: skip
    state, _ = p.train_step(state, {}, p.strategy.place_batch(Batch(tokens(1, V - 1)), p.accumulation))
    return bool(jax.tree.all(same)) and int(after.updates) == 0 and int(p.strategy.on_host(state).updates) == 1


def main() -> None:
    """Train each way, compare, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=60)
    flags = parser.parse_args()
    jax.config.update("jax_num_cpu_devices", DEVICES)
    expected: list[float] = []
    for way in WAYS:
        losses, on_each, whole = train(way, flags.steps)
        expected = expected or losses
        difference = max(abs(a / b - 1) for a, b in zip(losses, expected, strict=True))
        shares = ", ".join(f"{size / whole:.3f}" for size in on_each)
        print(
            f"{way:<20} loss {losses[0]:.4f} to {losses[-1]:.4f} in {len(losses)} steps, largest relative difference"
            f" from data {difference:.1e}; of {whole:,} bytes of state each device has {shares}",
            flush=True,
        )
    for way in WAYS:
        unchanged = [overflow(way, device) for device in (0, DEVICES - 1)]
        print(f"{way:<20} fp16, overflow on the first, the last device alone: state unchanged {unchanged}", flush=True)


if __name__ == "__main__":
    main()
