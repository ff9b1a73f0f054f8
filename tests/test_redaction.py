"""No secret's value in anything that a run prints or writes: tokens are planted everywhere a user may have them."""

import logging
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from jgpt.redaction import HIDDEN, redact

ROOT = Path(__file__).parents[1]
IN_ENVIRONMENT = (
    "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "KAGGLE_KEY", "KAGGLE_API_TOKEN", "KAGGLE_USER_SECRETS_TOKEN",
    "KAGGLE_DATA_PROXY_TOKEN", "WANDB_API_KEY", "MY_PASSWORD", "AWS_SECRET_ACCESS_KEY",
)  # fmt: skip
IN_FILES = {
    ".kaggle/kaggle.json": '{{"username": "me", "key": "{}"}}', ".cache/huggingface/token": "{}\n",
    ".netrc": "machine api.wandb.ai login user password {}\n", "session": "{}",
}  # fmt: skip

Started = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def planted(tmp_path: Path) -> dict[str, str]:
    """Put a token of its own into each file and return the environment with all of them."""
    home = tmp_path / "home"
    for n, (name, form) in enumerate(IN_FILES.items()):
        (home / name).parent.mkdir(parents=True, exist_ok=True)
        (home / name).write_text(form.format(f"planted-in-file-{n}"))
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "KAGGLE", "XLA_"))}
    environment |= {name: f"planted-{name.lower()}-value" for name in IN_ENVIRONMENT}
    environment |= {"HOME": str(home), "KAGGLE_API_V1_TOKEN": str(home / "session"), "HF_HUB_OFFLINE": "1"}
    environment |= {"KAGGLE_KERNEL_RUN_TYPE": "Batch", "JGPT_KAGGLE_ROOT": str(tmp_path / "kaggle")}
    (tmp_path / "kaggle" / "working").mkdir(parents=True)
    return environment | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}


def assert_hidden(printed: str, root: Path) -> None:
    """Assert that no token is in what a command printed and wrote."""
    assert "planted" not in printed
    for path in root.rglob("*"):
        if path.is_file() and not path.is_relative_to(root / "home"):
            assert b"planted" not in path.read_bytes(), path


@pytest.fixture
def start(planted: dict[str, str], tmp_path: Path) -> Started:
    """Run a line of Python's as a process with them, and look at everything that it printed and wrote."""

    def started(*line: str, code: int) -> subprocess.CompletedProcess[str]:
        done = subprocess.run([sys.executable, *line], env=planted, cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == code, done.stdout + done.stderr
        assert_hidden(done.stdout + done.stderr, tmp_path)
        return done

    return started


@pytest.fixture
def train(command: Any, planted: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """Train in this process with them, and look at everything that the command printed and wrote."""

    def trained(*arguments: str, code: int) -> str:
        with monkeypatch.context() as patch:
            for name, value in planted.items():
                patch.setenv(name, value)
            result = command("train", *arguments)
        assert result.code == code, result.out + result.err
        assert_hidden(result.out + result.err, tmp_path)
        return result.err

    return trained


def test_a_run_that_succeeds_whatever_it_is_given(
    train: Callable[..., str], planted: dict[str, str], tiny: list[str], tmp_path: Path
):
    """Also where a token is in an override, which config.json, status.json and report.html repeat."""
    own = f"--config.sample.prompt={planted['WANDB_API_KEY']}"
    train(*tiny, own, "--config.sample.num_samples=0", code=0)
    assert HIDDEN in (tmp_path / "run" / "status.json").read_text()
    assert HIDDEN in (tmp_path / "run" / "config.json").read_text()
    assert (tmp_path / "run" / "report.html").exists()


def test_what_the_user_got_wrong(train: Callable[..., str], planted: dict[str, str], tiny: list[str]):
    glob = f"--config.data.text_glob=/{planted['KAGGLE_KEY']}/*.txt"
    assert f"/{HIDDEN}/*.txt" in train(*tiny, glob, code=2)
    model = f"--config.init_from=https://me:{planted['HF_TOKEN']}@huggingface.co/owner/name"
    assert HIDDEN in train(*tiny, model, code=2)


def test_a_crash_with_a_traceback(start: Started, tiny: list[str], tmp_path: Path):
    """Of a library that quotes headers and addresses, in the middle of a run."""
    (tmp_path / "crash.py").write_text(
        "import os\n"
        "from jgpt.run_dir.checkpoint import Checkpoints\n"
        "def save(self, *arguments):\n"
        "    secrets = [value for value in os.environ.values() if value.startswith('plan' 'ted')]\n"
        "    files = [open(os.path.expanduser(name)).read() for name in ('~/session', '~/.netrc')]\n"
        "    raise RuntimeError(f'401 for https://a:{secrets[0]}@host/x with {secrets} and {files}')\n"
        "Checkpoints.save = save\n"
        "from jgpt import train\n"
        "from jgpt.cli.flags import define_config\nfrom jgpt.cli.run import run\n"
        "define_config()\n"
        "run(train.main, train.__doc__)\n"
    )
    done = start(str(tmp_path / "crash.py"), *tiny, code=1)
    assert "Traceback" in done.stderr and HIDDEN in done.stderr
    assert HIDDEN in (tmp_path / "run" / "status.json").read_text()


def test_check_env(start: Started, tmp_path: Path):
    assert "KAGGLE_KEY" in start("-m", "jgpt.check_env", "--quick", f"--run_dir={tmp_path}", code=0).stdout


def test_each_secret_is_found_by_its_value(planted: dict[str, str], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(os, "environ", planted)
    told = [value for name, value in planted.items() if name in IN_ENVIRONMENT]
    told += [f"planted-in-file-{n}" for n in range(len(IN_FILES))]
    for secret in told:
        assert redact(f"a {secret} b") == f"a {HIDDEN} b"


def test_what_is_no_secret_stays(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    text = "step 1/4 loss 2.0 at /kaggle/working, TOKENIZERS_PARALLELISM=false, hf_hub, s3://bucket/key@v1, 12:30@home"
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")
    monkeypatch.setenv("TOKEN_DIRECTORY", str(tmp_path))
    assert redact(text) == text and redact(f"in {tmp_path}") == f"in {tmp_path}"


def test_shapes_of_secrets_that_nobody_told_us():
    assert redact("hf_abcdefghijklmnopqrstuvwxyz") == HIDDEN
    assert redact("Authorization: Bearer KGAT_0123456789") == f"Authorization: Bearer {HIDDEN}"
    assert redact("at https://me:password@host/a?b") == f"at https://{HIDDEN}@host/a?b"


def test_the_log_hides_them(monkeypatch: pytest.MonkeyPatch, capsys):
    from jgpt.cli.terminal import TerminalHandler

    monkeypatch.setenv("SOME_TOKEN", "planted-0123456789")
    TerminalHandler().emit(logging.LogRecord("jgpt", logging.INFO, "", 0, "with %s", ("planted-0123456789",), None))
    assert capsys.readouterr().out == f"with {HIDDEN}\n"
