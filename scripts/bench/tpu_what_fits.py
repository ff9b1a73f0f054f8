"""What fits on Kaggle's TPU v5e-8: the bytes of a chip that each model takes, by arithmetic or by compiling its step.

    pip install -e '.[plan-tpu]'
    python scripts/bench/tpu_what_fits.py                  # parameters and moments alone: a minute
    python scripts/bench/tpu_what_fits.py --compile 124m   # the step, with activations and speed: 2 to 6 minutes of CPU
    python scripts/bench/tpu_what_fits.py --compile 7b --way "fsdp, gather=layer, Muon" \\
        --set batch.global_batch_size=16 execution.micro_batch_size=2

Without --compile nothing of a step is counted but what it holds all the time: what is more than 15.75 GiB cannot fit,
and what is less may not. Times are those of `jgpt/planning/roofline.py`, none measured. No TPU is needed.
"""

import argparse
import math
import os
import time
from collections import Counter
from collections.abc import Sequence
from typing import Any

os.environ["JAX_PLATFORMS"] = "cpu"  # before JAX is imported: libtpu only compiles here

import jax
from ml_collections import ConfigDict

from jgpt.config.defaults import default_config
from jgpt.model.lora import lora_config
from jgpt.model.parameters import abstract_adapters, count_parameters, flops_per_token
from jgpt.model.shapes import ModelConfig, model_config
from jgpt.planning.audit import collectives
from jgpt.planning.devices import Target, compile_only
from jgpt.planning.estimate import Estimate, estimate
from jgpt.planning.search import least_bytes
from jgpt.wording import GIB, format_count

VOCABULARY = 50_257
# GPT-2's four sizes with heads of 128, a Qwen2.5-7B and a 14B (their config.json on the Hub). The last two are
# fine-tuned. "flaxchat": the products of mlnomadpy/flaxchat's 204M (scripts/train_gpt2.py at 9653ab4; README: 12L/768d/
# 6h, 3kv, 379K tokens/s on Kaggle's TPU), 131,072 tokens a step. 75.5M of its parameters are six tables of embeddings
# of values, which are looked up and multiplied with nothing; they are not here.
SHAPES: dict[str, dict[str, Any]] = {
    "124m": {"n_layers": 12, "n_heads": 6, "d_model": 768},
    "flaxchat": {"n_layers": 12, "n_heads": 6, "n_kv_heads": 3, "d_model": 768, "d_ff": 3072, "mlp": "gelu",
                 "vocab_size": 32_768, "tie_embeddings": False, "qk_norm": True, "context_length": 2048},
    "203m": {"n_layers": 12, "n_heads": 8, "d_model": 1024},
    "355m": {"n_layers": 24, "n_heads": 8, "d_model": 1024},
    "774m": {"n_layers": 36, "n_heads": 10, "d_model": 1280},
    "1558m": {"n_layers": 48, "n_heads": 12, "d_model": 1536},
    "7b": {"n_layers": 28, "n_heads": 28, "n_kv_heads": 4, "d_model": 3584, "d_ff": 18_944, "vocab_size": 152_064,
           "qkv_bias": True, "tie_embeddings": False},
    "14b": {"n_layers": 48, "n_heads": 40, "n_kv_heads": 8, "d_model": 5120, "d_ff": 13_824, "vocab_size": 152_064,
            "qkv_bias": True, "tie_embeddings": False},
}  # fmt: skip
BLOCKS_RECOMPUTED: dict[str, Any] = {"micro_batch_size": 1, "remat": "block", "loss_chunk_tokens": 512}
EXECUTION: dict[str, dict[str, Any]] = {
    "774m": {"micro_batch_size": 4, "remat": "block"},
    "1558m": {"micro_batch_size": 4, "remat": "block"},
    "7b": BLOCKS_RECOMPUTED,
    "14b": BLOCKS_RECOMPUTED,
}
WAYS: dict[str, dict[str, Any]] = {
    "data": {},
    "fsdp": {"execution.parallel": "fsdp", "execution.gather": "step"},
    "fsdp, gather=layer": {"execution.parallel": "fsdp", "execution.gather": "layer"},
    "fsdp, gather=layer, Muon": {
        "execution.parallel": "fsdp",
        "execution.gather": "layer",
        "optimizer.kind": "muon",
        "precision.first_moment": "bf16",
    },
    "tensor, LoRA of rank 16": {"execution.parallel": "tensor", "lora.rank": 16},
}


