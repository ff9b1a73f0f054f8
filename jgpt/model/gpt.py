"""The GPT: token ids in, hidden states out. One module covers GPT-2 and the modern block (Llama, Mistral, Qwen).

In the data path: between the batches and the loss in training, between the prompt and the sampled token in decoding.

Dimensions, here and everywhere:
    A accumulation   B batch   T query positions   S key positions   D model width   N heads   K key/value heads
    G = N / K query heads that share a key/value head   H head width   F MLP width   V vocabulary   L layers
"""

from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array

from jgpt.model.attention.choose import attend_causally
from jgpt.model.attention.plain import attend_newest
from jgpt.model.kv_cache import KVCache, LayerCache
from jgpt.model.layers import Embedding, Linear, Norm, dropout
from jgpt.model.lora import LoRA
from jgpt.model.rope import rope
from jgpt.model.shapes import ModelConfig

# Standard deviations of the initial normal distribution (GPT-2's; Radford et al. 2019, section 2.3).
# The two layers that write to the residual stream are divided by sqrt(2 L): its variance must not grow with depth.
INIT = {"embedding": 0.02, "position": 0.02, "linear": 0.02, "residual": 0.02}


class Output(NamedTuple):
    """What a forward pass returns: `hidden` fp32 [B, T, D] after the last norm, and the cache with the new tokens."""

    hidden: Array
    cache: KVCache | None


class Context(NamedTuple):
    """What every block of one forward pass is told."""

    positions: Array  # int32 [B or 1, T]
    mask: Array  # bool [B or 1, T, S]: where a query may look
    prefill: bool  # with a cache: the tokens are the first of their rows, and attend to one another alone


class Attention(nn.Module):
    """Causal self-attention with grouped key/value heads (Ainslie et al., arXiv 2305.13245)."""

    config: ModelConfig
    dtype: Any
    lora: LoRA | None = None
    form: str = "chunked"  # see `attend_causally`

    @nn.compact
    def __call__(
        self, x: Array, context: Context, cache: LayerCache | None, deterministic: bool
    ) -> tuple[Array, LayerCache | None]:
        c = self.config
        group = c.n_heads // c.n_kv_heads
        # One product for all three: per key/value head, its G query heads, then its key, then its value.
        features, bias = (c.n_kv_heads, group + 2, c.d_head), c.bias or c.qkv_bias
        qkv = Linear(features, bias, INIT["linear"], self.dtype, self.dtype, lora=self.lora, name="qkv")
        qkv = qkv(x, deterministic)
        q, k, v = qkv[..., :group, :], qkv[..., group, :], qkv[..., group + 1, :]
        if c.qk_norm:
            q = Norm("rmsnorm", c.norm_eps, False, self.dtype, name="q_norm")(q)
            k = Norm("rmsnorm", c.norm_eps, False, self.dtype, name="k_norm")(k)
        if c.position == "rope":
            q = rope(q, context.positions, c.rope_theta, c.rope_scaling)
            k = rope(k, context.positions, c.rope_theta, c.rope_scaling)
        if cache is None:
            drop = None if deterministic or c.dropout == 0.0 else dropout(self, c.dropout, deterministic)
            mixed = attend_causally(q, k, v, context.mask, self.form, drop)  # [B, T, K, G, H]
        elif context.prefill:
            cache = cache.fill(k, v)
            mixed = attend_causally(q, k, v, context.mask, scores_dtype=jnp.float32)
        else:
            mixed = attend_newest(q, k, v, cache.keys, cache.values, context.mask)
            # Written after it was read: without the dependency XLA copies the whole cache at every token.
            after = 0 * mixed[..., 0, :]
            cache = cache.write(k + after, v + after, context.positions)
        mixed = mixed.reshape(*mixed.shape[:2], c.n_heads * c.d_head)
        std = INIT["residual"] * (2 * c.n_layers) ** -0.5
        proj = Linear((c.d_model,), c.bias, std, self.dtype, jnp.float32, lora=self.lora, name="proj")
        return proj(mixed, deterministic), cache


def gelu(x: Array) -> Array:
    """Return GPT-2's tanh form of x * P(normal < x), computed in fp32, in x's dtype."""
    return nn.gelu(x.astype(jnp.float32), approximate=True).astype(x.dtype)


def swiglu(x: Array) -> Array:
    """Return silu(gate) * up of `x` [..., 2, width], computed in fp32, in x's dtype."""
    wide = x.astype(jnp.float32)
    return (nn.silu(wide[..., 0, :]) * wide[..., 1, :]).astype(x.dtype)


_RECOMPUTED = {"gelu": jax.checkpoint(gelu), "swiglu": jax.checkpoint(swiglu)}


