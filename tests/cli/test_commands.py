"""`jgpt` and `python -m jgpt`: the list of commands, each as it runs alone; and no --help waits for JAX."""

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from jgpt.__main__ import CALLED, COMMANDS, entry, overview
from jgpt.cli.help import EXIT_CODES

ROOT = Path(__file__).parents[2]
HEAVY = {"jax", "flax", "optax", "orbax", "transformers", "ml_collections", "numpy"}
EVERY_HELP = """
import sys
from absl import flags
from jgpt.__main__ import entry

names = set(flags.FLAGS)
for name in sys.argv[1:]:
    sys.argv = ["jgpt", name, "--help"]
    try:
        entry()
    except SystemExit as end:
        assert end.code == 0, (name, end.code)
    loaded = HEAVY & sys.modules.keys()
    assert not loaded, f"{name} --help loads {loaded}"
    for flag in set(flags.FLAGS) - names:
        delattr(flags.FLAGS, flag)
"""


def test_no_help_waits_for_jax():
    names = [name for name in COMMANDS if name != "kaggle"]
    program = f"HEAVY = {HEAVY}\n{EVERY_HELP}"
    done = subprocess.run([sys.executable, "-c", program, *names], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for name in names:
        assert f"python -m jgpt.{name}" in done.stdout
    for code in ("0", "1", "2", "3", "4", "5", "130"):
        assert done.stdout.count(f"\n  {code} ") == len(names), code
    assert [code for code, _ in EXIT_CODES] == ["0", "1", "2", "3", "4", "5", "130"]


@pytest.mark.parametrize("arguments", [[], ["--help"], ["-h"], ["help"]])
def test_all_commands_are_listed(arguments, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["jgpt", *arguments])
    entry()
    lines = capsys.readouterr().out.splitlines()
    assert "\n".join(lines) == overview() and max(map(len, lines)) <= 120
    for name, path in COMMANDS.items():
        assert path.is_file() and any(line.startswith(f"  {name} ") for line in lines)


def test_an_unknown_command_is_refused(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["jgpt", "trian"])
    with pytest.raises(SystemExit) as end:
        entry()
    assert end.value.code == 2
    assert "error: 'trian' is no command. Did you mean train? Allowed: train, " in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("sample", "generate"), ("fine-tune", "train --config finetune_lora"), ("export", "convert export"),
        ("resume", "train, with the same arguments: it goes on by itself"), ("eval", "evaluate"),
    ],
)  # fmt: skip
def test_what_others_call_a_command_is_known(name, meant, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["jgpt", name])
    with pytest.raises(SystemExit):
        entry()
    assert f"error: {name!r} is no command. Did you mean jgpt {meant}? Allowed: " in capsys.readouterr().err


def test_other_names_lead_to_commands():
    assert not set(CALLED) & set(COMMANDS)
    assert {re.split(r"[ ,:]", meant)[0] for meant in CALLED.values()} <= set(COMMANDS)


def test_jgpt_runs_a_command_as_the_module_does(tmp_path):
    ends = [
        subprocess.run([sys.executable, *start, "--model", str(tmp_path)], cwd=ROOT, capture_output=True, text=True)
        for start in (["-m", "jgpt", "evaluate"], ["-m", "jgpt.evaluate"])
    ]
    assert ends[0].returncode == ends[1].returncode == 2
    assert ends[0].stderr == ends[1].stderr != ""


def test_the_scripts_that_are_installed():
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["scripts"]
    assert scripts == {"jgpt": "jgpt.__main__:entry", "jgpt-kaggle": "jgpt.kaggle.__main__:entry"}
    assert (ROOT / "jgpt" / "py.typed").is_file()


def test_an_error_that_names_a_key_says_how_it_is_set(command, tiny):
    result = command("prepare", *tiny, "--config.tokenizer.kind=hf")
    assert result.code == 2 and result.err.endswith("\nSet a key by --config.KEY=VALUE, or in the config file.\n")
    assert "Set a key by" not in command("prepare", *tiny, "--config.modle.bias=1").err
