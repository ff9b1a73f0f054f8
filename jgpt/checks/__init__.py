"""Is this machine fit to train on? What `jgpt.check_env` looks at."""
