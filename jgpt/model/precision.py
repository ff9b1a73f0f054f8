"""Which dtype holds what: one small policy object, and the rule that chooses it for a device.

In the data path: the model and the step ask it; nothing else decides a dtype.
"""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from jgpt.errors import UserError

DTYPES = {"fp32": jnp.float32, "fp16": jnp.float16, "bf16": jnp.bfloat16}


@dataclass(frozen=True)
class Policy:
    """Dtypes of the stored parameters, of the matrix products, and of what leaves the model (hidden states, logits).

    Whatever the policy, the residual stream, norms, softmax, loss and gradient sums are fp32.
    """

    param: Any = jnp.float32
    compute: Any = jnp.float32
    output: Any = jnp.float32

    @property
    def scales_loss(self) -> bool:
        """Tell whether gradients need loss scaling: only fp16's exponent is too short for them."""
        return self.compute == jnp.float16

    def cast_to_compute(self, params: Any) -> Any:
        """Copy the matrices of `params` to the compute dtype; vectors (norms, biases) stay as they are."""
        return jax.tree.map(lambda x: x.astype(self.compute) if x.ndim > 1 else x, params)


def choose_policy(compute: str, params: str, platform: str, compute_capability: tuple[int, int] | None) -> Policy:
    """Resolve `precision.compute` and `precision.params` for a device.

    `platform` is "cpu", "gpu" or "tpu"; `compute_capability` is (7, 5) for a T4, None where there is none. "auto" is
    fp32 on CPU, fp16 on GPUs below sm_80, bf16 above and on TPU. Raises UserError for bf16 below sm_80: XLA turns bf16
    matrix products there into fp32 ones, many times slower than fp16 (https://github.com/openxla/xla/issues/12429).

    >>> choose_policy("auto", "fp32", "gpu", (7, 5)).compute.__name__
    'float16'
    """
    before_ampere = compute_capability is not None and compute_capability < (8, 0)
    if compute == "auto":
        compute = "fp32" if platform == "cpu" else "fp16" if before_ampere else "bf16"
    if compute == "bf16" and before_ampere:
        major, minor = compute_capability or (0, 0)
        raise UserError(
            f"precision.compute='bf16' on a GPU of compute capability {major}.{minor} (a T4 is 7.5): it has no bf16"
            " units, and XLA would run every product in fp32, many times slower. Allowed here: 'auto', 'fp16', 'fp32'."
            " Take --config.precision.compute=auto (fp16 with loss scaling)."
        )
    return Policy(param=DTYPES[params], compute=DTYPES[compute])
