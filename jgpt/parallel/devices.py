"""The devices of a run, and how they divide its batch.

In the data path: before the parts of a run are built; a plan asks the same of devices that are not here.
"""

from itertools import groupby

import jax
from ml_collections import ConfigDict

from jgpt.errors import UserError
from jgpt.hardware.devices import all_devices
from jgpt.parallel.rules import TENSOR, group_size

# By JAX's platform: the environment variable that leaves a process some of its devices, and how it leaves it one.
_VISIBLE = {"cpu": "JAX_NUM_CPU_DEVICES", "gpu": "CUDA_VISIBLE_DEVICES", "tpu": "TPU_VISIBLE_CHIPS"}
_ONE_DEVICE = {
    "cpu": "JAX_NUM_CPU_DEVICES=1",
    "gpu": "CUDA_VISIBLE_DEVICES=0",
    "tpu": "TPU_VISIBLE_CHIPS=0 TPU_CHIPS_PER_PROCESS_BOUNDS=1,1,1 TPU_PROCESS_BOUNDS=1,1,1",
}


def splits_model(config: ConfigDict) -> bool:
    """Tell whether devices share the model: they then work on the same sequences together."""
    return config.execution.parallel == "tensor"


def training_devices(config: ConfigDict) -> list[jax.Device]:
    """Choose the devices of a run, in all its processes: they share its batch, or split its model.

    All of them, but on CPU, where a device is a share of the same cores: there the largest number in each process so
    that all divide the batch. Raises UserError where the devices cannot share the batch equally.
    """
    devices = all_devices()
    each = [list(group) for _, group in groupby(devices, key=lambda device: device.process_index)]
    if len({len(own) for own in each}) > 1:
        raise UserError(
            f"the processes of this run have {', '.join(str(len(own)) for own in each)} devices. Allowed: the same"
            f" number in each. Start them on machines of one kind, or set {_VISIBLE[devices[0].platform]} to as many in"
            " each."
        )
    if devices[0].platform == "cpu" and not splits_model(config):
        size = config.batch.global_batch_size
        fitting = [n for n in range(1, len(each[0]) + 1) if size % (n * len(each)) == 0]
        if fitting:
            return [device for own in each for device in own[: fitting[-1]]]
    batch_shares(config, len(devices), f"use fewer devices ({_ONE_DEVICE[devices[0].platform]})")
    return devices


def batch_shares(config: ConfigDict, n_devices: int, fewer: str = "") -> int:
    """Return how many equal parts the global batch is divided into on so many devices. Raises UserError.

    One for each device; where devices split the model, one for each group that does. `fewer` says in the message how to
    take fewer devices.
    """
    size, shares, name = config.batch.global_batch_size, n_devices, "devices"
    if splits_model(config):
        shares, name = n_devices // group_size(config.execution.mesh, TENSOR, n_devices), "groups of devices"
    if size % shares:
        nearest = max(1, round(size / shares)) * shares
        raise UserError(
            f"batch.global_batch_size is {size}, and there are {shares} {name}. Each takes the same number of"
            f" sequences, so it must be a multiple of {shares}: set --config.batch.global_batch_size={nearest}"
            f"{', or ' if fewer else ''}{fewer}."
        )
    return shares


def micro_batch_sizes(global_batch_size: int, shares: int) -> list[int]:
    """List the micro-batches that one device's share of a batch can be cut into.

    >>> micro_batch_sizes(24, 2)
    [1, 2, 3, 4, 6, 12]
    """
    share = global_batch_size // shares
    return [n for n in range(1, share + 1) if share % n == 0]
