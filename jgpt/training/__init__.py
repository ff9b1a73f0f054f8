"""The training run: optimizer, the one pmap'd step, checkpoints, the loop and what it reports."""
