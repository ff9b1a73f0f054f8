"""The training run: from a config to a trained run directory, step after step."""
