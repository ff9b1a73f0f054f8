"""Chat templates: messages to text, and which parts of it the assistant wrote.

In the data path: before the tokenizer, for conversations (`conversations.py`) and for prompts in a chat.
"""

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import lru_cache
from pathlib import Path
from typing import Any, NoReturn

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from jgpt.errors import UserError

Message = Mapping[str, str]  # role: system, user or assistant; content


def render(template: str, settings: Mapping[str, Any], messages: Sequence[Message], add_generation_prompt: bool) -> str:
    """Turn messages into text by a Jinja template, exactly as transformers' `apply_chat_template` does.

    `settings` are the tokenizer's, whose special tokens templates name. With `add_generation_prompt` the text ends
    where the assistant's answer begins. Raises UserError when the template is broken or refuses the messages.

    >>> render("{% for m in messages %}{{ m.role }}: {{ m.content }}{{ eos_token }}{% endfor %}",
    ...        {"eos_token": "</s>"}, [{"role": "user", "content": "Hi"}], False)
    'user: Hi</s>'
    """
    special = {key: token for key, token in settings.items() if key.endswith("_token") and isinstance(token, str)}
    try:
        return _compile(template).render(
            messages=messages, tools=None, documents=None, add_generation_prompt=add_generation_prompt, **special
        )
    except Exception as error:  # a template is a program: it raises whatever it likes
        raise UserError(
            f"the chat template does not render these messages ({type(error).__name__}: {error}). Templates may insist "
            "on an order of roles, or on no system message. Change the messages, or name another template by "
            "--config.tokenizer.chat_template=FILE."
        ) from error


def answers(template: str, settings: Mapping[str, Any], messages: Sequence[Message]) -> list[list[str]]:
    """Render a conversation for training: texts in parts, by turns what the assistant is shown and what it answers.

    An answer is what the template adds to the prompt when it is there: with its end of turn, as it will be generated.
    One text is all there is, unless the template rewrites earlier turns (Qwen3 drops their thoughts): then each answer
    that such a prompt leads to begins a text, so that every answer is learned behind the prompt that it will have.
    What follows the last answer is left out, and an assistant's message that opens the conversation is shown alone.

    >>> qa = "{% for m in messages %}{{ m.role[0] }}: {{ m.content }}\\n{% endfor %}"
    >>> qa += "{{ 'a: ' if add_generation_prompt else '' }}"
    >>> answers(qa, {}, [{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4"}])
    [['u: 2+2?\\na: ', '4\\n']]
    """
    texts: list[list[str]] = []
    before = ""  # the text up to the last answer's end
    for i, message in enumerate(messages):
        if message["role"] != "assistant" or i == 0:
            continue
        prompt = render(template, settings, messages[:i], True)
        whole = render(template, settings, messages[: i + 1], False)
        if not whole.startswith(prompt) or whole == prompt:
            raise UserError(
                f"the chat template puts message {i + 1} elsewhere than behind its prompt, which ends in "
                f"{prompt[-40:]!r}, so that what the assistant wrote cannot be told apart. A template must append. "
                "Name another one by --config.tokenizer.chat_template=FILE."
            )
        if not texts or not prompt.startswith(before):
            texts.append([])
            before = ""
        texts[-1] += [prompt[len(before) :], whole[len(prompt) :]]
        before = whole
    return texts


def read_template(name: str) -> str:
    """Read the file that tokenizer.chat_template names; raise UserError when it cannot be read."""
    try:
        return Path(name).expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"tokenizer.chat_template: {name!r} cannot be read ({error}). It must be a file with a Jinja template. "
            "Mend the name, or leave it empty for the pretrained tokenizer's own."
        ) from error


class _Generation(Extension):
    """{% generation %}, by which some templates mark what the assistant wrote: to the text it adds nothing."""

    tags = {"generation"}

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True)).set_lineno(line)


@lru_cache(maxsize=8)
def _compile(template: str) -> jinja2.Template:
    # These settings are transformers', and templates are written for them.
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
    )
    environment.filters["tojson"] = _to_json  # Jinja's own escapes HTML
    environment.globals["raise_exception"] = _raise
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return environment.from_string(template)


def _raise(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
