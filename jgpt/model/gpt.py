"""The GPT: token ids in, hidden states out. One module covers GPT-2 and the modern block (Llama, Mistral, Qwen).

In the data path: between the batches and the loss in training, between the prompt and the sampled token in decoding.

Dimensions, here and everywhere:
    A accumulation   B batch   T query positions   S key positions   D model width   N heads   K key/value heads
    G = N / K query heads that share a key/value head   H head width   F MLP width   V vocabulary   L layers
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.core.scope import LazyRng
from jax import Array

from jgpt.model.attention.choose import Split, attend_causally
from jgpt.model.attention.flash import flash_qkv
from jgpt.model.attention.plain import attend_newest
from jgpt.model.kv_cache import KVCache, LayerCache
from jgpt.model.layers import Embedding, Linear, Norm, dropout
from jgpt.model.lora import LoRA
from jgpt.model.rope import rope
from jgpt.model.shapes import ModelConfig

# Standard deviations of the initial normal distribution (GPT-2's; Radford et al. 2019, section 2.3).
INIT = {"embedding": 0.02, "position": 0.02, "linear": 0.02, "residual": 0.02}


def residual_std(config: ModelConfig) -> float:
    """Return the initial std of a layer that writes to the residual stream, whose variance must not grow with depth."""
    return INIT["residual"] * (2 * config.n_layers) ** -0.5


class Output(NamedTuple):
    """The result of a forward pass."""

    hidden: Array  # fp32 [B, T, D], after the last norm
    cache: KVCache | None  # with the new tokens in it


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


# What the backward pass computes again: all of a block, or all but its matrix products.
REMAT_POLICY = {"block": None, "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable}
GATHERED = "gathered"  # the checkpoint_name of parameters that a block gathers from several devices


class GPT(nn.Module):
    """A decoder-only transformer."""

    config: ModelConfig
    dtype: Any = jnp.float32  # of the matrix products
    remat: str = "none"  # or "block", "dots": what the backward pass computes again, see REMAT_POLICY
    lora: LoRA | None = None  # with it, `apply` takes the adapters as the collection "lora"
    attention: str = "chunked"  # of sequences without a cache: see `attend_causally`
    activations: Any = None  # the dtype from product to product; None: `dtype`
    gather: Callable[[Any], Any] | None = None  # of a block's parameters, split over devices, makes all of them
    split: Split | None = None  # of attention, where devices share the heads: see `attend_causally`

    def setup(self) -> None:
        c = self.config
        self.wte = Embedding(rows=c.vocab_size, width=c.d_model, std=INIT["embedding"])
        if c.position == "learned":
            self.wpe = Embedding(rows=c.context_length, width=c.d_model, std=INIT["position"])
        if not c.tie_embeddings:
            self.lm_head = Embedding(rows=c.vocab_size, width=c.d_model, std=INIT["embedding"])
        block, activations = self._block(), self.dtype if self.activations is None else self.activations
        self.h = [block(c, self.dtype, activations, self.lora, self.attention, self.split) for _ in range(c.n_layers)]
        self.norm = Norm(kind=c.norm, epsilon=c.norm_eps, use_bias=c.bias, dtype=jnp.float32)

    def _block(self) -> type[Block]:
        """Return Block, with what the backward pass computes again."""
        if self.remat == "none":
            return Block
        # `mode` is argument 4 of Block.__call__, with self as 0. Only a positional argument can be static.
        return nn.remat(Block, static_argnums=4, policy=REMAT_POLICY[self.remat])

    def one_block(self, i: int, x: Array, context: Context, mode: Mode) -> Array:
        """Run one block alone, without a cache."""
        return self.h[i](x, context, None, mode)[0]

    def _gathering(self, i: int, x: Array, context: Context, mode: Mode) -> Array:
        """Run one block, and gather its parameters before it: in the forward pass, and again in the backward pass."""
        gather, name, alone = self.gather, f"h_{i}", self.clone(parent=None, gather=None, remat="none")
        assert gather is not None and self.scope is not None
        rngs = {kind: LazyRng.create(key).as_jax_rng() for kind, key in self.scope.rngs.items()}

        def run(part: Any, x: Array) -> Array:
            params = {"params": {name: gather(part)}}
            return cast(Array, alone.apply(params, i, x, context, mode, rngs=rngs, method=GPT.one_block))

        keep_all_else = jax.checkpoint_policies.save_anything_except_these_names(GATHERED)
        policy = keep_all_else if self.remat == "none" else REMAT_POLICY[self.remat]
        return in_turn(jax.checkpoint(run, policy=policy), self.variables["params"][name], x)

    def __call__(
        self,
        tokens: Array,
        positions: Array | None = None,
        cache: KVCache | None = None,
        deterministic: bool = True,
        segments: Array | None = None,
    ) -> Output:
        """Run the model on `tokens` int [B, T].

        Three ways to call it:

        - Without `positions` and `cache`: the tokens stand at 0..T-1, and each attends to itself and those before it.
          `segments` int32 [B, T] numbers the texts that share a row: each text attends to itself only, and its
          positions begin at 0.
        - With an empty `cache` and no `positions`: the same, and the keys and values are written to the cache.
        - With `positions` int32 [B or 1, 1] and a `cache`: T is 1, and each token attends to itself and to the cached
          positions before its own.
        """
        prefill, length = positions is None, tokens.shape[1]
        indices = jnp.arange(length, dtype=jnp.int32)[None, :]
        if positions is not None:
            assert cache is not None and segments is None and length == 1
            mask = jnp.arange(cache[0].keys.shape[2])[None, None, :] < positions[:, :, None]  # [B or 1, 1, S]
        else:
            positions, mask = indices, indices[:, None, :] <= indices[:, :, None]
        if segments is not None:
            is_first = jnp.pad(segments[:, 1:] != segments[:, :-1], ((0, 0), (1, 0)))
            positions = indices - jax.lax.cummax(jnp.where(is_first, indices, 0), axis=1)
            mask = mask & (segments[:, None, :] == segments[:, :, None])
        x = self.wte(tokens)
        if self.config.position == "learned":
            x = x + self.wpe(positions)
        if self.is_initializing() and not self.config.tie_embeddings:
            _ = self.lm_head.embedding  # creates the parameter: linen is lazy, and only `unembedding` reads it
        x = dropout(self, self.config.dropout, deterministic)(x)
        context, mode = Context(positions, mask, segments), Mode(prefill, deterministic)
        layers: list[LayerCache] = []
        for i, block in enumerate(self.h):
            if self.gather is not None:
                x = self._gathering(i, x, context, mode)
                continue
            x, layer = block(x, context, cache[i] if cache is not None else None, mode)
            layers += [layer] if layer is not None else []
        return Output(self.norm(x), tuple(layers) if cache is not None else None)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def in_turn(block: Callable[[Any, Array], Array], part: Any, x: Array) -> Array:
    """Run block(part, x) such that XLA gathers for one block at a time, forward and backward.

    XLA starts early what it can, and puts off what nobody waits for. Left alone it would gather the parameters of many
    blocks at the start, and would keep the activations of all blocks until the gradient of the first one's input is
    known, to multiply and scatter all gradients of parameters then. The barriers make gathering wait for `x`, and the
    block before wait for the gradients of `part`.
    """
    return block(*jax.lax.optimization_barrier((part, x)))


def _in_turn_forward(block: Callable[[Any, Array], Array], part: Any, x: Array) -> tuple[Array, Any]:
    return jax.vjp(block, *jax.lax.optimization_barrier((part, x)))


def _in_turn_backward(block: Callable[[Any, Array], Array], vjp: Callable[[Array], Any], cotangent: Array) -> Any:
    return jax.lax.optimization_barrier(vjp(cotangent))


in_turn.defvjp(_in_turn_forward, _in_turn_backward)


def unembedding(params: Any) -> Array:
    """Return the output layer's matrix [V, D]: the token embedding where they are tied, else its own."""
    return params["lm_head" if "lm_head" in params else "wte"]["embedding"]
