"""Watch a GPT learn to write Python, from the source of Python's own standard library: nothing to download.

Hardware: any CPU (2 cores are enough).
Command:  python -m jgpt.train --config configs/quickstart.py
"""

from ml_collections import ConfigDict

from jgpt.config import default_config


def get_config() -> ConfigDict:
    """Return the config: 3 M parameters, byte-level BPE of 2048 ids."""
    config = default_config()
    config.out_dir = "runs/quickstart"
    config.tokenizer.vocab_size = 2048
    config.model.n_layers = 4
    config.model.n_heads = 4
    config.model.d_model = 192
    config.model.context_length = 128
    config.optimizer.total_steps = 600
    config.optimizer.warmup_steps = 50
    config.optimizer.learning_rate = 2e-3
    config.optimizer.min_learning_rate = 2e-4
    config.batch.global_batch_size = 16
    config.batch.micro_batch_size = 16
    config.eval.every_steps = 100
    config.checkpoint.every_steps = 200
    config.sample.every_steps = 200
    return config
