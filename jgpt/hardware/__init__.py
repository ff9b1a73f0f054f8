"""Beside the data path: the machine that the step runs on, what it can do, and whether all is well with it."""
