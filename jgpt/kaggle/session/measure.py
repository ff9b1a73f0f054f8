"""Measure the devices for the doctor, each part in its own process: NCCL reads its variables once in a process.

Beside the data path: `doctor.py` runs `python -m jgpt.kaggle.session.measure PART SECONDS`, and reads the last line
that it prints, which is JSON.
"""

import json
import statistics
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict

from jgpt.config.defaults import default_config
from jgpt.hardware import speed
from jgpt.hardware.devices import chip_of, local_devices
from jgpt.hardware.process import set_up_process
from jgpt.model.parameters import flops_per_token
from jgpt.model.precision import DTYPES
from jgpt.model.shapes import model_config
from jgpt.run_dir.identity import read_config
from jgpt.training import start

MIB = 2**20


def devices(seconds: float) -> list[dict[str, Any]]:
    """Describe the devices that JAX sees."""
    descriptions = []
    for device in local_devices():
        limit = (device.memory_stats() or {}).get("bytes_limit")
        capability = chip_of(device).compute_capability
        descriptions.append({"kind": device.device_kind, "compute_capability": capability, "bytes_for_jax": limit})
    return descriptions


def all_reduce(seconds: float) -> dict[str, Any]:
    """Sum buffers of several sizes (fp32, MiB) over all devices: bus bandwidth in GB/s; are the sums correct?"""
    local = local_devices()
    if len(local) < 2:
        return {"devices": len(local)}
    sizes = (1, 4) if local[0].platform == "cpu" else (1, 32, 512)  # 512 MiB: the gradient of GPT-2 124M in fp32
    measured = {size: speed.all_reduce_bandwidth(local, size * MIB, seconds / len(sizes)) for size in sizes}
    return {
        "devices": len(local),
        "correct": all(correct for _, correct in measured.values()),
        "gb_per_second_by_mib": {str(size): rate / 1e9 for size, (rate, _) in measured.items()},
    }


def matmul(seconds: float) -> dict[str, Any]:
    """Multiply matrices for `seconds` in all: each device alone and all together, in fp16 and in fp32, in FLOP/s.

    A TPU multiplies bf16 instead of fp16. Compare with "fp16_first_second": heat and the power limit slow a GPU down
    later.
    """
    local = local_devices()
    size = 512 if local[0].platform == "cpu" else 8192
    measured: dict[str, Any] = {"size": size}
    for name, share in ((half_precision(), 1 / 3), ("fp32", 1 / 6)):
        alone = together = seconds * share  # the devices share the first

        def flops(device: jax.Device, for_seconds: float, dtype: Any = DTYPES[name]) -> float:
            return speed.matmul_flops(device, dtype, size, for_seconds)

        measured[f"{name}_first_second"] = flops(local[0], min(1.0, alone / 4))
        measured[f"{name}_alone"] = [flops(device, alone / len(local)) for device in local]
        with ThreadPoolExecutor(len(local)) as pool:
            measured[f"{name}_together"] = list(pool.map(flops, local, [together] * len(local)))
    return measured


def half_precision() -> str:
    """Return the 16-bit format of the machine's matrix products: fp16, on a TPU bf16."""
    return "bf16" if local_devices()[0].platform == "tpu" else "fp16"


def memory(seconds: float) -> list[float]:
    """Copy memory on each device: GB/s, the bytes read plus the bytes written."""
    local = local_devices()
    n_bytes = (64 if local[0].platform == "cpu" else 1024) * MIB
    return [speed.copy_bandwidth(device, n_bytes, seconds / len(local)) / 1e9 for device in local]


def training(seconds: float) -> dict[str, Any]:
    """Train a small GPT for some steps, as `jgpt.train` does: tokens and FLOP per second, and the seconds in all."""
    on_cpu = local_devices()[0].platform == "cpu"
    with tempfile.TemporaryDirectory() as folder:
        config = _small_gpt(folder, on_cpu)
        began = time.monotonic()
        start.train(config)
        took = time.monotonic() - began
        lines = [json.loads(line) for line in (Path(folder) / "run" / "metrics.jsonl").read_text().splitlines()]
        rates = [line["tokens_per_second"] for line in lines if line.get("tokens_per_second")]
        saved = read_config(Path(folder) / "run")
        n_ids = json.loads((Path(folder) / "tokens" / "meta.json").read_text())["vocab_size"]
    rate = statistics.median(rates[len(rates) // 2 :])
    return {
        "tokens_per_second": rate,
        "flops": rate * flops_per_token(model_config(saved.model, n_ids)),
        "compute": "fp32" if on_cpu else half_precision(),
        "steps": config.optimizer.total_steps,
        "seconds_in_all": took,
    }


def _small_gpt(folder: str, on_cpu: bool) -> ConfigDict:
    """Return a config with GPT-2's shapes and a small vocabulary; on a CPU a much smaller one."""
    config = default_config()
    config.out_dir, config.data.cache_dir = f"{folder}/run", f"{folder}/tokens"
    config.log_every_steps = 1
    config.optimizer.total_steps, config.optimizer.warmup_steps = 12, 2
    config.eval.batches, config.sample.num_samples = 1, 0
    if on_cpu:
        config.data.text_glob, config.tokenizer.kind = config.data.text_glob.split(",")[-1], "char"
        config.model.update({"n_layers": 2, "n_heads": 2, "d_model": 64, "context_length": 64})
        config.batch.global_batch_size, config.execution.micro_batch_size = 8, 4
    else:
        config.precision.compute = half_precision()
        config.model.update({"n_layers": 12, "n_heads": 12, "d_model": 768, "context_length": 1024})
        config.batch.global_batch_size, config.execution.micro_batch_size = 32, 4
    return config


PARTS = {part.__name__: part for part in (devices, all_reduce, matmul, memory, training)}

if __name__ == "__main__":
    set_up_process()
    result = PARTS[sys.argv[1]](float(sys.argv[2]))
    print(json.dumps(result), flush=True)
