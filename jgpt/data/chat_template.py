"""Render messages as text by a chat template, and tell which parts the assistant wrote.

In the data path: before the tokenizer, for conversations (`conversations.py`) and for prompts in a chat.
"""

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import lru_cache
from typing import Any, NoReturn

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from jgpt.config.files import user_path
from jgpt.errors import UserError

Message = Mapping[str, str]  # {"role": "system", "user" or "assistant", "content": TEXT}


def render(template: str, settings: Mapping[str, Any], messages: Sequence[Message], add_generation_prompt: bool) -> str:
    """Render messages as text by a Jinja template, exactly as transformers' `apply_chat_template` does.

    `settings` are the tokenizer's; a template may use its special tokens. With `add_generation_prompt` the text ends
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
    except Exception as error:  # a template is a program, which may raise any error
        raise UserError(
            f"the chat template does not render these messages ({type(error).__name__}: {error}). A template may "
            "require an order of roles, or refuse a system message. Change the messages, or set "
            "tokenizer.chat_template to another file."
        ) from error


def answers(template: str, settings: Mapping[str, Any], messages: Sequence[Message]) -> list[list[str]]:
    """Render a conversation for training: texts, each a list of parts; every second part is an answer to learn.

    The parts take turns: a prompt, the assistant's answer, the next prompt, and so on. An answer is what the template
    adds to the prompt for it, with the end of turn, as the model will generate it. What follows the last answer is left
    out. An assistant's message that opens the conversation is part of the first prompt.

    Most templates only append, and give one text. Some rewrite earlier turns (Qwen3's removes their thoughts). Then an
    answer whose prompt does not continue the text so far begins a new text, so that each answer is learned after the
    prompt that the model will see. Raises UserError when a template does not put an answer after its prompt.

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
                f"the chat template does not put message {i + 1} after its prompt, which ends in {prompt[-40:]!r}, so "
                "the assistant's words cannot be separated from the rest. A template must append an answer to its "
                "prompt. Set tokenizer.chat_template to another file."
            )
        if not texts or not prompt.startswith(before):
            texts.append([])
            before = ""
        texts[-1] += [prompt[len(before) :], whole[len(prompt) :]]
        before = whole
    return texts


def read_template(name: str) -> str:
    """Read the template that tokenizer.chat_template names; raise UserError when it cannot be read."""
    try:
        return user_path(name).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"tokenizer.chat_template: {name!r} cannot be read ({error}). It must be a file with a Jinja template. "
            "Correct the name, or leave it empty for the pretrained tokenizer's own."
        ) from error


class _Generation(Extension):
    """Support {% generation %}, with which some templates mark the assistant's words; it adds nothing to the text."""

    tags = {"generation"}

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True)).set_lineno(line)


@lru_cache(maxsize=8)
def _compile(template: str) -> jinja2.Template:
    # The settings of transformers, for which templates are written.
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
