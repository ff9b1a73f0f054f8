"""nanoGPT's smallest run: 0.8 M parameters that learn Shakespeare's characters on a laptop's CPU.

Hardware: any CPU.
Time:     94 seconds on 2 cores of an AMD EPYC (measured: 23,000 tokens a second).
Expect:   validation loss 1.76 on all of the held-out tenth (measured). With nanoGPT's learning rate of 1e-3 it is 1.90
          there (measured); nanoGPT publishes 1.88.
Command:  python -m jgpt.train --config configs/shakespeare_char_cpu.py --config.data.text_glob=tinyshakespeare.txt
Text:     https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt
"""

from ml_collections import ConfigDict

from jgpt.config import default_config


def get_config() -> ConfigDict:
    """Return the config: nanoGPT's flags for a CPU (its README, "I only have a macbook"), at a higher learning rate."""
    config = default_config()
    config.out_dir = "runs/shakespeare_char_cpu"
    config.log_every_steps = 50
    config.data.text_glob = "tinyshakespeare.txt"
    config.tokenizer.kind = "char"
    config.model.n_layers = 4
    config.model.n_heads = 4
    config.model.d_model = 128
    config.model.context_length = 64
    config.model.vocab_multiple_of = 1
    config.model.dropout = 0.0
    config.model.position = "learned"
    config.model.norm = "layernorm"
    config.model.mlp = "gelu"
    config.optimizer.total_steps = 2000
    config.optimizer.warmup_steps = 100
    config.optimizer.learning_rate = 4e-3  # nanoGPT's 1e-3 is the baby GPT's
    config.optimizer.min_learning_rate = 1e-4
    config.optimizer.beta2 = 0.99
    config.batch.global_batch_size = 12
    config.execution.micro_batch_size = 12
    config.eval.every_steps = 250
    config.eval.batches = 1000  # all of it
    config.checkpoint.every_steps = 500
    config.sample.every_steps = 0
    config.sample.max_new_tokens = 500
    return config
