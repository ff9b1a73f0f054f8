"""What the commands have in common: flags in; help, one clear message and an exit code out."""

import contextlib
import errno
import importlib
import inspect
import os
import pty
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import pytest

from jgpt.cli.help import config_keys
from jgpt.config.defaults import KEYS, LORA_TARGETS, default_config, flatten
from jgpt.config.files import config_files, find_config
from jgpt.config.other_names import FLAG_CALLED, KEY_CALLED, VALUE_CALLED, unknown_key
from jgpt.errors import OutOfMemory, TrainingDiverged, UserError

ROOT = Path(__file__).parents[2]
BASE = f"--config={ROOT / 'configs' / 'base.py'}"
WITH_CONFIG = ("train", "prepare", "plan")
COMMANDS = (*WITH_CONFIG, "evaluate", "generate", "check_env")


def refused(result, *parts: str) -> None:
    """Assert that a command ended with one error message that holds `parts`, and did nothing else."""
    assert result.code == 2, result.err
    assert result.out == ""
    assert result.err.startswith("error: ") and "Traceback" not in result.err
    for part in parts:
        assert part in result.err, result.err


@pytest.mark.parametrize("name", COMMANDS)
def test_help_is_a_page_that_a_newcomer_can_read(command, name, monkeypatch):
    monkeypatch.chdir(ROOT)
    result = command(name, "--help")
    assert result.code == 0 and result.err == ""
    assert max(map(len, result.out.splitlines())) <= 120
    assert f"python -m jgpt.{name}" in result.out and "Flags:" in result.out
    assert "exit code" in result.out.lower()
    for config in config_files():
        assert (f"\n  {config} " in result.out) == (name in WITH_CONFIG)
    assert ("--config.KEY=VALUE" in result.out) == (name in WITH_CONFIG)


def test_help_is_the_same_in_every_folder(command, tmp_path, monkeypatch):
    before = command("train", "-h").out
    monkeypatch.chdir(tmp_path)
    assert command("train", "--help").out == before


def test_a_config_is_named_in_three_ways_and_a_file_of_the_users_comes_first(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    ours = ROOT / "configs" / "quickstart.py"
    assert find_config("quickstart") == find_config("quickstart.py") == find_config("configs/quickstart.py") == ours
    assert find_config("other/quickstart.py") is None and find_config("quick") is None
    assert config_files().keys() == {path.stem for path in (ROOT / "configs").glob("*.py")}
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "quickstart.py").touch()
    assert find_config("configs/quickstart.py") == Path("configs/quickstart.py")


