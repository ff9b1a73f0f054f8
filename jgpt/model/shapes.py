"""The shapes and choices of a model: the config's zeros filled in, once.

In the data path: between the tokenizer, which fixes the vocabulary, and the GPT.
"""

import math
from dataclasses import dataclass

from ml_collections import ConfigDict

from jgpt.errors import UserError
from jgpt.model.rope import RopeScaling


@dataclass(frozen=True)
class ModelConfig:
    """Shapes and choices of one GPT: the keys of config.model, explained there, with all derived values filled in."""

    vocab_size: int
    context_length: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    d_model: int
    d_head: int
    d_ff: int
    mlp_groups: int = 1  # columns of gate and up lie in so many groups: one for each device that shares the model
    dropout: float = 0.0
    position: str = "rope"
    norm: str = "rmsnorm"
    mlp: str = "swiglu"
    bias: bool = False
    qkv_bias: bool = False
    qk_norm: bool = False
    tie_embeddings: bool = True
    rope_theta: float = 10_000.0
    rope_scaling: RopeScaling = RopeScaling()
    norm_eps: float = 1e-5


def model_config(model: ConfigDict, n_ids: int) -> ModelConfig:
    """Fill in the derived values (the zeros of the config); `n_ids` is the tokenizer's vocabulary.

    Raises UserError when the model's vocabulary is smaller than the tokenizer's.

    >>> from jgpt.config import default_config
    >>> filled = model_config(default_config().model, n_ids=1000)
    >>> filled.vocab_size, filled.d_head, filled.d_ff
    (1024, 64, 1024)
    """
    if 0 < model.vocab_size < n_ids:
        raise UserError(
            f"model.vocab_size={model.vocab_size}, and the tokenizer has {n_ids} ids: the model must have a row for"
            f" each. Allowed: at least {n_ids}, or 0 for the tokenizer's own number. Set --config.model.vocab_size=0."
        )
    multiple = model.vocab_multiple_of
    mlp_width = 4 * model.d_model if model.mlp == "gelu" else math.ceil(8 * model.d_model / 3 / 64) * 64
    values = {key: value for key, value in model.items() if key != "vocab_multiple_of"}
    filled = {
        "vocab_size": model.vocab_size or math.ceil(n_ids / multiple) * multiple,
        "n_kv_heads": model.n_kv_heads or model.n_heads,
        "d_head": model.d_head or model.d_model // model.n_heads,
        "d_ff": model.d_ff or mlp_width,
        "rope_scaling": RopeScaling(**model.rope_scaling),
    }
    return ModelConfig(**values | filled)
