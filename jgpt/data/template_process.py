"""Render chat templates in a process of its own, with a bound on time, memory and output.

A template is a program, often of somebody else. Jinja's sandbox keeps it from files and the network, and not from
running without end or filling the memory. This process may do that: it alone ends.

In the data path: `chat_template.py` starts it (`python -m jgpt.data.template_process`), and sends a line of JSON for
each conversation on stdin; the answer is a line of JSON on stdout.
"""

import json
import re
import sys
from collections.abc import Iterator
from contextlib import suppress
from datetime import datetime
from functools import lru_cache
from os.path import commonprefix
from typing import Any, NoReturn

import jinja2
from jinja2 import meta, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

from jgpt.data.call_arguments import as_objects, items, with_arguments
from jgpt.errors import UserError

MEMORY_BYTES = 1 << 30
OUTPUT_CHARACTERS = 1 << 26  # of one rendering
REASONING = ("reasoning_content", "thinking", "reasoning")  # names of a thought; templates read the first two
MARKER = "\N{SNOWMAN}"
_MARK = re.compile(r"\{%[-+]?\s*generation\b")


class Message(dict):
    """A message that notes which of its fields the template reads, in `read`."""

    def __init__(self, fields: dict[str, Any], read: set[str]) -> None:
        thought = next((fields[name] for name in REASONING if fields.get(name) is not None), None)
        if thought is not None:  # as transformers does, since a dataset and a template may use different names
            fields = {"thinking": thought, **fields, "reasoning_content": thought}
        if "tool_calls" in fields:
            fields = fields | {"tool_calls": with_arguments(fields["tool_calls"])}
        super().__init__(fields)
        self._read = read

    def __getitem__(self, name: Any) -> Any:
        self._read.add(name)
        return super().__getitem__(name)

    def get(self, name: Any, default: Any = None) -> Any:
        self._read.add(name)
        return super().get(name, default)

    def __iter__(self) -> Iterator[Any]:
        self._read.update(super().keys())
        return super().__iter__()

    def items(self) -> Any:
        self._read.update(super().keys())
        return super().items()

    def values(self) -> Any:
        self._read.update(super().keys())
        return super().values()

    def __repr__(self) -> str:
        self._read.update(super().keys())
        return super().__repr__()


class Written(str):
    """A piece of rendered text that the template marks as the assistant's."""


class Renderer:
    """One template with the variables of one conversation."""

    def __init__(self, template: str, variables: dict[str, Any], messages: list[dict[str, Any]]) -> None:
        self.template, self.names, self.marks = compile_template(template)
        self.variables = {"tools": None, "documents": None, **variables}
        self.read: set[str] = set()
        self.messages = [Message(message, self.read) for message in messages]
        self._given = messages

    def parts(self, messages: list[Message], add_generation_prompt: bool = False) -> list[str]:
        """Return the parts of a rendering: every second part is one that the template marks as the assistant's."""
        variables = self.variables | {"messages": messages, "add_generation_prompt": add_generation_prompt}
        parts: list[list[str]] = [[]]
        n_characters = 0
        for piece in self.template.generate(variables):
            n_characters += len(piece)
            if n_characters > OUTPUT_CHARACTERS:
                raise MemoryError(f"it writes more than {OUTPUT_CHARACTERS:,} characters")
            if isinstance(piece, Written):
                parts += [[piece], []]
            else:
                parts[-1].append(piece)
        return ["".join(pieces) for pieces in parts]

    def text(self, messages: list[Message], add_generation_prompt: bool = False) -> str:
        """Return a rendering as one text."""
        return "".join(self.parts(messages, add_generation_prompt))

    def answers(self, learned: list[bool]) -> list[list[str]]:
        """Return the texts to train on, see `chat_template.answers`; `learned` has a bool for each message."""
        parts = self.parts(self.messages) if self.marks else []
        return self._marked(parts, learned) if len(parts) > 1 else self._after_prompts(learned)

    def _marked(self, parts: list[str], learned: list[bool]) -> list[list[str]]:
        """Return one text, of the parts that the template itself marks."""
        turns = [flag for flag, message in zip(learned, self._given, strict=True) if message["role"] == "assistant"]
        if not all(turns) and len(turns) != len(parts) // 2:
            raise UserError(
                f"the chat template marks {len(parts) // 2} parts by {{% generation %}} where the assistant has "
                f"{len(turns)} messages, so the one of weight 0 cannot be found. One mark for each is needed. Remove "
                "the weights, or set tokenizer.chat_template to another file."
            )
        kept = [parts[0]]
        for i in range(1, len(parts), 2):
            if all(turns) or turns[i // 2]:
                kept += parts[i : i + 2]
            else:
                kept[-1] += parts[i] + parts[i + 1]
        return [kept[:-1]] if len(kept) > 1 else []

    def _after_prompts(self, learned: list[bool]) -> list[list[str]]:
        """Return the texts of a template without marks, where an answer is what follows the prompt for it."""
        texts: list[list[str]] = []
        before = ""  # the text up to the end of the last answer that is learned
        for i in range(1, len(self.messages)):
            if self._given[i]["role"] != "assistant" or not learned[i]:
                continue
            prompt, whole = self.text(self.messages[:i], True), self.text(self.messages[: i + 1])
            if not whole.startswith(prompt):
                prompt = self._common_prompt(i, prompt)
            if not whole.startswith(prompt) or whole == prompt:
                raise UserError(
                    f"the chat template does not put message {i + 1} after its prompt, which ends in {prompt[-40:]!r}, "
                    "so the assistant's words cannot be separated from the rest. A template must append an answer to "
                    "its prompt. Set tokenizer.chat_template to another file."
                )
            if not texts or not prompt.startswith(before):
                texts.append([])
                before = ""
            texts[-1] += [prompt[len(before) :], whole[len(prompt) :]]
            before = whole
        return texts

    def _common_prompt(self, i: int, prompt: str) -> str:
        """Shorten the prompt for message `i` to what the template puts before its answer as well.

        Some templates end a prompt with words that no answer of a dataset begins with, such as `<think>`. The common
        prompt still holds all messages before; else the prompt is returned as it is.
        """
        answer = self._given[i]
        if isinstance(answer.get("content"), str):  # other words: an answer may begin like the end of the prompt
            answer = answer | {"content": MARKER}
        common = commonprefix([prompt, self.text([*self.messages[:i], Message(answer, self.read)])])
        return common if common.startswith(commonprefix([prompt, self.text(self.messages[:i])])) else prompt


@lru_cache(maxsize=8)
def compile_template(template: str) -> tuple[jinja2.Template, list[str], bool]:
    """Compile a template with transformers' settings, for which templates are written.

    Returns it, the names of the variables that it reads, and whether it marks the assistant's words.
    """
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
    )
    environment.filters["tojson"] = _to_json  # Jinja's own escapes HTML
    environment.filters["items"] = items
    environment.globals |= {
        "raise_exception": _raise,
        "strftime_now": lambda form: datetime.now().strftime(form),
        "dict": lambda *args, **fields: dict(*args, **fields),  # the class itself would give more than that
        "namespace": _Namespace,
    }
    template = template.removeprefix("\ufeff")
    names = sorted(meta.find_undeclared_variables(environment.parse(template)))
    return environment.from_string(template), names, bool(_MARK.search(template))


