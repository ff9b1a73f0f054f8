"""What a compiled step takes and costs: its memory part by part, and its time by the roofline.

Beside the data path: the parts of a run, built for devices that may not be here, in; bytes and seconds out. Nothing
runs.
"""

import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from jgpt.errors import UserError
from jgpt.hardware.memory import tpu_program_bytes
from jgpt.model.scopes import SCOPES
from jgpt.model.shapes import ModelConfig
from jgpt.parallel.build import Parts, make_parts
from jgpt.planning.devices import CUDNN_LINE, Target, compile_for, has_cudnn
from jgpt.planning.execution import Execution, execution_of
from jgpt.planning.hlo import Program, parse
from jgpt.planning.roofline import Prediction, predict

ACTIVATIONS = "activations, workspace"  # a part of the memory


@dataclass(frozen=True)
class Estimate:
    """What a step takes of each device, and how long it takes; the parts of `memory`, in bytes, add up to `peak`."""

    execution: Execution
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


def least_bytes(config: ConfigDict, shapes: ModelConfig, target: Target) -> int:
    """Return the bytes of a device that any execution takes: parameters, moments, LoRA's frozen ones. No compile."""
    parts = make_parts(Execution(1, "none", 0, "plain").put_into(config), shapes, target.devices)
    return parts.least_bytes()


def estimate(config: ConfigDict, shapes: ModelConfig, target: Target) -> Estimate:
    """Compile the train step that a config asks for, and read what it takes. Raises UserError."""
    parts, start = make_parts(config, shapes, target.devices), time.perf_counter()
    if parts.model.attention == "cudnn" and not has_cudnn():
        raise UserError(
            f"execution.attention={config.execution.attention!r} takes fused attention on {target.kind}, and compiling"
            f" it needs cuDNN, which JAX does not find. Run: {CUDNN_LINE}. Or plan with another form:"
            " --config.execution.attention=chunked_vjp."
        )
    try:
        compiled = compile_for(target, parts.lower())
    except jax.errors.JaxRuntimeError as error:
        if not (taken := tpu_program_bytes(str(error))):
            raise
        return _refused(config, parts, taken, time.perf_counter() - start)
    text = compiled.as_text()
    program = parse(text) if text else None
    usage: Any = compiled.memory_analysis()
    made = usage.output_size_in_bytes - usage.alias_size_in_bytes  # the rest lies where the old state was
    state = jax.eval_shape(parts.init)
    held = parts.strategy.bytes_per_device
    memory = {"parameters": held(state.params, {}), "moments": held(state.opt_state, {})}
    memory["batch, frozen parameters"] = usage.argument_size_in_bytes + made - sum(memory.values())
    if program is not None:
        memory |= _of_the_loop(program, parts)
    taken = usage.argument_size_in_bytes + made + usage.temp_size_in_bytes
    memory[ACTIVATIONS] = taken - sum(memory.values())
    return Estimate(
        execution=execution_of(config),
        parts=parts,
        memory=memory,
        logits=_logits(program, shapes) if program else 0,
        prediction=predict(program, target.rates, SCOPES, target.hosts) if program and target.rates else None,
        program=program,
        compile_seconds=time.perf_counter() - start,
    )


def _refused(config: ConfigDict, parts: Parts, taken: int, compile_seconds: float) -> Estimate:
    """Return what is known of a step that a TPU's compiler refuses to compile, because it takes too much memory."""
    state, held = jax.eval_shape(parts.init), parts.strategy.bytes_per_device
    memory = {"parameters": held(state.params, {}), "moments": held(state.opt_state, {})}
    memory[ACTIVATIONS] = taken - sum(memory.values())
    return Estimate(execution_of(config), parts, memory, 0, None, None, compile_seconds)


def _of_the_loop(program: Program, parts: Parts) -> dict[str, int]:
    """Return the bytes of the gradients' sums and of the compute copy, which the loop over micro-batches carries.

    Both are recognized by their shapes, which are those of the parameters on a device. With one micro-batch there is no
    such loop, and both are among the activations.
    """
    loops = [op.shapes for op in program.computations[program.entry] if op.opcode == "while"]
    if parts.accumulation == 1 or not loops:
        return {}
    carried = Counter(max(loops, key=lambda shapes: sum(shape.bytes for shape in shapes)))
    params = jax.tree.leaves(parts.params_in_loop())
    dims = Counter(leaf.shape for leaf in params)
    # Parameters that the step computes with as they are (vectors; all in fp32) are carried as well, and are no sums;
    # but those that XLA gathers before the loop are not.
    as_they_are = Counter(leaf.shape for leaf in params if leaf.dtype == jnp.float32)
    sums = copies = 0.0
    for shape, count in carried.items():
        if shape.dims in dims and shape.dtype == "f32":
            sums += shape.bytes * max(min(count, dims[shape.dims]), count - as_they_are[shape.dims])
        elif shape.dims in dims and shape.dtype in ("f16", "bf16"):
            copies += shape.bytes * count
    return {"gradients": int(sums), "compute copy": int(copies)}


def _logits(program: Program, shapes: ModelConfig) -> int:
    """Return the bytes of the largest array with a side of the vocabulary and none of the model's width."""
    arrays = (shape for ops in program.computations.values() for op in ops for shape in op.shapes)
    logits = (a for a in arrays if shapes.vocab_size in a.dims and shapes.d_model not in a.dims)
    return int(max((a.bytes for a in logits), default=0))
