"""Convert a tensor to another dtype; a value that fp16 cannot hold is an error, not an infinity.

Beside the data path: whatever reads or writes weights of others calls it.
"""

from typing import Any

import jax.numpy as jnp
import numpy as np

from jgpt.errors import UserError

RESTORE = "Download it again, or restore the file."


def cast(array: np.ndarray, dtype: Any, name: str) -> np.ndarray:
    """Return an array in `dtype`; raise UserError for a value that fp16 cannot hold, with the tensor's `name`."""
    if array.dtype == dtype:
        return array
    with np.errstate(over="ignore"):
        converted = array.astype(dtype)
    if dtype == jnp.float16 and not np.all(np.isfinite(converted)):
        largest = np.max(np.abs(array.astype(np.float32)))
        if not np.isfinite(largest):
            raise UserError(f"{name} holds {largest}. Allowed: finite numbers. {RESTORE}")
        raise UserError(
            f"{name} does not fit in fp16: its largest value is {largest:g}. Allowed in fp16: up to 65504. Take bf16 on"
            " a TPU, or a GPU of compute capability 8.0 or above, else fp32."
        )
    return converted