class _Generation(Extension):
    """Support {% generation %}, with which some templates mark the assistant's words; it adds nothing to the text."""

    tags = {"generation"}

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_mark"), [], [], body).set_lineno(line)

    def _mark(self, caller: Any) -> Written:
        return Written(caller())


class _Namespace(Namespace):
    """Jinja's namespace, without names that begin with an underscore: they have been ways out of its sandbox."""

    def __init__(*args: Any, **fields: Any) -> None:
        fields = dict(*args[1:], **fields)
        Namespace.__init__(args[0], {_allowed(name): value for name, value in fields.items()})

    def __setitem__(self, name: str, value: Any) -> None:
        super().__setitem__(_allowed(name), value)


def _allowed(name: Any) -> Any:
    if str(name).startswith("_"):
        raise jinja2.exceptions.SecurityError(f"a namespace must not have the name {name!r}")
    return name


def _raise(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    value = as_objects(value)
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def respond(request: dict[str, Any]) -> str:
    """Answer a request of `chat_template.py`, as JSON: a text or texts, or what is wrong."""
    try:
        renderer = Renderer(request["template"], request["variables"], request["messages"])
        if request["learned"] is None:
            found: Any = renderer.text(renderer.messages, request["add_generation_prompt"])
        else:
            found = renderer.answers(request["learned"])
        return json.dumps({"found": found, "read": sorted(renderer.read, key=str), "variables": renderer.names})
    except UserError as error:
        return json.dumps({"refused": str(error)})
    except MemoryError as error:
        return json.dumps({"error": f"MemoryError: {str(error) or f'it takes more than {MEMORY_BYTES >> 20:,} MiB'}"})
    except Exception as error:  # a template may raise any error
        return json.dumps({"error": f"{type(error).__name__}: {error}"})


def main() -> None:
    """Answer requests until stdin ends."""
    while line := sys.stdin.readline():
        request = json.loads(line)
        _limit(request["cpu_seconds"])
        print(respond(request), flush=True)


def _limit(cpu_seconds: int) -> None:
    """Limit what this process may take from now on; past its time the system ends it."""
    try:
        import resource
    except ImportError:  # Windows has no such limits
        return
    used = resource.getrusage(resource.RUSAGE_SELF)
    seconds = int(used.ru_utime + used.ru_stime) + 1 + cpu_seconds
    limits = ((resource.RLIMIT_CPU, seconds), (resource.RLIMIT_AS, MEMORY_BYTES), (resource.RLIMIT_CORE, 0))
    for limit, value in limits:
        hard = resource.getrlimit(limit)[1]
        with suppress(ValueError, OSError):  # macOS limits no memory
            resource.setrlimit(limit, (value if hard == resource.RLIM_INFINITY else min(value, hard), hard))


if __name__ == "__main__":
    main()
