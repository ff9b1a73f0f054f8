"""What `init_from` decides of a config: the model and the tokenizer are those of the model that it names.

In the data path: before the text is read.
"""

from pathlib import Path

from ml_collections import ConfigDict

from jgpt.config.defaults import default_config, flatten
from jgpt.errors import UserError
from jgpt.loading.source import Source, local_directory, open_source
from jgpt.run_dir.identity import read_config
from jgpt.run_dir.manifest import newest_meta, whole_steps


def adopt_source(config: ConfigDict, run_dir: Path) -> tuple[ConfigDict, Source | None]:
    """Put into a config what its `init_from` decides: the model, all but its dropout, and the tokenizer.

    Also return the source where its parameters are needed: to begin from, and under LoRA always. A run that goes on has
    all else in its directory. Raises UserError where `init_from` is no such model, no longer the one that the run in
    `run_dir` began from, or is contradicted by another key.
    """
    if not config.init_from:
        return config, None
    config = config.copy_and_resolve_references()
    directory = local_directory(config.init_from)
    config.init_from = config.init_from if directory is None else str(directory)
    begun = (run_dir / "config.json").is_file() and bool(whole_steps(run_dir / "checkpoints"))
    theirs, source = read_config(run_dir) if begun else None, None
    if theirs is None or config.lora.rank or theirs.init_from != config.init_from:
        source = open_source(config.init_from, fingerprint=_began_from(run_dir / "checkpoints") if begun else "")
    if theirs is None:
        assert source is not None
        theirs = source.config
        theirs.tokenizer.update({"kind": "hf", "pretrained": source.tokenizer_directory})
    _check_against(config, theirs)
    config.model.update({**theirs.model, "dropout": config.model.dropout})
    config.tokenizer.update({**theirs.tokenizer, "chat_template": config.tokenizer.chat_template})
    if config.batch.sequence_length > config.model.context_length:
        raise UserError(
            f"batch.sequence_length={config.batch.sequence_length}, and {config.init_from} sees"
            f" {config.model.context_length} tokens. Allowed: up to that, or 0 for all of it. Set"
            f" --config.batch.sequence_length={config.model.context_length} or less."
        )
    return config.lock(), source


def _began_from(checkpoints: Path) -> str:
    """Return the fingerprint of the model that a run began from; "" where no checkpoint says."""
    return newest_meta(checkpoints, whole_steps(checkpoints)).get("base") or ""


def _check_against(config: ConfigDict, theirs: ConfigDict) -> None:
    """Refuse what the user set of the model or the tokenizer where the model of `init_from` has it otherwise."""
    given, expected, defaults = flatten(config), flatten(theirs), flatten(default_config())
    free = ("model.dropout", "tokenizer.chat_template")
    wrong = [
        f"{key}: {value!r} was given, the model has {expected[key]!r}"
        for key, value in given.items()
        if key.startswith(("model.", "tokenizer.")) and key not in free and value not in (expected[key], defaults[key])
    ]
    if wrong:
        raise UserError(
            f"the model and the tokenizer are those of init_from={config.init_from}, and the config says otherwise:\n  "
            + "\n  ".join(wrong)
            + "\nLeave these keys out. The length of training sequences is batch.sequence_length."
        )
