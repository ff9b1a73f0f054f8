"""Keys and values of earlier versions: what they are called now.

Beside the data path: the command line, config files and the checks answer with it.
"""

KEYS = {
    "parallel": "execution.parallel",
    "remat": "execution.remat",
    "attention": "execution.attention",
    "loss_chunk_tokens": "execution.loss_chunk_tokens",
    "batch.micro_batch_size": "execution.micro_batch_size",
}
VALUES = {
    "execution.parallel": {"pmap": "data"},
    "execution.attention": {"kept": "chunked_vjp", "light": "chunked_vjp_recompute", "cudnn": "flash"},
}


def new_key(key: str) -> str:
    """Say where a key of an earlier version is now; "" where it never was one. The last part of its name is enough.

    >>> new_key("remat"), new_key("seed")
    ('config.remat is now config.execution.remat.', '')
    """
    for old, new in KEYS.items():
        if key in (old, old.split(".")[-1]):
            return f"config.{old} is now config.{new}."
    return ""


def new_value(key: str, value: object) -> str | None:
    """Return what a value of an earlier version is called now.

    >>> new_value("execution.attention", "kept")
    'chunked_vjp'
    """
    return VALUES[key].get(str(value)) if key in VALUES else None
