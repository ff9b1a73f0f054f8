"""No secret's value in anything that people read: tokens are planted everywhere a user may have them.

And what is no secret stays as it is, above all where a program reads it back.
"""

import html
import json
import logging
import os
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from jgpt.config.check import problems
from jgpt.config.defaults import default_config
from jgpt.redaction import HIDDEN, find_secret, looks_random, redact
from jgpt.report.page import write_report
from jgpt.run_dir.identity import read_config, write_identity
from jgpt.run_dir.samples import append_samples
from jgpt.run_dir.status_file import write_status

ROOT = Path(__file__).parents[1]
IN_ENVIRONMENT = (
    "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "KAGGLE_KEY", "KAGGLE_API_TOKEN", "KAGGLE_USER_SECRETS_TOKEN",
    "KAGGLE_DATA_PROXY_TOKEN", "WANDB_API_KEY", "MY_PASSWORD", "AWS_SECRET_ACCESS_KEY", "SMTP_PASS", "GPG_PASSPHRASE",
    "PGPASSWORD", "MYSQL_PWD", "REGISTRY_AUTH",
)  # fmt: skip
PLANTED = "pl4nt3D"  # a part of each
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
        (home / name).write_text(form.format(f"{PLANTED}xK9inFile{n}"))
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "KAGGLE", "XLA_"))}
    environment |= {name: f"{PLANTED}xK9{name}" for name in IN_ENVIRONMENT}
    environment |= {"HOME": str(home), "KAGGLE_API_V1_TOKEN": str(home / "session"), "HF_HUB_OFFLINE": "1"}
    environment |= {"KAGGLE_KERNEL_RUN_TYPE": "Batch", "JGPT_KAGGLE_ROOT": str(tmp_path / "kaggle")}
    (tmp_path / "kaggle" / "working").mkdir(parents=True)
    return environment | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}


def assert_hidden(printed: str, root: Path) -> None:
    """Assert that no token is in what a command printed and wrote."""
    assert PLANTED not in printed
    for path in root.rglob("*"):
        if path.is_file() and not path.is_relative_to(root / "home"):
            assert PLANTED.encode() not in path.read_bytes(), path


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


def test_a_run_that_succeeds(train: Callable[..., str], tiny: list[str], tmp_path: Path):
    train(*tiny, code=0)
    assert (tmp_path / "run" / "report.html").exists()


def test_a_config_with_a_secret_is_refused_before_anything_is_written(
    train: Callable[..., str], planted: dict[str, str], tiny: list[str], tmp_path: Path
):
    error = train(*tiny, f"--config.sample.prompt=I am {planted['WANDB_API_KEY']}, say.", code=2)
    assert "sample.prompt holds the secret in the environment variable WANDB_API_KEY" in error
    assert not (tmp_path / "run" / "config.json").exists()


def test_what_the_user_got_wrong(train: Callable[..., str], planted: dict[str, str], tiny: list[str]):
    glob = f"--config.data.text_glob=/{planted['KAGGLE_KEY']}/*.txt"
    assert f"/{HIDDEN}/*.txt" in train(*tiny, glob, code=2)
    model = f"--config.init_from=https://me:{planted['HF_TOKEN']}@huggingface.co/owner/name"
    assert "init_from holds the secret in the environment variable HF_TOKEN" in train(*tiny, model, code=2)


def test_a_crash_with_a_traceback(start: Started, tiny: list[str], tmp_path: Path):
    """Of a library that quotes headers and addresses, in the middle of a run."""
    (tmp_path / "crash.py").write_text(
        "import os\n"
        "from jgpt.run_dir.checkpoint import Checkpoints\n"
        "def save(self, *arguments):\n"
        "    secrets = [value for value in os.environ.values() if value.startswith('pl4n' 't3D')]\n"
        "    files = [open(os.path.expanduser(name)).read() for name in ('~/session', '~/.netrc')]\n"
        "    raise RuntimeError(f'401 for https://a:{secrets[0]}@host/x with {secrets} and {files}')\n"
        "Checkpoints.save = save\n"
        "import importlib\ntrain = importlib.import_module('jgpt.train')\n"
        "from jgpt.cli.flags import define_config\nfrom jgpt.cli.run import run\n"
        "from jgpt.cli.process_flags import define_processes\n"
        "define_config()\ndefine_processes()\n"
        "run(train.main, train.__doc__)\n"
    )
    done = start(str(tmp_path / "crash.py"), *tiny, code=1)
    assert "Traceback" in done.stderr and HIDDEN in done.stderr
    assert HIDDEN in (tmp_path / "run" / "status.json").read_text()


