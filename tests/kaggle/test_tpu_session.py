"""One run that moves between Kaggle's two free machines: T4 x2 in fp16, the TPU v5e-8 in bf16, and back.

The sessions are those of a push, in folders that imitate Kaggle; CPU devices are the GPUs and the TPU's chips.
"""

import json
from pathlib import Path

import pytest
from fake_machine import NAME, OWNER, Machine, settings

from jgpt.kaggle.laptop.kernel import Kernel, write_folder

CONFIG = str(Path(__file__).parents[2] / "configs" / "kaggle_tpu.py")
AT_ONCE = 1e-6  # hours: over when the first step is done, however fast the machine is


@pytest.mark.slow
def test_a_run_moves_between_the_t4s_and_the_tpu(tmp_path, python_without_ml_collections, compiled_on_kaggle):
    def session(accelerator: str, compute: str, devices: int, before: Machine | None, deadline_hours: float) -> Machine:
        root = tmp_path / f"{accelerator}-{deadline_hours}-{before is None}"
        machine = Machine(root, python_without_ml_collections, compiled_on_kaggle, devices)
        if before is not None:
            machine.mount(before.root / "working")
        arguments = settings(
            precision__compute=compute, deadline_hours=deadline_hours, data__text_glob=root / "input" / "**" / "*.txt"
        )
        kernel = Kernel(
            f"{OWNER}/{NAME}", arguments=("--config", CONFIG, *arguments), config=CONFIG, accelerator=accelerator,
            datasets=(f"{OWNER}/texts",), kernels=(f"{OWNER}/{NAME}",) if before else (),
        )  # fmt: skip
        output = machine.run(write_folder(kernel, tmp_path / "folder"))
        assert f"sequences = devices {devices} x " in output and f"computing in {compute}" in output, output
        return machine

    def progress(machine: Machine) -> tuple[str, int]:
        return machine.status()["state"], machine.status()["step"]

    first = session("TpuV5E8", "bf16", 8, None, AT_ONCE)
    assert progress(first) == ("stopped", 1)
    second = session("NvidiaTeslaT4", "fp16", 2, first, AT_ONCE)
    assert progress(second) == ("stopped", 2)
    third = session("TpuV5E8", "bf16", 8, second, 0.0)
    assert progress(third) == ("finished", 6)
    lines = [json.loads(line) for line in (third.outputs / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(7)) and all("loss" in line for line in lines[1:])
    scales = {line["step"]: line["loss_scale"] for line in lines if line.get("loss_scale")}
    assert scales == {2: 32_768.0}  # fp16 begins with the first scale of all, and bf16 has none
