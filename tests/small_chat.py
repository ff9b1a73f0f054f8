"""A small random model with a chat template, for the tests that need one."""

from functools import cache
from typing import Any

import numpy as np
from jax import tree
from tokenizers import Tokenizer as Backend

from jgpt.data.tokenizer import Tokenizer, train_bpe
from jgpt.model.gpt import GPT
from jgpt.model.parameters import abstract_params
from jgpt.model.shapes import ModelConfig

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@cache
def parts() -> tuple[GPT, Any, Tokenizer]:
    """Return the model, its parameters and its tokenizer."""
    backend = Backend.from_str(train_bpe(["user assistant system one two"], 290).tokenizer_json)
    backend.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    tokenizer = Tokenizer(backend.to_str(), {"eos_token": "<|endoftext|>", "chat_template": CHATML})
    shapes = dict(n_layers=1, n_heads=2, n_kv_heads=1, d_model=32, d_head=16, d_ff=64)
    config = ModelConfig(vocab_size=tokenizer.vocab_size, context_length=128, **shapes)
    rng = np.random.default_rng(0)
    params = tree.map(lambda x: rng.normal(x.ndim == 1, 0.2, x.shape).astype(np.float32), abstract_params(config))
    return GPT(config), params, tokenizer