def test_check_env(start: Started, tmp_path: Path):
    assert "KAGGLE_KEY" in start("-m", "jgpt.check_env", "--quick", f"--run_dir={tmp_path}", code=0).stdout


def test_each_secret_is_found_by_its_value(planted: dict[str, str], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(os, "environ", planted)
    values = [value for name, value in planted.items() if name in IN_ENVIRONMENT]
    values += [f"{PLANTED}xK9inFile{n}" for n in range(len(IN_FILES))]
    for secret in values:
        assert redact(f"a {secret} b") == f"a {HIDDEN} b"


# Words, numbers, paths and names that a user, a cluster or an image keeps in variables with any name.
WORDS = """
    checkpoint quickstart training learning_rate validation tokenizer metrics.jsonl kaggle_t4 optimizer default
    development production localhost postgres password changeme administrator postgresql://db:5432/app
    internationalization 20240101 12345678 1234567890123456 3.141592653589793 2024-01-01T12:00:00Z 127.0.0.1:8080
    20240101T120000Z
    HuggingFaceTB/SmolLM2-135M-Instruct Qwen/Qwen3-30B-A3B-Instruct-2507-FP8 meta-llama/Llama-3.2-1B-Instruct
    google/gemma-3n-E4B-it gpt2-124m-v3-bf16 deepseek-ai/DeepSeek-R1-0528-Qwen3-8B TinyLlama/TinyLlama-1.1B-Chat-v1.0
    RedHatAI/Llama-3.1-8B-quantized.w8a8 mistralai/Mixtral-8x7B-Instruct-v0.1 me/mytokenizer NvidiaTeslaT4Highmem
    configs/quickstart.py config.optimizer.total_steps us-east-1a x86_64-unknown-linux-gnu MyVeryLongProjectName
    Überraschungsgeschäft modèle-préférée 模型训练数据集合版本一
    /data/disk/.cache/huggingface/hub https://huggingface.co/HuggingFaceTB correct-horse-battery-staple
""".split()
NAMES = ("APP_KEY", "JUPYTER_TOKEN", "POSTGRES_PASSWORD", "TOKENIZER_NAME", "MAIL_PASS", "SESSION_SECRET")


def test_what_is_no_secret_stays(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    assert [word for word in WORDS if looks_random(word)] == []
    text = "step 1/4 loss 2.0 at /kaggle/working, TOKENIZERS_PARALLELISM=false, hf_hub, s3://bucket/key@v1, 12:30@home"
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")
    monkeypatch.setenv("TOKEN_DIRECTORY", str(tmp_path))
    assert redact(text) == text and redact(f"in {tmp_path}") == f"in {tmp_path}"


@pytest.mark.slow
def test_ordinary_words_in_200_variables_change_nothing_in_a_run(
    command: Any, trained: Path, tiny: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Every value of its config is in the environment under a secret's name, and it is stopped and goes on."""
    settings = [str(value) for value in json.loads((trained / "config.json").read_text())["optimizer"].values()]
    words = [*WORDS, *settings, "Once upon a time", "seed", "1234", str(tmp_path / "text.txt"), *tiny]
    variables = {f"N{n}_{NAMES[n % len(NAMES)]}": words[n % len(words)] for n in range(200)}
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    line = [*tiny, "--config.sample.prompt=checkpoint 1234 training"]
    for steps in (2, 4):
        result = command("train", *line, f"--config.optimizer.total_steps={steps}")
        assert result.code == 0 and HIDDEN not in result.out, result.out + result.err
        config = read_config(tmp_path / "run")
        assert (config.sample.prompt, config.optimizer.total_steps) == ("checkpoint 1234 training", steps)
        status = json.loads((tmp_path / "run" / "status.json").read_text())
        assert status["resume_command"] == shlex.join(
            ["python", "-m", "jgpt.train", *line, f"--config.optimizer.total_steps={steps}"]
        )
    assert "resuming from step 2" in result.out
    for path in (tmp_path / "run").glob("*.*"):
        assert HIDDEN.encode() not in path.read_bytes(), path


SHAPES = (
    "hf_AbCdEfGhIjKlMnOpQrStUvWxYzAbCdEfGh", "ghp_16C7e42F292c6912E7710c838347Ae178B4a", "AKIAIOSFODNN7EXAMPLE",
    "github_pat_11ABCDEFG0aBcDeFgHiJkL_mNoPqRsTuVwXyZ", "glpat-aBcD1234eFgH5678iJkL", "xoxb-1234567890-abcdefghij",
    "KGAT_0123456789abcdef0123456789abcdef", "wandb_v1_aBcDeFgHiJkLmNoPqRsTuVwX", "sk-ant-api03-aBcD-eFgH_iJkL1234567",
    "sk-proj-aBcDeFgHiJkLmNoPqRsTuVwX", "AIzaSyA1B2C3D4E5F6G7H8I9J0KaLbMcNdOePfQ",
    "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxMjM0NTY3ODkwIn0.dozjgNryP4J3jVmNHl0w5N_XgL0n3I9PlFUP0THsR8U",
    "-----BEGIN PRIVATE KEY-----\nMIIEvQIBADANBgkqhkiG9w0BAQ\n-----END PRIVATE KEY-----",
    "WANDB_API_KEY=0f8e7d6c5b4a39281706f5e4d3c2b1a0f8e7d6c5", "https://me:password@host/a?b",
    "Authorization: Bearer KGAT_0123456789",
)  # fmt: skip


@pytest.mark.parametrize("secret", SHAPES, ids=lambda secret: secret[:12])
def test_shapes_of_secrets_are_hidden_and_refused_in_every_text_of_a_config(secret: str):
    text = redact(f"It said {secret} and ended")
    assert HIDDEN in text and text.startswith("It said ") and text.endswith(" and ended")
    assert secret[-8:] not in text or secret.startswith("https")
    config = default_config()
    keys = ("out_dir", "init_from", "data.text_glob", "data.cache_dir", "sample.prompt", "tokenizer.pretrained")
    for key in keys:
        config.update_from_flattened_dict({key: f"x {secret}"})
    found = [problem for problem in problems(config) if "holds what has the form of a secret" in problem]
    assert {problem.split()[0] for problem in found} == set(keys)


NASTY = f"{PLANTED}\"q'u\\ö<&>é/ß{chr(0x1F600)}"  # what JSON, HTML, shells, addresses and Python write in other ways


def test_a_secret_is_hidden_however_it_is_escaped(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setenv("SMTP_PASS", NASTY)
    written = (
        NASTY, json.dumps(NASTY), json.dumps(NASTY, ensure_ascii=False), html.escape(NASTY), repr(NASTY), ascii(NASTY),
        shlex.join(["python", NASTY]), html.escape(json.dumps(NASTY)),
    )  # fmt: skip
    for text in written:
        assert HIDDEN in redact(text) and PLANTED not in redact(text), text
    # Structured files are cleaned before they are escaped; the report once more, as a run of elsewhere may be read.
    write_identity(tmp_path, default_config())
    write_status(tmp_path, "failed", 1, 2, f"RuntimeError: {NASTY}", f"jgpt train {NASTY}")
    append_samples(tmp_path / "samples.txt", 1, None, [f"I say {NASTY}."])
    (tmp_path / "config.json").write_text(json.dumps({"a": NASTY, "sample": {"prompt": "x" * 195 + NASTY}}))
    with (tmp_path / "samples.txt").open("a", encoding="utf-8") as file:
        file.write(f"=== step 2, sample 1 of 1 ===\n{NASTY}\n\n")
    write_report(tmp_path)
    status, report = (tmp_path / "status.json").read_text(), (tmp_path / "report.html").read_text()
    assert json.loads(status)["reason"] == f"RuntimeError: {HIDDEN}" and f"I say {HIDDEN}." in report
    assert PLANTED not in status + report and f"I say {HIDDEN}." in (tmp_path / "samples.txt").read_text("utf-8")


def test_the_log_hides_them(monkeypatch: pytest.MonkeyPatch, capsys):
    from jgpt.cli.terminal import TerminalHandler

    monkeypatch.setenv("SOME_TOKEN", NASTY)
    TerminalHandler().emit(logging.LogRecord("jgpt", logging.INFO, "", 0, "with %s", (NASTY,), None))
    assert capsys.readouterr().out == f"with {HIDDEN}\n"


def test_no_variable_and_no_file_breaks_the_log(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """Bytes that are no UTF-8, deep JSON, a pipe, a folder: a secret's name may stand before any of them."""
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "deep").write_text("[" * 100_000)
    for n, value in enumerate((b"a\xff1b2c3d4e5\xfe", bytes(tmp_path / "pipe"), bytes(tmp_path / "deep"), b"a" * 9000)):
        monkeypatch.setitem(os.environb, f"N{n}_TOKEN".encode(), value)
    assert redact("plain text") == "plain text" and find_secret("plain text") == ""