@pytest.mark.parametrize("spelling", [["--config=base"], ["--config", "base"], ["-config=configs/base.py"]])
def test_a_config_by_its_name(command, tiny, spelling, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert command("prepare", *spelling, *tiny[1:]).code == 0
    assert (tmp_path / "run" / "tokens" / "meta.json").is_file()


def test_every_key_is_listed_with_its_default_and_its_comment():
    listed = config_keys()
    for key, value in flatten(default_config()).items():
        shown = re.search(rf"^  {re.escape(key)}=(.+?)(  |$)", listed, re.MULTILINE)
        assert shown, key
        if key != "data.text_glob":
            assert eval(shown[1]) == value
        words = KEYS[key].explained().split()
        assert words[0] in shown.string[shown.end() :].split("\n")[0]
    assert re.search(r"checkpoint\.resume='auto' +what to do when out_dir holds a run: 'auto' \(resume", listed)
    assert re.search(r"model\.dropout=0\.0 .*\(0 to 0\.99\)", listed)


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        ([], ["no --config was given", "Allowed: base, ", "For example: --config quickstart"]),
        (["--config"], ["no --config was given"]),
        (["--config", "--config.seed=1"], ["no --config was given"]),
        (["--config=nothere.py"], ["--config=nothere.py: there is no such config or file", "current folder"]),
        (["--config=configs/quikstart.py"], ["Did you mean quickstart? Allowed: base, "]),
        (["--config=nothere", BASE], ["--config=nothere and --config=", "were given. Allowed: one config"]),
        ([BASE, "--config", "quickstart"], ["were given. Allowed: one config"]),
        ([BASE, "--config=a\nb"], ["were given. Allowed: one config"]),
        (["--config=" + "a" * 300], ["there is no such config or file"]),
        ([BASE, "--config.checkpoint.disk_gb=inf"], ["checkpoint.disk_gb=inf: it must be 0 to 2,147,483,647"]),
        ([BASE, f"--config.model.d_ff={2**63 - 1}"], ["model.d_ff=9223372036854775807: it must be 0 to 1,048,576"]),
        ([BASE, "--config.execution.micro_batch_size=100000000"], ["micro_batch_size=100000000: it must be 0 to"]),
        ([BASE, "--config.remat=block"], ["config.remat is now config.execution.remat."]),
        ([BASE, "--config.parallel=pmap"], ["config.parallel is now config.execution.parallel."]),
        ([BASE, "--config.batch.micro_batch_size=4"], ["size is now config.execution.micro_batch_size."]),
        ([BASE, "--confg=3"], ["unknown flag --confg", "Did you mean --config?"]),
        ([BASE, "--nothing"], ["unknown flag --nothing. All flags are in --help"]),
        ([BASE, "word"], ["unexpected argument 'word'", "--NAME=VALUE"]),
        (
            [BASE, "--config.optimizer.lr=3"],
            ["unknown config key --config.optimizer.lr. Did you mean optimizer.learni"],
        ),
        ([BASE, "--config.fp16=true"], ["unknown config key --config.fp16. Did you mean precision.compute=fp16?"]),
        ([BASE, "--config.batch_size=3"], ["Did you mean batch.global_batch_size?"]),
        ([BASE, "--config.optimizer.epochs=3"], ["epochs x tokens of the text / tokens of a step", "budget_epochs"]),
        ([BASE, "--config.gradient_accumulation_steps=3"], ["batch.global_batch_size, and", "micro_batch_size"]),
        (["base"], ["no --config was given. Did you mean --config base?"]),
        ([BASE, "config.seed=3"], ["unexpected argument 'config.seed=3'. Did you mean --config.seed=3?"]),
        ([BASE, "--lr=3"], ["unknown flag --lr. Did you mean optimizer.learning_rate?", "Set a key by --config.KEY"]),
        ([BASE, "--config.sed=3"], ["unknown config key --config.sed. Did you mean seed?"]),
        ([BASE, "--config.model.n_layer=3"], ["unknown config key --config.model.n_layer.", "mean model.n_layers?"]),
        ([BASE, "--config.modle.n_layers=3"], ["unknown config key --config.modle.n_layers.", "mean model.n_layers?"]),
        ([BASE, "--config.n_layers", "3"], ["unknown config key --config.n_layers. Did you mean model.n_layers?"]),
        ([BASE, "--noconfig.model.bais"], ["unknown config key --noconfig.model.bais. Did you mean model.bias?"]),
        ([BASE, "--config.zzz=3"], ["unknown config key --config.zzz. All keys are in --help"]),
        ([BASE, "--config.seed.x=3"], ["unknown config key --config.seed.x. Did you mean seed?"]),
        ([BASE, "--config.a=1", "--config.b.c=2"], ["--config.a.", "--config.b.c."]),
        ([BASE, "--config.eval=3"], ["--config.eval is a group of keys", "every_steps, batches"]),
        ([BASE, "--config.optimizer=adam"], ["--config.optimizer is a group of keys", "Did you mean optimizer.kind?"]),
        ([BASE, "--model=gpt2"], ["unknown flag --model. Did you mean init_from for a model to begin from?"]),
        (
            [BASE, "--num_gpus=1"],
            ["unknown flag --num_gpus. There is no such setting: all devices", "JAX_PLATFORMS=cpu"],
        ),
        ([BASE, "--config.wandb_log=1"], ["unknown config key --config.wandb_log. Did you mean logging.wandb?"]),
        ([BASE, "--config.warmup_ratio=0.1"], ["optimizer.warmup_steps = warmup_ratio x optimizer.total_steps."]),
        ([BASE, "--config.model.n_layers=x"], ["--config.model.n_layers='x': it must be a whole number, such as 6"]),
        ([BASE, "--config.seed=1.5"], ["--config.seed='1.5': it must be a whole number"]),
        ([BASE, "--config.model.dropout=a"], ["--config.model.dropout='a': it must be a number"]),
        ([BASE, "--config.model.bias=maybe"], ["--config.model.bias='maybe': it must be true or false"]),
        ([BASE, "--config.model.n_layers="], ["--config.model.n_layers='': it must be a whole number"]),
        ([BASE, "--config.seed"], ["--config.seed was given without a value", "--config.seed=VALUE"]),
        (["--config.seed=3", BASE], ["--config.seed"]),
    ],
    ids=lambda value: " ".join(value)[-40:] if isinstance(value, list) else None,
)
@pytest.mark.parametrize("name", WITH_CONFIG)
def test_a_wrong_command_line_is_refused(command, name, arguments, parts, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    refused(command(name, *arguments), *parts)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("name", "arguments", "parts"),
    [
        ("evaluate", [], ["no --model was given", "For example: --model runs/quickstart"]),
        ("generate", [], ["no --model was given", "For example: --model runs/quickstart"]),
        ("generate", ["--max_tokens=3"], ["unknown flag --max_tokens. Did you mean --max_new_tokens? All flags"]),
        ("generate", ["runs/x"], ["unexpected argument 'runs/x'. Did you mean --model=runs/x?"]),
        (
            "generate",
            ["--model=x", "--prompt", "a", "b"],
            ["unexpected argument 'b'. A value with spaces needs quotes"],
        ),
        ("chat", ["--temp", "3"], ["unknown flag --temp. Did you mean --temperature?"]),
        ("evaluate", ["--rundir=x"], ["unknown flag --rundir", "Did you mean --run_dir?"]),
        ("evaluate", ["--step=a"], ["--step='a': it must be a whole number"]),
        ("evaluate", ["--step=-1"], ["--step='-1': it must be a non-negative integer"]),
        ("generate", ["--num_samples=0"], ["--num_samples='0': it must be a positive integer"]),
        ("generate", ["--temperature=hot"], ["--temperature='hot': it must be a number, such as 0.8"]),
        ("generate", ["--compute=int8"], ["--compute='int8': it must be one of auto, fp32, fp16, bf16"]),
        ("generate", ["--run_dir=x", "--top_p=90"], ["top_p=90"]),
        ("check_env", ["--quick=perhaps"], ["--quick='perhaps': it must be true or false"]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_wrong_flags_of_the_other_commands(command, name, arguments, parts, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    refused(command(name, *arguments), *parts)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("source", "parts"),
    [
        ("def get_config(:\n", ["mine.py, line 1: SyntaxError", "Fix that line"]),
        ("x = 1\n", ["mine.py has no function get_config()", "default_config()"]),
        ("import not_there\n", ["mine.py, line 1: ModuleNotFoundError: No module named 'not_there'"]),
        ("def get_config():\n    pass\n", ["get_config() returned None", "default_config()"]),
        (
            "from ml_collections import ConfigDict\ndef get_config():\n    return ConfigDict({'a': 1})\n",
            ["the unknown key a, no key batch.global_batch_size, no key batch.sequence_length", "more"],
        ),
        (
            "{default}    config.model.n_layer = 3\n",
            ["line 4: unknown config key n_layer. Did you mean model.n_layers?"],
        ),
        (
            "{default}    config.optimizer.lr = 3\n",
            ["line 4: unknown config key lr. Did you mean optimizer.learning_r"],
        ),
        ("{default}    config.modle.n_layers = 3\n", ["line 4: unknown config key modle. Did you mean model?"]),
        ("{default}    config.zzz = 3\n", ["line 4: unknown config key zzz. Fix that line"]),
        (
            "{default}    config.remat = 'block'\n",
            ["line 4: config.remat is now config.execution.remat. Fix that line"],
        ),
        ("{default}    config.batch.micro_batch_size = 1\n", ["size is now config.execution.micro_batch_size."]),
        ("{default}    config.seed = 'a'\n", ["line 4: TypeError: Could not override field 'seed'"]),
        ("{default}    config.seed = 1 // 0\n", ["line 4: ZeroDivisionError"]),
        ("{default}    open('not_there')\n", ["line 4: FileNotFoundError", "not_there"]),
    ],
)
def test_a_mistake_in_a_config_file_is_named_with_its_line(command, source, parts, tmp_path):
    start = "from jgpt.config import default_config\ndef get_config():\n    config = default_config()\n"
    text = source.replace("{default}", start)
    (tmp_path / "mine.py").write_text(text + "    return config\n" * text.startswith(start))
    refused(command("prepare", f"--config={tmp_path / 'mine.py'}"), *parts)


def test_suggestions_name_every_group_that_has_the_key():
    for group in ("eval", "sample", "checkpoint"):
        assert f"{group}.every_steps" in unknown_key("every_steps")


def test_the_names_of_other_tools_lead_to_what_exists():
    assert set(KEY_CALLED.values()) <= KEYS.keys() and not set(KEY_CALLED) & KEYS.keys()
    values = {choice for key in KEYS.values() for choice in key.choices} | set(LORA_TARGETS)
    assert set(VALUE_CALLED.values()) <= values
    names = ("generate", "chat", "evaluate", "plan", "cli.model_flags", "serve.__main__")
    sources = "".join(inspect.getsource(importlib.import_module(f"jgpt.{name}")) for name in names)
    for flag in FLAG_CALLED.values():
        assert re.search(rf'DEFINE_\w+\(\s*"{flag}"', sources), flag


def ending(error):
    def main():
        if isinstance(error, BaseException):
            raise error
        return error

    return SimpleNamespace(__doc__="Do it.", __file__="it.py", define_flags=lambda: None, main=main)


@pytest.mark.parametrize(
    ("error", "code", "parts"),
    [
        (None, 0, []),
        (7, 7, []),
        (AssertionError("1 == 2"), 1, ["Traceback", "AssertionError: 1 == 2"]),
        (UserError("give less"), 2, ["error: give less\n"]),
        (
            jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 9663676416 bytes."),
            3,
            ["error: the cpu was asked for 9.00 GiB in one piece", "Take fewer or shorter sequences"],
        ),
        (MemoryError(), 3, ["error: the machine ran out of memory"]),
        (OutOfMemory("take less\nor less"), 3, ["error: take less\nor less\n"]),
        (RuntimeError("RESOURCE_EXHAUSTED, says who"), 1, ["Traceback"]),
        (TrainingDiverged("too fast"), 4, ["error: too fast\n"]),
        (KeyboardInterrupt(), 130, ["error: interrupted\n"]),
        (OSError(errno.ENOSPC, "No space left on device"), 2, ["the disk is full", "it continues"]),
        (PermissionError(errno.EACCES, "Permission denied", "a/b"), 2, ["error: a/b: Permission denied", "owner"]),
        (OSError(errno.EMFILE, "Too many open files", "a"), 2, ["a: Too many open files", "ulimit -n"]),
        (OSError(errno.ENOTCONN, "Transport endpoint is not connected"), 2, ["the connection to it, has failed"]),
        (PermissionError(errno.EPERM, "Operation not permitted"), 1, ["Traceback"]),
        (FileNotFoundError(errno.ENOENT, "No such file", "a"), 1, ["Traceback"]),
    ],
    ids=repr,
)
def test_exit_codes(command, error, code, parts):
    result = command(ending(error))
    assert (result.code, result.out) == (code, "")
    assert ("Traceback" in result.err) == (code == 1)
    assert (result.err == "") == (not parts)
    for part in parts:
        assert part in result.err


def test_exit_code_of_a_process(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "jgpt.evaluate", "--run_dir", str(tmp_path)], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith(f"error: {tmp_path} holds no model. It must hold")


def test_an_interrupted_command_ends_before_what_runs_at_exit_can_crash():
    """JAX frees its memory then, under a computation that may still run; here, something that aborts the process."""
    program = "import atexit, os, signal; from jgpt.cli.run import run; atexit.register(os.abort)\n"
    program += "def main(): signal.raise_signal(signal.SIGINT)\n"
    done = subprocess.run([sys.executable, "-c", program + "run(main, '')"], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (130, "error: interrupted\n")


SPEAKING = """
import logging
from jgpt.cli.run import run
from jgpt.cli.terminal import say, write
from jgpt.errors import UserError

TEXT = "\\x1b[2J\\x9b1m\\u6f22\\ud800\\b\\tok"

def main():
    write(TEXT + "\\r\\n")
    say(TEXT)
    print("\\u6f22")
    logging.getLogger("jgpt").info("%s", TEXT)
    raise UserError(TEXT)

run(main, "")
"""


@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "utf-8"])
def test_no_character_makes_a_command_fail(encoding):
    """A pipe gets text as it is; what its encoding lacks is an escape."""
    environment = os.environ | {"PYTHONIOENCODING": encoding}
    done = subprocess.run([sys.executable, "-c", SPEAKING], cwd=ROOT, env=environment, capture_output=True)
    assert done.returncode == 2 and b"Traceback" not in done.stderr, done.stderr
    text = "\x1b[2J\x9b1m\u6f22\ud800\b\tok".encode(encoding, "backslashreplace")
    assert done.stdout == text + b"\r\n" + "\u6f22\n".encode(encoding, "backslashreplace")
    assert done.stderr == text + b"\n" + text + b"\nerror: " + text + b"\n"


def test_a_terminal_obeys_nothing_that_a_text_holds():
    main, terminal = pty.openpty()
    environment = os.environ | {"PYTHONIOENCODING": "utf-8"}
    streams = dict(stdin=terminal, stdout=terminal, stderr=terminal)
    with subprocess.Popen([sys.executable, "-c", SPEAKING], cwd=ROOT, env=environment, **streams):
        os.close(terminal)
        shown = b""
        with contextlib.suppress(OSError):  # Linux ends a terminal so
            while piece := os.read(main, 1000):
                shown += piece
    os.close(main)
    text = "\\x1b[2J\\x9b1m\u6f22\\ud800\\x08\tok\r\n"
    assert shown.decode() == f"{text}{text}\u6f22\r\n{text}error: {text}"


def test_a_reader_that_goes_away_is_no_error():
    program = f"{sys.executable} -m jgpt.prepare --help | head -n 1; echo ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert (done.stdout.splitlines()[-1], done.stderr) == ("0", "")
