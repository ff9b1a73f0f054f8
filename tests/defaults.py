"""A config for tests: the defaults, unchanged."""

from jgpt.config import default_config as get_config

__all__ = ["get_config"]
