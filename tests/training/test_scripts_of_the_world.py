"""Names and texts in other scripts than Latin: what a run writes is read by people, and copied by them."""

import json
import os
import re
import shlex
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
from conftest import Command
from runs import status, stop_after

from jgpt.atomic_write import write_json
from jgpt.wording import json_text

STORY = "从前有座山，山里有座庙，庙里有个老和尚，给小和尚讲故事。讲的什么呢？\n"


@pytest.fixture
def chinese(tiny: list[str], tmp_path: Path) -> list[str]:
    """Return the arguments of a run in the directory 中文故事, trained on Chinese text."""
    (tmp_path / "文本").mkdir()
    (tmp_path / "文本" / "故事.txt").write_text(STORY * 40, encoding="utf-8")
    own = {"out_dir": tmp_path / "中文故事", "data.text_glob": tmp_path / "文本", "sample.prompt": "从前"}
    return [*tiny, *(f"--config.{key}={value}" for key, value in own.items())]


def copied_command(run_dir: Path) -> list[str]:
    """Return the words of the command that a person copies out of status.json, which knows no JSON."""
    text = (run_dir / "status.json").read_text(encoding="utf-8")
    (line,) = re.findall(r'"resume_command": "(.*)",', text)
    return shlex.split(line)


def test_a_run_with_a_chinese_name_goes_on_by_the_command_in_its_status(
    chinese: list[str], tmp_path: Path, command: Command
) -> None:
    run = tmp_path / "中文故事"
    with warnings.catch_warnings(), stop_after(2):
        warnings.simplefilter("error")  # of a title that no font can draw
        stopped = command("train", *chinese)
    assert stopped.code == 0 and "could not be written" not in stopped.out, stopped.out
    words = copied_command(run)
    assert words[:3] == ["python", "-m", "jgpt.train"] and f"--config.out_dir={run}" in words
    resumed = command("train", *words[3:])
    assert resumed.code == 0 and "resuming from step 2" in resumed.out, resumed.err
    assert status(run)["state"] == "finished"
    for name in ("status.json", "config.json", "samples.txt", "report.html"):
        text = (run / name).read_text(encoding="utf-8")
        assert re.search("从前|故事", text) and not re.search(r"\\u[0-9a-f]{4}", text), name


def test_its_command_works_in_the_locale_c(chinese: list[str], tmp_path: Path, command: Command) -> None:
    with stop_after(2):
        assert command("train", *chinese).code == 0
    words = copied_command(tmp_path / "中文故事")
    environment = {name: value for name, value in os.environ.items() if name not in ("LANG", "PYTHONUTF8")}
    environment |= {"LC_ALL": "C", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    resumed = subprocess.run([sys.executable, *words[1:]], env=environment, capture_output=True, timeout=300)
    assert resumed.returncode == 0, resumed.stderr.decode()
    assert f"finished: {tmp_path / '中文故事'}" in resumed.stdout.decode("utf-8")


def test_a_name_that_is_not_utf_8_comes_back(tmp_path: Path) -> None:
    value = {"resume_command": os.fsdecode(b"runs/\xff\xfe"), "reason": "中文 😀"}
    write_json(tmp_path / "a.json", value)
    text = (tmp_path / "a.json").read_text(encoding="utf-8")
    assert "中文 😀" in text and json.loads(text) == value


def test_a_terminal_that_lacks_a_character_gets_json_that_can_be_read() -> None:
    assert json_text({"a": "😀"}, "ascii", None) == r'{"a": "\ud83d\ude00"}'
    assert json_text({"a": "中"}, "gb18030", None) == '{"a": "中"}'
