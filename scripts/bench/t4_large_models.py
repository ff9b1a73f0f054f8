"""What a model that two T4s share takes on each, by compiling it for them on any machine: no GPU, driver or weights.

    pip install jax-cuda12-plugin==V jax-cuda12-pjrt==V        # V: the version of jax here, 0.10 or newer
    python scripts/bench/t4_large_models.py [--model qwen2.5-7b] [--decode 4096] [--lora 512,1024,2048,4096]

Compiles, as `jgpt.generate` and `jgpt.train` run them, in fp16: the prefill of a whole context and the decoding loop
behind it, one text; and a LoRA step (rank 16, all targets, remat=block), one sequence at a time. Prints the bytes of
each card at the peak (XLA's memory analysis: arguments + outputs - aliased + temporary) against what JAX may take of it
(0.92 of 14.6 GiB), what the cards exchange, and the dtypes of the matrix products. Takes minutes for 28 layers.
"""

import argparse
import math
import os
import re
import time
from typing import Any

os.environ["JAX_PLATFORMS"] = "cpu"  # before JAX is imported: the plugin only compiles here

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from jgpt.config.defaults import default_config
from jgpt.data.batches import Batch
from jgpt.inference.placement import needed
from jgpt.inference.rounds import UNLIMITED, Task, decode, prefill
from jgpt.inference.sampling import Sampling
from jgpt.model.columns import for_devices
from jgpt.model.gpt import GPT
from jgpt.model.lora import LoRA
from jgpt.model.parameters import abstract_params, count_parameters
from jgpt.model.precision import Policy
from jgpt.model.shapes import ModelConfig
from jgpt.parallel.rules import TENSOR, device_mesh, param_shardings
from jgpt.parallel.tensor_parallel import TensorParallel
from jgpt.planning.audit import products
from jgpt.planning.devices import compile_only
from jgpt.planning.hlo import parse
from jgpt.step.optimizer import learning_rate_schedule, make_optimizer
from jgpt.step.state import init_state
from jgpt.step.train_step import Step

GIB = 2**30
USABLE = 0.92 * 14.6 * GIB  # of a T4, by XLA_CLIENT_MEM_FRACTION as jgpt sets it
BANDWIDTH = 256e9  # bytes a second that a T4 sustains, of 320 on paper
ALL_REDUCE = 50e-6  # seconds, assumed: two cards that talk through the host, a few KB
FP16 = Policy(compute=jnp.float16)


def qwen(layers: int, width: int, heads: int, kv_heads: int, mlp: int, vocabulary: int, tied: bool) -> ModelConfig:
    """Shapes of a Qwen2.5 (its config.json on the Hub)."""
    return ModelConfig(
        vocabulary, 32_768, layers, heads, kv_heads, width, 128, mlp,
        qkv_bias=True, tie_embeddings=tied, rope_theta=1e6, norm_eps=1e-6,
    )  # fmt: skip


MODELS = {
    "smollm2-1.7b": ModelConfig(49_152, 8192, 24, 32, 32, 2048, 64, 8192, rope_theta=130_000.0),
    "qwen2.5-1.5b": qwen(28, 1536, 12, 2, 8960, 151_936, True),
    "qwen2.5-7b": qwen(28, 3584, 28, 4, 18_944, 152_064, False),
    "qwen2.5-14b": qwen(48, 5120, 40, 8, 13_824, 152_064, False),
}


class T4s:
    """Compile-only devices, and a model as they share it: shapes in the place of arrays."""

    def __init__(self, plain: ModelConfig, n: int = 2) -> None:
        self.devices = compile_only("t4x2").devices[:n]
        self.plain, self.shared, self.mesh = plain, for_devices(plain, n), device_mesh(self.devices)
        self.whole = NamedSharding(self.mesh, PartitionSpec())

    def copied(self, tree: Any, sharding: NamedSharding | None = None) -> Any:
        """Return shapes that lie whole on both cards, or as `sharding` says."""
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding or self.whole), tree)

    def params(self) -> Any:
        """Return the parameters, matrices in fp16."""
        params = jax.eval_shape(FP16.cast_to_compute, abstract_params(self.shared))
        return jax.tree.map(self.copied, params, param_shardings(params, self.shared, self.mesh))

    def lower_decoding(self, size: int) -> tuple[jax.stages.Lowered, jax.stages.Lowered]:
        """Trace the prefill of `size` tokens and the loop that decodes with a cache of as many."""
        model, params, one = GPT(self.shared, jnp.float16), {"params": self.params()}, jnp.zeros(1, jnp.int32)
        stops = jnp.full((1, 4), -1)
        task = self.copied(Task(one.astype(jnp.uint32), one, one, one, stops, one, Sampling().rules(1)))
        tokens, length, steps = map(self.copied, (jnp.zeros((1, size), jnp.int32), one, jnp.int32(UNLIMITED)))
        lowered = prefill.lower(model, size, params, task, tokens, length, None)
        rows = self.copied(lowered.out_info)
        by_heads = self.shared.n_kv_heads % len(self.devices) == 0
        of_cache = NamedSharding(self.mesh, PartitionSpec(None, TENSOR) if by_heads else PartitionSpec())
        rows = rows._replace(cache=self.copied(rows.cache, of_cache))
        return lowered, decode.lower(model, params, task, rows, steps)

    def compile_lora_step(self, length: int) -> Any:
        """Compile a training step on one sequence of `length` tokens."""
        config, lora = default_config(), LoRA(rank=16, alpha=32.0)
        optimizer, schedule = make_optimizer(config.optimizer), learning_rate_schedule(config.optimizer)
        runner, model = TensorParallel(self.devices, self.shared), GPT(self.shared, jnp.float16, "block", lora)
        step = Step(model, FP16, optimizer, schedule, accumulation=1, seed=0, loss_chunk_tokens=512, growth_steps=1000)
        plain = GPT(self.plain, jnp.float16, "block", lora)  # adapters have the plain model's shapes
        state = self.copied(jax.eval_shape(lambda: init_state(plain, FP16, optimizer, 0, 1024.0)))
        batch = self.copied(Batch(jnp.zeros((1, 1, length + 1), jnp.int32)))
        return runner.train_step(step).lower(state, self.params(), batch).compile()  # type: ignore[attr-defined]


