"""A modern GPT of 11 M parameters, with the best recipe that we measured. The place to start a config of your own.

Hardware: one GPU, or patience.
Time:     not measured; a step is 8,192 tokens, about 0.6 TFLOP.
Expect:   validation loss falling from ln(vocabulary) = 8.3; what it reaches depends on your text.
Command:  python -m jgpt.train --config configs/base.py --config.data.text_glob='texts/**/*.txt'
"""

from ml_collections import ConfigDict

from jgpt.config import default_config


def get_config() -> ConfigDict:
    """Return the config: Muon, QK-norm, and a rate that falls at the end alone, so that more steps can be added later.

    Every other key has its default: jgpt/config/defaults.py explains them, and --help.
    """
    config = default_config()
    config.model.qk_norm = True
    config.optimizer.kind = "muon"
    config.optimizer.schedule = "wsd"
    config.optimizer.learning_rate = 4e-3
    config.optimizer.min_learning_rate = 4e-4
    return config
