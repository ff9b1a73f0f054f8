"""What a training step of GPT-2 costs on two T4s, predicted: compiled for them on any machine, no GPU, no driver.

    pip install "jgpt[plan]"        # jax 0.10 or newer
    python scripts/bench/t4_predicted.py [--rows average16,flash] [--json predicted.json]

The table takes GPT-2 124M (T=1024, vocabulary 50304, 8 micro-batches of 8 a step) from a GPT as one writes it in plain
linen to jgpt's own, change by change. Peak memory is XLA's analysis of the compiled step; the times are those of
`jgpt/planning/roofline.py` at a T4's rates in `jgpt/hardware/chips.py`, none measured. A row compiles in about a minute
of CPU. `t4_fits.py` asks which sizes of GPT-2 fit.
"""

import argparse
import json
import os
import time
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

os.environ["JAX_PLATFORMS"] = "cpu"  # before JAX is imported: the plugin only compiles here

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from jax import Array

from jgpt.config.defaults import default_config
from jgpt.data.batches import Batch
from jgpt.model.block import Block, Context, Mode
from jgpt.model.gpt import GPT, Output
from jgpt.model.layers import Embedding, Norm
from jgpt.model.precision import Policy
from jgpt.model.scopes import SCOPES
from jgpt.model.shapes import ModelConfig
from jgpt.parallel.replicate import Replicate
from jgpt.planning.devices import Target, compile_only
from jgpt.planning.hlo import parse
from jgpt.planning.roofline import COLLECTIVE, OTHER, Prediction, predict
from jgpt.step.optimizer import learning_rate_schedule, make_optimizer
from jgpt.step.state import init_state
from jgpt.step.train_step import Step

T, V, A, GIB = 1024, 50_304, 8, 2**30
GROUPS = (*dict.fromkeys(SCOPES.values()), COLLECTIVE, OTHER)  # the columns of the first table
SIZES = {"gpt2": (12, 12, 768), "gpt2-medium": (24, 16, 1024), "gpt2-large": (36, 20, 1280), "gpt2-xl": (48, 25, 1600)}


class Variant(NamedTuple):
    """One row of the first table: attention, remat, sequences at a time, how gradients are averaged, the layers."""

    attention: str  # "linen" is the plain GPT below
    remat: str
    rows: int
    average: Any = jnp.float32
    scanned: bool = False  # one layer compiled, and a loop over all


STEPS = {
    "linen-remat": Variant("linen", "block", 8),
    "linen": Variant("linen", "none", 8),
    "plain": Variant("plain", "none", 8),
    "chunked": Variant("chunked", "none", 8),
    "chunked_vjp_recompute": Variant("chunked_vjp_recompute", "none", 8),
    "chunked_vjp": Variant("chunked_vjp", "none", 8),
    "average16": Variant("chunked_vjp", "none", 8, jnp.float16),
    "remat": Variant("chunked_vjp", "block", 8, jnp.float16),
    "rows12": Variant("chunked_vjp", "none", 12, jnp.float16),
    "flash": Variant("flash", "none", 8, jnp.float16),
    "scan": Variant("chunked_vjp", "none", 8, jnp.float16, scanned=True),
    "scan-remat": Variant("chunked_vjp", "block", 8, jnp.float16, scanned=True),
}


class LinenBlock(nn.Module):
    """A block of the plain GPT: fp16 layers between fp32 norms, all scores at once in fp32."""

    n_heads: int

    @nn.compact
    def __call__(self, x: Array) -> Array:
        rows, length, width = x.shape
        dense = partial(nn.Dense, dtype=jnp.float16)
        y = dense(3 * width, name="qkv")(nn.LayerNorm(name="attn_norm")(x))
        with jax.named_scope("attn"):
            q, k, v = (z.reshape(rows, length, self.n_heads, -1) for z in jnp.split(y, 3, axis=-1))
            scores = jnp.einsum("BTNH,BSNH->BNTS", q, k, preferred_element_type=jnp.float32) * q.shape[-1] ** -0.5
            scores = jnp.where(jnp.tril(jnp.ones((length, length), bool)), scores, jnp.finfo(jnp.float32).min)
            mixed = jnp.einsum("BNTS,BSNH->BTNH", nn.softmax(scores).astype(v.dtype), v).reshape(rows, length, width)
            x = x + dense(width, name="proj")(mixed)
        with jax.named_scope("mlp"):
            y = nn.gelu(dense(4 * width, name="up")(nn.LayerNorm(name="mlp_norm")(x)))
            return x + dense(width, name="down")(y)


