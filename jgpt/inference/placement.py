"""Where a model goes: onto one device where it fits, else onto all of this machine's, a part on each.

In the data path: before decoding; whatever loads the model hands each parameter to `Placement.place`.
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
from jgpt.hardware.devices import describe, free_memory
from jgpt.model.attention.chunked import chunk_size
from jgpt.model.columns import for_devices
from jgpt.model.parameters import abstract_stored
from jgpt.model.shapes import ModelConfig
from jgpt.parallel.rules import device_mesh, param_shardings, place, split_bytes
from jgpt.wording import GIB

log = logging.getLogger("jgpt")

# What no formula here counts: weights that XLA lays out anew beside the old, the sampler's arrays, fragmentation.
MARGIN = GIB // 2


@dataclass(frozen=True)
class Placement:
    """The devices that hold a model, and `config`, the model as they share it."""

    devices: tuple[jax.Device, ...]
    config: ModelConfig

    def place(self, path: tuple[str, ...], array: np.ndarray) -> Array:
        """Put one parameter of the plain model where it belongs; `path` is its keys, as ("wte", "embedding")."""
        if len(self.devices) == 1:
            return jax.device_put(array, self.devices[0])
        return place(path, array, self.config, device_mesh(self.devices))


class Need(NamedTuple):
    """The bytes that decoding takes on each device."""

    weights: int
    cache: int
    work: int  # arrays that come and go

    def __str__(self) -> str:
        weights, cache, work = (f"{n / GIB:.1f} GiB" if n >= GIB / 10 else f"{n / 2**20:.0f} MiB" for n in self)
        return f"weights {weights} + cache {cache} + working memory {work}"


def choose_placement(
    shapes: ModelConfig, matrices: Any, context_length: int, rows: int, devices: str = "auto"
) -> Placement:
    """Choose the devices for a model, and log what it takes on each of them, before anything is loaded.

    `matrices` is the dtype of the matrices and of the cache; vectors are fp32. `rows` texts of up to `context_length`
    tokens are decoded at a time. `devices` is "1", "2", "all", or "auto": one if it all fits there, else all.

    Raises:
        UserError: there are not so many devices, or they cannot hold the model.
    """
    local = jax.local_devices()
    numbers = {"auto": len(local), "all": len(local), "1": 1, "2": 2}
    if devices not in numbers or numbers[devices] > len(local):
        raise UserError(
            f"devices={devices}, and this machine has {len(local)} of the kind {local[0].device_kind}."
            " Allowed: auto, all, 1, and 2 where there are two. Take auto."
        )
    chosen = tuple(local[: numbers[devices]])
    if devices == "auto" and _fits(shapes, matrices, context_length, rows, chosen[:1]):
        chosen = chosen[:1]
    need, room, where = needed(shapes, matrices, context_length, rows, chosen), _room(chosen), _described(chosen)
    if room is None:
        log.info("memory: %s %s", need, where)
    elif sum(need) <= room:
        log.info("memory: %s %s, of %.1f GiB", need, where, room / GIB)
    else:
        lengths = (context_length >> halvings for halvings in range(1, context_length.bit_length()))
        fitting = next((n for n in lengths if _fits(shapes, matrices, n, rows, chosen)), None)
        shorter = f"a context of {fitting} tokens (--context_length={fitting}), " if fitting else ""
        more = "all devices (--devices=all), " if len(chosen) < len(local) else ""
        raise UserError(
            f"the model does not fit: with {rows} x {context_length} tokens it takes {need} {where}, and"
            f" {room / GIB:.1f} GiB are free. Allowed: what fits. Take {shorter}{more}a smaller model, or a machine"
            " with more or larger devices."
        )
    return Placement(chosen, for_devices(shapes, len(chosen)))


def needed(shapes: ModelConfig, matrices: Any, context_length: int, rows: int, devices: Sequence[jax.Device]) -> Need:
    """Return the bytes that each of the devices that share a model holds while it decodes."""
    n, itemsize = len(devices), jnp.dtype(matrices).itemsize
    shared = for_devices(shapes, n)
    parts = n if shared.n_kv_heads % n == 0 else 1  # of attention
    tokens = rows * context_length
    kept = 2 * shared.n_layers * tokens * shared.n_kv_heads // parts * shared.d_head * itemsize
    # The prefill of a whole context: two or three residual streams, and the larger of the last piece's scores, in fp32
    # and as weights, and the MLP's three arrays.
    scores = shared.n_heads // parts * chunk_size(context_length) * (4 + itemsize)
    work = tokens * (3 * 4 * shared.d_model + max(scores, 3 * itemsize * shared.d_ff // n)) + MARGIN
    return Need(_weights(shared, jnp.dtype(matrices), tuple(devices)), kept, work)


@cache
def _weights(shared: ModelConfig, matrices: Any, devices: tuple[jax.Device, ...]) -> int:
    params = abstract_stored(shared, matrices)
    return split_bytes(params, param_shardings(params, shared, device_mesh(devices)))


def _room(devices: Sequence[jax.Device]) -> int | None:
    free = [free_memory(device) for device in devices]
    known = [bytes for bytes in free if bytes is not None]
    return min(known) if known else None


def _fits(shapes: ModelConfig, matrices: Any, context_length: int, rows: int, devices: Sequence[jax.Device]) -> bool:
    room = _room(devices)
    return room is None or sum(needed(shapes, matrices, context_length, rows, devices)) <= room


def _described(devices: Sequence[jax.Device]) -> str:
    name = describe(devices[0]).name
    return f"on one {name}" if len(devices) == 1 else f"on each of {len(devices)} {name}s"
