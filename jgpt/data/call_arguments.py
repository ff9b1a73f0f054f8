"""The arguments of a tool call: an object for a chat template, also where a file has them as JSON in a text.

In the data path: inside `template_process.py`.
"""

import json
from typing import Any

from jinja2.filters import do_items


class Arguments(str):
    """The arguments of a call that are given as JSON in a text, as in OpenAI's files; `fields` are what they say.

    Templates that write a text get it as it is. Most expect an object: `tojson` would write the text as JSON once more,
    in quotes, and there would be no items.
    """

    fields: dict[str, Any]

    def items(self) -> Any:
        """Return the names and values of the arguments."""
        return self.fields.items()


def with_arguments(calls: Any) -> Any:
    """Return the calls of a message with `Arguments`; what has another form stays as it is."""
    return [_with_arguments(call) for call in calls] if isinstance(calls, list) else calls


def _with_arguments(call: Any) -> Any:
    if not isinstance(call, dict):
        return call
    if isinstance(call.get("function"), dict):
        return call | {"function": _with_arguments(call["function"])}
    text = call.get("arguments")
    if not isinstance(text, str):
        return call
    try:
        fields = json.loads(text) if text.strip() else {}
    except (ValueError, RecursionError):
        return call
    if not isinstance(fields, dict):
        return call
    arguments = Arguments(text)
    arguments.fields = fields
    return call | {"arguments": arguments}


def items(value: Any) -> Any:
    """Do what Jinja's filter `items` does, also for `Arguments`."""
    return value.items() if isinstance(value, Arguments) else do_items(value)


def as_objects(value: Any) -> Any:
    """Return a JSON value with the objects that `Arguments` in it say."""
    if isinstance(value, Arguments):
        return value.fields
    if isinstance(value, dict):
        return {name: as_objects(part) for name, part in value.items()}
    return [as_objects(part) for part in value] if isinstance(value, list | tuple) else value
