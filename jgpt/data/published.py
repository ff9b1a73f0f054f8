"""Open a tokenizer that others published, through transformers, with what the files beside it say of it.

In the data path: beside `make_tokenizer.py`, and where a model of others is opened.
"""

import importlib.util
import json
import logging
import os
from pathlib import Path
from typing import Any

import tokenizers

from jgpt.data.tokenizer import EMBEDDING_ROWS, Tokenizer, what_files_are
from jgpt.errors import UserError

log = logging.getLogger("jgpt")

LIKELY_ENDS = ("<|endoftext|>", "</s>", "<|im_end|>", "<eos>", "[EOS]", "[SEP]")


def load_pretrained(name: str) -> Tokenizer:
    """Open any fast tokenizer through transformers: a directory (offline), or a name on the Hugging Face Hub.

    Raises UserError when there is none, or it has no end-of-text token.
    """
    directory = os.path.expanduser(name)
    is_directory = os.path.isdir(directory)
    if not name or (not is_directory and name.startswith((".", "/", "~"))):
        raise UserError(
            f"tokenizer.pretrained is {name!r}, which is not a directory. tokenizer.kind='hf' needs a tokenizer's "
            "directory, or a name on the Hugging Face Hub. Set tokenizer.pretrained to one, such as 'gpt2'."
        )
    local = Path(directory) if is_directory else None
    pretrained = _open(name, local)
    backend = pretrained.backend_tokenizer
    if not backend.get_vocab(with_added_tokens=False):
        raise UserError(
            f"tokenizer.pretrained: {name!r} opens as a {type(pretrained).__name__} without any vocabulary. It must"
            " have tokenizer.json, or the files of its kind. Write the kind as tokenizer_class into"
            " tokenizer_config.json: BertTokenizer for a vocab.txt."
        )
    settings = _settings(name, local, pretrained)
    rows = rows_for(local, backend) if local else None
    if rows is not None and (backend.token_to_id(settings["eos_token"]) or 0) < rows:
        settings[EMBEDDING_ROWS] = rows
    return Tokenizer(backend.to_str(pretty=True), settings)


def _open(name: str, local: Path | None) -> Any:
    """Return transformers' fast tokenizer of a directory, `local`, or of a name on the Hub. Raises UserError."""
    os.environ.setdefault("USE_TF", "0")  # TensorFlow in the process breaks NCCL
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # such as "PyTorch was not found"
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    if local and (packages := missing_packages(local)):
        raise UserError(
            f"tokenizer.pretrained: {name!r} has a tokenizer.model and no tokenizer.json. To read it takes packages"
            f" that are not installed. Run: pip install {packages}"
        )
    try:
        pretrained = AutoTokenizer.from_pretrained(
            str(local or name), local_files_only=local is not None, trust_remote_code=False
        )
    except Exception as error:  # transformers and the Hub may raise any error
        reason = str(error).strip().split("\n")[0]
        raise UserError(
            f"tokenizer.pretrained: {name!r} does not open in transformers ({type(error).__name__}: {reason}). It "
            "must be a directory with tokenizer.json, or the name of a public model, which needs internet. Check the "
            "name, or download it and name the directory. Tokenizers with code of their own are never run."
            + (what_files_are(local) if local else "")
        ) from error
    if not isinstance(pretrained, PreTrainedTokenizerFast):
        raise UserError(
            f"tokenizer.pretrained: {name!r} is a {type(pretrained).__name__}, which has no tokenizer.json. "
            "A fast tokenizer is needed. Choose another, such as gpt2."
        )
    return pretrained


def _settings(name: str, local: Path | None, pretrained: Any) -> dict[str, Any]:
    """Return what `Tokenizer` needs to know: the special tokens, and the chat template where there is one."""
    backend = pretrained.backend_tokenizer
    settings: dict[str, Any] = {key: str(token) for key, token in pretrained.special_tokens_map.items() if str(token)}
    template = pretrained.chat_template  # from tokenizer_config.json, or chat_template.jinja beside it
    if isinstance(template, dict):  # several, by name; the others are for tools and retrieval
        template = template.get("default")
    if template:
        settings["chat_template"] = template
    if "eos_token" not in settings and local and (end := end_token(local, backend)):
        settings["eos_token"] = end
    if "eos_token" not in settings:
        token = likely_end(backend) or "<|endoftext|>"
        raise UserError(
            f"tokenizer.pretrained: {name!r} has no eos_token, which must end every document. Choose another, or name"
            " its end-of-text token in the directory's tokenizer_config.json, such as"
            f' {{"eos_token": {json.dumps(token, ensure_ascii=False)}}}.'
        )
    return settings


def end_token(directory: Path, backend: tokenizers.Tokenizer) -> str | None:
    """Return the token that ends a text, as the model's own files say; None where they do not."""
    for name in ("generation_config.json", "config.json"):
        found = _read(directory / name)
        ids = found.get("eos_token_id")
        for i in ids if isinstance(ids, list) else [ids]:
            if type(i) is int and 0 <= i < 2**32 and (token := backend.id_to_token(i)) is not None:
                log.info("tokenizer: its end-of-text token is %s, as %s says", token, directory / name)
                return token
    return None


def likely_end(backend: tokenizers.Tokenizer) -> str:
    """Return the token of a vocabulary that most likely ends a text; "" without one."""
    return next((token for token in LIKELY_ENDS if backend.token_to_id(token) is not None), "")


def rows_for(directory: Path, backend: tokenizers.Tokenizer) -> int | None:
    """Return the rows of the model beside a tokenizer, where tokens were added that have none; None elsewhere.

    Many fine-tuning recipes add a [PAD] that no text holds, and leave the embedding as it is.
    """
    found = _read(directory / "config.json")
    n_rows = found.get("vocab_size")
    if type(n_rows) is not int:
        return None
    beyond = {token: i for token, i in backend.get_vocab(with_added_tokens=True).items() if i >= n_rows}
    added = backend.get_added_tokens_decoder()
    if not beyond or not all(i in added for i in beyond.values()):
        return None
    log.warning(
        "tokenizer: the model's embedding has %d rows, and none for %s, which were added later: a text that holds one"
        " is refused", n_rows, ", ".join(sorted(beyond)[:10]),
    )  # fmt: skip
    return n_rows


def missing_packages(directory: Path) -> str:
    """Name the packages that a directory with a SentencePiece model alone needs, as far as they are not installed."""
    path = directory / "tokenizer.model"
    if (directory / "tokenizer.json").is_file() or not path.is_file():
        return ""
    with path.open("rb") as file:
        if file.read(1) != b"\n":  # how a SentencePiece model begins; a tiktoken file begins with text
            return ""
    return " ".join(name for name, module in _NEEDED.items() if not _is_installed(module))


_NEEDED = {"sentencepiece": "sentencepiece", "protobuf": "google.protobuf"}


def _is_installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # of the package that the module is in
        return False


def _read(path: Path) -> dict[str, Any]:
    """Read a JSON object; {} where there is none: whoever opens the model names what is wrong with its files."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}
