"""Would a kernel for decoding, one query against a long cache, pay on a T4? By compiling and a roofline, with no GPU.

    pip install "jgpt[plan]"        # jax 0.10 or newer
    python scripts/bench/decode_attention.py [--contexts 1024,4096,16384] [--json decode.json]

Compiles jgpt's decoding loop in fp16, one text, for GPT-2 124M on one T4 and Qwen2.5-7B on two, with one layer that
stands for all. Of what a token costs (jgpt/planning/roofline.py, a T4's rates) it takes the ops that read or write an
array as long as the cache. The best that a kernel could do is one launch a layer that reads keys and values once; what
it would save is the rest. An all-reduce of the two cards is assumed to take 50 us. The roofline gives every op the full
bandwidth: an op that keeps few SMs busy takes longer than it says, and a kernel split over the keys would save more.
"""

import argparse
import json
import os
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

os.environ["JAX_PLATFORMS"] = "cpu"  # before JAX is imported: the plugin only compiles here

from t4_large_models import ALL_REDUCE, BANDWIDTH, MODELS, T4s

from jgpt.hardware.chips import LAUNCH_SECONDS
from jgpt.model.scopes import SCOPES
from jgpt.model.shapes import ModelConfig
from jgpt.planning.devices import compile_only
from jgpt.planning.hlo import Program, parse
from jgpt.planning.roofline import predict

LAYERS = 1  # that are compiled
GPT2 = ModelConfig(
    50_304, 1024, 12, 12, 12, 768, 64, 3072, position="learned", norm="layernorm", mlp="gelu", bias=True
)  # fmt: skip
CASES = {"GPT-2 124M, one T4": (GPT2, 1), "Qwen2.5-7B, two T4s": (MODELS["qwen2.5-7b"], 2)}


def as_long_as_the_cache(program: Program, size: int) -> set[str]:
    """Return the names of the ops that read or write an array with a side of `size`."""
    found = set()
    for ops in program.computations.values():
        shapes = {op.name: op.shapes for op in ops}
        for op in ops:
            seen = [*op.shapes, *(shape for name in op.operands for shape in shapes.get(name, ()))]
            if any(size in shape.dims for shape in seen):
                found.add(op.name)
    return found


def token(plain: ModelConfig, cards: int, size: int) -> dict[str, Any]:
    """Compile, and return milliseconds of a token at a full cache of `size`."""
    few = replace(plain, n_layers=LAYERS, context_length=max(size, plain.context_length))
    program = parse(T4s(few, cards).lower_decoding(size)[1].compile().as_text())
    rates = compile_only("t4").rates
    assert rates is not None
    long, costs = as_long_as_the_cache(program, size), predict(program, rates, SCOPES).ops
    in_layers = [cost for cost in costs if re.search(r"\bh_\d+\b", cost.op_name) or cost.name in long]
    over_cache = [cost for cost in in_layers if cost.name in long and cost.kind != "collective"]
    share = plain.n_layers / LAYERS
    layers = share * sum(cost.seconds for cost in in_layers)
    rest = sum(cost.seconds for cost in costs) - layers / share
    talking = (2 * plain.n_layers + 3) * ALL_REDUCE if cards > 1 else 0.0
    attention = share * sum(cost.seconds for cost in over_cache)
    cache_bytes = 2 * plain.n_layers * plain.n_kv_heads * plain.d_head * 2 * size / cards
    least = cache_bytes / BANDWIDTH + plain.n_layers * LAUNCH_SECONDS
    whole = layers + rest + talking
    return {
        "ms": 1e3 * whole, "attention_ms": 1e3 * attention, "share": attention / whole, "least_ms": 1e3 * least,
        "could_save": max(0.0, attention - least) / whole, "ops_a_layer": round(len(over_cache) / LAYERS, 1),
        "ops": [[cost.name, cost.kind, cost.op_name.rpartition("attn")[2], round(cost.bytes)] for cost in over_cache],
    }  # fmt: skip


def main() -> None:
    """Compile and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--contexts", default="1024,4096,16384", help="tokens in the cache")
    parser.add_argument("--json", type=Path, help="where to write the numbers")
    flags = parser.parse_args()
    print("| model | cache | ms a token | over the cache | share | ops a layer | least | a kernel could save |")
    print("|" + " --- |" * 8)
    rows = []
    for name, (plain, cards) in CASES.items():
        for size in map(int, flags.contexts.split(",")):
            row = {"model": name, "cache": size, **token(plain, cards, size)}
            rows.append(row)
            print(
                f"| {name} | {size} | {row['ms']:.1f} | {row['attention_ms']:.2f} | {row['share']:.0%} |"
                f" {row['ops_a_layer']:g} | {row['least_ms']:.2f} | {row['could_save']:.0%} |",
                flush=True,
            )
    if flags.json:
        flags.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
