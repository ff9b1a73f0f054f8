"""GPT-2's smallest, 124 M parameters, context 1024, on GPT-2's own vocabulary.

Hardware: two T4s, or any GPU with 12 GB.
Time:     not measured. Predicted for two T4s (jgpt.plan): 39,000 tokens a second, so 7.4 hours for the 2000 steps here
          (1 B tokens).
Expect:   on web text a validation loss near 3.6 after 1 B tokens (predicted; GPT-2 itself has 3.1 on OpenWebText).
Command:  python -m jgpt.train --config configs/gpt2_124m.py --config.data.text_glob='texts/**/*.txt'
Offline:  --config.tokenizer.pretrained=DIR, a directory with GPT-2's tokenizer files.
"""

from ml_collections import ConfigDict

from jgpt.config import default_config


def get_config() -> ConfigDict:
    """Return the config: GPT-2 as published, trained with GPT-3's batch of half a million tokens."""
    config = default_config()
    config.out_dir = "runs/gpt2_124m"
    config.data.text_glob = "texts/**/*.txt"
    config.data.val_fraction = 0.01
    config.tokenizer.kind = "hf"
    config.tokenizer.pretrained = "gpt2"
    config.model.n_layers = 12
    config.model.n_heads = 12
    config.model.d_model = 768
    config.model.context_length = 1024
    config.model.position = "learned"
    config.model.norm = "layernorm"
    config.model.mlp = "gelu"
    config.model.bias = True
    config.optimizer.total_steps = 2000
    config.optimizer.warmup_steps = 200
    config.optimizer.learning_rate = 6e-4
    config.optimizer.min_learning_rate = 6e-5
    config.optimizer.beta2 = 0.95
    config.batch.global_batch_size = 512
    config.execution.micro_batch_size = 8
    config.eval.every_steps = 100
    config.eval.batches = 1
    config.checkpoint.every_steps = 500
    config.deadline_hours = 11.0
    return config
