"""LoRA: small matrices beside frozen ones (Hu et al., arXiv 2106.09685).

In the data path: a linear layer of `model/layers.py` that is a target adds scale * (x @ a) @ b to its output. The
adapters are a tree of their own (the variable collection "lora"), shaped like the parameters: what is trained and
saved is that tree alone. A fused layer (query, key and value; gate and up) has one `a` for all its parts.
"""

from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

TARGETS = ("qkv", "proj", "gate_up", "up", "down")  # the linear layers of a block, by their names


@dataclass(frozen=True)
class LoRA:
    """What is adapted, and how: `rank` columns in `a`, the product scaled by alpha / rank."""

    rank: int
    alpha: float
    dropout: float = 0.0  # on the input of `a`
    targets: tuple[str, ...] = TARGETS

    @property
    def scale(self) -> float:
        """The factor of the adapters' output."""
        return self.alpha / self.rank


def init_adapters(model: nn.Module, key: jax.Array) -> Any:
    """Make the adapters of a GPT whose `lora` is set, fp32; under jit its parameters are not made along."""
    return model.init(key, jnp.zeros((1, 1), jnp.int32))["lora"]


def merge(params: Any, adapters: Any, lora: LoRA) -> Any:
    """Return the parameters with the adapters added to the kernels, each in its kernel's dtype.

    The sum is formed in fp32. `adapters` holds {"a": [inputs, rank], "b": [rank, *features]} where `params` holds
    {"kernel": [inputs, *features]}, or [features, inputs] in "down", which is stored transposed.
    """
    merged = dict(params)
    for name, adapter in adapters.items():
        if "a" not in adapter:
            merged[name] = merge(params[name], adapter, lora)
            continue
        kernel = params[name]["kernel"]
        update = jnp.tensordot(adapter["a"].astype(jnp.float32), adapter["b"].astype(jnp.float32), 1) * lora.scale
        update = update.T if name == "down" else update
        merged[name] = {**params[name], "kernel": (kernel.astype(jnp.float32) + update).astype(kernel.dtype)}
    return merged
