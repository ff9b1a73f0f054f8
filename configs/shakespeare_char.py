"""nanoGPT's baby GPT: 10.7 M parameters that write Shakespeare a character at a time.

Hardware: one GPU. On a CPU take configs/shakespeare_char_cpu.py.
Time:     not measured on a GPU; nanoGPT publishes 3 minutes on an A100. Predicted for a T4: about 6 minutes (82 M
          tokens).
Expect:   nanoGPT publishes a validation loss of 1.4697. The best checkpoint is kept; later ones overfit.
Command:  python -m jgpt.train --config configs/shakespeare_char.py --config.data.text_glob=tinyshakespeare.txt
Text:     https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt
"""

from ml_collections import ConfigDict

from jgpt.config import default_config


def get_config() -> ConfigDict:
    """Return the config: GPT-2's block without biases, as nanoGPT's config/train_shakespeare_char.py."""
    config = default_config()
    config.out_dir = "runs/shakespeare_char"
    config.data.text_glob = "tinyshakespeare.txt"
    config.tokenizer.kind = "char"
    config.model.n_layers = 6
    config.model.n_heads = 6
    config.model.d_model = 384
    config.model.context_length = 256
    config.model.vocab_multiple_of = 1
    config.model.dropout = 0.2
    config.model.position = "learned"
    config.model.norm = "layernorm"
    config.model.mlp = "gelu"
    config.optimizer.total_steps = 5000
    config.optimizer.warmup_steps = 100
    config.optimizer.learning_rate = 1e-3
    config.optimizer.min_learning_rate = 1e-4
    config.optimizer.beta2 = 0.99
    config.batch.global_batch_size = 64
    config.execution.micro_batch_size = 64
    config.eval.every_steps = 250
    config.eval.batches = 100
    config.checkpoint.every_steps = 250
    config.sample.every_steps = 1000
    config.sample.max_new_tokens = 500
    return config
