"""What runs first on Kaggle: a child with its output passed on, signals with it, and an end that is always written."""

import base64
import io
import json
import lzma
import os
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest

from jgpt.kaggle.session import bootstrap

STATUS_KEYS = ["state", "step", "total_steps", "reason", "resume_command", "time", "pid"]


def archive(code: str) -> str:
    """Pack a project with one module, `tiny`."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        member = tarfile.TarInfo("tiny.py")
        member.size = len(code.encode())
        tar.addfile(member, io.BytesIO(code.encode()))
    return base64.b85encode(lzma.compress(buffer.getvalue())).decode()


def start(code: str, *arguments: str, trains: bool = False, internet: bool = False) -> None:
    bootstrap.start(
        archive(code),
        "tiny",
        list(arguments),
        inputs=["datasets me/a"],
        accelerator="TpuV5E8",
        internet=internet,
        trains=trains,
    )


@pytest.fixture
def outputs(tmp_path, monkeypatch):
    monkeypatch.setenv("JGPT_KAGGLE_ROOT", str(tmp_path))
    for name in ("JAX_COMPILATION_CACHE_DIR", "HF_HOME", "HF_HUB_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path / "working" / "outputs"


def status(outputs: Path) -> dict:
    return json.loads((outputs / "status.json").read_text())


WRITES_STATUS = """
import json, os, pathlib, sys
out = pathlib.Path(os.environ["JGPT_KAGGLE_ROOT"], "working", "outputs")
out.mkdir(parents=True, exist_ok=True)
def write(state, pid=os.getpid()):
    record = {"state": state, "step": 7, "total_steps": 9, "reason": "its own", "resume_command": "again"}
    (out / "status.json").write_text(json.dumps(record | {"time": "", "pid": pid}))
