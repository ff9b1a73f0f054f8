"""The run directory: its layout, its checkpoints, its files."""
