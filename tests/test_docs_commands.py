"""Every command of README.md and docs/ is run here, with small models and texts, or listed with the reason why not.

A section of a page is run from its first command to its last, in a folder of its own. The pages in Chinese have the
same commands (test_docs_zh.py).
"""

import json
import re
import shlex
import shutil
from pathlib import Path

import pytest
from conftest import own_process_state

from jgpt.__main__ import COMMANDS
from jgpt.kaggle.__main__ import VERBS

ROOT = Path(__file__).parents[1]
PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md")), ROOT / "docs" / "benchmarks" / "README.md"]
PAGES = [page for page in PAGES if page.name not in ("CHANGELOG.md", "README.zh-CN.md")]
PROGRAMS = "jgpt python python3 pip bash git sudo ps nvidia-smi sha256sum cd . .ci/run".split()

NOT_RUN = {
    r"python3 -m venv |\. \.venv/|pip install |sudo apt ": "changes the machine, and needs the network",
    r"(\w+=\S+ )?bash scripts/(run_local|test|lint)\.sh|\.ci/run": "installs packages and takes minutes; CI runs them",
    r"bash scripts/launch_local\.sh": "starts several processes; tests/parallel/test_hosts.py does",
    r"jgpt train .*--coordinator_address": "waits for other machines; tests/parallel/test_hosts.py starts all of them",
    r"git clone ": "needs the network",
    r"cd ": "is the folder in which the next command is run",
    r"(python|bash) scripts/bench/": "needs a GPU, PyTorch or minutes; the page says which machine",
    r"python scripts/docs/": "writes into docs/; tests/test_docs.py compares what it would write",
    r"ps |nvidia-smi|sha256sum ": "is a tool of the system",
    r"jgpt plan .*--device|jgpt plan --device": "needs the extra `plan`; tests/planning/test_plan.py runs it",
    r"(jgpt|python -m jgpt\.)\s?serve ": "runs until it is stopped; tests/serve starts it",
    r"jgpt train .*upload=gs://": "needs a bucket; tests/kaggle/test_bucket.py trains with a folder as one",
    r"jgpt train .*budget_hours": "takes the hours that it names; tests/training/test_length.py trains so",
}

# What makes a config small; what a page itself sets counts more, except for how long it trains.
MODEL = {"tokenizer.kind": "bpe", "tokenizer.vocab_size": 300, "model.n_layers": 1, "model.n_heads": 2,
         "model.d_model": 16, "model.context_length": 64}  # fmt: skip
SMALL = {"log_every_steps": 1, "batch.global_batch_size": 4, "execution.micro_batch_size": 2, "eval.every_steps": 2,
         "batch.sequence_length": 64, "eval.batches": 1, "sample.max_new_tokens": 4, "sample.every_steps": 0,
         "data.val_fraction": 0.1, "checkpoint.every_steps": 2}  # fmt: skip