class MLP(nn.Module):
    """GPT-2's two layers with a GELU between, or SwiGLU (Shazeer, arXiv 2002.05202)."""

    config: ModelConfig
    dtype: Any
    lora: LoRA | None = None

    @nn.compact
    def __call__(self, x: Array, deterministic: bool) -> Array:
        c = self.config
        gated = c.mlp == "swiglu"
        features = (c.mlp_groups, 2, c.d_ff // c.mlp_groups) if gated else (c.d_ff,)
        name = "gate_up" if gated else "up"
        up = Linear(features, c.bias, INIT["linear"], self.dtype, self.dtype, lora=self.lora, name=name)
        x = up(x, deterministic)
        # In half precision the work is memory traffic: between the passes only the layer's output is kept. On a CPU, in
        # fp32, it is the arithmetic.
        x = (swiglu if gated else gelu)(x) if self.dtype == jnp.float32 else _RECOMPUTED[c.mlp](x)
        x = x.reshape(*x.shape[:2], c.d_ff)
        std = INIT["residual"] * (2 * c.n_layers) ** -0.5
        down = Linear((c.d_model,), c.bias, std, self.dtype, jnp.float32, True, self.lora, name="down")
        return down(x, deterministic)


class Block(nn.Module):
    """One pre-norm layer: x + attention(norm(x)), then x + MLP(norm(x)). `x` is the fp32 residual stream [B, T, D]."""

    config: ModelConfig
    dtype: Any
    lora: LoRA | None = None
    attention: str = "chunked"

    @nn.compact
    def __call__(
        self, x: Array, positions: Array, mask: Array, prefill: bool, cache: LayerCache | None, deterministic: bool
    ) -> tuple[Array, LayerCache | None]:
        c = self.config
        drop = dropout(self, c.dropout, deterministic)
        y = Norm(c.norm, c.norm_eps, c.bias, self.dtype, name="attn_norm")(x)
        context = Context(positions, mask, prefill)
        y, cache = Attention(c, self.dtype, self.lora, self.attention, name="attn")(y, context, cache, deterministic)
        x = x + drop(y)
        y = Norm(c.norm, c.norm_eps, c.bias, self.dtype, name="mlp_norm")(x)
        return x + drop(MLP(c, self.dtype, self.lora, name="mlp")(y, deterministic)), cache


REMAT_POLICY = {"block": None, "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable}


class GPT(nn.Module):
    """A decoder-only transformer. `dtype` is that of the matrix products; `remat` is none, block or dots."""

    config: ModelConfig
    dtype: Any = jnp.float32
    remat: str = "none"
    lora: LoRA | None = None  # with it, `apply` takes the adapters as the collection "lora"
    attention: str = "chunked"  # of sequences without a cache: see `attend_causally`

    def setup(self) -> None:
        c = self.config
        self.wte = Embedding(c.vocab_size, c.d_model, INIT["embedding"])
        if c.position == "learned":
            self.wpe = Embedding(c.context_length, c.d_model, INIT["position"])
        if not c.tie_embeddings:
            self.lm_head = Embedding(c.vocab_size, c.d_model, INIT["embedding"])
        # prefill and deterministic (arguments 4 and 6 of __call__, self counted) must be static; only positional
        # arguments can be.
        remat = REMAT_POLICY.get(self.remat)
        block = Block if self.remat == "none" else nn.remat(Block, static_argnums=(4, 6), policy=remat)
        self.h = [block(c, self.dtype, self.lora, self.attention) for _ in range(c.n_layers)]
        self.norm = Norm(c.norm, c.norm_eps, c.bias, jnp.float32)

    def __call__(
        self,
        tokens: Array,
        positions: Array | None = None,
        cache: KVCache | None = None,
        deterministic: bool = True,
        segments: Array | None = None,
    ) -> Output:
        """Run the model on `tokens` int [B, T].

        Without `positions` the tokens stand at 0..T-1 and see those before them; a `cache` is empty then, and is
        filled. With `positions` int32 [B or 1, 1] there is a cache, T is 1, and they see what their row holds so far.
        `segments` int32 [B, T] (no cache) numbers the texts that share a row: each is seen by itself alone, and its
        positions begin at 0.
        """
        prefill, length = positions is None, tokens.shape[1]
        places = jnp.arange(length, dtype=jnp.int32)[None, :]
        if positions is not None:
            assert cache is not None and segments is None and length == 1
            mask = jnp.arange(cache[0].keys.shape[2])[None, None, :] < positions[:, :, None]  # [B or 1, 1, S]
        else:
            positions, mask = places, places[:, None, :] <= places[:, :, None]
        if segments is not None:
            begins = jnp.pad(segments[:, 1:] != segments[:, :-1], ((0, 0), (1, 0)))
            positions = places - jax.lax.cummax(jnp.where(begins, places, 0), axis=1)
            mask = mask & (segments[:, None, :] == segments[:, :, None])
        x = self.wte(tokens)
        if self.config.position == "learned":
            x = x + self.wpe(positions)
        if self.is_initializing() and not self.config.tie_embeddings:
            _ = self.lm_head.embedding  # makes it: linen is lazy, and only `unembedding` uses this one
        x = dropout(self, self.config.dropout, deterministic)(x)
        layers: list[LayerCache] = []
        for i, block in enumerate(self.h):
            x, layer = block(x, positions, mask, prefill, cache[i] if cache is not None else None, deterministic)
            layers += [layer] if layer is not None else []
        return Output(self.norm(x), tuple(layers) if cache is not None else None)


def unembedding(params: Any) -> Array:
    """Return the output layer's matrix [V, D]: its own where embeddings are not tied, else the token embedding."""
    return params["lm_head" if "lm_head" in params else "wte"]["embedding"]
