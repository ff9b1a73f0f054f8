"""The GPT: token ids in, hidden states out. One module covers GPT-2 and the modern block (Llama, Qwen).

In the data path: between the batches and the loss in training, between the prompt and the sampled token in decoding.

Dimensions, here and everywhere:
    A accumulation   B batch   T query positions   S key positions   D model width   N heads   K key/value heads
    G = N / K query heads that share a key/value head   H head width   F MLP width   V vocabulary   L layers
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array

from jgpt.model.attention import attend, attend_causally, rope
from jgpt.model.kv_cache import KVCache, LayerCache

# Standard deviations of the initial normal distribution (GPT-2's; Radford et al. 2019, section 2.3).
# The two layers that write to the residual stream are divided by sqrt(2 L): its variance must not grow with depth.
INIT = {"embedding": 0.02, "position": 0.02, "linear": 0.02, "residual": 0.02}


@dataclass(frozen=True)
class ModelConfig:
    """Shapes and choices of one GPT, all derived values filled in; see `jgpt.config` for what each key means."""

    vocab_size: int
    context_length: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    d_model: int
    d_head: int
    d_ff: int
    dropout: float = 0.0
    position: str = "rope"
    norm: str = "rmsnorm"
    mlp: str = "swiglu"
    bias: bool = False
    qkv_bias: bool = False
    qk_norm: bool = False
    tie_embeddings: bool = True
    rope_theta: float = 10_000.0
    norm_eps: float = 1e-5


class Output(NamedTuple):
    """What a forward pass returns: `hidden` fp32 [B, T, D] after the last norm, and the cache with the new tokens."""

    hidden: Array
    cache: KVCache | None


class Norm(nn.Module):
    """LayerNorm (Ba et al., arXiv 1607.06450) or RMSNorm (Zhang, Sennrich, arXiv 1910.07467), last axis, in fp32."""

    config: ModelConfig
    dtype: Any  # of the output
    kind: str

    @nn.compact
    def __call__(self, x: Array) -> Array:
        x = x.astype(jnp.float32)
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],))
        if self.kind == "layernorm":
            x = x - jnp.mean(x, axis=-1, keepdims=True)
        x = x * jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + self.config.norm_eps)
        wide = (1,) * (x.ndim - 1) + scale.shape
        x = x * scale.astype(jnp.float32).reshape(wide)
        if self.kind == "layernorm" and self.config.bias:
            x = x + self.param("bias", nn.initializers.zeros, scale.shape).astype(jnp.float32).reshape(wide)
        return x.astype(self.dtype)


class Linear(nn.Module):
    """x @ kernel + bias in `dtype`. The kernel is [inputs, *features], or [features, inputs] where `transposed`.

    All leading dimensions of x are folded into one, which keeps XLA from transposing activations before the weight
    gradient (a fifth of a training step on CPU). For the same reason the MLP's last layer is stored transposed.
    """

    features: tuple[int, ...]
    use_bias: bool
    std: float
    dtype: Any
    transposed: bool = False

    @nn.compact
    def __call__(self, x: Array) -> Array:
        inputs, outputs = x.shape[-1], math.prod(self.features)
        shape = (*self.features, inputs) if self.transposed else (inputs, *self.features)
        kernel = self.param("kernel", nn.initializers.normal(self.std), shape).astype(self.dtype)
        y = x.reshape(-1, inputs).astype(self.dtype)
        y = y @ (kernel.reshape(outputs, inputs).T if self.transposed else kernel.reshape(inputs, outputs))
        if self.use_bias:
            y = y + self.param("bias", nn.initializers.zeros, self.features).astype(self.dtype).reshape(1, outputs)
        return y.reshape(*x.shape[:-1], *self.features)


class Embedding(nn.Module):
    """A table of `rows` vectors of width D."""

    rows: int
    width: int
    std: float

    def setup(self) -> None:
        self.embedding = self.param("embedding", nn.initializers.normal(self.std), (self.rows, self.width))

    def __call__(self, ids: Array) -> Array:
        return jnp.take(self.embedding, ids, axis=0).astype(jnp.float32)


class Attention(nn.Module):
    """Causal self-attention with grouped key/value heads (Ainslie et al., arXiv 2305.13245)."""

    config: ModelConfig
    dtype: Any

    @nn.compact
    def __call__(
        self, x: Array, positions: Array, mask: Array, cache: LayerCache | None, deterministic: bool
    ) -> tuple[Array, LayerCache | None]:
        c = self.config
        group = c.n_heads // c.n_kv_heads
        # One product for all three: per key/value head, its G query heads, then its key, then its value.
        qkv = Linear((c.n_kv_heads, group + 2, c.d_head), c.bias or c.qkv_bias, INIT["linear"], self.dtype, name="qkv")(
            x
        )
        q, k, v = qkv[..., :group, :], qkv[..., group, :], qkv[..., group + 1, :]
        if c.qk_norm:
            q = Norm(c, self.dtype, "rmsnorm", name="q_norm")(q)
            k = Norm(c, self.dtype, "rmsnorm", name="k_norm")(k)
        if c.position == "rope":
            q, k = rope(q, positions, c.rope_theta), rope(k, positions, c.rope_theta)
        drop = dropout(self, deterministic)
        if cache is None:
            mixed = attend_causally(q, k, v, mask, drop)  # [B, T, K, G, H]
        else:
            cache = cache.write(k, v, positions)
            mixed = attend(q, cache.keys.astype(self.dtype), cache.values.astype(self.dtype), mask, drop)
        mixed = mixed.reshape(*mixed.shape[:2], c.n_heads * c.d_head)
        std = INIT["residual"] * (2 * c.n_layers) ** -0.5
        return Linear((c.d_model,), c.bias, std, self.dtype, name="proj")(mixed), cache


class MLP(nn.Module):
    """GPT-2's two layers with a GELU between, or SwiGLU (Shazeer, arXiv 2002.05202)."""

    config: ModelConfig
    dtype: Any

    @nn.compact
    def __call__(self, x: Array) -> Array:
        c = self.config
        if c.mlp == "swiglu":
            gate_up = Linear((2, c.d_ff), c.bias, INIT["linear"], self.dtype, name="gate_up")(x)
            x = nn.silu(gate_up[..., 0, :]) * gate_up[..., 1, :]
        else:
            x = nn.gelu(Linear((c.d_ff,), c.bias, INIT["linear"], self.dtype, name="up")(x), approximate=True)
        std = INIT["residual"] * (2 * c.n_layers) ** -0.5
        return Linear((c.d_model,), c.bias, std, self.dtype, transposed=True, name="down")(x)


