"""An imitation of Kaggle's machine for tests: its folders, its environment, and a Python that lacks ml_collections."""

import json
import os
import subprocess
import sysconfig
import venv
from pathlib import Path
from typing import Any

# What depends on neither the clock nor the machine: the same, to the last bit, in an uninterrupted run.
OF_THE_RUN = ("step", "tokens", "loss", "val_loss", "bits_per_byte", "grad_norm", "learning_rate", "loss_scale")
OWNER, NAME = "me", "my-run"
TEXT = "".join(f"{i} and {i * 7919 % 1000} make {i + i * 7919 % 1000}, so they say.\n" for i in range(200))


def settings(**changes: Any) -> tuple[str, ...]:
    """Return the overrides of a run that takes a second; its dropout needs the right random numbers."""
    small = {
        "log_every_steps": 1, "data.val_fraction": 0.1, "tokenizer.kind": "bpe", "tokenizer.vocab_size": 300,
        "model.n_layers": 1, "model.n_heads": 2, "model.d_model": 16, "model.context_length": 16, "model.dropout": 0.1,
        "optimizer.total_steps": 6, "optimizer.warmup_steps": 2, "batch.global_batch_size": 8,
        "execution.micro_batch_size": 2, "eval.every_steps": 3, "eval.batches": 1, "sample.num_samples": 0,
        "checkpoint.every_steps": 3, "deadline_hours": 0.0,
    }  # fmt: skip
    changed = {name.replace("__", "."): value for name, value in changes.items()}
    return tuple(f"--config.{key}={value}" for key, value in (small | changed).items())


def python_without(packages: tuple[str, ...], folder: Path) -> Path:
    """Make a virtual environment that has all packages of this one but some; return its Python."""
    venv.create(folder, symlinks=True, with_pip=False)
    own = Path(sysconfig.get_path("purelib", vars={"base": str(folder)}))
    for source in sysconfig.get_path("purelib"), sysconfig.get_path("platlib"):
        for path in Path(source).iterdir():
            if not any(package in path.name for package in packages) and not (own / path.name).exists():
                (own / path.name).symlink_to(path)
    python = folder / "bin" / "python"
    for package in packages:
        assert subprocess.run([python, "-I", "-c", f"import {package}"], capture_output=True).returncode == 1
    return python


class Machine:
    """One session: an empty working folder below `root`, and what is mounted; so many CPU devices are its GPUs."""

    def __init__(self, root: Path, python: Path, compiled: Path, devices: int = 2) -> None:
        self.root, self.python, self.compiled, self.devices = root, python, compiled, devices
        self.outputs = root / "working" / "outputs"
        (root / "working").mkdir(parents=True)
        (root / "temp").mkdir()
        self.text = root / "input" / "datasets" / OWNER / "texts" / "numbers.txt"
        self.text.parent.mkdir(parents=True)
        self.text.write_text(TEXT)

    def mount(self, output: Path) -> Path:
        """Mount the output of an earlier session as Kaggle does, and make the input read-only."""
        place = self.root / "input" / "notebooks" / OWNER / NAME
        place.parent.mkdir(parents=True)
        output.rename(place)
        return place

    def environment(self) -> dict[str, str]:
        """Return what a session's process has: no settings of this one, no way to a network."""
        return {
            "PATH": os.environ["PATH"], "HOME": str(self.root), "TMPDIR": str(self.root / "temp"),
            "KAGGLE_KERNEL_RUN_TYPE": "Batch", "JGPT_KAGGLE_ROOT": str(self.root), "JAX_PLATFORMS": "cpu",
            "XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={self.devices}",
            "JAX_COMPILATION_CACHE_DIR": str(self.compiled), "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0", "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
            "http_proxy": "http://127.0.0.1:9", "https_proxy": "http://127.0.0.1:9",
        }  # fmt: skip

    def start(self, script: Path, **options: Any) -> subprocess.Popen[str]:
        """Start the script as a cell is run: no __file__, no arguments."""
        cell = "import sys; source = open(sys.argv.pop()).read(); exec(compile(source, '<cell>', 'exec'), {})"
        return subprocess.Popen(
            [str(self.python), "-c", cell, str(script)], cwd=self.root / "working", env=self.environment(), text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, **options,
        )  # fmt: skip

    def run(self, script: Path, **options: Any) -> str:
        """Run the script to its end, which must be 0, and return what it printed."""
        process = self.start(script, **options)
        output, _ = process.communicate(timeout=300)
        assert process.returncode == 0, output
        return output

    def status(self) -> dict[str, Any]:
        """Return what status.json says."""
        return json.loads((self.outputs / "status.json").read_text())


def metrics_of(run_dir: Path) -> list[dict[str, Any]]:
    """Return the lines of metrics.jsonl, without what depends on the clock."""
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [{key: line[key] for key in OF_THE_RUN if key in line} for line in lines]
