"""Which GPT-2 fits two T4s, with which attention and how fast, predicted: compiled for them on any machine, no GPU.

    pip install "jgpt[plan]"        # jax 0.10 or newer
    python scripts/bench/t4_fits.py [--sizes gpt2] [--forms chunked_vjp,flash] [--lengths 1024,4096] [--layers all]

For each size, form of attention and length of a sequence, with 65,536 tokens a step on each card and gradients averaged
in fp16, it searches for the fastest step that fits, as `execution.micro_batch_size=auto` and `execution.remat=auto` do;
each row is a step that was tried. Memory and times grow by as much with each layer, so steps of a few layers are
compiled and the line through them is followed (--layers; "all" compiles the whole step, a minute of CPU or several).
Peak memory is XLA's analysis; the times are those of `jgpt/planning/roofline.py`, none measured.
"""

import argparse
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

os.environ["JAX_PLATFORMS"] = "cpu"  # before JAX is imported: the plugin only compiles here

import jax
from ml_collections import ConfigDict
from t4_predicted import GIB, SIZES, A, T, heading, shapes_of, write

from jgpt.config.defaults import default_config
from jgpt.errors import UserError
from jgpt.model.parameters import count_parameters
from jgpt.model.shapes import ModelConfig
from jgpt.planning.devices import Target, compile_only
from jgpt.planning.estimate import estimate
from jgpt.planning.execution import Execution
from jgpt.planning.roofline import OpCost, Prediction
from jgpt.planning.search import Search, check_parameters_fit, space_of


@dataclass(frozen=True)
class Step:
    """A step that was tried, as the search asks for it; `tokens` are of one card."""

    execution: Execution
    peak: int
    state: int
    prediction: Prediction
    tokens: int

    @property
    def seconds(self) -> float:
        """Seconds of an optimizer step."""
        return self.prediction.seconds


def compiled(config: ConfigDict, shapes: ModelConfig, target: Target, layers: Sequence[int]) -> Step:
    """Compile a config's step with each number of `layers`, and follow the line through them to the model's own."""
    few = [estimate(config, replace(shapes, n_layers=n), target) for n in layers]
    # The line through the first and the last: what it weighs them with to reach n_layers.
    reach = (shapes.n_layers - layers[0]) / (layers[-1] - layers[0]) if len(layers) > 1 else 1.0
    weights = {0: 1 - reach, -1: reach} if len(layers) > 1 else {0: 1.0}
    peak = sum(weight * few[i].peak for i, weight in weights.items())
    state = sum(weight * few[i].state for i, weight in weights.items())
    ops: list[OpCost] = []
    for i, weight in weights.items():
        prediction = few[i].prediction
        assert prediction is not None
        ops += [replace(op, seconds=weight * op.seconds) for op in prediction.ops]
    predicted = Prediction(tuple(ops), prediction.groups)
    tokens = few[0].parts.tokens_per_step // len(target.devices)
    return Step(few[0].execution, round(peak), round(state), predicted, tokens)


def fit(size: str, form: str, length: int, target: Target, layers: str) -> list[dict[str, Any]]:
    """Search, and print what was tried."""
    config, shapes = default_config(), replace(shapes_of(size), context_length=length)
    config.batch.global_batch_size, config.precision.gradient_average = 2 * A * 8 * T // length, "fp16"
    config.execution.update({"micro_batch_size": 0, "remat": "auto", "attention": form})
    name, rows = f"{size} {count_parameters(shapes) / 1e6:.0f}M {form} T={length}", []
    numbers = [shapes.n_layers] if layers == "all" else [int(n) for n in layers.split(",")]

    def measure(execution: Execution) -> Step:
        found = compiled(execution.put_into(config), shapes, target, numbers)
        assert target.memory_bytes is not None
        note = "fits" if found.peak <= target.memory_bytes else "does not fit"
        micro, remat = execution[:2]
        rows.append(write(name, micro, remat, found.peak, found.prediction, found.tokens, note))
        return found

    try:
        check_parameters_fit(config, shapes, target)
    except UserError as error:
        print(f"{name}: {error}", flush=True)
        return []
    assert target.memory_bytes is not None
    best = Search(measure, space_of(config, shapes, target, everything=False), target.memory_bytes).fastest()
    print(f"    the fastest that fits: {best.execution.described() if best else 'none'}", flush=True)
    return rows


def main() -> None:
    """Compile and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", default=",".join(SIZES), help="of " + ", ".join(SIZES))
    parser.add_argument("--forms", default="chunked_vjp,flash", help="of attention")
    parser.add_argument("--lengths", default=str(T), help="of a sequence")
    parser.add_argument("--layers", default="2,3", help="that are compiled: two numbers, or all")
    parser.add_argument("--json", type=Path, help="where to write the table")
    flags = parser.parse_args()
    target = compile_only("t4x2")
    assert target.memory_bytes is not None
    what = (
        f"predicted for two T4s at {target.rates}, {target.memory_bytes / GIB:.2f} GiB of each, jax {jax.__version__}"
    )
    print(f"{what}, layers compiled: {flags.layers}; tokens/s of each\n{heading()}")
    rows = []
    for size, form, length in product(*(given.split(",") for given in (flags.sizes, flags.forms, flags.lengths))):
        rows += fit(size, form, int(length), target, flags.layers)
        if flags.json:  # what is there so far
            found = {"what": what, "layers_compiled": flags.layers, "rows": rows}
            flags.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
