"""Check a line of a file of conversations: what the messages are, which are learned, what else the template gets.

In the data path: between `corpus.py`, which reads the JSON, and `conversations.py`.
"""

import json
from collections.abc import Callable
from typing import Any, NamedTuple

from jgpt.data.chat_layouts import THEIR_ROLES, find_layout
from jgpt.errors import UserError

ROLES = ("system", "user", "assistant", "tool")
MESSAGE = 'A message must be {"role": "user", "content": "..."}. Correct it, or remove the line.'


class ChatLine(NamedTuple):
    """One conversation, as the chat template gets it."""

    messages: list[dict[str, Any]]  # without their weights
    learned: list[bool]  # for each message: False where it is seen, and not learned
    variables: dict[str, Any]  # the other fields of the line, such as tools
    layout: str  # of the line, see `chat_layouts.LAYOUTS`


def read_chat_line(record: Any, place: str, well_formed: Callable[[str, str], str]) -> ChatLine:
    """Check the JSON value of a line in any layout; `well_formed(text, place)` checks each text, and returns it.

    Raises UserError, with `place`, for a line that is not a conversation.
    """
    try:
        return _read_chat_line(record, place, well_formed)
    except RecursionError:
        raise UserError(f"{place} is nested too deeply. Messages are not. Correct the line, or remove it.") from None


def _read_chat_line(record: Any, place: str, well_formed: Callable[[str, str], str]) -> ChatLine:
    layout, given, rest = find_layout(record, place)
    messages, learned = [], []
    for i, message in enumerate(given, 1):
        where = f"{place}, message {i}"
        message = _clean(_message(_without_nulls(message), where), where, well_formed)
        learned.append(message.pop("weight", 1) == 1)
        messages.append(message)
    return ChatLine(messages, learned, _variables(_clean(rest, place, well_formed), place), layout)


def _without_nulls(value: Any) -> Any:
    """Remove the null fields of an object, but content: tables that become JSON have them where a row lacks a field."""
    if not isinstance(value, dict):
        return value
    return {name: part for name, part in value.items() if part is not None or name == "content"}


def _message(message: Any, place: str) -> dict[str, Any]:
    if not isinstance(message, dict):
        raise UserError(f"{place} is {str(message)[:40]!r}, which is not an object. {MESSAGE}")
    role, content, weight = message.get("role"), message.get("content"), message.get("weight", 1)
    if role not in ROLES:
        raise UserError(f"{place} has the role {role!r:.40}. Allowed: {', '.join((*ROLES, *THEIR_ROLES))}. {MESSAGE}")
    if isinstance(content, list):
        content = join_parts(content, place)
        message = message | {"content": content}
    calls = role == "assistant" and bool(message.get("tool_calls"))
    if not isinstance(content, str) and not (content is None and calls):
        raise UserError(f"{place} has the content {str(content)[:40]!r}, which is not text. {MESSAGE}")
    if weight not in (0, 1) or (weight and "weight" in message and role != "assistant"):
        raise UserError(
            f"{place}, of the {role}, has the weight {weight!r}. Allowed: 0 (seen, not learned), and 1 (learned) where "
            "the role is assistant. Correct it, or remove it."
        )
    if role == "assistant" and weight and not calls and not (content or "").strip():
        raise UserError(
            f"{place} is an empty answer, which would teach the model to say nothing. Answers must hold text. "
            'Fill it in, remove the line, or add "weight": 0.'
        )
    return message


def join_parts(parts: list[Any], place: str) -> str:
    """Join a content of parts, {"type": "text", "text": TEXT}, to the text that it is."""
    texts = []
    for part in parts:
        text = part.get("text") if isinstance(part, dict) and part.get("type") == "text" else part
        if not isinstance(text, str):
            kind = part.get("type") if isinstance(part, dict) else part
            raise UserError(
                f"{place} has a content with a part of type {str(kind)[:40]!r}, which is not text. Allowed: "
                '{"type": "text", "text": "..."}. Remove the part, or the line.'
            )
        texts.append(text)
    return "".join(texts)


def _variables(variables: dict[str, Any], place: str) -> dict[str, Any]:
    """Read `tools` where a data set stores it as the text of its JSON; a template needs the list."""
    tools = variables.get("tools")
    if isinstance(tools, str):
        try:
            tools = json.loads(tools) if tools.strip() else None
        except ValueError:
            pass
        variables = variables | {"tools": tools}
    if tools is not None and not isinstance(tools, list):
        raise UserError(f"{place} has the tools {str(tools)[:40]!r}. Allowed: a list. Correct it, or remove it.")
    return variables


def _clean(value: Any, place: str, well_formed: Callable[[str, str], str]) -> Any:
    """Check all texts of a JSON value."""
    if isinstance(value, str):
        return well_formed(value, place)
    if isinstance(value, list):
        return [_clean(part, place, well_formed) for part in value]
    if isinstance(value, dict):
        return {well_formed(name, place): _clean(part, place, well_formed) for name, part in value.items()}
    return value
