"""A block of the GPT: attention, then the MLP, each added to the residual stream.

In the data path: inside `gpt.py`, whose legend names the dimensions. `layers.py` has the layers that both are made of.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array

from jgpt.model.attention.choose import Split, attend_causally
from jgpt.model.attention.flash import flash_qkv
from jgpt.model.attention.plain import attend_newest
from jgpt.model.kv_cache import LayerCache
from jgpt.model.layers import Linear, Norm, dropout
from jgpt.model.lora import LoRA
from jgpt.model.rope import rope
from jgpt.model.shapes import ModelConfig

# Standard deviations of the initial normal distribution (GPT-2's; Radford et al. 2019, section 2.3).
INIT = {"embedding": 0.02, "position": 0.02, "linear": 0.02, "residual": 0.02}


def residual_std(config: ModelConfig) -> float:
    """Return the initial std of a layer that writes to the residual stream, whose variance must not grow with depth."""
    return INIT["residual"] * (2 * config.n_layers) ** -0.5


class Context(NamedTuple):
    """The arrays that all blocks of a forward pass share."""

    positions: Array  # int32 [B or 1, T]
    mask: Array  # bool [B or 1, T, S], true where a query may attend to a key
    segments: Array | None = None  # int32 [B, T], the number of the text that a token belongs to


@dataclass(frozen=True)
class Mode:
    """The choices that all blocks of a forward pass share; static, so each combination compiles its own program."""

    prefill: bool  # with a cache: the tokens are the first of their rows and attend only to one another
    deterministic: bool  # without dropout


class Attention(nn.Module):
    """Causal self-attention with grouped key/value heads (Ainslie et al., arXiv 2305.13245).

    `x` [B, T, D] in; fp32 [B, T, D] out, and the cache with the new keys and values where one was given.
    """

    config: ModelConfig
    dtype: Any  # of the products' operands
    activations: Any  # the dtype from product to product
    lora: LoRA | None = None
    form: str = "chunked"  # see `attend_causally`, also for `split`
    split: Split | None = None

    @nn.compact
    def __call__(
        self, x: Array, context: Context, cache: LayerCache | None, mode: Mode
    ) -> tuple[Array, LayerCache | None]:
        c = self.config
        group = c.n_heads // c.n_kv_heads
        # One product for all three: per key/value head, its G query heads, then its key, then its value.
        qkv_layer = Linear(
            features=(c.n_kv_heads, group + 2, c.d_head),
            use_bias=c.bias or c.qkv_bias,
            std=INIT["linear"],
            dtype=self.dtype,
            output_dtype=self.activations,
            lora=self.lora,
            name="qkv",
        )
        qkv = qkv_layer(x, mode.deterministic)
        q, k, v = qkv[..., :group, :], qkv[..., group, :], qkv[..., group + 1, :]
        if c.qk_norm:
            q = Norm(kind="rmsnorm", epsilon=c.norm_eps, use_bias=False, dtype=self.activations, name="q_norm")(q)
            k = Norm(kind="rmsnorm", epsilon=c.norm_eps, use_bias=False, dtype=self.activations, name="k_norm")(k)
        if c.position == "rope":
            q = rope(q, context.positions, c.rope_theta, c.rope_scaling)
            k = rope(k, context.positions, c.rope_theta, c.rope_scaling)
        if cache is None:
            drop = None if mode.deterministic or c.dropout == 0.0 else dropout(self, c.dropout, mode.deterministic)
            as_they_are = c.position == "learned" and not c.qk_norm
            if self.form == "flash" and drop is None and as_they_are and self.split is None:
                mixed = flash_qkv(qkv, context.segments)  # reads all three where the product left them
            else:
                mixed = attend_causally(
                    q, k, v, context.mask, self.form, drop, segments=context.segments, split=self.split
                )
        elif mode.prefill:
            cache = cache.fill(k, v)
            mixed = attend_causally(q, k, v, context.mask, scores_dtype=jnp.float32)
        else:
            mixed = attend_newest(q, k, v, cache.keys, cache.values, context.mask)
            # Written after it was read: without the dependency XLA copies the whole cache at every token.
            after = 0 * mixed[..., 0, :]
            cache = cache.write(k + after, v + after, context.positions)
        mixed = mixed.reshape(*mixed.shape[:2], c.n_heads * c.d_head)
        proj = Linear(
            features=(c.d_model,),
            use_bias=c.bias,
            std=residual_std(c),
            dtype=self.dtype,
            output_dtype=jnp.float32,
            lora=self.lora,
            name="proj",
        )
        return proj(mixed, mode.deterministic), cache


def gelu(x: Array) -> Array:
    """Return GELU of `x` in its tanh form, as GPT-2 has it; computed in fp32, returned in x's dtype."""
    return nn.gelu(x.astype(jnp.float32), approximate=True).astype(x.dtype)


