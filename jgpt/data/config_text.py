"""The text that a config names: its files, opened as documents or as conversations with their template.

In the data path: `write_tokens.py` tokenizes what is opened here; training asks for the files before anything else.
"""

import logging
from collections.abc import Sequence

from ml_collections import ConfigDict

from jgpt.data.chat_template import read_template
from jgpt.data.conversations import ChatCorpus
from jgpt.data.corpus import Corpus
from jgpt.data.find_files import find_files
from jgpt.data.remote import TextFile
from jgpt.data.token_directory import FORMAT_VERSION, read_token_meta, token_directory
from jgpt.data.tokenizer import END_OF_TEXT, Tokenizer
from jgpt.errors import UserError

log = logging.getLogger("jgpt")


def find_text(config: ConfigDict) -> Sequence[TextFile]:
    """List the files of a config's text; [] where they are gone and their tokens are complete, with a warning.

    Raises UserError where there is no text and no tokens that were made from the same data.text_glob.
    """
    try:
        return find_files(config.data.text_glob, "chat" if config.data.format == "chat" else "text")
    except UserError as error:
        directory, reason = token_directory(config), str(error).split(". ")[0]
        meta = read_token_meta(directory)
        if meta.get("format_version") != FORMAT_VERSION or meta.get("text_glob") != config.data.text_glob:
            raise
    log.warning(
        "%s. Training continues from the tokens in %s, which were made from %s",
        reason,
        directory,
        f"{meta['n_files']:,} files that data.text_glob={config.data.text_glob!r} matched before",
    )
    return []


def open_corpus(config: ConfigDict, given: Tokenizer | None, files: Sequence[TextFile]) -> Corpus:
    """Open the text of a config. Of conversations the template stays empty where a pretrained tokenizer brings it."""
    data, chat = config.data, config.data.format == "chat"
    if not chat:
        return Corpus(files, text_field=data.text_field, encoding=data.encoding, encoding_errors=data.encoding_errors)
    from_tokenizer = config.tokenizer.kind == "hf" and not given and not config.tokenizer.chat_template
    template = "" if from_tokenizer else chat_template(config, given)
    # The settings are for a tokenizer that is trained on the rendered text.
    settings = {"eos_token": END_OF_TEXT}
    return ChatCorpus(
        files, encoding=data.encoding, encoding_errors=data.encoding_errors, template=template, settings=settings
    )


def chat_template(config: ConfigDict, tokenizer: Tokenizer | None) -> str:
    """Return the template of conversations: the file that a config names, else the tokenizer's own.

    Raises UserError where neither is there.
    """
    if config.tokenizer.chat_template:
        return read_template(config.tokenizer.chat_template)
    own = tokenizer.settings.get("chat_template") if tokenizer else None
    if not own:
        raise UserError(
            "data.format='chat' needs a chat template, which turns messages into text, and the tokenizer has none. "
            "Tokenizers of instruct models have one. Start from such a model, or set tokenizer.chat_template to a "
            "Jinja file."
        )
    return own
