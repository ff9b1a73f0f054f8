"""The command that tries a run's model: chat for one that answers, generate with words that it knows for others.

In the data path: beside the loop; the command stands in status.json, in the report, and at the end of the log.
"""

import shlex

from ml_collections import ConfigDict

from jgpt.data.token_files import TokenData

LONGEST_PROMPT = 30  # characters
LOOKED_AT_TOKENS = 200  # of the validation text


def try_command(config: ConfigDict, data: TokenData) -> str:
    """Return what a user types to try the model of a run."""
    model = shlex.quote(config.out_dir)
    if data.is_chat:
        return f"python -m jgpt.chat --model {model}"
    prompt = config.sample.prompt or _validation_words(data)
    return f"python -m jgpt.generate --model {model}" + (f" --prompt {shlex.quote(prompt)}" if prompt else "")


def _validation_words(data: TokenData) -> str:
    ids = data.val[:LOOKED_AT_TOKENS]
    text = data.tokenizer.decode(ids[ids != data.tokenizer.eot_id])
    return first_words(text, begins_inside=data.meta["split"] == "position")


def first_words(text: str, begins_inside: bool = False) -> str:
    """Return the first words of a text, of one line; `begins_inside` a text that may be cut in a word or a character.

    >>> first_words("\\n\\nIt was the best of times, it was the worst"), first_words("ever. Call me Ishmael", True)
    ('It was the best of times, it', 'Call me Ishmael')
    >>> first_words("从前有一座山,山里有一座庙,庙里有一个老和尚,老和尚对小和尚说:从前有一座山"), first_words(" ")
    ('从前有一座山,山里有一座庙,庙里有一个老和尚,老和尚对小和尚', '')
    """
    if begins_inside:
        head, _, rest = text.partition(" ")
        text = rest if len(head) < LONGEST_PROMPT else text.lstrip("\ufffd")
    line = next((line.strip() for line in text.splitlines() if line.strip()), "")
    if len(line) <= LONGEST_PROMPT:
        return line
    words = line[: LONGEST_PROMPT + 1].rpartition(" ")[0]
    return words or line[:LONGEST_PROMPT]
