"""A small model that has learned a few conversations by heart, and `jgpt serve` as a process of its own."""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from small_chat import CHATML

import jgpt

ROOT = Path(__file__).parents[2]
CHINESE = (
    "你好，请介绍一下自己。",
    "你好！我是一个小小的语言模型，只有几万个参数。\n\n我会写中文，也会写代码：\n```python\nprint('你好，世界')\n```\n"
    "但是我说的话不一定对。",
)
ATTACK = (
    "Show me an attack.",
    "Here is one: <script>document.title = 'stolen'</script><img src=x onerror=\"document.title='stolen'\"> & that is"
    " all.",
)
COUNT = ("Count.", "one two three four five six seven eight nine ten")


def learn_by_heart(root: Path) -> Path:
    """Train a model on a few conversations until it knows them; return its run directory."""
    known = [[CHINESE], [ATTACK], [COUNT], [CHINESE, ATTACK]]
    said = [
        [message for q, a in turns for message in ({"role": "user", "content": q}, {"role": "assistant", "content": a})]
        for turns in known
    ]
    lines = [json.dumps({"messages": messages}, ensure_ascii=False) + "\n" for messages in said * 30]
    (root / "chats.jsonl").write_text("".join(lines), encoding="utf-8")
    (root / "template.jinja").write_text(CHATML)
    changes = {
        "out_dir": str(root / "parrot"), "log_every_steps": 50, "data.text_glob": str(root / "chats.jsonl"),
        "data.format": "chat", "tokenizer.kind": "bpe", "tokenizer.vocab_size": 400,
        "tokenizer.chat_template": str(root / "template.jinja"), "model.n_layers": 2, "model.n_heads": 4,
        "model.d_model": 64, "model.context_length": 256, "optimizer.total_steps": 100, "optimizer.warmup_steps": 10,
        "optimizer.learning_rate": 1e-2, "batch.global_batch_size": 4, "execution.micro_batch_size": 2,
        "eval.every_steps": 100, "sample.num_samples": 0,
    }  # fmt: skip
    return jgpt.train("base", changes).run_dir


@dataclass
class Server:
    """A server that runs."""

    process: subprocess.Popen[str]
    address: str

    def health(self) -> dict:
        """Return what /health says."""
        with urllib.request.urlopen(f"{self.address}/health", timeout=60) as answer:
            return json.load(answer)

    def wait_until_idle(self, seconds: float = 60) -> None:
        """Wait until no text is written and none waits."""
        end = time.monotonic() + seconds
        while self.health() != {"status": "ok", "active": 0, "waiting": 0}:
            assert time.monotonic() < end, self.health()
            time.sleep(0.05)


@contextlib.contextmanager
def serving(model: Path, *flags: str, **environment: str) -> Iterator[Server]:
    """Run `jgpt serve` on a free port; interrupt it at the end, as Ctrl-C does, and see that it ends well."""
    command = [sys.executable, "-m", "jgpt.serve", f"--model={model}", "--port=0", *flags]
    env = {**os.environ, "PYTHONUNBUFFERED": "1", **environment}
    process = subprocess.Popen(command, cwd=ROOT, env=env, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    try:
        said = ""
        while not (found := re.search(r"^API:  (http://\S+)/v1", said, re.MULTILINE)):
            line = process.stderr.readline()
            assert line, said
            said += line
        yield Server(process, found[1])
        process.send_signal(signal.SIGINT)
        _, rest = process.communicate(timeout=60)
        assert process.returncode == 0 and rest.endswith("stopped\n") and "Traceback" not in rest, rest
    finally:
        process.kill()
        process.wait()
        process.stderr.close()
