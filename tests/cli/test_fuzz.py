"""Random overrides, command lines and files: whatever a user gives, the answer is never a traceback.

Each command runs as it does for a user, up to where it would compile: there it is interrupted. Each case has a seed of
its own, which its failure names. The cases are few, for the suite; JGPT_FUZZ=1000 tries more:

    JGPT_FUZZ=1000 python -m pytest -n 0 tests/cli/test_fuzz.py
"""

import importlib
import json
import os
import random
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from absl import flags
from conftest import TEXT, Result
from safetensors import safe_open

from jgpt.config.defaults import KEYS
from jgpt.planning.auto import is_auto

CASES = int(os.environ.get("JGPT_FUZZ", 0))
INTERRUPTED = 130

NUMBERS = [0, 1, 2, 3, 7, 64, -1, 2**31 - 1, 2**31, 2**63 - 1, 2**63, 10**30]
REALS = [0.0, 0.5, 1.0, -1.0, 1e-7, 1e-320, 1e6, 1e308, float("inf"), float("-inf"), float("nan")]
TEXTS = [
    "", " ", ".", "..", "-", "--", "~", "~zz", "~zz/a", "a" * 300, "a/" * 300, "é日本", "\udcff", "a\nb", "*", "[",
    "{}", "a,b", ",", "a:b", "hub:", "hub:a/b/c", "dataset:x", "/proc/x", "/dev/null/x", "text.txt", "gpt2", "no/such",
    "None", "true", "%s", "\x1b[31m", "-1", "1e400", "0x10", "1_000",
]  # fmt: skip
# What a file may hold that a flag cannot.
JSONS = [None, True, [], {}, [5], [[]], {"a": 1}, "text", "a" * 300, *NUMBERS, *REALS, 10**400, "0", [None, 2**70]]


@pytest.fixture
def interrupted_before_compiling(monkeypatch: pytest.MonkeyPatch) -> None:
    """Press Ctrl-C where a command would compile."""

    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    def interrupt_a_search(config, *_):
        return interrupt() if is_auto(config) else config

    monkeypatch.setattr("jgpt.training.start.choose_execution", interrupt_a_search)
    for place in (
        "jgpt.training.start.write_identity",
        "jgpt.planning.summary.estimate",
        "jgpt.planning.summary.search",
        "jgpt.inference.write.stream",
        "jgpt.loading.measure.evaluate_loaded",
    ):
        monkeypatch.setattr(place, interrupt)


