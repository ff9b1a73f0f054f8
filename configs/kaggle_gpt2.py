"""GPT-2 grade in one free session: 124 M parameters on web text, with GPT-2's vocabulary, on Kaggle's two T4s.

Hardware: two T4s (accelerator "GPU T4 x2"). It runs on any GPU with 12 GB: the hours decide the steps.
Data:     add a dataset with .parquet files of FineWeb-Edu (two of its 2 GB files are enough for one session), or set
          --config.data.text_glob to your own text. Give it 1 B tokens or more.
Offline:  add a dataset with GPT-2's tokenizer files, and set --config.tokenizer.pretrained to its directory.
Time:     11 hours; the steps that fit are measured at the start (total_steps=auto). Predicted (jgpt.plan), not measured
          on a T4: 36,500 tokens a second, 1.4 B tokens, 8.3 of 13.4 GiB on each card.
Expect:   not measured. Others report a loss of 3.28 on FineWeb after 0.7 to 0.9 B tokens with Muon and such a block, on
          one card of another kind (modded-nanogpt's class), where GPT-2's own recipe takes 10 B tokens.
Command:  python -m jgpt.train --config configs/kaggle_gpt2.py
"""

from ml_collections import ConfigDict

from jgpt.config import default_config
from jgpt.kaggle.session.paths import input_dir, outputs_dir, scratch_dir


def get_config() -> ConfigDict:
    """Return the config: a modern block in GPT-2's smallest size, Muon, and a rate that falls in the last 40%."""
    config = default_config()
    config.out_dir = str(outputs_dir())
    config.log_every_steps = 20
    config.data.text_glob = f"{input_dir()}/**/*.parquet"
    config.data.cache_dir = f"{scratch_dir()}/jgpt/tokens"  # scratch: not counted against the 20 GB that are kept
    config.data.val_fraction = 0.005
    config.tokenizer.kind = "hf"
    config.tokenizer.pretrained = "gpt2"
    config.model.n_layers = 12
    config.model.n_heads = 12
    config.model.d_model = 768
    config.model.context_length = 1024
    config.model.qk_norm = True  # keeps attention scores small, which fp16 likes
    config.optimizer.kind = "muon"
    config.optimizer.schedule = "wsd"
    config.optimizer.total_steps = 0  # auto
    config.optimizer.budget_hours = 11.0
    config.optimizer.warmup_steps = 250
    config.optimizer.learning_rate = 2e-3
    config.optimizer.min_learning_rate = 2e-4
    config.optimizer.beta2 = 0.95
    config.batch.global_batch_size = 128
    config.execution.micro_batch_size = 8
    config.eval.every_steps = 500
    config.eval.batches = 8
    config.checkpoint.every_steps = 1000
    config.checkpoint.every_minutes = 30.0
    config.checkpoint.disk_gb = 19.5  # of the 20 GB that are kept of the working folder
    config.sample.every_steps = 2000
    return config
