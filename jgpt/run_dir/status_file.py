"""status.json: how a run stands, for whoever looks in from outside.

Beside the data path: training writes it when a run begins, saves and ends.
"""

import json
import os
import time
from pathlib import Path

from jgpt.atomic_write import write_json
from jgpt.config.files import user_path
from jgpt.parallel.hosts import is_first
from jgpt.redaction import redact_values


def write_status(
    run_dir: Path, state: str, step: int, total_steps: int, reason: str, command: str, try_command: str = ""
) -> None:
    """Write status.json; `state` is running, finished, stopped or failed.

    `command` is what makes the run go on, `try_command` what tries its model.
    """
    now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    status = {"state": state, "step": step, "total_steps": total_steps, "reason": reason, "resume_command": command}
    status |= {"try_command": try_command, "time": now, "pid": os.getpid()}
    write_json(run_dir / "status.json", redact_values(status))  # an error may quote a secret


def write_lost(out_dir: str, reason: str, command: str) -> None:
    """Write into status.json, in process 0, that the run ends because another of its processes has ended."""
    run_dir = user_path(out_dir).absolute()
    if is_first() and (run_dir / "status.json").is_file():
        status = json.loads((run_dir / "status.json").read_text(encoding="utf-8"))
        write_status(run_dir, "failed", status["step"], status["total_steps"], reason, command)
