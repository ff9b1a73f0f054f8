"""What models larger than a card take on several cards, predicted: compiled for them on any machine, no GPU, no driver.

    pip install "jgpt[plan]"        # jax 0.10 or newer
    python scripts/bench/sharded_plan.py --json table.json [--rows 124M,1558M] [--ways data,step,layer]

Each row compiles one training step: GPT-2's shapes at T=1024, Qwen2.5's at T=1024 (a full fine-tune), for two T4s or
eight H100s. Bytes are XLA's memory analysis of the compiled step; seconds are those of `jgpt/planning/roofline.py` at
the rates in `jgpt/hardware/chips.py`, none measured; `exchanged` says how often collectives of arrays run in a step, in
the loop over micro-batches and outside. Rows that are in the JSON already are not compiled again.
"""

import argparse
import json
import os
import resource
import time
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

os.environ["JAX_PLATFORMS"] = "cpu"  # before JAX is imported: the plugin only compiles here

import jax
from ml_collections import ConfigDict

from jgpt.config.defaults import default_config
from jgpt.model.parameters import count_parameters
from jgpt.model.shapes import ModelConfig
from jgpt.planning.audit import collectives
from jgpt.planning.devices import compile_only
from jgpt.planning.estimate import Estimate, estimate
from jgpt.wording import GIB

T = 1024
TOKENS = 131_072  # of an optimizer step, on all devices together


class Row(NamedTuple):
    """One model on one machine, and the execution that it is compiled with."""

    shapes: ModelConfig
    device: str
    micro_batch_size: int
    remat: str
    ways: tuple[str, ...] = ("data", "step", "layer")
    overrides: dict[str, Any] = {}  # noqa: RUF012  # nobody writes to it


def gpt2(layers: int, heads: int, width: int) -> ModelConfig:
    """Shapes of a GPT-2, with the vocabulary that jgpt rounds it up to."""
    return ModelConfig(
        50_304, T, layers, heads, heads, width, width // heads, 4 * width,
        position="learned", norm="layernorm", mlp="gelu", bias=True,
    )  # fmt: skip


def qwen(layers: int, width: int, heads: int, kv_heads: int, mlp: int, vocabulary: int, tied: bool) -> ModelConfig:
    """Shapes of a Qwen2.5 (its config.json on the Hub), for texts of T tokens."""
    return ModelConfig(
        vocabulary, T, layers, heads, kv_heads, width, 128, mlp,
        qkv_bias=True, tie_embeddings=tied, rope_theta=1e6, norm_eps=1e-6,
    )  # fmt: skip


HALF = {"precision.first_moment": "bf16"}
ROWS = {
    "124M": Row(gpt2(12, 12, 768), "t4x2", 8, "none"),
    "355M": Row(gpt2(24, 16, 1024), "t4x2", 4, "none"),
    "774M": Row(gpt2(36, 20, 1280), "t4x2", 4, "block"),
    "1558M": Row(gpt2(48, 25, 1600), "t4x2", 2, "block", overrides=HALF),
    "Qwen2.5-1.5B": Row(qwen(28, 1536, 12, 2, 8960, 151_936, True), "t4x2", 1, "block", ("step", "layer"), HALF),
    "Qwen2.5-3B": Row(qwen(36, 2048, 16, 2, 11_008, 151_936, True), "t4x2", 1, "block", ("layer",), HALF),
    "Qwen2.5-7B": Row(qwen(28, 3584, 28, 4, 18_944, 152_064, False), "h100x8", 4, "block", ("step", "layer")),
}


def config_of(row: Row, way: str) -> ConfigDict:
    """Return the config of a row."""
    config = default_config()
    sharing = {"execution.parallel": "data"} if way == "data" else {"execution.gather": way}
    config.update_from_flattened_dict(
        {
            "batch.global_batch_size": TOKENS // T,
            "batch.sequence_length": T,
            "precision.gradient_average": "fp16",
            "execution.parallel": "fsdp",
            "execution.micro_batch_size": row.micro_batch_size,
            "execution.remat": row.remat,
        }
        | sharing
        | row.overrides
    )
    return config


def compiled(name: str, way: str) -> dict[str, Any]:
    """Compile one row one way; return its facts."""
    row = ROWS[name]
    target, cpu = compile_only(row.device), time.process_time()
    found = estimate(config_of(row, way), row.shapes, target)
    assert found.program is not None and found.prediction is not None
    return {
        "model": name,
        "device": row.device,
        "way": way,
        "parameters": count_parameters(row.shapes),
        "micro_batch_size": found.parts.rows,
        "accumulation": found.parts.accumulation,
        "remat": row.remat,
        "overrides": row.overrides,
        "attention": found.parts.model.attention,
        "memory_gib": {part: round(size / GIB, 3) for part, size in found.memory.items()},
        "peak_gib": round(found.peak / GIB, 3),
        "usable_gib": round((target.memory_bytes or 0) / GIB, 3),
        "tokens_per_second": round(found.tokens_per_second or 0),
        "seconds_by_group": {group: round(s, 3) for group, s in found.prediction.by_group().items()},
        "exchanged": _exchanged(found),
        "compile_cpu_seconds": round(time.process_time() - cpu),
        "compile_seconds": round(found.compile_seconds),
        "most_resident_gib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 1),
        "jax": jax.__version__,
        "link_gb_per_second": (target.rates.link if target.rates else 0) / 1e9,
    }


def _exchanged(found: Estimate) -> dict[str, Any]:
    assert found.program is not None
    kinds: Counter[str] = Counter()
    sizes: Counter[str] = Counter()
    for one in collectives(found.program):
        name = f"{one.kind} {'inside' if one.in_loop else 'outside'}"
        kinds[name] += one.times
        sizes[name] += int(one.bytes * one.times)
    return {name: {"times": kinds[name], "bytes": sizes[name]} for name in kinds}


def shown(facts: dict[str, Any]) -> str:
    """Write the facts of a row as a line of the table."""
    verdict = "fits" if facts["peak_gib"] <= facts["usable_gib"] else "DOES NOT FIT"
    return (
        f"{facts['model']:<14}{facts['device']:<8}{facts['way']:<7}{facts['micro_batch_size']:>3}"
        f" {facts['remat']:<6}{facts['peak_gib']:7.2f} of {facts['usable_gib']:.2f} GiB {verdict:<13}"
        f"{facts['tokens_per_second']:>9,} tokens/s   compiled in {facts['compile_cpu_seconds']} s of CPU"
    )


def main() -> None:
    """Compile what is asked for, one after another, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", default=",".join(ROWS))
    parser.add_argument("--ways", default="data,step,layer")
    parser.add_argument("--json", type=Path, help="read what is there already, add the rest")
    flags = parser.parse_args()
    done: list[dict[str, Any]] = json.loads(flags.json.read_text()) if flags.json and flags.json.exists() else []
    for name in flags.rows.split(","):
        for way in [way for way in ROWS[name].ways if way in flags.ways.split(",")]:
            facts = next((one for one in done if (one["model"], one["way"]) == (name, way)), None)
            if facts is None:
                facts = compiled(name, way)
                done.append(facts)
                if flags.json:
                    flags.json.write_text(json.dumps(done, indent=1) + "\n")
            print(shown(facts), flush=True)


if __name__ == "__main__":
    main()
