"""Sessions on an imitated Kaggle that end at random moments, one after another: none loses a whole checkpoint.

Not part of the suite, as it takes minutes and its moments are random; test_session.py has one such end. To run it:

    JGPT_ROUNDS=20 JGPT_SEED=1 python -m pytest -s tests/kaggle/test_interrupted.py

Each round is a session with the outputs of those before it mounted. It is ended by SIGTERM, by SIGKILL of everything
(the machine is taken away), by SIGKILL of the training process (out of memory), or by a disk that runs full, while it
starts, trains and saves, or packs. What it goes on from is compared with what this file finds by itself.
"""

import hashlib
import os
import random
import re
import shutil
import signal
import subprocess
import tarfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from fake_machine import NAME, OWNER, Machine, metrics_of, settings

from jgpt.kaggle.laptop.kernel import Kernel, write_folder

CONFIG = str(Path(__file__).parents[2] / "configs" / "kaggle_t4.py")
KINDS = ("SIGTERM", "SIGKILL", "out of memory", "full disk")
MOMENTS = {
    "starting": r"^\+ python -m jgpt\.train",
    "training": r"^step +\d+/",
    "packing": r"^\+ python -m jgpt\.kaggle\.session\.pack",
}
DISK_MB = 24

pytestmark = pytest.mark.skipif("JGPT_ROUNDS" not in os.environ, reason="takes minutes: set JGPT_ROUNDS")


@dataclass
class Checkpoint:
    """A checkpoint that agrees with its manifest, and the output that holds it."""

    step: int
    output: str


def whole_checkpoints(output: Path) -> list[Checkpoint]:
    """Read an output with nothing of jgpt: sha256 of all files of each step, packed or not, against its manifest."""
    found = []
    for manifest in output.glob("outputs/checkpoints/*.sha256"):
        step = manifest.with_suffix("")
        files = {str(p.relative_to(step.parent)): p.read_bytes() for p in step.rglob("*") if p.is_file()}
        found.append((int(step.name), files, manifest.read_text()))
    for path in output.glob("outputs/checkpoint-*.tar"):
        step = re.findall(r"\d+", path.name)[-1]
        with tarfile.open(path) as tar:
            files = {m.name: tar.extractfile(m).read() for m in tar.getmembers() if m.isfile()}  # type: ignore[union-attr]
        found.append((int(step), files, files.pop(f"{step}.sha256").decode()))
    return [
        Checkpoint(step, output.name)
        for step, files, manifest in found
        if manifest
        == "".join(f"{hashlib.sha256(files[name]).hexdigest()}  {name}\n" for name in sorted(files, key=Path))
    ]


@contextmanager
def small_disk(folder: Path) -> Iterator[bool]:
    """Mount a disk of its own on a folder, where that is allowed."""
    mount = ["mount", "-t", "tmpfs", "-o", f"size={DISK_MB}m", "tmpfs", str(folder)]
    mounted = subprocess.run(mount, capture_output=True).returncode == 0
    try:
        yield mounted
    finally:
        if mounted:
            subprocess.run(["umount", "-l", str(folder)], check=True)


def children(pid: int) -> list[int]:
    with suppress(OSError):
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    return []


def strike(kind: str, process: subprocess.Popen, working: Path) -> None:
    """End the session, as the kind has it."""
    if kind == "SIGTERM":
        process.send_signal(signal.SIGTERM)
    elif kind == "full disk":
        with suppress(OSError), (working / "filler").open("wb", buffering=0) as filler:
            while True:
                filler.write(bytes(4096))
    else:
        inner = children(process.pid)
        if kind == "SIGKILL":
            process.kill()
        for pid in inner:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


def interrupt(machine: Machine, script: Path, kind: str, moment: str, delay: float) -> str:
    """Run a session until `delay` seconds after its moment, and `kind` then; return what it printed."""
    lines: list[str] = []
    reached = threading.Event()
    with machine.start(script) as process:

        def read() -> None:
            assert process.stdout
            for line in process.stdout:
                lines.append(line)
                if re.match(MOMENTS[moment], line):
                    reached.set()
            reached.set()

        reader = threading.Thread(target=read)
        reader.start()
        if moment == "packing":  # it comes after the end of training
            while not any(re.match(MOMENTS["training"], line) for line in lines) and process.poll() is None:
                time.sleep(0.01)
            process.send_signal(signal.SIGTERM)
        assert reached.wait(300), "".join(lines)
        time.sleep(delay)
        strike(kind, process, machine.root / "working")
        reader.join(300)
        assert process.wait(60) == (-signal.SIGKILL if kind == "SIGKILL" else 0), "".join(lines)
    return "".join(lines)


