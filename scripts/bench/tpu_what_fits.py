"""What fits on Kaggle's TPU v5e-8: the bytes of a chip that each model takes, by arithmetic or by compiling its step.

    pip install -e '.[plan-tpu]'
    python scripts/bench/tpu_what_fits.py                       # parameters and moments alone: a minute
    python scripts/bench/tpu_what_fits.py --compile 124m        # the step, with its activations and speed: minutes

Without --compile nothing of a step is counted but what it holds all the time: what is more than 15.75 GiB cannot fit,
and what is less may not. No TPU is needed.
"""

import argparse
import os
from typing import Any

os.environ["JAX_PLATFORMS"] = "cpu"  # before JAX is imported: libtpu only compiles here

from ml_collections import ConfigDict

from jgpt.config.defaults import default_config
from jgpt.model.parameters import count_parameters
from jgpt.model.shapes import model_config
from jgpt.planning.devices import compile_only
from jgpt.planning.estimate import estimate
from jgpt.planning.page import tried_row
from jgpt.planning.search import least_bytes
from jgpt.wording import GIB, format_count

VOCABULARY = 50_257
# GPT-2's four sizes with heads of 128, a Qwen2.5-7B and a 14B (their config.json on the Hub); what else they are run
# with. The last two are fine-tuned.
SHAPES: dict[str, dict[str, Any]] = {
    "124m": {"n_layers": 12, "n_heads": 6, "d_model": 768},
    "355m": {"n_layers": 24, "n_heads": 8, "d_model": 1024},
    "774m": {"n_layers": 36, "n_heads": 10, "d_model": 1280},
    "1558m": {"n_layers": 48, "n_heads": 12, "d_model": 1536},
    "7b": {"n_layers": 28, "n_heads": 28, "n_kv_heads": 4, "d_model": 3584, "d_ff": 18_944, "vocab_size": 152_064,
           "qkv_bias": True, "tie_embeddings": False},
    "14b": {"n_layers": 48, "n_heads": 40, "n_kv_heads": 8, "d_model": 5120, "d_ff": 13_824, "vocab_size": 152_064,
            "qkv_bias": True, "tie_embeddings": False},
}  # fmt: skip
WAYS: dict[str, dict[str, Any]] = {
    "data": {},
    "fsdp": {"execution.parallel": "fsdp"},
    "fsdp, gather=layer": {"execution.parallel": "fsdp", "execution.gather": "layer"},
    "tensor, LoRA of rank 16": {"execution.parallel": "tensor", "lora.rank": 16},
}


def config_of(shape: str, way: str) -> ConfigDict:
    """Return the config of a model and of a way to share it over the chips."""
    config = default_config()
    config.model.update(SHAPES[shape] | {"context_length": 1024, "vocab_multiple_of": 128})
    config.batch.global_batch_size = 64
    config.execution.update({"micro_batch_size": 8, "attention": "flash", "loss_chunk_tokens": 2048})
    if shape in ("7b", "14b"):
        config.execution.update({"micro_batch_size": 1, "remat": "block", "loss_chunk_tokens": 512})
    config.update_from_flattened_dict(WAYS[way])
    if config.execution.parallel == "tensor":
        config.execution.attention = "auto"
    return config


def main() -> None:
    """Print a row for each model and way."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--compile", default="", choices=["", *SHAPES], help="compile the step of this model")
    parser.add_argument("--way", default="data", choices=WAYS, help="with --compile: how the chips share it")
    options = parser.parse_args()
    target = compile_only("v5e8")
    if options.compile:
        config = config_of(options.compile, options.way)
        found = estimate(config, model_config(config.model, VOCABULARY), target)
        print(f"compiled in {found.compile_seconds:.0f} s: {tried_row(found)}")
        return
    for shape in SHAPES:
        for way in WAYS:
            config = config_of(shape, way)
            shapes = model_config(config.model, VOCABULARY)
            least = least_bytes(config, shapes, target) / GIB
            verdict = "cannot fit" if least > target.memory_bytes / GIB else ""
            print(f"{format_count(count_parameters(shapes)):>8}  {way:<24} {least:7.2f} GiB a chip  {verdict}".rstrip())


if __name__ == "__main__":
    main()
