"""The configuration: every key with its value, its range and its reason."""

from jgpt.config.check import check, problems
from jgpt.config.defaults import default_config, flatten, standard_library_glob

__all__ = ["check", "default_config", "flatten", "problems", "standard_library_glob"]
