"""One 12-hour run on Kaggle's two T4s, on every .txt that you added as input: a modern GPT of 70 M parameters.

Hardware: two T4s (accelerator "GPU T4 x2"). One T4 or any newer GPU works also works; the batch stays the same.
Time:     not measured on a T4. Predicted (jgpt.plan): 56,000 tokens a second, so 6.5 hours for the 20,000 steps (1.3 B
          tokens). It saves and stops after 11 hours; the same command resumes it.
Expect:   depends on your text. With less than about 50 MB of it, fewer steps: watch where the validation loss turns up.
Command:  python -m jgpt.train --config configs/kaggle_t4.py
"""

from ml_collections import ConfigDict

from jgpt.config import default_config
from jgpt.kaggle.session.paths import input_dir, outputs_dir, scratch_dir


def get_config() -> ConfigDict:
    """Return the config: about 20 tokens a parameter in one session, in fp16 with loss scaling."""
    config = default_config()
    config.out_dir = str(outputs_dir())
    config.log_every_steps = 20
    config.data.text_glob = f"{input_dir()}/**/*.txt"  # what an earlier run wrote is left out
    config.data.cache_dir = f"{scratch_dir()}/jgpt/tokens"  # scratch: not counted against the 20 GB that are kept
    config.data.val_fraction = 0.01
    config.tokenizer.vocab_size = 16_384
    config.model.n_layers = 12
    config.model.n_heads = 10
    config.model.d_model = 640
    config.model.context_length = 1024
    config.model.qk_norm = True  # keeps attention scores small, which fp16 likes
    config.optimizer.kind = "muon"
    config.optimizer.schedule = "wsd"  # with a larger total_steps a later session goes on from before the decay
    config.optimizer.total_steps = 20_000
    config.optimizer.warmup_steps = 500
    config.optimizer.learning_rate = 2e-3
    config.optimizer.min_learning_rate = 2e-4
    config.optimizer.beta2 = 0.95
    config.batch.global_batch_size = 64
    config.execution.micro_batch_size = 8
    config.eval.every_steps = 500
    config.eval.batches = 8
    config.checkpoint.every_steps = 1000
    config.checkpoint.every_minutes = 30.0
    config.checkpoint.disk_gb = 19.5  # of the 20 GB that are kept of the working folder
    config.sample.every_steps = 2000
    return config
