"""GPT-2 grade in an hour of the other free machine: 124 M parameters on web text, on Kaggle's TPU v5e-8.

Hardware: a TPU v5e of 8 chips (accelerator "TPU v5e-8", in a push TpuV5E8). It runs on any GPU with 16 GB as well.
Data:     add a dataset with .parquet files of FineWeb-Edu (four of its 2 GB files), or set --config.data.text_glob to
          your own text. Give it 2.6 B tokens; with fewer it repeats them.
Offline:  add a dataset with GPT-2's tokenizer files, and set --config.tokenizer.pretrained to its directory.
Time:     not measured: jgpt has not run on a TPU yet. Predicted from the compiled step at the data sheet's rates, a
          bound: 591 ms a step, 887,000 tokens a second, so 50 minutes; 7.6 of 15.75 GiB on each chip.
Expect:   not measured.
Command:  python -m jgpt.train --config configs/kaggle_tpu.py
"""

from ml_collections import ConfigDict

from jgpt.config import default_config
from jgpt.kaggle.session.paths import input_dir, outputs_dir, scratch_dir


def get_config() -> ConfigDict:
    """Return the config: that of kaggle_gpt2, with sizes that fill a TPU's matrix unit of 128 x 128."""
    config = default_config()
    config.out_dir = str(outputs_dir())
    config.log_every_steps = 20
    config.data.text_glob = f"{input_dir()}/**/*.parquet"
    config.data.cache_dir = f"{scratch_dir()}/jgpt/tokens"  # scratch: not counted against the 20 GB that are kept
    config.data.val_fraction = 0.005
    config.tokenizer.kind = "hf"
    config.tokenizer.pretrained = "gpt2"
    config.model.n_layers = 12
    config.model.n_heads = 6  # of 128, not 12 of 64: the matrix unit takes 128 at a time
    config.model.d_model = 768
    config.model.context_length = 1024
    config.model.vocab_multiple_of = 128
    config.model.qk_norm = True
    config.optimizer.kind = "muon"
    config.optimizer.schedule = "wsd"
    config.optimizer.total_steps = 5000
    config.optimizer.warmup_steps = 250
    config.optimizer.learning_rate = 2e-3
    config.optimizer.min_learning_rate = 2e-4
    config.optimizer.beta2 = 0.95
    config.batch.global_batch_size = 512  # half a million tokens: 8 chips x 8 micro-batches x 8
    config.execution.micro_batch_size = 8
    config.eval.every_steps = 250
    config.eval.batches = 2
    config.checkpoint.every_steps = 1000
    config.checkpoint.every_minutes = 30.0
    config.checkpoint.disk_gb = 19.5  # of the 20 GB that are kept of the working folder
    config.sample.every_steps = 1000
    return config