def swiglu(x: Array) -> Array:
    """Return silu(gate) * up of `x` [..., 2, width], [..., width]; computed in fp32, returned in x's dtype."""
    wide = x.astype(jnp.float32)
    return (nn.silu(wide[..., 0, :]) * wide[..., 1, :]).astype(x.dtype)


_RECOMPUTED = {"gelu": jax.checkpoint(gelu), "swiglu": jax.checkpoint(swiglu)}


class MLP(nn.Module):
    """GPT-2's two layers with a GELU between, or SwiGLU (Shazeer, arXiv 2002.05202); [B, T, D] in, fp32 out."""

    config: ModelConfig
    dtype: Any  # of the products' operands
    activations: Any  # the dtype from product to product
    lora: LoRA | None = None

    @nn.compact
    def __call__(self, x: Array, deterministic: bool) -> Array:
        c = self.config
        gated = c.mlp == "swiglu"
        features = (c.mlp_groups, 2, c.d_ff // c.mlp_groups) if gated else (c.d_ff,)
        up = Linear(
            features=features,
            use_bias=c.bias,
            std=INIT["linear"],
            dtype=self.dtype,
            output_dtype=self.activations,
            lora=self.lora,
            name="gate_up" if gated else "up",
        )
        x = up(x, deterministic)
        # In half precision memory traffic is what costs: the backward pass computes the activation again from its
        # input, so only that is stored. In fp32, on a CPU, arithmetic is what costs.
        x = (swiglu if gated else gelu)(x) if self.activations == jnp.float32 else _RECOMPUTED[c.mlp](x)
        x = x.reshape(*x.shape[:2], c.d_ff)
        down = Linear(
            features=(c.d_model,),
            use_bias=c.bias,
            std=residual_std(c),
            dtype=self.dtype,
            output_dtype=jnp.float32,
            transposed=True,
            lora=self.lora,
            name="down",
        )
        return down(x, deterministic)


class Block(nn.Module):
    """One pre-norm layer: x + attention(norm(x)), then x + MLP(norm(x)). `x` is the fp32 residual stream [B, T, D]."""

    config: ModelConfig
    dtype: Any  # of the products' operands
    activations: Any  # the dtype from product to product
    lora: LoRA | None = None
    attention: str = "chunked"
    split: Split | None = None

    @nn.compact
    def __call__(
        self, x: Array, context: Context, cache: LayerCache | None, mode: Mode
    ) -> tuple[Array, LayerCache | None]:
        c = self.config
        drop = dropout(self, c.dropout, mode.deterministic)
        norm = partial(Norm, kind=c.norm, epsilon=c.norm_eps, use_bias=c.bias, dtype=self.activations)
        attn = Attention(
            c, self.dtype, self.activations, lora=self.lora, form=self.attention, split=self.split, name="attn"
        )
        mlp = MLP(c, self.dtype, self.activations, lora=self.lora, name="mlp")
        y, cache = attn(norm(name="attn_norm")(x), context, cache, mode)
        x = x + drop(y)
        y = mlp(norm(name="mlp_norm")(x), mode.deterministic)
        return x + drop(y), cache
