"""Follow README.md as a newcomer does, word for word, in a copy of this checkout, and time each command.

    python scripts/docs/follow_readme.py                              # "Your own text in five commands"
    python scripts/docs/follow_readme.py --section "Try it"

It takes minutes and installs packages from the network, so no test runs it: tests/test_docs_commands.py runs the other
commands with small models. The copy has no virtual environment, and `texts` in it holds the pages of docs/ as text.
"""

import argparse
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]


def commands_of(section: str) -> list[str]:
    """Return the commands of the README's section whose title begins so."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    parts = [part for part in readme.split("\n## ") if part.startswith(section)]
    if len(parts) != 1:
        sys.exit(f"README.md has {len(parts)} sections that begin with {section!r}.")
    blocks = re.findall(r"^```bash\n(.*?)^```", parts[0], re.MULTILINE | re.DOTALL)
    return [command for block in blocks for command in block.splitlines()]


def copy_checkout(folder: Path) -> None:
    """Copy the files of the checkout that git knows, and make `texts`."""
    listed = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    for name in subprocess.run(listed, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\0"):
        if name and (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)
    (folder / "texts").mkdir()
    for page in sorted((ROOT / "docs").glob("*.md")):
        shutil.copy(page, folder / "texts" / f"{page.stem}.txt")


def follow(commands: list[str], folder: Path) -> list[tuple[str, float]]:
    """Run commands in one shell, as they are typed; return each with its seconds. Exits at the first that fails."""
    shell = subprocess.Popen(["bash"], cwd=folder, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert shell.stdin is not None and shell.stdout is not None
    times = []
    for command in commands:
        print(f"\n$ {command}", flush=True)
        began = time.monotonic()
        shell.stdin.write(f"{command}\necho END-OF-COMMAND $?\n")
        shell.stdin.flush()
        code = None
        while code is None and (line := shell.stdout.readline()):
            if found := re.search(r"END-OF-COMMAND (\d+)$", line):
                code, line = int(found[1]), line[: found.start()]
            print(line, end="", flush=True)
        times.append((command, time.monotonic() - began))
        if code != 0:
            sys.exit(f"{command} ended with {code}.")
    shell.stdin.close()
    return times


def main() -> None:
    """Copy, follow, print the times."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--section", default="Your own text", help="the beginning of a section's title")
    section = parser.parse_args().section
    with tempfile.TemporaryDirectory() as folder:
        copy_checkout(Path(folder))
        times = follow(commands_of(section), Path(folder))
    print("\nseconds  command")
    for command, seconds in times:
        print(f"{seconds:7.1f}  {command}")


if __name__ == "__main__":
    main()
