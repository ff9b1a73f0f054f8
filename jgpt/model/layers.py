"""The layers that a block is made of: norm, linear layer, embedding, dropout.

In the data path: inside `model/gpt.py`, whose legend names the dimensions.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array

from jgpt.model.lora import LoRA


class Norm(nn.Module):
    """LayerNorm (Ba et al., arXiv 1607.06450) or RMSNorm (Zhang, Sennrich, arXiv 1910.07467), last axis, in fp32."""

    kind: str  # "layernorm", "rmsnorm"
    epsilon: float
    use_bias: bool  # layernorm only
    dtype: Any  # of the output

    @nn.compact
    def __call__(self, x: Array) -> Array:
        x = x.astype(jnp.float32)
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],))
        variance = jnp.mean(jnp.square(x), axis=-1, keepdims=True)
        if self.kind == "layernorm":  # both means in one pass over x, and in one pass their gradients
            mean = jnp.mean(x, axis=-1, keepdims=True)
            variance = jnp.maximum(variance - jnp.square(mean), 0)
            x = x - mean
        x = x * jax.lax.rsqrt(variance + self.epsilon)
        wide = (1,) * (x.ndim - 1) + scale.shape
        x = x * scale.astype(jnp.float32).reshape(wide)
        if self.kind == "layernorm" and self.use_bias:
            x = x + self.param("bias", nn.initializers.zeros, scale.shape).astype(jnp.float32).reshape(wide)
        return x.astype(self.dtype)


class Linear(nn.Module):
    """x @ kernel + bias, multiplied in `dtype`, returned in `output`. The kernel is [inputs, *features], or
    [features, inputs] where `transposed`.

    All leading dimensions of x are folded into one, and the features too, which keeps XLA from transposing activations
    before the weight gradient (a fifth of a training step on CPU). For the same reason the MLP's last layer is stored
    transposed. Only the first of the features can be split over devices (`parallel/rules.py`): folded, the others could
    not be told apart.
    """

    features: tuple[int, ...]
    use_bias: bool
    std: float
    dtype: Any
    output: Any
    transposed: bool = False
    lora: LoRA | None = None

    @nn.compact
    def __call__(self, x: Array, deterministic: bool) -> Array:
        inputs, leading = x.shape[-1], x.shape[:-1]
        shape = (*self.features, inputs) if self.transposed else (inputs, *self.features)
        kernel = self.param("kernel", nn.initializers.normal(self.std), shape).astype(self.dtype)
        x = x.reshape(-1, inputs).astype(self.dtype)
        y = product(x, kernel, self.transposed, self.output)
        if self.use_bias:
            bias = self.param("bias", nn.initializers.zeros, self.features)
            y = (y.reshape(len(y), -1) + bias.astype(self.output).reshape(1, -1)).reshape(y.shape)
        if self.lora is not None and self.name in self.lora.targets:
            y = y + self._adapter(dropout(self, self.lora.dropout, deterministic)(x))
        return y.reshape(*leading, *self.features)

    def _adapter(self, x: Array) -> Array:
        assert self.lora is not None
        rank, inputs = self.lora.rank, x.shape[-1]
        # As in the paper's code: `a` as PyTorch initializes a linear layer, `b` zero, so that training begins at the
        # base model exactly.
        uniform = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")
        a = self.variable("lora", "a", lambda: uniform(self.make_rng("params"), (inputs, rank)))
        b = self.variable("lora", "b", lambda: jnp.zeros((rank, *self.features)))
        # On a GPU XLA would join these products with the layer's own, which have the same operands, and keep a copy of
        # every kernel for that: the barriers part them, in the forward pass and in the backward pass.
        mixed = jax.lax.optimization_barrier(x) @ a.value.astype(self.dtype)
        y = product(mixed, b.value.astype(self.dtype), False, self.output) * jnp.asarray(self.lora.scale, self.output)
        return jax.lax.optimization_barrier(y)


def product(x: Array, kernel: Array, transposed: bool, output: Any) -> Array:
    """Multiply `x` [M, inputs] by `kernel`, [inputs, *features] or (transposed) [features, inputs], into `output`.

    Where `output` is wider than the operands, the sum leaves the product unrounded: a layer that writes to the fp32
    residual stream cannot overflow fp16. Its gradient is multiplied in the operands' dtype all the same, which a plain
    `preferred_element_type` would make fp32 products, without tensor cores on a T4.
    """
    if output == x.dtype:
        return _product(x, kernel, transposed, output)
    return _wide_product(x, kernel, transposed, output)


def _product(x: Array, kernel: Array, transposed: bool, output: Any) -> Array:
    inputs = x.shape[-1]
    features = kernel.shape[:-1] if transposed else kernel.shape[1:]
    kernel = kernel.reshape(-1, inputs) if transposed else kernel.reshape(inputs, -1)
    over = 1 if transposed else 0
    if len(x) == 1 and output != x.dtype:
        # One row, as in decoding: XLA would write an fp32 copy of the matrix to memory first. This it fuses.
        x = (x if transposed else x.T).astype(output)
        return jnp.sum(x * kernel.astype(output), axis=over).reshape(1, *features)
    # Not x @ kernel.T: for one row XLA would write the transposed matrix to memory first.
    y = jax.lax.dot_general(x, kernel, (((1,), (over,)), ((), ())), preferred_element_type=output)
    return y.reshape(-1, *features)


@partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _wide_product(x: Array, kernel: Array, transposed: bool, output: Any) -> Array:
    return _product(x, kernel, transposed, output)


def _wide_forward(x: Array, kernel: Array, transposed: bool, output: Any) -> tuple[Array, tuple[Array, Array]]:
    return _product(x, kernel, transposed, output), (x, kernel)


def _wide_backward(transposed: bool, output: Any, operands: tuple[Array, Array], cotangent: Array) -> Any:
    x, kernel = operands
    _, backward = jax.vjp(lambda x, kernel: _product(x, kernel, transposed, x.dtype), x, kernel)
    return backward(cotangent.astype(x.dtype))


_wide_product.defvjp(_wide_forward, _wide_backward)


class Embedding(nn.Module):
    """A table of `rows` vectors of width D."""

    rows: int
    width: int
    std: float

    def setup(self) -> None:
        self.embedding = self.param("embedding", nn.initializers.normal(self.std), (self.rows, self.width))

    def __call__(self, ids: Array) -> Array:
        # XLA makes a slice of one row's lookup, and where the table is split over devices gathers all of it for that.
        twice = jnp.concatenate([ids, ids]) if ids.size == 1 else ids
        return jnp.take(self.embedding, twice, axis=0)[: len(ids)].astype(jnp.float32)


def dropout(module: nn.Module, rate: float, deterministic: bool) -> Callable[[Array], Array]:
    """Return dropout with a fresh key of `module` for each call, or the identity."""
    if deterministic or rate == 0.0:
        return lambda x: x

    def drop(x: Array) -> Array:
        kept = random_words(module.make_rng("dropout"), x.shape) >= jnp.uint32(round(rate * 2**32))
        return jnp.where(kept, x * jnp.asarray(1 / (1 - rate), x.dtype), jnp.zeros((), x.dtype))

    return drop


def random_words(key: Array, shape: tuple[int, ...]) -> Array:
    """Hash the place of each element together with `key`: uint32, uniform, good enough for dropout.

    JAX's own generator (threefry) took a third of a training step on a CPU. This is two rounds of a 32-bit mixer
    (lowbias32, https://nullprogram.com/blog/2018/07/31/) with half of the key before each: ten times less work, plain
    integer arithmetic that gives the same words on every device, and that XLA fuses into what uses them.
    """
    first, second = jax.random.bits(key, (2,), jnp.uint32)
    place = jax.lax.iota(jnp.uint32, math.prod(shape)).reshape(shape)
    return _mixed(_mixed(place + first) + second)


def _mixed(x: Array) -> Array:
    x = (x ^ (x >> 16)) * jnp.uint32(0x7FEB352D)
    x = (x ^ (x >> 15)) * jnp.uint32(0x846CA68B)
    return x ^ (x >> 16)
