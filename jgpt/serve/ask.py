"""Read a request: the JSON of a client in, what is to be written out; everything that is wrong with it is a Refusal.

In the data path: between `app.py` and `worker.py`. The fields are those of OpenAI's API, and the sampling rules that
vLLM adds to them. A field that would change the answer, and that jgpt does not have, is refused.
"""

import secrets
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from jgpt.data.unknown import name_unknown, unknown_characters
from jgpt.errors import UserError
from jgpt.inference.batch import Row
from jgpt.inference.chat_prompt import ChatPrompts, chat_sampling, conversation
from jgpt.inference.sampling import Sampling
from jgpt.inference.stop_strings import StopStrings
from jgpt.inference.text_stream import TextStream
from jgpt.inference.write import Prompt, text_prompt
from jgpt.loading.model import ANSWER_TOKENS, TEXT_TOKENS, Model
from jgpt.serve.refusal import Refusal
from jgpt.serve.worker import Event, Job

RULES = {"temperature": float, "top_k": int, "top_p": float, "min_p": float, "repetition_penalty": float}
OURS = {"model", "stream", "stream_options", "seed", "stop", "n", "max_tokens", *RULES}
# What says nothing about the answer, and the values with which other fields say nothing.
NO_MATTER = {
    "user",
    "metadata",
    "store",
    "service_tier",
    "safety_identifier",
    "prompt_cache_key",
    "parallel_tool_calls",
}
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "presence_penalty": (0,), "frequency_penalty": (0,), "logit_bias": ({},), "logprobs": (False,),
    "top_logprobs": (0,), "best_of": (1,), "echo": (False,), "suffix": ("",), "tools": ([],), "functions": ([],),
    "tool_choice": ("none", "auto"), "function_call": ("none", "auto"), "response_format": ({"type": "text"},),
    "modalities": (["text"],),
}  # fmt: skip
MOST_STOP_STRINGS, LONGEST_STOP = 16, 200
T = TypeVar("T")


@dataclass(frozen=True)
class Limits:
    """What a request may ask for."""

    new_tokens: int
    texts: int  # of a request
    context_length: int


@dataclass(frozen=True)
class Asked:
    """What a client wants written: `n` texts after each prompt."""

    prompts: list[Prompt]
    n: int
    sampling: Sampling
    max_new_tokens: int
    seed: int
    stop_ids: tuple[int, ...]
    stop: tuple[str, ...]
    slides: bool
    stream: bool
    include_usage: bool
    note: str  # for the client: characters that the model does not know

    def jobs(self, model: Model, put: Callable[[Event], None]) -> list[Job]:
        """Return the texts to write, numbered in order; `put` gets their events."""
        jobs: list[Job] = []
        for prompt in (prompt for prompt in self.prompts for _ in range(self.n)):
            row = Row(
                ids=list(prompt.ids),
                max_new_tokens=self.max_new_tokens,
                sampling=self.sampling,
                seed=self.seed,
                number=len(jobs),
                stop_ids=self.stop_ids,
                slides=self.slides,
            )
            jobs.append(Job(row, TextStream(model.tokenizer, prompt.text), StopStrings(self.stop), len(jobs), put))
        return jobs


def read_completion(body: Mapping[str, Any], model: Model, limits: Limits) -> Asked:
    """Read a request for texts that go on. A prompt may be longer than the context: its end is in view."""
    given = _known(body, {"prompt"})
    found = _prompts(given.get("prompt", ""))
    prompts = [_text(prompt, model) for prompt in found]
    note = _note(model, "".join(prompt for prompt in found if isinstance(prompt, str)), "the prompt")
    sampling = _valid(lambda: _rules(given, Sampling()))
    most = _whole(given, "max_tokens", min(TEXT_TOKENS, limits.new_tokens), 1, limits.new_tokens)
    return _asked(given, limits, prompts, sampling, model.loaded.stop_ids, most, slides=True, note=note)


def read_chat(body: Mapping[str, Any], model: Model, prompts: ChatPrompts | None, limits: Limits) -> Asked:
    """Read a request for an answer; `prompts` are the model's, None where it has no chat template."""
    given = _known(body, {"messages", "max_completion_tokens"})
    if prompts is None:
        raise Refusal(
            400,
            "this model has no chat template: it continues texts. Ask /v1/completions, or start the server with"
            " --chat_template=FILE.",
            "no_chat_template",
        )
    messages = given.get("messages")
    text = _valid(lambda: prompts.text(conversation(messages if messages is not None else [])), "messages")
    ids = _valid(lambda: prompts.ids(text), "messages")
    room = limits.context_length - len(ids)
    if room < 1:
        raise Refusal(
            400,
            f"the messages have {len(ids):,} tokens. Allowed: {limits.context_length - 1:,}, which leaves one for the"
            " answer. Leave out the first messages, or shorten them.",
            "context_length_exceeded",
            "messages",
        )
    name = "max_completion_tokens" if "max_completion_tokens" in given else "max_tokens"
    sampling = _valid(lambda: chat_sampling(model.loaded.sampling, _numbers(given)))
    most = min(_whole(given, name, min(ANSWER_TOKENS, limits.new_tokens), 1, limits.new_tokens), room)
    note = _note(model, text, "the conversation")
    shown = [Prompt(ids, ids)]
    return _asked(given, limits, shown, sampling, prompts.stop_ids, most, slides=False, stop=prompts.stop, note=note)


