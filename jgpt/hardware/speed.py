"""How fast the devices multiply matrices, move memory and sum over each other: measured, in a second or two.

Beside the data path: these numbers bound the step; `jgpt.check_env` prints them.
"""

import time
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec


def matmul_flops(device: jax.Device, dtype: jax.typing.DTypeLike, size: int, seconds: float) -> float:
    """Measure a product of two [size, size] matrices of `dtype` on the device, for about so many `seconds`: FLOP/s."""
    key = jax.random.key(0)
    a, b = (jax.device_put(jax.random.normal(k, (size, size), dtype), device) for k in jax.random.split(key))
    matmul = jax.jit(jnp.matmul)
    return 2 * size**3 / _seconds_per_call(lambda: matmul(a, b), seconds)


def copy_bandwidth(device: jax.Device, n_bytes: int, seconds: float) -> float:
    """Measure how fast the device reads and writes its memory, with a buffer of `n_bytes` (fp32): bytes a second."""
    x = jax.device_put(jnp.zeros(n_bytes // 4, jnp.float32), device)
    add = jax.jit(lambda x: x + 1)
    return 2 * n_bytes / _seconds_per_call(lambda: add(x), seconds)


def all_reduce_bandwidth(devices: Sequence[jax.Device], n_bytes: int, seconds: float) -> tuple[float, bool]:
    """Sum a buffer of `n_bytes` (fp32) on each device over all of them, for about so many `seconds`.

    Returns the bus bandwidth in bytes a second, as NCCL's tests define it (2 (n - 1) / n times the buffer over the
    time, so that the number does not depend on the count n of devices), and whether the sums were right.
    """
    n = len(devices)
    mesh = Mesh(np.array(devices), ("devices",))
    rows = np.arange(1, n + 1, dtype=np.float32)[:, None] + np.arange(n_bytes // 4, dtype=np.float32) % 1024
    x = jax.device_put(rows, NamedSharding(mesh, PartitionSpec("devices")))  # a row on each device
    all_reduce = jax.jit(lambda x: x.sum(axis=0), out_shardings=NamedSharding(mesh, PartitionSpec()))
    copies = [np.asarray(shard.data) for shard in all_reduce(x).addressable_shards]
    correct = len(copies) == n and all(np.array_equal(copy, rows.sum(axis=0)) for copy in copies)
    return 2 * (n - 1) / n * n_bytes / _seconds_per_call(lambda: all_reduce(x), seconds), correct


def _seconds_per_call(call: Callable[[], jax.Array], seconds: float) -> float:
    """Time a call in a loop of about so many `seconds`, after one call that compiles."""
    call().block_until_ready()
    n_calls, elapsed, start = 0, 0.0, time.perf_counter()
    while elapsed < seconds:
        # One at a time: of two all-reduces in flight, each can hold threads that the other waits for. XLA's CPU client
        # then hangs, and ends the process after a while.
        call().block_until_ready()
        n_calls, elapsed = n_calls + 1, time.perf_counter() - start
    return elapsed / n_calls