@pytest.fixture
def folder(tmp_path: Path, trained: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the current folder: a text, a run, and a home without anything."""
    (tmp_path / "home").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    (tmp_path / "text.txt").write_text(TEXT)
    shutil.copytree(trained, tmp_path / "run")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def survey(run: Callable[[random.Random], tuple[list[str], Result]], cases: int, seed: int = 0) -> Counter[int]:
    """Run cases, each with a random generator of its own; fail with all that ended in a traceback."""
    codes: Counter[int] = Counter()
    failures = []
    for case in range(cases):
        arguments, result = run(random.Random(f"{seed} {case}"))
        codes[result.code] += 1
        if result.code not in (0, 2, 3, INTERRUPTED) or "Traceback" in result.err:
            failures.append(f"case {case}: {arguments}: exit {result.code}: {result.err[-1500:]}")
    print(f"exit codes of {cases} cases: {dict(codes)}")
    assert not failures, f"{len(failures)} of {cases}:\n" + "\n\n".join(failures[:20])
    return codes


def value_for(key: str, at: random.Random) -> str:
    """Return a value for a key of the config: at the ends of its range or beyond, or of another kind."""
    known = KEYS[key]
    if at.random() < 0.1:
        return at.choice(TEXTS)
    if known.choices:
        return at.choice([*known.choices, *known.choices, "other"])
    if isinstance(known.value, bool):
        return at.choice(["true", "false", "1", "maybe"])
    if isinstance(known.value, str):
        return at.choice(TEXTS)
    ends = [known.low, known.low - 1, known.high, known.high + 1, known.value, known.value * 2, known.value / 2]
    if isinstance(known.value, int):
        return str(at.choice([*map(int, ends), *NUMBERS]))
    return str(at.choice([*ends, *REALS]))


def overrides(at: random.Random) -> Iterator[str]:
    for key in at.sample(sorted(KEYS), at.choice([1, 1, 2, 3, 6])):
        # A thousand layers are allowed, and tracing them takes a minute.
        value = value_for(key, at)
        if not (key == "model.n_layers" and value in map(str, range(65, 1001))):
            yield f"--config.{key}={value}"


def test_random_overrides_of_a_config(command, tiny, folder, interrupted_before_compiling):
    def run(at: random.Random) -> tuple[list[str], Result]:
        name = at.choice(["train", "train", "train", "prepare", "plan"])
        shutil.rmtree(folder / "out", ignore_errors=True)
        own = at.choice([["--config.out_dir=out"], ["--config.out_dir=out"], ["--config.out_dir=run"]])
        arguments = [name, *tiny, *own, *overrides(at), *(["--device=this"] if name == "plan" else [])]
        return arguments[len(tiny) + 1 :] + [name], command(*arguments)

    codes = survey(run, CASES or 40)
    assert codes[2] and codes[INTERRUPTED]  # some are refused, and some are not


def flags_of(name: str) -> dict[str, list[Any]]:
    """Return the flags of a command, each with values of its kind."""
    known = set(flags.FLAGS)
    importlib.import_module(f"jgpt.{name}").define_flags()
    found: dict[str, list[Any]] = {}
    for flag in sorted(set(flags.FLAGS) - known):
        kind = flags.FLAGS[flag].flag_type()
        words = getattr(flags.FLAGS[flag].parser, "enum_values", TEXTS)
        found[flag] = {"int": NUMBERS, "float": REALS, "bool": ["true", "false"]}.get(kind, words)
        delattr(flags.FLAGS, flag)
    return found


def command_line(known: dict[str, dict[str, list[Any]]], at: random.Random) -> list[str]:
    """Return a command with some of its flags, each with a value that may be right or not."""
    name = at.choice(["generate", "generate", "evaluate", "chat", "convert", "train", "prepare", "plan"])
    arguments = [name]
    if name == "convert":
        arguments += at.sample(["import", "export", "gguf", "run", "exported", "new", *TEXTS], at.choice([2, 3, 3, 4]))
        if at.random() < 0.7:
            arguments[1:] = at.choice(
                [["import", "exported", "new"], ["export", "run", "new"], ["gguf", "run", "new.gguf"]]
            )
    elif name in known and name != "plan":
        arguments += [f"--model={at.choice(['run', 'run', 'run', 'exported', at.choice(TEXTS)])}"]
        arguments += ["--chat_template=text.txt", "--prompt=7"] * (name == "chat" and at.random() < 0.8)
    else:
        arguments += at.choice([["--config=base"], ["--config", "base"], ["--config=base"], [at.choice(TEXTS)]])
        arguments += ["--config.out_dir=out", "--config.data.text_glob=text.txt", "--config.tokenizer.kind=char"]
    own = known.get(name) or {f"config.{key}": [value_for(key, at)] for key in KEYS}
    for flag in at.sample(sorted(own), min(len(own), at.choice([0, 1, 1, 2, 4]))):
        value = at.choice(own[flag]) if at.random() < 0.8 else at.choice([*TEXTS, *NUMBERS, *REALS])
        arguments += [f"-{flag}", str(value)] if at.random() < 0.1 else [f"--{flag}={value}"]
    if at.random() < 0.1:
        arguments.insert(at.randrange(1, len(arguments) + 1), at.choice(["--", "-x", "--no", "-", "word", *TEXTS]))
    return arguments


def test_random_command_lines(command, folder, interrupted_before_compiling):
    assert command("convert", "export", "run", "exported").code == 0
    known = {name: flags_of(name) for name in ("generate", "evaluate", "chat", "convert", "plan")}

    def run(at: random.Random) -> tuple[list[str], Result]:
        shutil.rmtree(folder / "new", ignore_errors=True)
        arguments = command_line(known, at)
        return arguments, command(*arguments, stdin=at.choice([b"", b"text", b"\xff\xfe"]))

    codes = survey(run, CASES // 2 or 40, seed=1)
    assert codes[2] and codes[0] + codes[INTERRUPTED]


def spoilt(content: Any, at: random.Random) -> Any:
    """Return JSON with one value changed, or one key gone or new, at any depth."""
    if not isinstance(content, dict) or not content or at.random() < 0.02:
        return at.choice(JSONS)
    key = at.choice(sorted(content))
    if at.random() < 0.1:
        return {name: value for name, value in content.items() if name != key}
    if at.random() < 0.05:
        return content | {"new": at.choice(JSONS)}
    return content | {key: spoilt(content[key], at)}


# The files that a user may have edited, or got from others; each with a command that reads it.
FILES = {
    "run/config.json": [["evaluate", "--model=run"], ["convert", "export", "run", "new"], ["train"]],
    "run/tokenizer/tokenizer_config.json": [["generate", "--model=run", "--prompt=7"]],
    "exported/config.json": [["generate", "--model=exported"], ["convert", "import", "exported", "new"]],
    "exported/generation_config.json": [["chat", "--model=exported", "--chat_template=text.txt", "--prompt=7"]],
    "exported/tokenizer_config.json": [["generate", "--model=exported", "--prompt=7"]],
    "exported/model.safetensors.index.json": [["generate", "--model=exported"]],
}


def test_random_changes_of_json_files(command, tiny, folder, interrupted_before_compiling):
    assert command("convert", "export", "run", "exported").code == 0
    (folder / "exported" / "model.safetensors").rename(folder / "exported" / "model-1.safetensors")
    weight_map = {name: "model-1.safetensors" for name in _read_names(folder / "exported" / "model-1.safetensors")}
    index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
    (folder / "exported" / "model.safetensors.index.json").write_text(json.dumps(index))
    right = {name: (folder / name).read_text() for name in FILES}

    def run(at: random.Random) -> tuple[list[str], Result]:
        shutil.rmtree(folder / "new", ignore_errors=True)
        name = at.choice(sorted(FILES))
        text = json.dumps(spoilt(json.loads(right[name]), at))
        cut = at.choice([text] * 9 + [text[: at.randrange(len(text))], "[" * 100_000])
        (folder / name).write_text(cut)
        arguments = at.choice(FILES[name])
        result = command(*arguments, *(tiny if arguments == ["train"] else []))
        (folder / name).write_text(right[name])
        return [*arguments, name, cut[:3000]], result

    codes = survey(run, CASES or 40, seed=2)
    assert codes[2] and codes[0] + codes[INTERRUPTED]


def _read_names(path: Path) -> list[str]:
    with safe_open(path, framework="numpy") as file:
        return list(file.keys())
