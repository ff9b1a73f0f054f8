"""Find a model by its name: a directory, a directory below it, or a download from the Hub.

Beside the data path: before `pretrained.py` opens the directory. huggingface_hub downloads: it resumes where the
connection broke, keeps complete files in HF_HOME, reads its token from HF_TOKEN, and stays offline with
HF_HUB_OFFLINE=1.
"""

import logging
import os
import re
from contextlib import suppress
from pathlib import Path

from jgpt.config.files import user_path
from jgpt.errors import UserError, is_disk_full
from jgpt.wording import did_you_mean

log = logging.getLogger("jgpt")

ADAPTER_CONFIG = "adapter_config.json"
HUB_NAME = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")
# Not every safetensors file: some repositories hold the same weights again in another layout.
FILES = [
    "config.json", "generation_config.json", "model.safetensors", "model-*.safetensors", "model.safetensors.index.json",
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json",
    "merges.txt", "tokenizer.model", "chat_template*", "README.md", ADAPTER_CONFIG, "adapter_model.safetensors",
]  # fmt: skip


def locate(name: str) -> Path:
    """Return the directory of a model, which holds config.json, or of an adapter of PEFT (see `is_adapter`).

    It is downloaded where `name` is a name on the Hub.

    Raises UserError when there is no such model, when a directory holds several, and when the download fails.
    """
    directory = user_path(name)
    if name and os.path.isdir(directory):
        return _below(directory)
    if name and os.path.isfile(directory):
        raise UserError(
            f"{name[:200]!r} is a file. Allowed: the directory of a model, with config.json, weights in .safetensors"
            " and a tokenizer, or that of a run. Name the directory."
        )
    folder, runs = _runs_near(name)
    if not is_hub_name(name) or folder == directory.parent != Path():  # runs/mistyped: the other runs are in runs/
        raise UserError(
            f"there is no directory {name[:200]!r} (current folder: {Path.cwd()}).{_named(name, runs)} Allowed: a model"
            " directory, or a name on the Hugging Face Hub such as HuggingFaceTB/SmolLM2-135M-Instruct. Correct the"
            " name."
        )
    return _download(name, _named(name, runs))


def is_adapter(directory: Path) -> bool:
    """Return whether a directory holds adapters in PEFT's layout, and not the model that they belong to."""
    return (directory / ADAPTER_CONFIG).is_file() and not any(directory.glob("model*.safetensors"))


def is_hub_name(name: str) -> bool:
    """Return whether a name can be one on the Hub ("gpt2", "OWNER/NAME") and is not a directory here."""
    return bool(HUB_NAME.fullmatch(name)) and not os.path.isdir(user_path(name))


def cached_card(name: str) -> Path | None:
    """Return the model card of a model that is on this machine: in its directory, or downloaded; None without one."""
    directory = user_path(name)
    if os.path.isdir(directory):
        return directory / "README.md" if (directory / "README.md").is_file() else None
    from huggingface_hub import try_to_load_from_cache

    with suppress(ValueError):  # a name that the Hub does not allow
        found = try_to_load_from_cache(name, "README.md") if is_hub_name(name) else None
        return Path(found) if isinstance(found, str) else None
    return None


def _runs_near(name: str) -> tuple[Path, list[str]]:
    """Return where a user may have meant a directory to be, beside others or in runs/, and the runs there."""
    for folder in (user_path(name).parent, Path("runs")):
        try:
            entries = sorted(os.listdir(folder))
        except OSError:
            continue
        if runs := [str(folder / entry) for entry in entries if os.path.isdir(folder / entry / "checkpoints")]:
            return folder, runs
    return Path(), []


def _named(name: str, runs: list[str]) -> str:
    if not runs:
        return ""
    return f"{did_you_mean(name, runs)} Runs here: {', '.join(runs[:10])}{', ...' if len(runs) > 10 else ''}."


def _below(directory: Path) -> Path:
    """Return the directory itself, or the one below it that holds a model, as Kaggle mounts them."""
    if is_adapter(directory) or (directory / "config.json").is_file():
        return directory
    found = {path.parent for path in directory.rglob("config.json") if any(path.parent.glob("*.safetensors"))}
    models = sorted(found | {path.parent for path in directory.rglob(ADAPTER_CONFIG) if is_adapter(path.parent)})
    if len(models) == 1:
        log.info("model: found in %s", models[0])
        return models[0]
    if models:
        listed = ", ".join(map(str, models[:10]))
        raise UserError(f"{directory} holds {len(models)} models: {listed}. Allowed: one. Name one of them.")
    whole = next((path.parent for path in (directory, *directory.parents) if path.name == "checkpoints"), None)
    if whole is not None and (whole / "config.json").is_file():
        step = f"; --step={directory.name} takes that checkpoint" if directory.name.isdecimal() else ""
        raise UserError(f"{directory} is a part of the run {whole}. Allowed: the run itself. Name {whole}{step}.")
    raise UserError(
        f"{directory} holds no model. It must hold config.json and weights in .safetensors, itself or in one directory"
        " below it, or be a training run that has saved at least once. Name such a directory."
    )


def _download(name: str, runs: str) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=FILES))
    except Exception as error:  # the network libraries may raise any error
        problem, advice = _reason(name, error, f" (current folder: {Path.cwd()}).{runs}".removesuffix("."))
        raise UserError(f"the model {name!r} cannot be downloaded: {problem}. {advice}.") from None


def _reason(name: str, error: Exception, here: str) -> tuple[str, str]:
    """Return what went wrong, and what to do; `here` says what is there instead of a directory of this name."""
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
    )

    if isinstance(error, HFValidationError):
        problem = f"the Hub has no such names, and there is no such directory here{here}"
        return problem, "Correct the name (OWNER/NAME), or name a directory with the model"
    again = "Complete files are kept: the same command continues from there"
    if isinstance(error, LocalEntryNotFoundError):
        if not isinstance(error.__cause__, HfHubHTTPError):
            problem = "it is not on this machine, and the Hub cannot be reached; there is no such directory here" + here
            advice = "If you meant a directory, correct its name; if a model on the Hub, turn the internet on"
            return problem, f"{advice} (and HF_HUB_OFFLINE off), or name a directory with the model"
        error = error.__cause__
    if isinstance(error, GatedRepoError):
        problem = "its owner gives access on request"
        return problem, f"Ask for it at https://huggingface.co/{name}, then set HF_TOKEN to a token of yours"
    if isinstance(error, RepositoryNotFoundError):
        problem = f"it is not on the Hugging Face Hub, or it is private; there is no such directory here{here}"
        return problem, "Correct the name (OWNER/NAME), or set HF_TOKEN to a token that may read it"
    if isinstance(error, HfHubHTTPError) and error.response is not None:
        return f"the Hub answered {error.response.status_code}", f"Try again later, or check HF_TOKEN. {again}"
    if is_disk_full(error):
        place = os.environ.get("HF_HOME", "~/.cache/huggingface")
        return f"the disk of {place} is full", f"Make room, or set HF_HOME to another disk. {again}"
    return f"the download broke off ({type(error).__name__})", f"Check the network. {again}"