"""


def test_it_needs_the_standard_library_alone():
    code = f"import sys; sys.modules['jgpt'] = None; exec(open({bootstrap.__file__!r}).read(), {{}})"
    found = subprocess.run([sys.executable, "-I", "-S", "-c", code], capture_output=True, text=True)
    assert found.returncode == 0, found.stderr


def test_both_streams_arrive_line_by_line_and_no_amount_of_them_blocks(outputs, capfd):
    # Ten times what a pipe holds, in each stream: a child whose output nobody reads would wait for ever.
    start(
        "import sys\nfor i in range(700):\n  print('out', i, 'x' * 990)\n  print('err', i, 'x' * 990, file=sys.stderr)"
    )
    lines = capfd.readouterr().out.splitlines()
    assert lines[0] == "+ python -m tiny"
    for stream in ("out", "err"):
        assert [line for line in lines if line.startswith(stream)] == [f"{stream} {i} {'x' * 990}" for i in range(700)]
    assert status(outputs)["state"] == "finished" and list(status(outputs)) == STATUS_KEYS


def test_the_child_has_the_project_its_caches_in_scratch_and_no_hub_when_offline(outputs, capfd, monkeypatch):
    monkeypatch.setenv("MY_TOKEN", "secret-value")
    code = "import os, sys; print([os.environ.get(n) for n in sys.argv[1:]]); print(os.getcwd())"
    names = ("PYTHONPATH", "PYTHONUNBUFFERED", "JAX_COMPILATION_CACHE_DIR", "HF_HOME", "HF_HUB_OFFLINE")
    monkeypatch.setenv("PYTHONPATH", "mine")
    scratch = outputs.parents[1] / "temp" / "jgpt"
    start(code, *names, "JGPT_KAGGLE_INPUTS", "JGPT_KAGGLE_ACCELERATOR")
    printed = capfd.readouterr().out
    path = f"{scratch}/code:{scratch}/code/packages:mine"
    assert str([path, "1", f"{scratch}/jax", f"{scratch}/huggingface", "1", "datasets me/a", "TpuV5E8"]) in printed
    assert f"\n{scratch}/code\n" in printed and "secret-value" not in printed
    start(code, *names, internet=True)
    assert str([path, "1", f"{scratch}/jax", f"{scratch}/huggingface", None]) in capfd.readouterr().out


def test_a_run_has_its_directory_where_kaggle_keeps_it_and_its_tokens_in_scratch(outputs, capfd):
    code = "import sys; print(sys.argv[1:])"
    start(code, "--config", "c.py", trains=True)
    tokens = outputs.parents[1] / "temp" / "jgpt" / "tokens"
    printed = capfd.readouterr().out
    assert str(["--config", "c.py", f"--config.out_dir={outputs}", f"--config.data.cache_dir={tokens}"]) in printed
    start(code, "--config.data.cache_dir=mine", trains=True)
    assert str(["--config.data.cache_dir=mine", f"--config.out_dir={outputs}"]) in capfd.readouterr().out


def test_what_the_child_said_of_its_end_stays(outputs):
    start(WRITES_STATUS + "write('stopped')")
    assert (status(outputs)["state"], status(outputs)["reason"]) == ("stopped", "its own")
    start(WRITES_STATUS + "write('failed'); sys.exit(4)")
    assert (status(outputs)["state"], status(outputs)["reason"]) == ("failed", "its own")


def test_a_child_that_dies_without_a_word_is_spoken_for(outputs):
    code = WRITES_STATUS + "write('running'); print('line 1'); print('line 2', flush=True)\n"
    start(code + "import signal; os.kill(os.getpid(), signal.SIGKILL)")
    found = status(outputs)
    assert found["state"] == "failed" and found["reason"] == "killed by signal 9 (SIGKILL)\nline 1\nline 2"
    assert (found["step"], found["total_steps"], found["resume_command"]) == (7, 9, "again")
    assert list(found) == STATUS_KEYS and found["pid"] != 0


def test_what_an_earlier_run_said_is_not_taken_for_its_word(outputs):
    start(WRITES_STATUS + "write('finished', pid=1)\nprint('a mistake', file=sys.stderr); sys.exit(2)")
    assert status(outputs)["state"] == "failed"
    assert status(outputs)["reason"] == "exit code 2\na mistake"


@pytest.mark.parametrize("torn", ["", "{", "[1]", "3"])
def test_a_torn_status_is_written_again(outputs, torn):
    start(WRITES_STATUS + f"(out / 'status.json').write_text({torn!r}); sys.exit(3)")
    assert status(outputs)["reason"] == "exit code 3" and list(status(outputs)) == STATUS_KEYS


def test_only_the_last_lines_are_kept(outputs):
    start("import sys\nfor i in range(500):\n  print(i)\nsys.exit(1)")
    assert status(outputs)["reason"].splitlines() == ["exit code 1", *(str(i) for i in range(480, 500))]


def test_an_archive_that_is_none_ends_without_an_exception(outputs, capfd):
    bootstrap.start("AAAA", "tiny", [], inputs=[], accelerator="", internet=False, trains=False)
    assert status(outputs)["state"] == "failed"
    assert (
        status(outputs)["reason"].startswith("it could not be started\n") and "ReadError" in status(outputs)["reason"]
    )
    assert "Traceback" in capfd.readouterr().err


def test_a_status_that_cannot_be_written_is_in_the_log(outputs, capfd):
    outputs.parent.mkdir()
    outputs.write_text("a file in the way")
    start("import sys; sys.exit(3)")
    printed = capfd.readouterr().out
    assert "failed: exit code 3" in printed and "status.json could not be written" in printed


WAITS = (
    WRITES_STATUS
    + """
import signal, time
def stop(number, frame):
    write('stopped'); print('stopping by', signal.Signals(number).name, flush=True); sys.exit(0)
signal.signal(signal.SIGTERM, stop); signal.signal(signal.SIGINT, stop)
print('ready', flush=True)
while True: time.sleep(0.05)
"""
)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signals_reach_the_child_which_has_the_time_it_needs(outputs, number):
    call = f"start({archive(WAITS)!r}, 'tiny', [], inputs=[], accelerator='', internet=False, trains=False)"
    code = Path(bootstrap.__file__).read_text() + f"\n{call}\nprint('end of the cell')\n"
    with subprocess.Popen(
        [sys.executable, "-c", "import sys; exec(sys.stdin.read(), {})"], env=os.environ, text=True,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    ) as process:  # fmt: skip
        assert process.stdin and process.stdout
        process.stdin.write(code)
        process.stdin.close()
        assert process.stdout.readline() == "+ python -m tiny\n" and process.stdout.readline() == "ready\n"
        process.send_signal(number)
        assert process.stdout.read() == f"stopping by {number.name}\nend of the cell\n"
    assert process.returncode == 0 and status(outputs)["state"] == "stopped"


def test_handlers_are_put_back(outputs):
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    start("pass")
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before


def test_after_a_signal_nothing_new_is_started(tmp_path):
    child = bootstrap.Child()
    with child.forwards_signals():
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.01)
        child.run([sys.executable, "-c", "raise SystemExit(5)"], tmp_path, dict(os.environ))
    assert child.process is None