def rounds(count: int, seed: int, disk: bool) -> Iterator[tuple[str, str, float]]:
    """Draw the kind and the moment of each round; each kind comes equally often."""
    draw = random.Random(seed)
    kinds = [kind for kind in KINDS if disk or kind != "full disk"]
    for n in range(count):
        moment = draw.choices(tuple(MOMENTS), (1, 3, 1))[0]
        longest = {"starting": 3.0, "training": 5.0, "packing": 0.4}[moment]
        kind = kinds[n % len(kinds)]
        yield kind, moment, draw.uniform(0, longest)


def test_no_end_of_a_session_loses_a_whole_checkpoint(tmp_path, python_without_ml_collections, compiled_on_kaggle):
    count, seed = int(os.environ.get("JGPT_ROUNDS", "4")), int(os.environ.get("JGPT_SEED", "0"))
    arguments = (
        "--config",
        CONFIG,
        *settings(optimizer__total_steps=100_000),
    )
    kernel = Kernel(f"{OWNER}/{NAME}", arguments=arguments, config=CONFIG, datasets=(f"{OWNER}/texts",))
    script = write_folder(kernel, tmp_path / "folder")
    outputs, whole, last_step = tmp_path / "kept", list[Checkpoint](), 0
    outputs.mkdir()
    (tmp_path / "probe").mkdir()
    with small_disk(tmp_path / "probe") as disk:
        pass
    plan = [*rounds(count, seed, disk), ("SIGTERM", "training", 0.5)]  # the last one shows what the one before it left
    for n, (kind, moment, delay) in enumerate(plan, 1):
        machine = Machine(tmp_path / f"session-{n}", python_without_ml_collections, compiled_on_kaggle)
        mounted = machine.root / "input" / "notebooks" / OWNER
        mounted.mkdir(parents=True)
        for output in outputs.iterdir():
            (mounted / output.name).symlink_to(output)
        expected = max((checkpoint.step for checkpoint in whole), default=0)
        with small_disk(machine.root / "working"):
            printed = interrupt(machine, script, kind, moment, delay)
            (machine.root / "working" / "filler").unlink(missing_ok=True)
            kept = outputs / f"output-{n}"
            shutil.copytree(machine.root / "working", kept)
        shutil.rmtree(machine.root)
        resumed = re.search(r"^resuming from step (\d+) of", printed, re.MULTILINE)
        began = re.search(r"^compiling the step$", printed, re.MULTILINE)
        if began:
            assert int(resumed[1] if resumed else 0) == expected, printed
        left = whole_checkpoints(kept)
        steps = [int(step) for step in re.findall(r"^step +(\d+)/", printed, re.MULTILINE)]
        reached, ended = max(steps, default=0), "went on" if began else "ended before"
        newest = max((checkpoint.step for checkpoint in left), default=None)
        print(
            f"{n:3} {moment:9} +{delay:4.2f} s  {kind:14} {ended:13} from step {expected:5}, reached {reached:5}, "
            f"newest whole left {newest}"
        )
        # Of a run that is seen to train, all that was whole is there or has a newer one in its place.
        if resumed or (began and newest):
            assert newest is not None and newest >= expected, printed
        whole += left
        last_step = max(last_step, reached)
    assert last_step > 0 and whole

    # Cut off so many times, it is the run that was never cut off.
    whole_machine = Machine(tmp_path / "uninterrupted", python_without_ml_collections, compiled_on_kaggle)
    newest = max(whole, key=lambda checkpoint: checkpoint.step)
    with whole_machine.start(write_folder(replace(kernel, kernels=()), tmp_path / "folder")) as process:
        assert process.stdout
        for line in process.stdout:
            if (found := re.match(r"step +(\d+)/", line)) and int(found[1]) > newest.step:
                process.send_signal(signal.SIGTERM)
    joined = Machine(tmp_path / "joined", python_without_ml_collections, compiled_on_kaggle)
    shutil.copytree(outputs / newest.output / "outputs", joined.outputs)
    metrics = [line for line in metrics_of(joined.outputs) if line["step"] <= newest.step]
    assert [line["step"] for line in metrics] == list(range(newest.step + 1))
    assert metrics == [line for line in metrics_of(whole_machine.outputs) if line["step"] <= newest.step]