class LinenGPT(nn.Module):
    """GPT-2 as one writes it first: returns the fp32 logits."""

    shapes: ModelConfig
    remat: bool

    @nn.compact
    def __call__(self, tokens: Array) -> Array:
        c = self.shapes
        wte = nn.Embed(c.vocab_size, c.d_model, name="wte")
        x = wte(tokens) + nn.Embed(c.context_length, c.d_model, name="wpe")(jnp.arange(tokens.shape[1])[None])
        block = nn.remat(LinenBlock) if self.remat else LinenBlock
        for i in range(c.n_layers):
            x = block(c.n_heads, name=f"h_{i}")(x)
        x = nn.LayerNorm(name="norm")(x).astype(jnp.float16)
        with jax.named_scope("loss"):
            table = wte.embedding.astype(jnp.float16)
            return jnp.einsum("BTD,VD->BTV", x, table, preferred_element_type=jnp.float32)


class Layer(nn.Module):
    """A layer of jgpt's as `nn.scan` takes it."""

    shapes: ModelConfig
    remat: bool
    attention: str

    @nn.compact
    def __call__(self, x: Array, positions: Array, mask: Array) -> tuple[Array, None]:
        block = nn.remat(Block, static_argnums=4) if self.remat else Block
        context, mode = Context(positions, mask), Mode(prefill=True, deterministic=False)
        layer = block(self.shapes, jnp.float16, jnp.float16, attention=self.attention)
        return layer(x, context, None, mode)[0], None


class ScannedGPT(nn.Module):
    """jgpt's GPT-2 for training, its layers in a loop: parameters [L, ...]."""

    config: ModelConfig
    remat: bool
    attention: str
    lora: None = None

    @nn.compact
    def __call__(self, tokens: Array, segments: None = None, deterministic: bool = False) -> Output:
        c, positions = self.config, jnp.arange(tokens.shape[1])[None]
        x = Embedding(c.vocab_size, c.d_model, 0.02, name="wte")(tokens)
        x = x + Embedding(c.context_length, c.d_model, 0.02, name="wpe")(positions)
        layers = nn.scan(
            Layer, variable_axes={"params": 0}, split_rngs={"params": True}, in_axes=nn.broadcast, length=c.n_layers
        )
        mask = positions[:, None, :] <= positions[:, :, None]
        x, _ = layers(c, self.remat, self.attention, name="h")(x, positions, mask)
        return Output(Norm(c.norm, c.norm_eps, c.bias, jnp.float32, name="norm")(x), None)


