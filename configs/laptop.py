"""Your own text on a laptop: 1 M parameters, as many steps as 5 minutes hold, or fewer for a small text.

Hardware: 2 to 8 CPU cores.
Time:     5 minutes: the first steps are measured, and as many are taken as fit; less where the text was read 16 times
          before that. At 16,500 tokens a second (quickstart.py, measured on 2 cores of an AMD EPYC) 5 minutes are about
          2,000 steps, 4 M tokens.
Expect:   depends on your text, and was not measured on an idle machine. It must fall from ln(2048) = 7.6.
Command:  python -m jgpt.train --config configs/laptop.py --config.data.text_glob=texts
"""

from ml_collections import ConfigDict

from jgpt.config import default_config


def get_config() -> ConfigDict:
    """Return the config: the recipe of quickstart.py, for a text and a machine that it does not know."""
    config = default_config()
    config.out_dir = "runs/laptop"
    config.data.text_glob = "texts"
    config.tokenizer.vocab_size = 2048
    config.model.n_layers = 4
    config.model.n_heads = 4
    config.model.d_model = 128
    config.model.context_length = 128
    config.model.qk_norm = True
    config.optimizer.kind = "muon"
    config.optimizer.total_steps = 0
    config.optimizer.budget_hours = 5 / 60
    config.optimizer.budget_epochs = 16.0
    config.optimizer.warmup_steps = 20
    config.optimizer.learning_rate = 8e-3
    config.optimizer.muon_learning_rate = 8e-3
    config.optimizer.min_learning_rate = 8e-4
    config.batch.global_batch_size = 16
    config.execution.micro_batch_size = 2  # on a CPU small buffers are faster
    config.log_every_steps = 20
    config.eval.every_steps = 100
    config.checkpoint.every_steps = 200
    config.sample.every_steps = 400
    return config
