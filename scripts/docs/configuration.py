"""Write docs/configuration.md, the table of all config keys: python scripts/docs/configuration.py

The values and the reasons are those of jgpt/config/, where every key is defined.
"""

from dataclasses import dataclass, field
from pathlib import Path

from jgpt.config.defaults import GROUPS

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "configuration.md"

INTRODUCTION = """# Configuration

All config keys, with the values that they have when a config file does not change them. This page is made by
`python scripts/docs/configuration.py` from the code; do not edit it.

A config file is a Python file with a function `get_config()`. It starts from `jgpt.config.default_config()`, changes
some keys, and returns the config. The files in `configs/` are examples. On the command line
`--config.GROUP.KEY=VALUE` overrides one key, as often as you like:

```bash
jgpt train --config quickstart --config.optimizer.total_steps=2000
```

`jgpt train --help` prints the same keys. A key that does not exist is refused, with the nearest name that does. All
problems of a config are reported at once, before anything else is done.
"""


@dataclass
class Setting:
    """One key as the page shows it."""

    name: str
    value: str
    allowed: str
    reason: str


@dataclass
class Group:
    """The keys that share a prefix; the keys without one have the empty name."""

    name: str
    reason: str
    settings: list[Setting] = field(default_factory=list)


def read_groups() -> list[Group]:
    """Read keys, values, reasons and what is allowed. This is the only function here that knows where they are."""
    groups = []
    for group in GROUPS:
        page_group = Group(group.name, group.reason)
        for name, key in group.keys.items():
            choices = [f"`{choice}`" + (f" ({meaning})" if meaning else "") for choice, meaning in key.choices.items()]
            allowed = ", ".join(choices) or key.allowed()
            value = key.shown or f"`{key.value!r}`"
            page_group.settings.append(Setting(f"{group.name}.{name}".lstrip("."), value, allowed, key.reason))
        groups.append(page_group)
    return groups


def page(groups: list[Group]) -> str:
    """Return the page as Markdown, a table for each group."""
    parts = [INTRODUCTION]
    for group in groups:
        title = f"## `{group.name}`" if group.name else "## The run"
        parts.append(title + (f"\n\n{_sentence(group.reason)}" if group.reason else "") + "\n")
        rows = [("key", "value", "allowed", "what it is"), ("---", "---", "---", "---")]
        rows += [(f"`{s.name}`", s.value, s.allowed, _cell(s.reason)) for s in group.settings]
        parts.append("\n".join(f"| {' | '.join(row)} |" for row in rows) + "\n")
    return "\n".join(parts)


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def _sentence(text: str) -> str:
    return text[0].upper() + text[1:] + "."


if __name__ == "__main__":
    PAGE.write_text(page(read_groups()), encoding="utf-8")
    print(f"wrote {PAGE.relative_to(ROOT)}")
