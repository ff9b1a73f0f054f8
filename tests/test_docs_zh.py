"""The Chinese pages say what the English ones say: the same sections, commands, names, numbers and links."""

import os.path
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAIRS = {
    ROOT / "README.md": ROOT / "README.zh-CN.md",
    **{DOCS / path.name: path for path in sorted((DOCS / "zh").glob("*.md"))},
}
FENCED = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
LINK = re.compile(r"\]\(([^)\s]+)\)")


def sections(text: str) -> Iterator[tuple[int, str]]:
    """Split a page at its headings; yield the level of each, and its section with the heading."""
    hidden = FENCED.sub(lambda block: block[0].replace("#", "\0"), text)  # a comment in a command is no heading
    for part in re.split(r"^(?=#+ )", hidden, flags=re.MULTILINE)[1:]:
        yield len(part) - len(part.lstrip("#")), part.replace("\0", "#")


def facts(section: str, page: Path) -> dict[str, Any]:
    """Return what a translation must not change."""
    blocks = [
        (kind, [re.sub(r"\s+#.*", "", line) for line in body.splitlines()]) for kind, body in FENCED.findall(section)
    ]
    prose = FENCED.sub("", section)
    names = Counter(" ".join(name.split()) for name in re.findall(r"`([^`]+)`", prose))
    prose = re.sub(r"`[^`]+`", "", prose)
    links = Counter(os.path.relpath(page.parent / link, ROOT) for link in LINK.findall(prose) if ":" not in link)
    prose = LINK.sub("]", prose)
    return {
        "commands": blocks,
        "names in code": names,
        "numbers": Counter(number.replace(",", "") for number in re.findall(r"\d+(?:[.,]\d+)*", prose)),
        "links": links,
        "rows of tables": len(re.findall(r"^\|", prose, re.MULTILINE)),
        "points of lists": len(re.findall(r"^(?:-|\d\.) ", prose, re.MULTILINE)),
    }


def differences(english: str, chinese: str, page: Path, translation: Path) -> list[str]:
    """List where a page and its translation are not in step, "" where they are."""
    ours, theirs = list(sections(english)), list(sections(chinese))
    if [level for level, _ in ours] != [level for level, _ in theirs]:
        return [f"other headings: {[s.splitlines()[0] for _, s in ours]}, {[s.splitlines()[0] for _, s in theirs]}"]
    found = []
    for (_, a), (_, b) in zip(ours, theirs, strict=True):
        wanted, have = facts(a, page), facts(b, translation)
        wanted["links"] = Counter(_as_translated(link) for link in wanted["links"].elements())
        found += [f"{a.splitlines()[0]}: other {what}: {wanted[what]}, {have[what]}" for what in wanted
                  if wanted[what] != have[what]]  # fmt: skip
    return found


def _as_translated(link: str) -> str:
    """Return the page that a Chinese page links to where the English one has `link`; a page links to its other form."""
    pairs = {os.path.relpath(a, ROOT): os.path.relpath(b, ROOT) for a, b in PAIRS.items()}
    both = pairs | {b: a for a, b in pairs.items()}
    return both.get(link, link)


@pytest.mark.parametrize("page", PAIRS, ids=lambda page: page.name)
def test_both_languages_say_the_same(page):
    translation = PAIRS[page]
    found = differences(page.read_text(encoding="utf-8"), translation.read_text(encoding="utf-8"), page, translation)
    assert found == [], "\n".join(found)


def test_start_kaggle_and_troubleshooting_are_there_in_chinese():
    assert {page.name for page in PAIRS} == {"README.md", "start.md", "kaggle.md", "troubleshooting.md"}
    for page in PAIRS.values():
        assert len(re.findall(r"[\u4e00-\u9fff]", page.read_text(encoding="utf-8"))) > 500, page


@pytest.mark.parametrize(
    ("old", "new", "named"),
    [
        ("## 安装\n", "", "other headings"),
        ("## 安装\n", "### 安装\n", "other headings"),
        ("\njgpt check_env\n", "\njgpt check-env\n", "## Install: other commands"),
        ("\njgpt check_env\n", "\n", "## Install: other commands"),
        ("2 个 CPU 核", "4 个 CPU 核", "## Configs: other numbers"),
        ("10.7 M", "107 M", "## Configs: other numbers"),
        ("`loss.png`", "loss.png", "## Install: other names in code"),
        ("bits/byte)", "bit/byte)", "## What you see: other commands"),
        ("](../glossary.md)", "](../data.md)", "## What you see: other links"),
        ("| 4 | 训练发散：好的检查点都还在 |\n", "", "## Exit codes: other numbers"),
        ("- `lr` 是", "`lr` 是", "## What you see: other points of lists"),
    ],
)
def test_a_change_in_one_language_alone_is_found(old, new, named):
    page = DOCS / "start.md"
    english, chinese = page.read_text(encoding="utf-8"), PAIRS[page].read_text(encoding="utf-8")
    assert old in chinese
    assert any(named in line for line in differences(english, chinese.replace(old, new, 1), page, PAIRS[page]))
