"""How a step runs on devices: replicated or sharded."""
