"""scripts/bench/gpu_check.sh, with a Python that plays its parts: one JSON of all, limits, the exit code."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "scripts" / "bench" / "gpu_check.sh"

# What a part does here: `train` fails, `flash` writes half of its JSON and waits to be cut off, the others succeed.
PART = """#!{python}
import os, sys, time
from pathlib import Path

if sys.argv[1] == "-":
    os.execv("{python}", ["{python}", *sys.argv[1:]])
name, target = Path(sys.argv[1]).stem, Path(sys.argv[sys.argv.index("--json") + 1])
print(name, "speaks")
if target.stem == "flash":
    target.write_text('{{"half')
    time.sleep(60)
if name == "train_gpu":
    sys.exit(3)
target.write_text('{{"ms": 5}}')
"""


def gpu_check(tmp_path: Path, seconds: int, *parts: str) -> subprocess.CompletedProcess[str]:
    player = tmp_path / "python"
    player.write_text(PART.format(python=sys.executable))
    player.chmod(0o755)
    environment = {**os.environ, "PYTHON": str(player), "SECONDS_ALLOWED": str(seconds)}
    command = ["bash", str(SCRIPT), str(tmp_path / "out"), *parts]
    return subprocess.run(command, capture_output=True, text=True, env=environment)


def found(tmp_path: Path) -> dict:
    return json.loads((tmp_path / "out" / "gpu_check.json").read_text())


def test_one_json_says_how_each_part_ended_and_what_it_found(tmp_path: Path):
    done = gpu_check(tmp_path, 100, "plan", "train", "sanitize", "resume")
    assert done.returncode == 1 and "train: failed (3)" in done.stdout
    parts = found(tmp_path)
    assert parts["plan"]["ended"].startswith("passed in ") and parts["plan"]["found"] == {"ms": 5}
    assert parts["train"]["ended"].startswith("failed (3)") and "train_gpu speaks" in parts["train"]["found"]["log"]
    for name in ("sanitize", "resume"):
        assert parts[name]["ended"].startswith("passed in ") and parts[name]["found"] == {"ms": 5}
    assert "jax" in parts["versions"] and "date" in parts


def test_what_comes_late_is_cut_off_or_left_out_and_named(tmp_path: Path):
    assert gpu_check(tmp_path, 6, "flash", "plan").returncode == 1
    parts = found(tmp_path)
    assert parts["flash"]["ended"].startswith("failed (124)") and "flash_check speaks" in parts["flash"]["found"]["log"]
    assert parts["plan"]["ended"] == "left out: no time"
    assert gpu_check(tmp_path, 100, "plan").returncode == 0  # what another call found is kept
    assert found(tmp_path)["plan"]["found"] == {"ms": 5} and "flash" in found(tmp_path)


@pytest.mark.parametrize("parts", [("flesh",), ("plan", "all")])
def test_an_unknown_part_is_refused_before_anything_runs(tmp_path: Path, parts: tuple[str, ...]):
    done = gpu_check(tmp_path, 100, *parts)
    assert done.returncode == 2 and f"no part {parts[-1]}: flash plan train" in done.stderr
    assert not (tmp_path / "out").exists()
