"""The defaults, unchanged: a modern GPT of 11 M parameters. The place to start a config of your own from.

Hardware: one GPU, or patience.
Time:     not measured; a step is 8,192 tokens, about 0.6 TFLOP.
Expect:   validation loss falling from ln(vocabulary) = 8.3; what it reaches depends on your text.
Command:  python -m jgpt.train --config configs/base.py --config.data.text_glob='texts/**/*.txt'
"""

from ml_collections import ConfigDict

from jgpt.config import default_config


def get_config() -> ConfigDict:
    """Return the config: every key is explained in jgpt/config/defaults.py, and in --help."""
    return default_config()
