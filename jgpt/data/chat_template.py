"""Render messages as text by a chat template, and separate what the assistant wrote from the rest.

In the data path: before the tokenizer, for conversations (`conversations.py`) and for prompts in a chat. The work is
done by `template_process.py`, in a process of its own, since a template may run without end.
"""

import atexit
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any, NamedTuple

from jgpt.config.files import user_path
from jgpt.errors import UserError

Message = Mapping[str, Any]  # {"role": "system", "user", "assistant" or "tool", "content": TEXT, ...}
_OURS = {"messages", "add_generation_prompt"}  # variables that no line can set
CPU_SECONDS = 10  # that a template may take for one conversation
MANY_MESSAGES = 500  # a usual template takes a second for them; with more, the messages are why it takes long
_OTHER_TEMPLATE = "Change the messages, or set tokenizer.chat_template to another file."


class Answers(NamedTuple):
    """The texts of a conversation, see `answers`, and what the template reads."""

    texts: list[list[str]]
    read: frozenset[str]  # fields of messages
    variables: frozenset[str]  # given variables that it reads, and Jinja's own


def render(template: str, settings: Mapping[str, Any], messages: Sequence[Message], add_generation_prompt: bool) -> str:
    """Render messages as text by a Jinja template, exactly as transformers' `apply_chat_template` does.

    `settings` are the tokenizer's; a template may use its special tokens. With `add_generation_prompt` the text ends
    where the assistant's answer begins. Raises UserError when the template is broken, refuses the messages, or takes
    too much time or memory.

    >>> render("{% for m in messages %}{{ m.role }}: {{ m.content }}{{ eos_token }}{% endfor %}",
    ...        {"eos_token": "</s>"}, [{"role": "user", "content": "Hi"}], False)
    'user: Hi</s>'
    """
    request = {"messages": messages, "learned": None, "add_generation_prompt": add_generation_prompt}
    return _ask(template, _special_tokens(settings), request)["found"]


def answers(
    template: str,
    settings: Mapping[str, Any],
    messages: Sequence[Message],
    learned: Sequence[bool] | None = None,
    variables: Mapping[str, Any] | None = None,
) -> Answers:
    """Render a conversation for training: texts, each a list of parts; every second part is an answer to learn.

    The parts take turns: a prompt, the assistant's answer, the next prompt, and so on. An answer is what the template
    adds to the prompt for it, with the end of turn, as the model will generate it. What follows the last answer is left
    out. An assistant's message that opens the conversation is part of the first prompt. `learned` has False for
    messages that are seen and not learned. `variables` are for the template, such as `tools`.

    Most templates only append, and give one text. Some rewrite earlier turns (Qwen3's removes their thoughts). Then an
    answer whose prompt does not continue the text so far begins a new text, so that each answer is learned after the
    prompt that the model will see. A template that marks the assistant's words by {% generation %} gives one text, and
    what it marks is learned. Raises UserError as `render` does, and when a template does not put an answer after its
    prompt.

    >>> qa = "{% for m in messages %}{{ m.role[0] }}: {{ m.content }}\\n{% endfor %}"
    >>> qa += "{{ 'a: ' if add_generation_prompt else '' }}"
    >>> answers(qa, {}, [{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4"}]).texts
    [['u: 2+2?\\na: ', '4\\n']]
    """
    request = {"messages": messages, "learned": [True] * len(messages) if learned is None else learned}
    ours = _special_tokens(settings)
    reply = _ask(template, {**(variables or {}), **ours}, request)
    return Answers(reply["found"], frozenset(reply["read"]), frozenset(reply["variables"]) - ours.keys() - _OURS)


def _special_tokens(settings: Mapping[str, Any]) -> dict[str, str]:
    """Return the special tokens among a tokenizer's settings, which a template may use."""
    return {key: token for key, token in settings.items() if key.endswith("_token") and isinstance(token, str)}


def read_template(name: str) -> str:
    """Read the template that tokenizer.chat_template names; raise UserError when it cannot be read."""
    try:
        return user_path(name).read_text(encoding="utf-8-sig")
    except (OSError, ValueError) as error:
        raise UserError(
            f"tokenizer.chat_template: {name!r} cannot be read ({error}). It must be a file with a Jinja template. "
            "Correct the name, or leave it empty for the pretrained tokenizer's own."
        ) from error


def _ask(template: str, variables: Mapping[str, Any], request: Mapping[str, Any]) -> dict[str, Any]:
    """Send a conversation to the process that renders; return its reply, or raise UserError with what is wrong."""
    try:
        line = json.dumps({"template": template, "variables": variables, "cpu_seconds": CPU_SECONDS, **request})
    except RecursionError:
        raise UserError(f"the messages are nested too deeply to be rendered. {_OTHER_TEMPLATE}") from None
    except (TypeError, ValueError) as error:  # a message of a program may hold anything
        raise UserError(
            f"the messages hold what JSON has not ({error}). Allowed: texts, numbers, true, false, None, lists and"
            " objects with texts as names. Convert it, or leave it out."
        ) from None
    reply = _process.ask(line, len(request["messages"]))
    if "refused" in reply:
        raise UserError(reply["refused"])
    if "error" in reply:
        raise UserError(
            f"the chat template does not render these messages ({reply['error']}). A template may require an order of "
            f"roles, or refuse a system message. {_OTHER_TEMPLATE}"
        )
    return reply


class _Process:
    """The process that renders, started when it is first needed."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[str] | None = None
        self._lock = threading.Lock()

    def ask(self, line: str, n_messages: int) -> dict[str, Any]:
        """Return the reply to one request, of so many messages; raise UserError where the process ended instead."""
        with self._lock:
            process = self._process or self._start()
            assert process.stdin and process.stdout
            try:
                with suppress(BrokenPipeError):  # it has ended: there will be no reply
                    process.stdin.write(line + "\n")
                    process.stdin.flush()
                reply = process.stdout.readline()
            except BaseException:  # a reply that nobody reads must not answer the next request
                self.close()
                raise
            if reply.endswith("\n"):
                return json.loads(reply)
            _, errors = process.communicate()
            self._process = None
        code = process.returncode
        end = signal.Signals(-code).name if code < 0 else ""
        if end == "SIGXCPU":
            why = f"it took more than {CPU_SECONDS} seconds for {n_messages:,} messages, and " + (
                "each answer is rendered with all before it: cut this conversation into several shorter ones"
                if n_messages > MANY_MESSAGES
                else "may hold a loop without end"
            )
        elif end == "SIGKILL":
            why = "the system ended its process, as it does when memory is short"
        else:
            why = f"its process ended with code {code}: {errors.strip()[-300:]}"
        raise UserError(f"the chat template was stopped: {why}. {_OTHER_TEMPLATE}")

    def _start(self) -> "subprocess.Popen[str]":
        self._process = subprocess.Popen(
            [sys.executable, "-m", "jgpt.data.template_process"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            encoding="ascii",
            env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
            start_new_session=True,  # Ctrl-C is for us alone
        )
        return self._process

    def close(self) -> None:
        """End the process, if there is one; the next request starts another."""
        if self._process:
            self._process.kill()
            self._process.communicate()
            self._process = None


_process = _Process()
atexit.register(_process.close)