SHORT = {"optimizer.total_steps": 4, "optimizer.warmup_steps": 1}
HUB_MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"  # in these tests a directory, which is looked for first
PLACEHOLDERS = {"YOU": "owner", "STEP": "4", "Qwen/Qwen2.5-7B-Instruct": HUB_MODEL}
TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def sections(page: Path) -> list[tuple[str, list[str]]]:
    """Return the sections of a page, each with its commands: of its blocks, and in its sentences and tables."""
    title, found = "", {}
    text = re.sub(r"^(```\w*\n)(.*?)^```$", _marked, page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    for part in re.split(r"^#+ (?=.*\n)", text, flags=re.MULTILINE)[1:]:
        title, _, body = part.partition("\n")
        found[title] = [
            " ".join(command.split()) for command in re.findall(r"\0(.+)|`([^`\0]+)`", body) for command in command
        ]
    return [(title, [line for line in lines if is_command(line)]) for title, lines in found.items()]


def _marked(block: re.Match[str]) -> str:
    """Mark the commands of a block: all lines of bash, those that begin with ! or % in a notebook."""
    notebook = block[1] == "```text\n"
    lines = [re.sub(r"(^|\s+)#.*", "", line) for line in block[2].splitlines()]
    if block[1] == "```bash\n":
        return "\n".join(f"\0{command}" for line in lines for command in line.split(" && "))
    cells = [line[1:] for line in lines if notebook and line[:1] in ("!", "%")]
    return "\n".join(f"\0{command}" for line in cells for command in line.split(" && "))


def is_command(line: str) -> bool:
    """Tell whether a line, or what a sentence has in code, is a command."""
    words = [word for word in line.split() if not re.match(r"[A-Z]+=", word)]
    return bool(words) and words[0] in PROGRAMS and (len(words) > 1 or words[0] in ("nvidia-smi", ".ci/run"))


def reason_not_to_run(command: str) -> str:
    """Say why a command is not run here; "" where it is."""
    return next((reason for pattern, reason in NOT_RUN.items() if re.match(pattern, command)), "")


ALL = [(page, title, commands) for page in PAGES for title, commands in sections(page) if commands]
TO_RUN = [
    pytest.param(commands, id=f"{page.relative_to(ROOT)}: {title}")
    for page, title, commands in ALL
    if not all(map(reason_not_to_run, commands))
]


def test_the_commands_are_found():
    everything = [command for _, _, commands in ALL for command in commands]
    run = [command for command in everything if not reason_not_to_run(command)]
    assert len(everything) > 80 and len(run) > 50
    for command in (
        "bash scripts/run_local.sh", "jgpt check_env", "jgpt kaggle push", "python -m jgpt.check_env --run_dir",
        "jgpt train --config laptop --config.data.text_glob=texts", "PYTHON=/path/to/python3.12 bash", "ps aux",
    ):  # fmt: skip
        assert any(line.startswith(command) for line in everything), command
    assert all(line.startswith(("jgpt ", "python -m jgpt")) for line in run), run


@pytest.mark.parametrize("pattern", NOT_RUN)
def test_what_is_not_run_is_in_a_page(pattern):
    assert any(re.match(pattern, command) for _, _, commands in ALL for command in commands), pattern


@pytest.fixture(scope="module")
def chat_model(command, tmp_path_factory) -> Path:
    """Train a small model on conversations, export it, and train adapters to that: `run`, `exported` and `lora`."""
    root = tmp_path_factory.mktemp("chat")
    write_texts(root)
    (root / "template.jinja").write_text(TEMPLATE)
    settings = {"out_dir": root / "run", "data.format": "chat", "data.text_glob": root / "chats" / "*.jsonl",
                "tokenizer.chat_template": root / "template.jinja"}  # fmt: skip
    trained = command("train", "--config=base", *flags(MODEL | SMALL | SHORT | settings))
    assert trained.code == 0, trained.err
    exported = command("convert", "export", str(root / "run"), str(root / "exported"))
    assert exported.code == 0, exported.err
    adapters = {"out_dir": root / "lora", "init_from": root / "exported", "lora.rank": 2}
    trained = command("train", "--config=finetune_lora", *flags(SMALL | SHORT | settings | adapters))
    assert trained.code == 0, trained.err
    return root


def flags(config: dict) -> list[str]:
    return [f"--config.{key}={value}" for key, value in config.items()]


def write_texts(root: Path) -> None:
    """Write the files that the pages speak of."""
    lines = [f"Once upon a time {n} was a number, and class {n} def main(" for n in range(99)]
    for name in ("texts/a.txt", "texts/more/b.txt", "tables/a.csv", "other/a.py"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text("\n".join(lines) + f"\n{name}\n")
    (root / "data").mkdir()
    (root / "data" / "a.jsonl").write_text("".join(json.dumps({"content": line}) + "\n" for line in lines))
    shown = json.loads(re.findall(r"^```json\n(.*?)```", (ROOT / "docs" / "finetuning.md").read_text(), re.M | re.S)[0])
    chats = []
    for line in lines:
        messages = [message | {"content": line} for message in shown["messages"]]
        chats.append(json.dumps(shown | {"messages": messages}) + "\n")
    for folder in ("chats", "test_chats"):
        (root / folder).mkdir()
        (root / folder / "a.jsonl").write_text("".join(chats))


@pytest.mark.slow  # a minute in all
@pytest.mark.parametrize("commands", TO_RUN)
def test_the_commands_of_a_section_work(commands, command, chat_model, tmp_path, monkeypatch):
    write_texts(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("JGPT_KAGGLE_ROOT", str(tmp_path / "kaggle"))
    for place in (HUB_MODEL, "kaggle/input/qwen2.5"):
        shutil.copytree(chat_model / "exported", place)
    for line in commands:
        if reason_not_to_run(line):
            continue
        words = shlex.split(small(line).replace("/kaggle/", f"{tmp_path}/kaggle/"))
        words = [words[2].removeprefix("jgpt."), *words[3:]] if words[0] == "python" else words[1:]
        assert words[0] in COMMANDS, line
        # What another section trains is put where it would be.
        for run in (word for word in words if re.fullmatch(r"runs/[\w/-]+", word)):
            if not Path(run).exists() and words[1] != "import":
                shutil.copytree(chat_model / ("lora" if "lora" in run else "run"), run)
        if asks_for_a_name_alone(words):
            options = [word.partition("=")[0] for word in words if word.startswith("--")]
            result = command(*module_of(words), "--help")
            assert all(f"\n  {option} " in result.out for option in options), line
        else:
            result = command(*module_of(words), *additions(words), stdin="one two\n")
        assert result.code == 0, f"{line}\n{result.err}"


def asks_for_a_name_alone(words: list[str]) -> bool:
    """Tell whether a command is named, without what it needs."""
    if words[0] == "kaggle":
        return words[1] in VERBS and words[1] != "publish" and "--slug" not in words
    return len(words) == 1 and words[0] != "check_env"


def module_of(words: list[str]) -> list[str]:
    return [f"{words[0]}.__main__", *words[1:]] if words[0] in ("kaggle", "serve") else words


def additions(words: list[str]) -> list[str]:
    """Return the flags that make a command short, and keep it on this machine."""
    short = {
        "train": flags(SHORT), "generate": ["--max_new_tokens=3"], "chat": ["--max_new_tokens=3"],
        "check_env": ["--quick"], "kaggle": ["--dry_run"],
    }  # fmt: skip
    return short.get(words[0], [])


def small(line: str) -> str:
    """Put small sizes behind the config of a command, and names for the placeholders."""
    for placeholder, name in PLACEHOLDERS.items():
        line = re.sub(rf"(?<!\w){placeholder}(?!\w)", name, line)
    line = line.replace("publish DIR", "publish texts").replace('--prompt "def main("', "--prompt 'def main('")
    if not (config := re.search(r"jgpt[ .](?:train|prepare) --config (\S+)", line)):
        return line
    sizes = SMALL | ({"init_from": HUB_MODEL} if "finetune" in config[1] else MODEL | {"data.text_glob": "texts"})
    return line.replace(config[0], f"{config[0]} {' '.join(flags(sizes))}", 1)


def test_the_cell_that_trains_in_a_notebook(tmp_path, monkeypatch):
    """The Python of docs/kaggle.md, on an imitated Kaggle."""
    (cell,) = re.findall(r"^```python\n(.*?)```", (ROOT / "docs" / "kaggle.md").read_text(), re.MULTILINE | re.DOTALL)
    write_texts(tmp_path / "input")
    (tmp_path / "working").mkdir()
    monkeypatch.syspath_prepend(ROOT)
    monkeypatch.setenv("KAGGLE_KERNEL_RUN_TYPE", "Interactive")
    monkeypatch.setenv("JGPT_KAGGLE_ROOT", str(tmp_path))
    assert cell.split() == ["import", "jgpt", 'jgpt.train("kaggle_t4")']
    with own_process_state():
        exec(cell.replace(")", ", sizes)"), {"sizes": MODEL | SMALL | SHORT})
    run = tmp_path / "working" / "outputs"
    assert json.loads((run / "status.json").read_text())["state"] == "finished"
