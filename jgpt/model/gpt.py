"""The GPT: token ids in, hidden states out. One module covers GPT-2 and the modern block (Llama, Mistral, Qwen).

In the data path: between the batches and the loss in training, between the prompt and the sampled token in decoding.

Dimensions, here and everywhere:
    A accumulation   B batch   T query positions   S key positions   D model width   N heads   K key/value heads
    G = N / K query heads that share a key/value head   H head width   F MLP width   V vocabulary   L layers
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.core.scope import LazyRng
from jax import Array

from jgpt.model.attention.choose import Split
from jgpt.model.block import INIT, Block, Context, Mode
from jgpt.model.kv_cache import KVCache, LayerCache
from jgpt.model.layers import Embedding, Norm, dropout
from jgpt.model.lora import LoRA
from jgpt.model.shapes import ModelConfig


class Output(NamedTuple):
    """The result of a forward pass."""

    hidden: Array  # fp32 [B, T, D], after the last norm
    cache: KVCache | None  # with the new tokens in it


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
        context = _context(tokens.shape[1], positions, cache, segments)
        mode = Mode(prefill=positions is None, deterministic=deterministic)
        x = self.wte(tokens)
        if self.config.position == "learned":
            x = x + self.wpe(context.positions)
        if self.is_initializing() and not self.config.tie_embeddings:
            _ = self.lm_head.embedding  # creates the parameter: linen is lazy, and only `unembedding` reads it
        x = dropout(self, self.config.dropout, deterministic)(x)
        layers: list[LayerCache] = []
        for i, block in enumerate(self.h):
            if self.gather is not None:
                x = self._gathering(i, x, context, mode)
                continue
            x, layer = block(x, context, cache[i] if cache is not None else None, mode)
            layers += [layer] if layer is not None else []
        return Output(self.norm(x), tuple(layers) if cache is not None else None)


def _context(length: int, positions: Array | None, cache: KVCache | None, segments: Array | None) -> Context:
    """Return the positions of the tokens [B or 1, T], and the keys that each may attend to; see `GPT.__call__`."""
    if positions is not None:
        assert cache is not None and segments is None and length == 1
        earlier = jnp.arange(cache[0].keys.shape[2])[None, None, :] < positions[:, :, None]  # [B or 1, 1, S]
        return Context(positions, earlier)
    indices = jnp.arange(length, dtype=jnp.int32)[None, :]
    mask = indices[:, None, :] <= indices[:, :, None]
    if segments is None:
        return Context(indices, mask)
    is_first = jnp.pad(segments[:, 1:] != segments[:, :-1], ((0, 0), (1, 0)))
    positions = indices - jax.lax.cummax(jnp.where(is_first, indices, 0), axis=1)
    return Context(positions, mask & (segments[:, None, :] == segments[:, :, None]), segments)


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
