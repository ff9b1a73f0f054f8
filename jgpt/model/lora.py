"""LoRA: train small matrices beside frozen ones (Hu et al., arXiv 2106.09685).

In the data path: a linear layer of `model/layers.py` that is a target adds scale * (x @ a) @ b to its output. The
adapters are a tree of their own (the variable collection "lora"), with the structure of the parameters; only that tree
is trained and saved. A fused layer (query, key and value; gate and up) has one `a` for all its parts.
"""

from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from jgpt.config.defaults import LORA_TARGETS


@dataclass(frozen=True)
class LoRA:
    """The settings of LoRA adapters."""

    rank: int  # columns of `a`
    alpha: float  # the adapter's output is multiplied by alpha / rank
    dropout: float = 0.0  # on the input of `a`
    targets: tuple[str, ...] = LORA_TARGETS  # the layers that have adapters

    @property
    def scale(self) -> float:
        """The factor of the adapters' output."""
        return self.alpha / self.rank


def init_adapters(model: nn.Module, key: jax.Array) -> Any:
    """Return new adapters, fp32, of a GPT whose `lora` is set; under jit, XLA does not compute the parameters."""
    return model.init(key, jnp.zeros((1, 1), jnp.int32))["lora"]


def merge(path: tuple[str, ...], array: np.ndarray, adapters: Any, lora: LoRA) -> np.ndarray:
    """Return a parameter of the plain model with its adapter added, if it has one, in the parameter's dtype.

    `path` is the parameter's keys in the tree. The sum is computed in fp32. In the place of a kernel [inputs,
    *features], `adapters` has {"a": [inputs, rank], "b": [rank, *features]}; of adapters of others the rank may differ
    from `lora.rank`. The kernel of "down" is stored transposed, [features, inputs].
    """
    adapter = adapters
    for key in path[:-1]:
        adapter = adapter.get(key, {})
    if path[-1] != "kernel" or "a" not in adapter:
        return array
    a, b = (np.asarray(adapter[name], np.float32) for name in ("a", "b"))
    update = a @ b.reshape(len(b), -1) * lora.scale
    update = update.T if path[-2] == "down" else update
    return (array.astype(np.float32) + update.reshape(array.shape)).astype(array.dtype)


def lora_config(lora: ConfigDict) -> LoRA | None:
    """Return the settings in `config.lora`; None where its rank is 0."""
    targets = tuple(target.strip() for target in lora.targets.split(","))
    return LoRA(lora.rank, lora.alpha, lora.dropout, targets) if lora.rank else None
