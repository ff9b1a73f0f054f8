"""Choose the devices that hold a model: one where it fits, else all of this machine, with a part on each.

In the data path: before decoding; the code that loads a model passes each parameter to `Placement.place`.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jgpt.errors import UserError
from jgpt.hardware.devices import chip_of, free_memory, local_devices
from jgpt.model.attention.chunked import chunk_size
from jgpt.model.columns import for_devices
from jgpt.model.parameters import abstract_stored
from jgpt.model.shapes import ModelConfig
from jgpt.parallel.rules import device_mesh, param_shardings, place, split_bytes
from jgpt.wording import GIB

log = logging.getLogger("jgpt")

# For what is not counted below: copies of weights in another layout, the sampler's arrays, fragmentation.
MARGIN = GIB // 2


@dataclass(frozen=True)
class Placement:
    """The devices that hold a model."""

    devices: tuple[jax.Device, ...]
    config: ModelConfig  # the model's, with its columns grouped for these devices

    def place(self, path: tuple[str, ...], array: np.ndarray) -> Array:
        """Put one parameter of the plain model on the devices; `path` is its keys, as ("wte", "embedding")."""
        if len(self.devices) == 1:
            return jax.device_put(array, self.devices[0])
        return place(path, array, self.config, device_mesh(self.devices))


class Need(NamedTuple):
    """The bytes that decoding takes on each device."""

    weights: int
    cache: int
    work: int  # temporary arrays

    def __str__(self) -> str:
        weights, cache, work = (f"{n / GIB:.1f} GiB" if n >= GIB / 10 else f"{n / 2**20:.0f} MiB" for n in self)
        return f"weights {weights} + cache {cache} + working memory {work}"


def choose_placement(
    shapes: ModelConfig, matrices: Any, context_length: int, rows: int, devices: str = "auto"
) -> Placement:
    """Choose the devices for a model, and log the memory that it takes on each of them; nothing is loaded yet.

    `matrices` is the dtype of the matrices and of the cache; vectors are fp32. `rows` texts of up to `context_length`
    tokens are decoded at a time. `devices` is "1", "2", "all" or "auto": one where the model fits on one, else all.

    Raises:
        UserError: there are not so many devices, or they cannot hold the model.
    """
    local = local_devices()
    numbers = {"auto": len(local), "all": len(local), "1": 1, "2": 2}
    if devices not in numbers or numbers[devices] > len(local):
        raise UserError(
            f"devices={devices}, and this machine has {len(local)} of the kind {local[0].device_kind}."
            " Allowed: auto, all, 1, and 2 where there are two. Take auto."
        )
    chosen = tuple(local[: numbers[devices]])
    if devices == "auto" and _fits(shapes, matrices, context_length, rows, chosen[:1]):
        chosen = chosen[:1]
    need, free, where = needed(shapes, matrices, context_length, rows, chosen), _free(chosen), _described(chosen)
    if free is None:
        log.info("memory: %s %s", need, where)
    elif sum(need) <= free:
        log.info("memory: %s %s, of %.1f GiB", need, where, free / GIB)
    else:
        lengths = (context_length >> halvings for halvings in range(1, context_length.bit_length()))
        fitting = next((n for n in lengths if _fits(shapes, matrices, n, rows, chosen)), None)
        shorter = f"a context of {fitting} tokens (--context_length={fitting}), " if fitting else ""
        more = "all devices (--devices=all), " if len(chosen) < len(local) else ""
        raise UserError(
            f"the model does not fit: with {rows} x {context_length} tokens it takes {need} {where}, and"
            f" {free / GIB:.1f} GiB are free. Allowed: what fits. Take {shorter}{more}a smaller model, or a machine"
            " with more or larger devices."
        )
    return Placement(chosen, for_devices(shapes, len(chosen)))


def needed(shapes: ModelConfig, matrices: Any, context_length: int, rows: int, devices: Sequence[jax.Device]) -> Need:
    """Return the bytes that each of the devices that share a model holds while it decodes."""
    n, itemsize = len(devices), jnp.dtype(matrices).itemsize
    shared = for_devices(shapes, n)
    parts = n if shared.n_kv_heads % n == 0 else 1  # of attention
    tokens = rows * context_length
    cache = 2 * shared.n_layers * tokens * shared.n_kv_heads // parts * shared.d_head * itemsize
    # The prefill of a whole context: three residual streams in fp32, and the larger of the scores of the last chunk of
    # queries (in fp32, and as weights) and three arrays of the MLP.
    scores = shared.n_heads // parts * chunk_size(context_length) * (4 + itemsize)
    work = tokens * (3 * 4 * shared.d_model + max(scores, 3 * itemsize * shared.d_ff // n)) + MARGIN
    return Need(_weights(shared, jnp.dtype(matrices), tuple(devices)), cache, work)


@cache
def _weights(shared: ModelConfig, matrices: Any, devices: tuple[jax.Device, ...]) -> int:
    params = abstract_stored(shared, matrices)
    return split_bytes(params, param_shardings(params, shared, device_mesh(devices)))


def _free(devices: Sequence[jax.Device]) -> int | None:
    """Return the free bytes of the fullest device; None where no device reports them."""
    known = [n_bytes for n_bytes in map(free_memory, devices) if n_bytes is not None]
    return min(known) if known else None


def _fits(shapes: ModelConfig, matrices: Any, context_length: int, rows: int, devices: Sequence[jax.Device]) -> bool:
    free = _free(devices)
    return free is None or sum(needed(shapes, matrices, context_length, rows, devices)) <= free


def _described(devices: Sequence[jax.Device]) -> str:
    name = chip_of(devices[0]).name
    return f"on one {name}" if len(devices) == 1 else f"on each of {len(devices)} {name}s"