def linen_step(shapes: ModelConfig, remat: bool, optimizer: optax.GradientTransformation, devices: Any) -> Any:
    """Return the plain GPT's pmapped step (state, batch [devices, A, B, T + 1]) -> (state, loss), and its state."""
    model = LinenGPT(shapes, remat)

    def loss_of(params: Any, tokens: Array) -> Array:
        logits = model.apply({"params": params}, tokens[:, :-1])
        with jax.named_scope("loss"):
            return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean()  # type: ignore[arg-type]

    def step(state: Any, batch: Array) -> Any:
        params, moments = state

        def micro_step(total: Any, tokens: Array) -> Any:
            loss, gradient = jax.value_and_grad(loss_of)(params, tokens)
            return jax.tree.map(jnp.add, total, gradient), loss

        gradient, loss = jax.lax.scan(micro_step, jax.tree.map(jnp.zeros_like, params), batch)
        gradient = jax.lax.pmean(gradient, "devices")
        with jax.named_scope("optimizer"):
            updates, moments = optimizer.update(gradient, moments, params)
            return (optax.apply_updates(params, updates), moments), jax.lax.pmean(loss.mean(), "devices")

    params = jax.eval_shape(lambda: model.init(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"])
    pmapped = jax.pmap(
        step, "devices", in_axes=(None, 0), out_axes=(None, None), devices=devices, donate_argnums=0
    )  # fmt: skip
    return pmapped, (params, jax.eval_shape(optimizer.init, params))


def shapes_of(size: str) -> ModelConfig:
    """Return GPT-2's shapes."""
    n_layers, n_heads, d_model = SIZES[size]
    return ModelConfig(
        V, T, n_layers, n_heads, n_heads, d_model, d_model // n_heads, 4 * d_model,
        position="learned", norm="layernorm", mlp="gelu", bias=True,
    )  # fmt: skip


def compile_for(variant: Variant, devices: Any) -> Any:
    """Compile the variant's step for the devices."""
    shapes, options = shapes_of("gpt2"), default_config().optimizer
    optimizer, schedule = make_optimizer(options), learning_rate_schedule(options)
    batch = jax.ShapeDtypeStruct((len(devices), A, variant.rows, T + 1), jnp.int32)
    if variant.attention == "linen":
        step, state = linen_step(shapes, variant.remat == "block", optax.adamw(schedule), devices)
        return step.lower(state, batch).compile()
    policy = Policy(compute=jnp.float16)
    model: Any = GPT(shapes, policy.compute, variant.remat, attention=variant.attention)
    if variant.scanned:
        model = ScannedGPT(shapes, variant.remat == "block", variant.attention)
    step = Step(
        model,
        policy,
        optimizer,
        schedule,
        accumulation=A,
        seed=0,
        loss_chunk_tokens=2048,
        growth_steps=1000,
        average_dtype=variant.average,
    )
    state = jax.eval_shape(lambda: init_state(model, policy, optimizer, 0, 1.0))
    return Replicate(devices).train_step(step).lower(state, {}, Batch(batch)).compile()  # type: ignore[attr-defined]


def write(
    name: str, size: int, remat: str, peak: int, prediction: Prediction, tokens: int, note: str
) -> dict[str, Any]:
    """Print a row: `tokens` of a step on one card, `size` sequences at a time; return it for the JSON file."""
    groups = {group: 1e3 * prediction.by_group()[group] for group in GROUPS}
    fp32 = sum(op.kind == "fp32 gemm" for op in prediction.ops)
    reduces = sum(op.kind == "collective" and op.bytes > 1e4 for op in prediction.ops)
    speed, cells = tokens / prediction.seconds, " ".join(f"{groups[group]:10.0f}" for group in GROUPS)
    print(
        f"{name:<30}{size:>3} {remat:<6}{peak / GIB:>6.2f} {cells} {1e3 * prediction.seconds:>7.0f}{speed:>8.0f}"
        f"{fp32:>6}{reduces:>8}   {note}",
        flush=True,
    )
    found = {"name": name, "micro_batch": size, "remat": remat, "gib": round(peak / GIB, 2)}
    found |= {"ms_by_group": {group: round(ms) for group, ms in groups.items()}, "ms": round(1e3 * prediction.seconds)}
    return found | {"tokens_per_second_of_a_card": round(speed), "note": note}


def row(name: str, variant: Variant, target: Target) -> dict[str, Any]:
    """Compile, and print a row of the first table."""
    assert target.rates is not None
    start, compiled = time.process_time(), compile_for(variant, target.devices)
    m, prediction = compiled.memory_analysis(), predict(parse(compiled.as_text()), target.rates, SCOPES)
    peak = m.argument_size_in_bytes + m.output_size_in_bytes - m.alias_size_in_bytes + m.temp_size_in_bytes
    note = f"compiled in {time.process_time() - start:.0f} s of CPU"
    return write(name, variant.rows, variant.remat, peak, prediction, A * variant.rows * T, note)


def heading() -> str:
    """Return the heads of the table that `write` prints."""
    heads = " ".join(f"{group:>10}" for group in GROUPS)
    return f"{'':<30}{'B':>3} {'remat':<6}{'GiB':>6} {heads} {'all ms':>7}{'tok/s':>8}{'fp32':>6}{'reduces':>8}"


def main() -> None:
    """Compile and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", default=",".join(STEPS), help="of " + ", ".join(STEPS))
    parser.add_argument("--json", type=Path, help="where to write the table")
    flags = parser.parse_args()
    names = flags.rows.split(",")
    if unknown := [name for name in names if name not in STEPS]:
        parser.error(f"--rows: {', '.join(unknown)}. Allowed: {', '.join(STEPS)}")
    target = compile_only("t4x2")
    what = f"predicted for two T4s at {target.rates}, A={A}, T={T}, V={V}, jax {jax.__version__}; tokens/s of each"
    print(f"{what}\n{heading()}")
    rows = []
    for name in names:
        rows.append(row(name, STEPS[name], target))
        if flags.json:  # what is there so far
            flags.json.write_text(json.dumps({"what": what, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