class Block(nn.Module):
    """One pre-norm layer: x + attention(norm(x)), then x + MLP(norm(x)). `x` is the fp32 residual stream [B, T, D]."""

    config: ModelConfig
    dtype: Any

    @nn.compact
    def __call__(
        self, x: Array, positions: Array, mask: Array, cache: LayerCache | None, deterministic: bool
    ) -> tuple[Array, LayerCache | None]:
        c = self.config
        drop = dropout(self, deterministic)
        y = Norm(c, self.dtype, c.norm, name="attn_norm")(x)
        y, cache = Attention(c, self.dtype, name="attn")(y, positions, mask, cache, deterministic)
        x = x + drop(y).astype(jnp.float32)
        y = MLP(c, self.dtype, name="mlp")(Norm(c, self.dtype, c.norm, name="mlp_norm")(x))
        return x + drop(y).astype(jnp.float32), cache


def dropout(module: nn.Module, deterministic: bool) -> Callable[[Array], Array]:
    """Return the dropout of `module.config`, with a fresh key for each call, or the identity."""
    rate = module.config.dropout  # type: ignore[attr-defined]
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


REMAT_POLICY = {"block": None, "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable}


class GPT(nn.Module):
    """A decoder-only transformer. `dtype` is that of the matrix products; `remat` is none, block or dots."""

    config: ModelConfig
    dtype: Any = jnp.float32
    remat: str = "none"

    def setup(self) -> None:
        c = self.config
        self.wte = Embedding(c.vocab_size, c.d_model, INIT["embedding"])
        if c.position == "learned":
            self.wpe = Embedding(c.context_length, c.d_model, INIT["position"])
        if not c.tie_embeddings:
            self.lm_head = Embedding(c.vocab_size, c.d_model, INIT["embedding"])
        # deterministic (argument 5 of __call__, self counted) must be static; only positional arguments can be.
        block = Block if self.remat == "none" else nn.remat(Block, static_argnums=(5,), policy=REMAT_POLICY[self.remat])
        self.h = [block(c, self.dtype) for _ in range(c.n_layers)]
        self.norm = Norm(c, jnp.float32, c.norm)

    def __call__(
        self, tokens: Array, positions: Array | None = None, cache: KVCache | None = None, deterministic: bool = True
    ) -> Output:
        """Run the model on `tokens` int [B, T].

        Without a cache the tokens stand at positions 0..T-1 and see those before them. With one, they stand at
        `positions` int32 [B or 1, T], and see whatever their row holds up to there.
        """
        if positions is None:
            positions = jnp.arange(tokens.shape[1], dtype=jnp.int32)[None, :]
        key_positions = positions if cache is None else jnp.arange(cache[0].keys.shape[1], dtype=jnp.int32)[None, :]
        mask = key_positions[:, None, :] <= positions[:, :, None]  # [B or 1, T, S]
        x = self.wte(tokens)
        if self.config.position == "learned":
            x = x + self.wpe(positions)
        if self.is_initializing() and not self.config.tie_embeddings:
            _ = self.lm_head.embedding  # makes it: linen is lazy, and only `unembedding` uses this one
        x = dropout(self, deterministic)(x)
        layers: list[LayerCache] = []
        for i, block in enumerate(self.h):
            x, layer = block(x, positions, mask, cache[i] if cache is not None else None, deterministic)
            layers += [layer] if layer is not None else []
        return Output(self.norm(x), tuple(layers) if cache is not None else None)


def unembedding(params: Any) -> Array:
    """Return the output layer's matrix [V, D]: its own where embeddings are not tied, else the token embedding."""
    return params["lm_head" if "lm_head" in params else "wte"]["embedding"]
