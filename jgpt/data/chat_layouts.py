"""Find the layout of a line of conversations, and turn it into messages: ShareGPT, Alpaca, prompt and completion.

In the data path: inside `chat_lines.py`, which checks the messages. What each field means is defined by LLaMA-Factory
(data/README.md: ShareGPT, Alpaca) and TRL (dataset formats: prompt and completion).
"""

import json
from typing import Any

from jgpt.errors import UserError

LAYOUTS = {  # the name of each, and a line
    "messages": '{"messages": [{"role": "user", "content": "..."}, ...]}',
    "ShareGPT": '{"conversations": [{"from": "human", "value": "..."}, ...]}',
    "Alpaca": '{"instruction": "...", "input": "...", "output": "..."}',
    "prompt/completion": '{"prompt": "...", "completion": "..."}',
}
MEANING = {  # what the names do not say
    "Alpaca": "the user says instruction, a new line, input; the assistant says output",
    "prompt/completion": "the user says the prompt, the assistant the completion",
}
THEIR_ROLES = {"human": "user", "gpt": "assistant", "observation": "tool", "function_call": "assistant"}
THEIR_ROLES |= {"developer": "system"}  # OpenAI's newer name
PAIRS = (("prompt", "completion"), ("prompt", "response"), ("question", "answer"), ("input", "output"))


def find_layout(record: Any, place: str) -> tuple[str, list[Any], dict[str, Any]]:
    """Return the layout of a line (a key of LAYOUTS), its messages, and all its other fields that are not null.

    The messages are not checked yet. Raises UserError, with `place`, for a line in no layout, and for a field of one
    that is not what the layout says.
    """
    given = record if isinstance(record, dict) else {}
    fields = {name: value for name, value in given.items() if value is not None}
    for key, name in (("messages", "messages"), ("conversations", "ShareGPT")):
        if isinstance(fields.get(key), list) and fields[key]:
            messages = [_turn(turn, f"{place}, message {i}") for i, turn in enumerate(fields.pop(key), 1)]
            return name, messages if name == "messages" else _after_system(messages, fields), fields
    for answers in (fields, given):  # an answer that is null is an empty one, unless the line has another layout
        if "instruction" in fields and "output" in answers:
            return "Alpaca", _after_system(_alpaca(fields, place), fields), fields
        for prompt, completion in PAIRS:
            if prompt in fields and completion in answers:
                messages = _part(fields, prompt, "user", place) + _part(fields, completion, "assistant", place)
                return "prompt/completion", _after_system(messages, fields), fields
    have = f"has the fields {sorted(fields)}" if isinstance(record, dict) else f"is {str(record)[:40]!r}"
    empty = next((key for key in ("messages", "conversations") if key in fields), "")
    have = f"has {empty}: {str(fields[empty])[:40]!r}, not a list with a message" if empty else have
    raise UserError(
        f"{place} is no conversation: it {have}. Allowed: {', '.join(LAYOUTS.values())}. Rename its fields, or remove"
        " the line."
    )


def _turn(turn: Any, place: str) -> Any:
    """Return a message of ShareGPT as one of ours; what is no message is returned as it is, and refused later."""
    if not isinstance(turn, dict):
        return turn
    turn = dict(turn)
    for theirs, ours in (("from", "role"), ("value", "content")):
        if theirs in turn and turn.get(ours) is None:
            turn[ours] = turn.pop(theirs)
    role = turn.get("role")
    if role == "function_call":
        turn |= {"content": None, "tool_calls": _calls(turn.get("content"), place)}
    return turn | {"role": THEIR_ROLES.get(role, role)} if isinstance(role, str) else turn


def _calls(text: Any, place: str) -> list[dict[str, Any]]:
    """Read what a function_call of ShareGPT says: the JSON of {"name", "arguments"}, or of a list of them."""
    try:
        calls = json.loads(text) if isinstance(text, str) else text
    except (ValueError, RecursionError):
        calls = None
    calls = calls if isinstance(calls, list) else [calls]
    if not calls or not all(isinstance(call, dict) and call.keys() == {"name", "arguments"} for call in calls):
        raise UserError(
            f'{place} is a function_call of {str(text)[:40]!r}. Allowed: the JSON of {{"name": "...", "arguments":'
            " {...}}, or of a list of such. Correct it, or remove the line."
        )
    return [{"type": "function", "function": call} for call in calls]


def _alpaca(fields: dict[str, Any], place: str) -> list[Any]:
    """Take the fields of Alpaca's layout out of `fields`; return their messages. Earlier rounds are in `history`."""
    instruction, given = (_text(fields, name, place) for name in ("instruction", "input"))
    history = fields.pop("history", [])
    rounds = history if isinstance(history, list | tuple) else [history]
    if not all(
        isinstance(r, list | tuple) and len(r) == 2 and all(isinstance(text, str) for text in r) for r in rounds
    ):
        raise UserError(
            f"{place} has the history {str(history)[:40]!r}. Allowed: a list of pairs of texts, [instruction, answer]."
            " Correct it, or remove the line."
        )
    rounds = [*rounds, [f"{instruction}\n{given}" if instruction and given else instruction or given,
                        _text(fields, "output", place)]]  # fmt: skip
    return [message for asked, said in rounds for message in ({"role": "user", "content": asked}, _answer(said))]


def _part(fields: dict[str, Any], name: str, role: str, place: str) -> list[Any]:
    """Take a prompt or a completion out of `fields`: a text that `role` says, or a list of messages.

    Answers in a prompt are seen and not learned, as in TRL.
    """
    if not isinstance(fields.get(name), list):
        text = _text(fields, name, place)
        return [_answer(text) if role == "assistant" else {"role": role, "content": text}]
    turns = [_turn(turn, f"{place}, {name}, message {i}") for i, turn in enumerate(fields.pop(name), 1)]
    seen = {"weight": 0} if role == "user" else {}
    return [{**seen, **turn} if isinstance(turn, dict) and turn.get("role") == "assistant" else turn for turn in turns]


def _answer(text: str) -> dict[str, Any]:
    """Return an answer. One without text is not learned, and the line is counted among those without an answer."""
    return {"role": "assistant", "content": text} | ({} if text.strip() else {"weight": 0})


def _after_system(messages: list[Any], fields: dict[str, Any]) -> list[Any]:
    """Put the system prompt of a line, if it has one, before its messages; one among the messages counts more."""
    first = messages[0].get("role") if messages and isinstance(messages[0], dict) else None
    system = fields.get("system")
    if not isinstance(system, str) or (first == "system" and system):
        return messages  # what is left in `fields` goes to the template, and is named where it is not read
    del fields["system"]
    return [{"role": "system", "content": system}, *messages] if system else messages


def _text(fields: dict[str, Any], name: str, place: str) -> str:
    text = fields.pop(name, "")
    if not isinstance(text, str):
        raise UserError(f"{place} has the {name} {str(text)[:40]!r}. Allowed: text. Correct it, or remove the line.")
    return text
