"""The dtypes of a run: their names, and the rule that chooses them for a device.

In the data path: the model and the step read the policy; nothing else chooses a dtype.
"""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from jgpt.errors import UserError

DTYPES = {"fp32": jnp.float32, "fp16": jnp.float16, "bf16": jnp.bfloat16}  # by their names in configs and messages


def dtype_name(dtype: Any) -> str:
    """Return the name of a dtype that DTYPES has, given in any form that numpy understands.

    >>> dtype_name(jnp.float16), dtype_name("bfloat16")
    ('fp16', 'bf16')
    """
    return next(name for name, known in DTYPES.items() if jnp.dtype(known) == jnp.dtype(dtype))


@dataclass(frozen=True)
class Policy:
    """The dtypes that a run chooses.

    Under every policy the residual stream, norms, softmax, loss and gradient sums are fp32.
    """

    param: Any = jnp.float32  # of the stored parameters
    compute: Any = jnp.float32  # of the operands of matrix products
    activations: Any = None  # of what flows from product to product; None: as `compute`

    @property
    def scales_loss(self) -> bool:
        """Whether gradients need loss scaling: only those in fp16 do, whose exponent has 5 bits."""
        return self.compute == jnp.float16

    def cast_to_compute(self, params: Any) -> Any:
        """Return `params` with matrices in the compute dtype; vectors (norms, biases) keep theirs."""
        return jax.tree.map(lambda x: x.astype(self.compute) if x.ndim > 1 else x, params)


def choose_policy(compute: str, params: str, platform: str, compute_capability: tuple[int, int] | None) -> Policy:
    """Return the policy that `precision.compute` and `precision.params` mean on a device.

    `platform` is "cpu", "gpu" or "tpu"; `compute_capability` is (7, 5) for a T4, None where there is none. "auto" is
    fp32 on CPU, fp16 on GPUs below sm_80, bf16 above and on TPU. Raises UserError for bf16 below sm_80: XLA turns bf16
    matrix products there into fp32 ones, many times slower than fp16 (https://github.com/openxla/xla/issues/12429).
    Also for fp16 on a TPU, whose matrix unit has none.

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
    if compute == "fp16" and platform == "tpu":
        raise UserError(
            "precision.compute='fp16' on a TPU: its matrix unit multiplies bf16, and fp16 would only be converted."
            " bf16 has the range of fp32, and so needs no loss scaling. Allowed here: 'auto', 'bf16', 'fp32'. Take"
            " --config.precision.compute=auto (bf16). A run that computed in fp16 so far goes on with it."
        )
    # CPUs multiply bf16 (AVX-512 BF16, AMX), and do nothing else in it: XLA would convert each operand and result.
    activations = jnp.float32 if platform == "cpu" and compute == "bf16" else None
    return Policy(DTYPES[params], DTYPES[compute], activations)
