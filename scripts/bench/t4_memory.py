"""Memory that a config's training step takes on two T4s, by compiling it for them on any machine: no GPU, no driver.

    pip install jax-cuda12-plugin==V jax-cuda12-pjrt==V        # V: the version of jax here, 0.10 or newer
    python scripts/bench/t4_memory.py configs/kaggle_t4.py [KEY=VALUE ...]

Prints the bytes of a device at the step's peak (XLA's memory analysis: arguments + outputs - aliased + temporary), the
gradient all-reduces, and the dtype of each matrix product's operands and result. A T4 has about 14.6 GiB to use.
"""

import os
import re
import runpy
import sys
import time
from ast import literal_eval
from collections import Counter
from pathlib import Path

os.environ["JAX_PLATFORMS"] = "cpu"  # before JAX is imported: the plugin only compiles here

import jax
import jax.numpy as jnp
from jax.experimental import topologies

from jgpt.data.batches import Batch
from jgpt.model.attention import choose_attention
from jgpt.model.build import count_parameters, model_config
from jgpt.model.gpt import GPT
from jgpt.model.precision import DTYPES, choose_policy
from jgpt.training.optimizer import learning_rate_schedule, make_optimizer
from jgpt.training.step import Pmap, init_state, make_train_step

N_IDS = {"hf": 50_257, "char": 100}  # of a tokenizer that is not made here; bpe's is in the config


def main(config_file: str, *overrides: str) -> None:
    """Compile and print."""
    config = runpy.run_path(config_file)["get_config"]()
    for key, _, value in (override.partition("=") for override in overrides):
        config.update_from_flattened_dict({key: literal_eval(value) if value[:1].isdigit() else value})
    shapes = model_config(config.model, N_IDS.get(config.tokenizer.kind, config.tokenizer.vocab_size))
    target = (Path(__file__).parent / "t4_target_config.txt").read_text()
    topology = topologies.get_topology_desc(platform="cuda", target_config=target, topology="1x1x2")
    runner = Pmap(topology.devices)
    policy = choose_policy("auto", config.precision.params, "gpu", (7, 5))
    attention = choose_attention(config.attention, policy.compute, "gpu", (7, 5))
    model, optimizer = GPT(shapes, policy.compute, config.remat, attention=attention), make_optimizer(config.optimizer)
    rows = config.batch.micro_batch_size
    accumulation = config.batch.global_batch_size // (len(runner.devices) * rows)
    schedule = learning_rate_schedule(config.optimizer)
    chunk, average = config.loss_chunk_tokens, DTYPES[config.precision.gradient_average]
    pure = make_train_step(model, policy, optimizer, schedule, accumulation, 0, chunk, 1000, average)
    step = runner.train_step(pure)
    state = jax.eval_shape(lambda: init_state(model, policy, optimizer, 0, 1.0))
    batch = Batch(jax.ShapeDtypeStruct((runner.shares, accumulation, rows, shapes.context_length + 1), jnp.int32))
    began = time.perf_counter()
    compiled = step.lower(state, {}, batch).compile()  # type: ignore[attr-defined]
    m, program = compiled.memory_analysis(), compiled.as_text()
    peak = m.argument_size_in_bytes + m.output_size_in_bytes - m.alias_size_in_bytes + m.temp_size_in_bytes
    millions, seconds = count_parameters(shapes) / 1e6, time.perf_counter() - began
    print(f"{' '.join([config_file, *overrides])}: {millions:.1f} M parameters, A={accumulation}, B={rows}")
    print(f"peak memory of a T4   {peak / 2**30:.2f} GiB (jax {jax.__version__}, compiled in {seconds:.0f} s)")
    print(f"all-reduces           {len(re.findall(r' all-reduce(?:-start)?[(]', program))}")
    print("matrix products       " + ", ".join(f"{n} x {kind}" for kind, n in products(program).most_common()))


def products(program: str) -> Counter[str]:
    """Count the matrix products in optimized HLO, by the dtypes of operands and result."""
    dtypes = dict(re.findall(r"(%[\w.-]+) = \(?(\w+)\[", program))
    calls = re.findall(r"= \(?(\w+)\[.*? custom-call\((%[\w.-]+), (%[\w.-]+).*?custom_call_target=\"__cublas", program)
    return Counter(f"{dtypes.get(a, '?')}*{dtypes.get(b, '?')}->{result}" for result, a, b in calls)


if __name__ == "__main__":
    main(*sys.argv[1:]) if len(sys.argv) > 1 else sys.exit(__doc__)