def report(name: str, compiled: Any) -> None:
    """Print a row of the table, and below it what the cards exchange and multiply."""
    m, program = compiled.memory_analysis(), compiled.as_text()
    kept, made, temporary = m.argument_size_in_bytes, m.output_size_in_bytes, m.temp_size_in_bytes
    made -= m.alias_size_in_bytes
    peak = kept + made + temporary
    row = "".join(f"{part / GIB:11.2f}" for part in (kept, made, temporary, peak))
    print(f"{name:<20}{row}   {'fits' if peak <= USABLE else 'DOES NOT FIT'}")
    reduces = len(re.findall(r" all-reduce(?:-start)?\(", program))
    print(f"    {reduces} all-reduces; gathered from the other card: {gathered(program)}")
    print("    matrix products: " + ", ".join(f"{n} x {kind}" for kind, n in products(parse(program)).most_common()))
    copies = re.findall(r"= f32\[[\d,]*\]\S* (?:fusion|convert)\(.*wrapped_convert", program)
    print(f"    arrays that are converted to fp32 by themselves: {len(copies)}", flush=True)


def gathered(program: str) -> str:
    """Say what is fetched whole from the other card, not added up: the largest array, and MiB in all."""
    results = re.findall(r"= (.*) (?:all-gather|all-to-all|collective-permute)(?:-start)?\(", program)
    arrays = [array for result in results for array in re.findall(r"\w+\[[\d,]*\]", result)]
    sizes = [mebibytes(array) for array in arrays]
    largest = max(arrays, key=mebibytes, default="nothing")
    return f"{largest}" + (f" the largest, {sum(sizes):.1f} MiB in all" if arrays else "")


def mebibytes(array: str) -> float:
    """Return the size of an array as HLO writes it.

    >>> mebibytes("f16[1024,1024]")
    2.0
    """
    dtype, dimensions = array.removesuffix("]").split("[")
    bits = int("".join(filter(str.isdigit, dtype)) or 8)  # pred
    return math.prod(int(n) for n in dimensions.split(",") if n) * bits / 8 / 2**20


def predict(cards: T4s, size: int) -> str:
    """Predict the speed of decoding one text from the bytes that a card must read for each token (a roofline)."""
    shared, need = cards.shared, needed(cards.plain, jnp.float16, size, 1, cards.devices)
    lookup = 0 if shared.tie_embeddings else shared.vocab_size * shared.d_model * 2 // 2  # one row of this is read
    reading = (need.weights - lookup + need.cache) / BANDWIDTH
    talking = (2 * shared.n_layers + 3) * ALL_REDUCE
    return (
        f"predicted, not measured: {1 / (reading + talking):.0f} tokens/s of one text at a full cache:"
        f" {reading * 1e3:.1f} ms to read weights and cache at {BANDWIDTH / 1e9:.0f} GB/s,"
        f" {talking * 1e3:.1f} ms for all-reduces of {ALL_REDUCE * 1e6:.0f} us (assumed)"
    )


def main() -> None:
    """Compile and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, default="qwen2.5-7b")
    parser.add_argument("--decode", type=int, default=4096, help="tokens in the cache; 0: skip")
    parser.add_argument("--lora", default="512,1024,2048,4096", help="lengths of a training sequence; '': skip")
    flags = parser.parse_args()
    began, plain = time.perf_counter(), MODELS[flags.model]
    cards = T4s(plain)
    print(
        f"{flags.model}: {count_parameters(plain) / 1e9:.2f} B parameters in fp16 over two T4s, jax {jax.__version__}"
    )
    print(f"{f'GiB of {USABLE / GIB:.1f} on each':<20}{'arguments':>11}{'results':>11}{'temporary':>11}{'peak':>11}")
    if flags.decode:
        for name, lowered in zip(("prefill", "decode"), cards.lower_decoding(flags.decode), strict=True):
            report(f"{name} {flags.decode}", lowered.compile())
        print(f"    jgpt's own estimate before it loads: {needed(plain, jnp.float16, flags.decode, 1, cards.devices)}")
        print(f"    {predict(cards, flags.decode)}")
    for length in filter(None, flags.lora.split(",")):
        report(f"LoRA step {length}", cards.compile_lora_step(int(length)))
    print(f"compiled in {time.perf_counter() - began:.0f} s")


if __name__ == "__main__":
    main()
