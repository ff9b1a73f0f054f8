"""The table of weights: each tensor of a Hugging Face model by name, and the parameter of the GPT that it is part of.

Beside the data path: `read_weights.py` and `write_weights.py` go by this table. Names and shapes are those of
transformers' modeling_*.py: weights are [outputs, inputs], in GPT-2 [inputs, outputs]. Dimension letters: see
`model/gpt.py`.
"""

import re
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np

from jgpt.model.shapes import ModelConfig

Shape = tuple[int, ...]
# Of every name but lm_head's. A file of the bare model, without an output layer, has names without the prefix.
PREFIXES = {"gpt2": "transformer."}
# Constants that older versions of transformers saved with the weights.
BUFFERS = re.compile(r"(h\.\d+\.attn\.(masked_)?bias|.*rotary_emb\.inv_freq)")


class Entry(NamedTuple):
    """One parameter of the GPT, and the tensors that it is made of."""

    path: tuple[str, ...]  # its keys in the tree, as ("h_0", "attn", "qkv", "kernel")
    names: tuple[str, ...]  # without the prefix
    shapes: tuple[Shape, ...]  # of the tensors
    join: Callable[[list[np.ndarray]], np.ndarray]  # the tensors to the parameter
    split: Callable[[np.ndarray], list[np.ndarray]]  # the parameter to the tensors
    in_model: bool = True  # False: a bias that the GPT does not have, so it must be zero


def prefix(family: str) -> str:
    """Return the prefix of the tensors' names in a file of the whole model."""
    return PREFIXES.get(family, "model.")


def full_name(start: str, name: str) -> str:
    """Return the name of a tensor with the prefix `start`, which the output layer has not."""
    return name if name.startswith("lm_head") else start + name


def table(family: str, shapes: ModelConfig) -> Iterator[Entry]:
    """List every parameter of a model in `family`'s layout."""
    c = shapes
    vocabulary = (c.vocab_size, c.d_model)
    gpt2 = family == "gpt2"
    yield _same(("wte", "embedding"), "wte.weight" if gpt2 else "embed_tokens.weight", vocabulary)
    if gpt2:
        yield _same(("wpe", "embedding"), "wpe.weight", (c.context_length, c.d_model))
    for i in range(c.n_layers):
        yield from _gpt2_layer(c, i) if gpt2 else _llama_layer(c, i, family)
    yield from _norm(("norm",), "ln_f" if gpt2 else "norm", c, gpt2)
    if not c.tie_embeddings:
        yield _same(("lm_head", "embedding"), "lm_head.weight", vocabulary)


def _gpt2_layer(c: ModelConfig, i: int) -> Iterator[Entry]:
    layer, start, width = f"h_{i}", f"h.{i}.", c.d_model
    yield from _norm((layer, "attn_norm"), f"{start}ln_1", c, True)
    for leaf, name, lead in (("kernel", "weight", (width,)), ("bias", "bias", ())):
        in_model = leaf == "kernel" or c.bias
        yield Entry(
            (layer, "attn", "qkv", leaf), (f"{start}attn.c_attn.{name}",), ((*lead, 3 * width),),
            lambda x: x[0].reshape(*x[0].shape[:-1], 3, c.n_heads, c.d_head).swapaxes(-3, -2),
            lambda x: [x.swapaxes(-3, -2).reshape(*x.shape[:-3], -1)], in_model or c.qkv_bias,
        )  # fmt: skip
        yield _same((layer, "attn", "proj", leaf), f"{start}attn.c_proj.{name}", (*lead, width), in_model)
        yield _same((layer, "mlp", "up", leaf), f"{start}mlp.c_fc.{name}", (*lead, c.d_ff), in_model)
    yield _transposed((layer, "mlp", "down", "kernel"), f"{start}mlp.c_proj.weight", (c.d_ff, width))
    yield _same((layer, "mlp", "down", "bias"), f"{start}mlp.c_proj.bias", (width,), c.bias)
    yield from _norm((layer, "mlp_norm"), f"{start}ln_2", c, True)