def config_of(shape: str, way: str, changes: Sequence[str] = ()) -> ConfigDict:
    """Return the config of a model and of a way to share it over the chips; `changes` are KEY=NUMBER."""
    config = default_config()
    config.model.update({"context_length": 1024, "vocab_multiple_of": 128} | SHAPES[shape])
    config.batch.global_batch_size = 64
    config.execution.update({"micro_batch_size": 8, "attention": "flash", "loss_chunk_tokens": 2048})
    config.execution.update(EXECUTION.get(shape, {}))
    config.update_from_flattened_dict(WAYS[way])
    config.update_from_flattened_dict({key: int(value) for key, _, value in (x.partition("=") for x in changes)})
    if config.execution.parallel == "tensor":
        config.execution.attention = "auto"
    return config


def shapes_of(config: ConfigDict) -> ModelConfig:
    """Return the shapes of a config, with GPT-2's vocabulary where it has none."""
    return model_config(config.model, config.model.vocab_size or VOCABULARY)


def print_compiled(shape: str, way: str, changes: Sequence[str], target: Target) -> None:
    """Compile the step of a model, and print what it takes of a chip, and how fast it is."""
    config, began = config_of(shape, way, changes), time.process_time()
    shapes = shapes_of(config)
    found = estimate(config, shapes, target)
    cpu = time.process_time() - began
    times, sent = Counter[str](), Counter[str]()
    for one in collectives(found.program) if found.program else []:
        times[one.kind] += one.times
        sent[one.kind] += int(one.bytes * one.times)
    exchanged = ", ".join(f"{times[kind]} {kind} ({sent[kind] / 1e6:,.0f} MB)" for kind in times)
    print(
        f"{format_count(count_parameters(shapes))}, {way}: {found.peak / GIB:.2f} GiB a chip"
        f"{speed(found, config, shapes, target)}; exchanged: {exchanged or 'nothing'}; compiled in {cpu:.0f} s of CPU"
    )


def main() -> None:
    """Print a row for each model and way, or compile one."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--compile", default="", choices=["", *SHAPES], help="compile the step of this model")
    parser.add_argument("--way", default="data", choices=WAYS, help="with --compile: how the chips share it")
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=NUMBER", help="further keys of the config")
    options = parser.parse_args()
    target = compile_only("v5e8")
    if options.compile:
        print_compiled(options.compile, options.way, options.set, target)
    else:
        print_state_alone(target)


def speed(found: Estimate, config: ConfigDict, shapes: ModelConfig, target: Target) -> str:
    """Say how fast a step is, and which share of the peak it makes; "" where it was refused."""
    if not found.seconds:
        return ""
    tokens = config.batch.global_batch_size * shapes.context_length / found.seconds
    lora = lora_config(config.lora)
    adapters = sum(math.prod(x.shape) for x in jax.tree.leaves(abstract_adapters(shapes, lora))) if lora else 0
    mfu = flops_per_token(shapes, adapters) * tokens / len(target.devices) / (target.chip.peak_flops["bf16"] or 1.0)
    return f", {1e3 * found.seconds:,.1f} ms a step, {tokens:,.0f} tokens/s, MFU {100 * mfu:.0f}%"


def print_state_alone(target: Target) -> None:
    """Print what each model and way holds all the time."""
    for shape in SHAPES:
        for way in WAYS:
            config = config_of(shape, way)
            shapes = shapes_of(config)
            least = least_bytes(config, shapes, target) / GIB
            verdict = "cannot fit" if least > (target.memory_bytes or 0) / GIB else ""
            print(f"{format_count(count_parameters(shapes)):>8}  {way:<24} {least:7.2f} GiB a chip  {verdict}".rstrip())


if __name__ == "__main__":
    main()
