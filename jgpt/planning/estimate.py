"""What a compiled step takes and costs: its memory part by part, and its time by the roofline.

Beside the data path: the parts of a run, built for devices that may not be here, in; bytes and seconds out. Nothing
runs.
"""

import math
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
from ml_collections import ConfigDict

from jgpt.model.shapes import ModelConfig
from jgpt.parallel.build import Parts, make_parts
from jgpt.planning.devices import Target, compile_for
from jgpt.planning.hlo import Program, parse
from jgpt.planning.roofline import Prediction, predict


class Choice(NamedTuple):
    """What changes a step's memory and speed and not, but for rounding, its result: config keys, by other names."""

    micro_batch_size: int
    remat: str
    loss_chunk_tokens: int
    attention: str

    def overrides(self) -> dict[str, Any]:
        """Return them by their keys in a config."""
        micro, remat, chunk, attention = self
        return {
            "execution.micro_batch_size": micro, "execution.remat": remat,
            "execution.loss_chunk_tokens": chunk, "execution.attention": attention,
        }  # fmt: skip

    def described(self) -> str:
        """Say it in words."""
        chunk = f"loss in chunks of {self.loss_chunk_tokens}" if self.loss_chunk_tokens else "loss in one chunk"
        return f"micro-batch {self.micro_batch_size}, remat {self.remat}, attention {self.attention}, {chunk}"

    def flags(self) -> str:
        """Return them as a command line has them."""
        return " ".join(f"--config.{key}={value}" for key, value in self.overrides().items())


@dataclass(frozen=True)
class Estimate:
    """What a step takes of each device, and how long it takes. Of `memory` bytes, the parts add up to `peak`."""

    choice: Choice
    parts: Parts
    memory: Mapping[str, int]
    logits: int  # bytes of the largest array with a side of the vocabulary, among the activations
    prediction: Prediction | None  # None where the rates of the device, or the program, are not known
    program: Program | None  # optimized HLO; None where JAX does not show it
    compile_seconds: float

    @property
    def peak(self) -> int:
        """Bytes of a device at the step's peak."""
        return sum(self.memory.values())

    @property
    def state(self) -> int:
        """Bytes that a step takes whatever its micro-batch: all but activations."""
        return sum(size for part, size in self.memory.items() if part != ACTIVATIONS)

    @property
    def seconds(self) -> float | None:
        """Seconds of an optimizer step."""
        return self.prediction.seconds if self.prediction else None

    @property
    def tokens_per_second(self) -> float | None:
        """Tokens a second of all devices together."""
        return self.parts.tokens_per_step / self.seconds if self.seconds else None


ACTIVATIONS = "activations, workspace"


def choice_of(config: ConfigDict) -> Choice:
    """Return what a config chooses."""
    return Choice(
        config.execution.micro_batch_size,
        config.execution.remat,
        config.execution.loss_chunk_tokens,
        config.execution.attention,
    )


def with_choice(config: ConfigDict, choice: Choice) -> ConfigDict:
    """Return a copy of a config with another choice."""
    config = config.copy_and_resolve_references()
    config.update_from_flattened_dict(choice.overrides())
    return config.lock()


def least_bytes(config: ConfigDict, shapes: ModelConfig, target: Target) -> int:
    """Return the bytes of a device that any choice takes: parameters, moments, the frozen ones of LoRA. No compile."""
    parts = make_parts(with_choice(config, Choice(1, "none", 0, config.execution.attention)), shapes, target.devices)
    everywhere = _bytes(jax.eval_shape(parts.init)) + _bytes(parts.abstract_frozen())
    return everywhere // (len(target.devices) if config.execution.parallel == "tensor" else 1)


def estimate(config: ConfigDict, shapes: ModelConfig, target: Target) -> Estimate:
    """Compile the train step that a config asks for, and read what it takes. Raises UserError."""
    parts, began = make_parts(config, shapes, target.devices), time.perf_counter()
    compiled = compile_for(target, parts.lower())
    text = compiled.as_text() or ""
    found: Any = compiled.memory_analysis()
    made = found.output_size_in_bytes - found.alias_size_in_bytes  # the rest lies where the old state was
    program = parse(text) if text else None
    state = jax.eval_shape(parts.init)
    memory = {"parameters": _bytes(state.params), "moments": _bytes(state.opt_state)}
    memory["batch, frozen parameters"] = found.argument_size_in_bytes + made - sum(memory.values())
    if program is not None:
        memory |= _of_the_loop(program, state.params, parts)
    taken = found.argument_size_in_bytes + made + found.temp_size_in_bytes
    memory[ACTIVATIONS] = taken - sum(memory.values())
    return Estimate(
        choice=choice_of(config),
        parts=parts,
        memory=memory,
        logits=_logits(program, shapes) if program else 0,
        prediction=predict(text, target.rates) if text and target.rates else None,
        program=program,
        compile_seconds=time.perf_counter() - began,
    )


def _bytes(tree: Any) -> int:
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def _of_the_loop(program: Program, params: Any, parts: Parts) -> dict[str, int]:
    """Return the bytes of the gradients' sums and of the compute copy, which the loop over micro-batches carries.

    Both are told by their shapes, which are the parameters'. With one micro-batch there is no such loop, and they are
    among the activations.
    """
    loops = [op.shapes for op in program.computations[program.entry] if op.opcode == "while"]
    if parts.accumulation == 1 or not loops:
        return {}
    carried = Counter(max(loops, key=lambda shapes: sum(shape.bytes for shape in shapes)))
    leaves, copied = jax.tree.leaves(params), jax.tree.leaves(jax.eval_shape(parts.policy.cast_to_compute, params))
    dims = {leaf.shape for leaf in leaves}
    # Parameters that the step computes with as they are (vectors; all in fp32) are carried as well, and are no sums.
    as_they_are = Counter(old.shape for old, new in zip(leaves, copied, strict=True) if new.dtype == old.dtype)
    sums = copies = 0.0
    for shape, count in carried.items():
        if shape.dims in dims and shape.dtype == "f32":
            sums += shape.bytes * max(0, count - as_they_are[shape.dims])
        elif shape.dims in dims and shape.dtype in ("f16", "bf16"):
            copies += shape.bytes * count
    return {"gradients": int(sums), "compute copy": int(copies)}


def _logits(program: Program, shapes: ModelConfig) -> int:
    """Return the bytes of the largest array with a side of the vocabulary that is no parameter's shape."""
    sides = {shapes.vocab_size}
    return int(
        max(
            (
                shape.bytes
                for ops in program.computations.values()
                for op in ops
                for shape in op.shapes
                if sides & set(shape.dims) and shapes.d_model not in shape.dims
            ),
            default=0,
        )
    )
