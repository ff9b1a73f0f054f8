"""What the documents name exists: files, functions, commands, configs and keys. No file names one person's machine."""

import ast
import importlib.util
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from jgpt.__main__ import COMMANDS
from jgpt.cli.help import EXIT_CODES
from jgpt.config.defaults import default_config, flatten
from jgpt.kaggle.__main__ import VERBS

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
DOCUMENTS = sorted([*PAGES, *(ROOT / "configs").glob("*.py"), *(ROOT / "jgpt").rglob("*.py")])
GROUPS = {key.split(".")[0] for key in flatten(default_config())}


def tracked() -> list[Path]:
    """List the files of the repository; without git, those that would be in it."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    try:
        listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
    except (OSError, subprocess.CalledProcessError):
        folders = ("jgpt", "configs", "scripts", "tests", "docs", ".ci", ".github")
        listed = [str(p.relative_to(ROOT)) for folder in folders for p in (ROOT / folder).rglob("*.*")]
        listed += [path.name for path in ROOT.glob("*.*")]
    return [ROOT / name for name in listed if (ROOT / name).is_file() and not name.endswith((".pyc", ".png"))]


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_what_a_document_names_exists(path):
    text = path.read_text(encoding="utf-8")
    for name in re.findall(r"\bconfigs/(\w+)\.py", text):
        assert (ROOT / "configs" / f"{name}.py").is_file() or name in ("X", "mine", "my_config"), f"configs/{name}.py"
    for name in re.findall(r"python -m jgpt\.(\w+(?:\.\w+)*)", text):
        module = ROOT / "jgpt" / name.replace(".", "/")
        is_there = module.with_suffix(".py").is_file() or (module / "__main__.py").is_file()
        assert is_there or name in ("NAME", "COMMAND"), f"python -m jgpt.{name}"
    for verb in re.findall(r"(?:python -m jgpt\.kaggle|jgpt-kaggle|`jgpt kaggle|^jgpt kaggle) ([\w-]+)", text, re.M):
        assert verb in (*VERBS, "VERB", "--help"), f"python -m jgpt.kaggle {verb}"
    for name in re.findall(r"(?:bash |\()((?:scripts|\.ci)/[\w./]+)", text):
        assert (ROOT / name).exists(), name
    for key in re.findall(r"--config\.([a-z]\w*(?:\.\w+)*)(?==| |`|$|\.)", text):
        assert key in flatten(default_config()) or key in GROUPS, f"--config.{key}"


@pytest.mark.parametrize("path", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_and_paths_lead_to_files(path):
    text = path.read_text(encoding="utf-8")
    for link in re.findall(r"\]\(([^)#\s]+)", text):
        assert link.startswith(("https://", "http://", "mailto:")) or (path.parent / link).exists(), link
    for name in re.findall(r"\b(?:jgpt|scripts|tests|configs|docs)/[\w./-]*\.(?:py|sh|md|svg)\b", text):
        assert (ROOT / name).is_file(), name


def test_each_promise_names_a_test_that_exists():
    named = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", (ROOT / "docs" / "reliability.md").read_text(encoding="utf-8"))
    assert len(named) > 30
    for path, name in named:
        assert f"def {name}(" in (ROOT / path).read_text(encoding="utf-8"), f"{path}::{name}"


def test_the_architecture_names_functions_that_exist():
    rows = re.findall(
        r"\| `(jgpt/\S+\.py)` \| (.+) \|\n", (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    )
    assert len(rows) > 30
    for path, names in rows:
        tree = ast.parse((ROOT / path).read_text(encoding="utf-8"))
        defined = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.ClassDef)}
        defined |= {node.arg for node in ast.walk(tree) if isinstance(node, ast.arg)}
        assert set(re.findall(r"`(\w+)`", names)) <= defined, path


def script(name: str) -> ModuleType:
    """Import scripts/docs/NAME.py."""
    spec = importlib.util.spec_from_file_location(f"docs_{name}", ROOT / "scripts" / "docs" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_picture_of_the_rooms_is_up_to_date():
    draw_rooms = script("draw_rooms")
    drawn = draw_rooms.draw(draw_rooms.read_floors())
    shown = {name.split(".")[0] for name in re.findall(r'class="name"[^>]*>([^<]+)<', drawn)}
    assert {path.parent.name for path in (ROOT / "jgpt").glob("*/__init__.py")} <= shown

    def without_counts(picture: str) -> str:  # or every change of the code would make the picture old
        return re.sub(r">[\d,]+ files?, [\d,]+ lines<", "><", picture)

    committed = draw_rooms.PICTURE.read_text(encoding="utf-8")
    assert without_counts(committed) == without_counts(drawn), "run: python scripts/docs/draw_rooms.py"


def test_the_list_of_config_keys_is_up_to_date():
    configuration = script("configuration")
    written = configuration.page(configuration.read_groups())
    assert sorted(re.findall(r"^\| `([\w.]+)` \|", written, re.MULTILINE)) == sorted(flatten(default_config()))
    committed = configuration.PAGE.read_text(encoding="utf-8")
    assert committed == written, "run: python scripts/docs/configuration.py"


@pytest.mark.parametrize("name", ["README.md", "README.zh-CN.md"])
def test_the_readme_is_short_and_shows_the_way(name):
    readme = (ROOT / name).read_text(encoding="utf-8")
    assert len(readme.splitlines()) < 130 and max(map(len, readme.splitlines())) <= 120
    for part in ("bash scripts/run_local.sh", "bash scripts/test.sh", "pip install", "jgpt train --config"):
        assert part in readme
    five = re.findall(r"```bash\n(.*?)```", readme.split("\n## ")[2], re.DOTALL)[0].splitlines()
    assert len(five) == 5
    linked = re.findall(r"\]\(([^)#]+\.md)\)", readme)
    pages = [path.relative_to(ROOT) for path in PAGES if path.parent == ROOT / "docs"]
    for page in pages:
        assert f"{page}" in linked or f"docs/zh/{page.name}" in linked or page.name in ("flash.md",), page


def test_the_first_steps_list_all_commands_and_configs():
    page = (ROOT / "docs" / "start.md").read_text(encoding="utf-8")
    for command in COMMANDS:
        assert re.search(rf"^\| `jgpt {command}\b.*\|$", page, re.MULTILINE), command
    for config in (ROOT / "configs").glob("*.py"):
        assert f"\n| `{config.stem}` |" in page, config
    assert re.findall(r"^\| (\d+) \|", page, re.MULTILINE) == [code for code, _ in EXIT_CODES]


def test_the_messages_in_troubleshooting_are_those_of_the_code():
    page = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    shown = re.findall(r"^### `([^`]+)`$", page, re.MULTILINE)
    assert len(shown) > 25
    sources = [path.read_text(encoding="utf-8") for path in (ROOT / "jgpt").rglob("*.py")]
    said = [_text(node) for source in sources for node in ast.walk(ast.parse(source)) if _text(node)]
    said.append((ROOT / "scripts" / "environment.sh").read_text(encoding="utf-8"))
    for message in shown:
        for piece in filter(None, (part.strip(" :") for part in message.split("..."))):
            assert any(piece in text for text in said), f"{message}: nothing says {piece!r}"


def _text(node: ast.AST) -> str:
    """Return a text of the source; what it fills in is not known."""
    if isinstance(node, ast.Constant):
        return node.value if isinstance(node.value, str) else ""
    return "".join(_text(part) or "..." for part in node.values) if isinstance(node, ast.JoinedStr) else ""


def test_no_file_names_the_machine_it_was_written_on():
    machine = re.compile(r"(?<![\w.])/(root|home/\w+|Users/\w+|work|mnt|workspace)/")
    found = [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()}"
        for path in tracked()
        if path != Path(__file__)
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1)
        if machine.search(line)
    ]
    assert found == []
