"""The layers that a block is made of: norm, linear layer, embedding, dropout.

In the data path: inside `block.py`. The legend of `gpt.py` names the dimensions.
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
    """LayerNorm (Ba et al., arXiv 1607.06450) or RMSNorm (Zhang, Sennrich, arXiv 1910.07467) over the last axis.

    It is computed in fp32, whatever the dtype of the input.
    """

    kind: str  # "layernorm", "rmsnorm"
    epsilon: float
    use_bias: bool  # layernorm only
    dtype: Any  # of the output

    @nn.compact
    def __call__(self, x: Array) -> Array:
        x = x.astype(jnp.float32)
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],))
        variance = jnp.mean(jnp.square(x), axis=-1, keepdims=True)
        if self.kind == "layernorm":  # mean and mean square in one pass over x, and so are their gradients
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
    """x @ kernel + bias: [..., inputs] to [..., *features].

    The product folds all leading dimensions of x into one, and the features too. That keeps XLA from transposing
    activations before the weight gradient, which took a fifth of a training step on a CPU. For the same reason the
    MLP's last layer is stored transposed. Only the first of the features can be split over devices
    (`parallel/rules.py`): of the folded features, each device then holds one contiguous part.
    """

    features: tuple[int, ...]
    use_bias: bool
    std: float  # of the kernel's initial normal distribution
    dtype: Any  # of the product's operands
    output_dtype: Any  # of the result, as wide as the operands or wider; see `product`
    transposed: bool = False  # the kernel is [features, inputs], else [inputs, *features]
    lora: LoRA | None = None

    @nn.compact
    def __call__(self, x: Array, deterministic: bool) -> Array:
        inputs, leading = x.shape[-1], x.shape[:-1]
        shape = (*self.features, inputs) if self.transposed else (inputs, *self.features)
        kernel = self.param("kernel", nn.initializers.normal(self.std), shape).astype(self.dtype)
        x = x.reshape(-1, inputs)
        y = product(x, kernel, transposed=self.transposed, output_dtype=self.output_dtype)
        if self.use_bias:
            bias = self.param("bias", nn.initializers.zeros, self.features)
            y = (y.reshape(len(y), -1) + bias.astype(self.output_dtype).reshape(1, -1)).reshape(y.shape)
        if self.lora is not None and self.name in self.lora.targets:
            y = y + self._adapter(dropout(self, self.lora.dropout, deterministic)(x))
        return y.reshape(*leading, *self.features)

    def _adapter(self, x: Array) -> Array:
        assert self.lora is not None
        rank, inputs = self.lora.rank, x.shape[-1]
        # As in the paper's code: `a` is drawn as PyTorch draws a linear layer, and `b` is zero, so that training
        # begins exactly at the base model.
        uniform = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")
        a = self.variable("lora", "a", lambda: uniform(self.make_rng("params"), (inputs, rank)))
        b = self.variable("lora", "b", lambda: jnp.zeros((rank, *self.features)))
        # On a GPU, XLA would join these products with the layer's own, which have the same operands, and would store a
        # copy of every kernel for that. The barriers keep them apart, in the forward and in the backward pass.
        mixed = jax.lax.optimization_barrier(x.astype(self.dtype)) @ a.value.astype(self.dtype)
        y = product(mixed, b.value.astype(self.dtype), transposed=False, output_dtype=self.output_dtype)
        return jax.lax.optimization_barrier(y * jnp.asarray(self.lora.scale, self.output_dtype))


def product(x: Array, kernel: Array, *, transposed: bool, output_dtype: Any) -> Array:
    """Multiply `x` [M, inputs] by `kernel`, [inputs, *features] or (transposed) [features, inputs]: [M, *features].

    The operands are in the kernel's dtype, in the backward pass too. `output_dtype` and x may be wider than that: the
    sums are then not rounded to the kernel's dtype, and a layer that writes to the fp32 residual stream cannot overflow
    fp16. With a plain `preferred_element_type` the products of the backward pass would be fp32 ones, which a T4
    computes without tensor cores.
    """
    if x.dtype == kernel.dtype == output_dtype:
        return _product(x, kernel, transposed, output_dtype)
    return _wide_product(x, kernel, transposed, output_dtype)


def _product(x: Array, kernel: Array, transposed: bool, output_dtype: Any) -> Array:
    inputs = x.shape[-1]
    features = kernel.shape[:-1] if transposed else kernel.shape[1:]
    kernel = kernel.reshape(-1, inputs) if transposed else kernel.reshape(inputs, -1)
    axis = 1 if transposed else 0  # of the kernel: its inputs
    if len(x) == 1 and output_dtype != x.dtype:
        # One row, as in decoding: a matrix product makes XLA write an fp32 copy of the kernel to memory first. A sum
        # of products is fused with the conversion.
        x = (x if transposed else x.T).astype(output_dtype)
        return jnp.sum(x * kernel.astype(output_dtype), axis=axis).reshape(1, *features)
    # Not x @ kernel.T: for one row, XLA would write the transposed kernel to memory first.
    y = jax.lax.dot_general(x, kernel, (((1,), (axis,)), ((), ())), preferred_element_type=output_dtype)
    return y.reshape(-1, *features)


@partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _wide_product(x: Array, kernel: Array, transposed: bool, output_dtype: Any) -> Array:
    return _wide_forward(x, kernel, transposed, output_dtype)[0]


def _wide_forward(x: Array, kernel: Array, transposed: bool, output_dtype: Any) -> tuple[Array, tuple]:
    narrow = x.astype(kernel.dtype)
    return _product(narrow, kernel, transposed, output_dtype), (narrow, kernel, x[:0])  # of x itself only the dtype


def _wide_backward(transposed: bool, output_dtype: Any, saved: tuple, cotangent: Array) -> Any:
    x, kernel, like_x = saved
    cotangent = cotangent.reshape(len(x), -1).astype(kernel.dtype)
    matrix = kernel.reshape(-1, x.shape[1]) if transposed else kernel.reshape(x.shape[1], -1)
    wide = partial(jax.lax.dot_general, preferred_element_type=like_x.dtype)
    d_x = wide(cotangent, matrix, (((1,), (0 if transposed else 1,)), ((), ())))
    left, right = (cotangent, x) if transposed else (x, cotangent)
    d_matrix = product_of_transposed(left, right, like_x.dtype)
    return d_x, d_matrix.reshape(kernel.shape).astype(kernel.dtype)


def product_of_transposed(left: Array, right: Array, output_dtype: Any) -> Array:
    """Multiply `left`, transposed, by `right`: [M, K] and [M, N] to [K, N]."""
    multiply = partial(jax.lax.dot_general, preferred_element_type=output_dtype)

    def plain(left: Array, right: Array) -> Array:
        return multiply(left, right, (((0,), (0,)), ((), ())))

    def in_order(left: Array, right: Array) -> Array:
        # XLA's CPU backend computes [K, M] @ [M, N] in bf16. In any other order it converts the operands to fp32, which
        # takes twice the time. It undoes a transposition of two dimensions before it looks, but not one of three.
        split = (math.gcd(len(left), 8), -1)
        left = left.reshape(*split, left.shape[1]).transpose(2, 0, 1)
        return multiply(left, right.reshape(*split, right.shape[1]), (((1, 2), (0, 1)), ((), ())))

    if left.dtype != jnp.bfloat16 or output_dtype != jnp.float32:
        return plain(left, right)
    return jax.lax.platform_dependent(left, right, cpu=in_order, default=plain)


_wide_product.defvjp(_wide_forward, _wide_backward)


class Embedding(nn.Module):
    """A table of vectors: ids int [B, T] to fp32 [B, T, width]."""

    rows: int
    width: int
    std: float  # of the initial normal distribution

    def setup(self) -> None:
        self.embedding = self.param("embedding", nn.initializers.normal(self.std), (self.rows, self.width))

    def __call__(self, ids: Array) -> Array:
        # XLA turns the lookup of one row into a slice, and gathers the whole table for a slice when the table is split
        # over devices. Two rows stay a lookup.
        twice = jnp.concatenate([ids, ids]) if ids.size == 1 else ids
        return jnp.take(self.embedding, twice, axis=0)[: len(ids)].astype(jnp.float32)


def dropout(module: nn.Module, rate: float, deterministic: bool) -> Callable[[Array], Array]:
    """Return a function that drops elements, with a new key of `module` at each call; the identity at rate 0 or when
    deterministic.

    What stays is multiplied by 1 / (1 - rate). The function keeps shape and dtype.
    """
    if deterministic or rate == 0.0:
        return lambda x: x

    def drop(x: Array) -> Array:
        stays = random_words(module.make_rng("dropout"), x.shape) >= jnp.uint32(round(rate * 2**32))
        return jnp.where(stays, x * jnp.asarray(1 / (1 - rate), x.dtype), jnp.zeros((), x.dtype))

    return drop


def random_words(key: Array, shape: tuple[int, ...]) -> Array:
    """Return uniform random words, uint32 of `shape`: good enough for dropout, not for statistics.

    Each word is a hash of `key` and of the element's index: two rounds of a 32-bit mixer (lowbias32,
    https://nullprogram.com/blog/2018/07/31/), half of the key before each. JAX's own generator (threefry) took a third
    of a training step on a CPU; this is a tenth of its work. It is integer arithmetic, the same on every device, and
    XLA fuses it into the code that uses the words.
    """
    first, second = jax.random.bits(key, (2,), jnp.uint32)
    index = jax.lax.iota(jnp.uint32, math.prod(shape)).reshape(shape)
    return _lowbias32(_lowbias32(index + first) + second)


def _lowbias32(x: Array) -> Array:
    x = (x ^ (x >> 16)) * jnp.uint32(0x7FEB352D)
    x = (x ^ (x >> 15)) * jnp.uint32(0x846CA68B)
    return x ^ (x >> 16)
