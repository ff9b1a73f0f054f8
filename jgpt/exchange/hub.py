"""Find a model by its name: a directory, a directory below it, or a download from the Hub.

Beside the data path: before `pretrained.py` opens the directory. huggingface_hub downloads: it resumes where the
connection broke, keeps complete files in HF_HOME, reads its token from HF_TOKEN, and stays offline with
HF_HUB_OFFLINE=1.
"""

import errno
import logging
import os
import re
from pathlib import Path

from jgpt.errors import UserError

log = logging.getLogger("jgpt")

HUB_NAME = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")
# Not every safetensors file: some repositories hold the same weights again in another layout.
FILES = [
    "config.json", "generation_config.json", "model.safetensors", "model-*.safetensors", "model.safetensors.index.json",
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json",
    "merges.txt", "tokenizer.model", "chat_template*",
]  # fmt: skip


def locate(name: str) -> Path:
    """Return the directory of a model, which holds config.json; download it where `name` is a name on the Hub.

    Raises UserError when there is no such model, when a directory holds several, and when the download fails.
    """
    directory = Path(name).expanduser()
    if name and directory.is_dir():
        return _below(directory)
    if not is_hub_name(name):
        raise UserError(
            f"there is no directory {name!r} (current folder: {Path.cwd()}). Allowed: a model directory, or a name on"
            " the Hugging Face Hub such as HuggingFaceTB/SmolLM2-135M-Instruct. Correct the name."
        )
    return _download(name)


def is_hub_name(name: str) -> bool:
    """Return whether a name can be one on the Hub ("gpt2", "OWNER/NAME") and is not a directory here."""
    return bool(HUB_NAME.fullmatch(name)) and not Path(name).expanduser().is_dir()


def _below(directory: Path) -> Path:
    """Return the directory itself, or the one below it that holds a model, as Kaggle mounts them."""
    if (directory / "config.json").is_file():
        return directory
    models = sorted({path.parent for path in directory.rglob("config.json") if any(path.parent.glob("*.safetensors"))})
    if len(models) == 1:
        log.info("model: found in %s", models[0])
        return models[0]
    if models:
        listed = ", ".join(map(str, models[:10]))
        raise UserError(f"{directory} holds {len(models)} models: {listed}. Allowed: one. Name one of them.")
    raise UserError(
        f"{directory} holds no model. It must hold config.json and weights in .safetensors, itself or in one directory"
        " below it, or be a training run that has saved at least once. Name such a directory."
    )


def _download(name: str) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=FILES))
    except Exception as error:  # the network libraries may raise any error
        problem, advice = _reason(name, error)
        raise UserError(f"the model {name!r} cannot be downloaded: {problem}. {advice}.") from None


def _reason(name: str, error: Exception) -> tuple[str, str]:
    """Return what went wrong, and what to do."""
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError

    again = "Complete files are kept: the same command continues from there"
    if isinstance(error, LocalEntryNotFoundError):
        if not isinstance(error.__cause__, HfHubHTTPError):
            problem = "it is not on this machine, and the Hub cannot be reached"
            return problem, "Turn the internet on (and HF_HUB_OFFLINE off), or name a directory with the model"
        error = error.__cause__
    if isinstance(error, GatedRepoError):
        problem = "its owner gives access on request"
        return problem, f"Ask for it at https://huggingface.co/{name}, then set HF_TOKEN to a token of yours"
    if isinstance(error, RepositoryNotFoundError):
        problem = "it is not on the Hugging Face Hub, or it is private"
        return problem, "Correct the name (OWNER/NAME), or set HF_TOKEN to a token that may read it"
    if isinstance(error, HfHubHTTPError) and error.response is not None:
        return f"the Hub answered {error.response.status_code}", f"Try again later, or check HF_TOKEN. {again}"
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        place = os.environ.get("HF_HOME", "~/.cache/huggingface")
        return f"the disk of {place} is full", f"Make room, or set HF_HOME to another disk. {again}"
    return f"the download broke off ({type(error).__name__})", f"Check the network. {again}"
