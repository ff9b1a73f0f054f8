"""What the documents promise is there: files, commands, configs and keys; and nothing names one person's machine."""

import re
import subprocess
from pathlib import Path

import pytest

from jgpt.config.defaults import default_config, flatten
from jgpt.kaggle.__main__ import VERBS

ROOT = Path(__file__).parents[1]
DOCUMENTS = sorted([*ROOT.glob("*.md"), *(ROOT / "configs").glob("*.py"), *(ROOT / "jgpt").rglob("*.py")])
GROUPS = {key.split(".")[0] for key in flatten(default_config())}


def tracked() -> list[Path]:
    """List the files of the repository; without git, those that would be in it."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    try:
        listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
    except (OSError, subprocess.CalledProcessError):
        folders = ("jgpt", "configs", "scripts", "tests", ".ci")
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
    for verb in re.findall(r"(?:python -m jgpt\.kaggle|jgpt-kaggle) ([\w-]+)", text):
        assert verb in (*VERBS, "VERB", "--help"), f"python -m jgpt.kaggle {verb}"
    for name in re.findall(r"(?:bash |\()((?:scripts|\.ci)/[\w./]+)", text):
        assert (ROOT / name).exists(), name
    for key in re.findall(r"--config\.([a-z]\w*(?:\.\w+)*)(?==| |`|$|\.)", text):
        assert key in flatten(default_config()) or key in GROUPS, f"--config.{key}"


@pytest.mark.parametrize("path", sorted(ROOT.glob("*.md")), ids=lambda path: path.name)
def test_links_lead_to_files(path):
    for link in re.findall(r"\]\(([^)#\s]+)", path.read_text(encoding="utf-8")):
        assert link.startswith(("https://", "http://", "mailto:")) or (path.parent / link).exists(), link


def test_the_readme_is_short_and_shows_the_way():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    if not readme.strip():
        pytest.skip("there is none yet")
    assert len(readme.splitlines()) < 200
    assert re.findall(r"@[A-Z]{3,}@", readme) == [], "measured numbers are still to be filled in"
    for part in ("bash scripts/run_local.sh", "bash scripts/test.sh", "pip install", "python -m jgpt.train --config"):
        assert part in readme
    for command in ("prepare", "generate", "evaluate", "check_env"):
        assert f"jgpt.{command}" in readme
    for config in (ROOT / "configs").glob("*.py"):
        assert config.stem in readme


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
