"""A conversation as a model is shown it: through its chat template; and the token that ends an answer.

In the data path: between the messages and `decode.py`. The template is rendered by `data/chat_template.py`.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from jgpt.data.chat_lines import ROLES, join_parts
from jgpt.data.chat_template import Message, render
from jgpt.data.tokenizer import Tokenizer
from jgpt.errors import UserError
from jgpt.inference.sampling import Sampling

MARK = re.compile(r"\s*(<[^<>\s]{1,60}>|\[[^\[\]\s]{1,60}\])")  # not a full stop: answers have several
MESSAGE = 'A message is {"role": "user", "content": "..."}.'


def conversation(messages: str | Sequence[Message]) -> list[Message]:
    """Check messages, or make one of a question; contents of parts become text. Raises UserError."""
    if isinstance(messages, str):
        messages = [{"role": "user", "content": messages}]
    if not isinstance(messages, list | tuple) or not messages:
        raise UserError(f"the messages are {str(messages)[:40]!r}. Allowed: a list of one message and more. {MESSAGE}")
    return [_message(message, number) for number, message in enumerate(messages, 1)]


def _message(message: Any, number: int) -> Message:
    place = f"message {number}"
    if not isinstance(message, Mapping):
        raise UserError(f"{place} is {str(message)[:40]!r}. Allowed: an object. {MESSAGE}")
    role, content = message.get("role"), message.get("content")
    if role == "developer":  # OpenAI's newer name
        role = "system"
    if role not in ROLES:
        raise UserError(f"{place} has the role {str(role)[:40]!r}. Allowed: {', '.join(ROLES)}. {MESSAGE}")
    if isinstance(content, list):
        content = join_parts(content, place)
    if not isinstance(content, str) and not (content is None and message.get("tool_calls")):
        raise UserError(f"{place} has the content {str(content)[:40]!r}. Allowed: text. {MESSAGE}")
    return {**message, "role": role, "content": content}


class ChatPrompts:
    """The prompts of a model's chat template. Raises UserError where the template is broken or refuses messages."""

    def __init__(self, tokenizer: Tokenizer, template: str, stop_ids: Iterable[int], system: Sequence[Message] = ()):
        """`stop_ids` are the model's own; `system` the messages that begin every conversation."""
        self.tokenizer, self.template, self.system = tokenizer, template, list(system)
        ids, self.stop = self._end_of_turn()
        self.stop_ids = (*stop_ids, *ids)

    def text(self, messages: Sequence[Message]) -> str:
        """Return the text that ends where the answer to `messages`, after the system's, begins."""
        return render(self.template, self.tokenizer.settings, [*self.system, *messages], True)

    def ids(self, text: str) -> list[int]:
        """Return the ids of that text. A template writes all special tokens itself, so the tokenizer adds none."""
        return self.tokenizer.encode(text).tolist()

    def _end_of_turn(self) -> tuple[list[int], tuple[str, ...]]:
        """Return with what the template ends an answer: a special token, else a mark such as <|im_end|>.

        It often differs from the end of a text. A tokenizer that was trained here has no special token for it.
        """
        marker = "\N{SNOWMAN}"
        messages = [*self.system, {"role": "user", "content": marker}, {"role": "assistant", "content": marker}]
        _, _, end = render(self.template, self.tokenizer.settings, messages, False).rpartition(marker)
        ids = self.tokenizer.encode(end).tolist()[:1]
        special = self.tokenizer.backend.get_added_tokens_decoder()
        if ids and ids[0] in special and special[ids[0]].special:
            return ids, ()
        mark = MARK.match(end)
        return [], (mark[0].strip(),) if mark else ()


def chat_sampling(advised: dict[str, float], given: dict[str, float]) -> Sampling:
    """Return the rules for an answer: what was given, else what the model's publisher advises, else ours.

    Where the advice leaves something out, transformers fills in temperature 1 and top_k 50. Raises UserError for what
    is out of range.
    """
    unset = Sampling(temperature=1.0, top_k=50) if advised else Sampling(temperature=0.7, top_k=50, top_p=0.95)
    sampling = replace(unset, **advised | given)
    sampling.validate()
    return sampling