def _note(model: Model, text: str, what: str) -> str:
    return name_unknown(unknown_characters(model.tokenizer, text), what)


def _known(body: Mapping[str, Any], more: set[str]) -> dict[str, Any]:
    """Return the fields that were given; refuse those that jgpt does not have."""
    given = {name: value for name, value in body.items() if value is not None and name not in NO_MATTER}
    for name, value in given.items():
        if name in NEUTRAL:
            if value not in NEUTRAL[name]:
                allowed = " or ".join(map(repr, NEUTRAL[name]))
                raise Refusal(
                    400, f"{name}={_short(value)} is not supported. Allowed: {allowed}. Leave it out.", "", name
                )
        elif name not in OURS | more:
            raise Refusal(
                400, f"unknown field {name[:60]!r}. Allowed: {', '.join(sorted(OURS | more))}.", "", name[:60]
            )
    return {name: value for name, value in given.items() if name not in NEUTRAL}


def _asked(
    given: Mapping[str, Any],
    limits: Limits,
    prompts: list[Prompt],
    sampling: Sampling,
    stop_ids: tuple[int, ...],
    max_new_tokens: int,
    slides: bool,
    stop: tuple[str, ...] = (),
    note: str = "",
) -> Asked:
    n = _whole(given, "n", 1, 1, limits.texts)
    if n * len(prompts) > limits.texts:
        raise Refusal(
            400,
            f"{n * len(prompts)} texts were asked for. Allowed: {limits.texts} a request. Ask several times.",
            "",
            "n",
        )
    options = given.get("stream_options", {})
    if not isinstance(options, dict):
        raise Refusal(400, f"stream_options={_short(options)}. Allowed: an object.", "", "stream_options")
    return Asked(
        prompts=prompts,
        n=n,
        sampling=sampling,
        max_new_tokens=max_new_tokens,
        seed=_whole(given, "seed", secrets.randbelow(2**32), -(2**63), 2**63 - 1) % 2**32,
        stop_ids=stop_ids,
        stop=(*stop, *_stop(given.get("stop", []))),
        slides=slides,
        stream=_flag(given, "stream"),
        include_usage=_flag(options, "include_usage"),
        note=note,
    )


def _prompts(prompt: Any) -> list[Any]:
    """Return the prompts: OpenAI's field is a text, a list of texts, a list of ids, or a list of lists of ids."""
    if isinstance(prompt, list) and prompt and not isinstance(prompt[0], int):
        return prompt
    return [prompt]


def _text(prompt: Any, model: Model) -> Prompt:
    if isinstance(prompt, str):
        return _valid(lambda: text_prompt(model.tokenizer, prompt), "prompt")
    n_ids = model.tokenizer.vocab_size
    if isinstance(prompt, list) and prompt and all(type(i) is int and 0 <= i < n_ids for i in prompt):
        return Prompt(prompt, prompt)
    raise Refusal(400, f"prompt={_short(prompt)}. Allowed: a text, or ids from 0 to {n_ids - 1}.", "", "prompt")


def _rules(given: Mapping[str, Any], default: Sampling) -> Sampling:
    sampling = Sampling(**vars(default) | _numbers(given))
    sampling.validate()
    return sampling


def _numbers(given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the sampling rules that were given; each must be a number."""
    for name, kind in RULES.items():
        value = given.get(name)
        if value is not None and not (type(value) is int or (kind is float and type(value) is float)):
            wanted = "a whole number" if kind is int else "a number"
            raise Refusal(400, f"{name}={_short(value)}. Allowed: {wanted}.", "", name)
    return {name: max(given[name], 0) if name == "top_k" else given[name] for name in RULES if name in given}


def _stop(stop: Any) -> tuple[str, ...]:
    strings = [stop] if isinstance(stop, str) else stop
    if (
        not isinstance(strings, list)
        or len(strings) > MOST_STOP_STRINGS
        or not all(isinstance(s, str) and 0 < len(s) <= LONGEST_STOP for s in strings)
    ):
        raise Refusal(
            400,
            f"stop={_short(stop)}. Allowed: a text, or up to {MOST_STOP_STRINGS}, of 1 to {LONGEST_STOP} characters.",
            "",
            "stop",
        )
    return tuple(strings)


def _whole(given: Mapping[str, Any], name: str, default: int, low: int, high: int) -> int:
    value = given.get(name, default)
    if type(value) is not int or not low <= value <= high:
        raise Refusal(400, f"{name}={_short(value)}. Allowed: a whole number from {low} to {high}.", "", name)
    return value


def _flag(given: Mapping[str, Any], name: str) -> bool:
    value = given.get(name) or False
    if not isinstance(value, bool):
        raise Refusal(400, f"{name}={_short(value)}. Allowed: true or false.", "", name)
    return value


def _valid(make: Callable[[], T], param: str = "") -> T:
    """Return what `make` does; what it finds wrong with the user's input is refused."""
    try:
        return make()
    except UserError as error:
        raise Refusal(400, str(error), "", param) from None


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
