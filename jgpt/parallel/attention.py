"""The form of attention of a run: what its config names, or what suits its devices and its model, as they share it.

In the data path: `build.py` asks before it builds the model. `model/attention/choose.py` knows the forms, and what one
device can run.
"""

import logging
from functools import cache

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from jgpt.errors import UserError
from jgpt.hardware.devices import compute_capability
from jgpt.model.attention.choose import choose_attention
from jgpt.model.precision import Policy
from jgpt.model.shapes import ModelConfig
from jgpt.parallel.devices import splits_model

log = logging.getLogger("jgpt")


def attention_of_run(
    config: ConfigDict, shared: ModelConfig, policy: Policy, devices: list[jax.Device], group: int
) -> str:
    """Return a form of `attend_causally`. `group` devices have the model `shared` together (1: each has all of it).

    Raises UserError where there is no such form.
    """
    wanted, split = config.execution.attention, splits_model(config)
    if split and wanted == "auto":
        return "chunked"  # the only form that was measured with the model split
    form = choose_attention(
        wanted,
        policy.compute,
        devices[0].platform,
        compute_capability(devices[0]),
        d_head=shared.d_head,
        deterministic=config.execution.deterministic,
    )
    if wanted == "flash" and split and (form != "flash" or shared.n_kv_heads % group):
        raise UserError(
            f"execution.attention='flash' with execution.parallel='tensor', {shared.n_kv_heads} key/value heads on"
            f" {group} devices in {jnp.dtype(policy.compute).name}: there is no fused attention for this. Allowed: fp16"
            " on GPUs, and heads that the devices divide. Take --config.execution.attention=auto."
        )
    if wanted == "flash" and config.model.dropout:
        _warn_once(
            f"execution.attention='flash' with model.dropout={config.model.dropout:g}: a fused kernel drops no weights"
            " of attention, so training takes 'chunked'. For the kernel, set --config.model.dropout=0."
        )
    return form


@cache
def _warn_once(message: str) -> None:
    """Warn, the first time: a search for the fastest step builds many."""
    log.warning("%s", message)
