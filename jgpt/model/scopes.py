"""The names of JAX scopes in a training step, and the part of the step that each belongs to.

Beside the data path: a prediction adds up by them what the ops of a compiled step cost. The names are those of the
modules in `block.py` and of the scopes in `loss.py` and `step/train_step.py`. A norm belongs to what it feeds.
"""

SCOPES = {
    "attn": "attention",
    "attn_norm": "attention",
    "mlp": "mlp",
    "mlp_norm": "mlp",
    "loss": "loss",
    "accumulate": "optimizer",
    "optimizer": "optimizer",
}