def _llama_layer(c: ModelConfig, i: int, family: str) -> Iterator[Entry]:
    layer, attn, mlp, width = f"h_{i}", f"layers.{i}.self_attn.", f"layers.{i}.mlp.", c.d_model
    heads, kv_heads = c.n_heads * c.d_head, c.n_kv_heads * c.d_head
    yield from _norm((layer, "attn_norm"), f"layers.{i}.input_layernorm", c, False)
    leaves = [("kernel", "weight", (width,))] + ([("bias", "bias", ())] if c.bias or c.qkv_bias else [])
    for leaf, name, inputs in leaves:
        yield Entry(
            (layer, "attn", "qkv", leaf), tuple(f"{attn}{part}_proj.{name}" for part in "qkv"),
            ((heads, *inputs), (kv_heads, *inputs), (kv_heads, *inputs)), lambda x: _join_heads(x, c), _split_heads,
        )  # fmt: skip
    yield _transposed((layer, "attn", "proj", "kernel"), f"{attn}o_proj.weight", (width, heads))
    if len(leaves) == 2 and family != "qwen2":
        yield _same((layer, "attn", "proj", "bias"), f"{attn}o_proj.bias", (width,), c.bias)
    if c.qk_norm:
        yield _same((layer, "attn", "q_norm", "scale"), f"{attn}q_norm.weight", (c.d_head,))
        yield _same((layer, "attn", "k_norm", "scale"), f"{attn}k_norm.weight", (c.d_head,))
    yield from _norm((layer, "mlp_norm"), f"layers.{i}.post_attention_layernorm", c, False)
    for leaf, name, inputs in leaves[: 1 + c.bias]:
        yield Entry(
            (layer, "mlp", "gate_up", leaf), (f"{mlp}gate_proj.{name}", f"{mlp}up_proj.{name}"),
            ((c.d_ff, *inputs),) * 2, lambda x: np.stack([part.T for part in x], axis=-2)[..., None, :, :],
            lambda x: [x[..., 0, 0, :].T, x[..., 0, 1, :].T],
        )  # fmt: skip
    yield _same((layer, "mlp", "down", "kernel"), f"{mlp}down_proj.weight", (width, c.d_ff))
    if c.bias:
        yield _same((layer, "mlp", "down", "bias"), f"{mlp}down_proj.bias", (width,))


def _same(path: tuple[str, ...], name: str, shape: Shape, in_model: bool = True) -> Entry:
    return Entry(path, (name,), (shape,), lambda x: x[0], lambda x: [x], in_model)


def _transposed(path: tuple[str, ...], name: str, shape: Shape) -> Entry:
    return Entry(path, (name,), (shape,), lambda x: x[0].T, lambda x: [x.T])


def _norm(path: tuple[str, ...], name: str, c: ModelConfig, bias: bool) -> Iterator[Entry]:
    yield _same((*path, "scale"), f"{name}.weight", (c.d_model,))
    if bias:
        yield _same((*path, "bias"), f"{name}.bias", (c.d_model,), c.bias)


def _join_heads(parts: list[np.ndarray], c: ModelConfig) -> np.ndarray:
    """Join the query tensor [N*H(, D)] and those of key and value [K*H(, D)] to one parameter [(D,) K, G+2, H]."""
    return np.concatenate([x.T.reshape(*x.shape[1:], c.n_kv_heads, -1, c.d_head) for x in parts], axis=-2)


def _split_heads(x: np.ndarray) -> list[np.ndarray]:
    """Split the parameter [(D,) K, G+2, H] into the tensors of query, key and value."""
    parts = x[..., :-2, :], x[..., -2:-1, :], x[..., -1:, :]
    return [part.reshape(*x.shape[:-3], -1).T for part in parts]
