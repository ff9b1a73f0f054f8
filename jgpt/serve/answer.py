"""Write answers in OpenAI's form: whole, or as a stream of server-sent events.

In the data path: the events of `worker.py` in, bytes for the client out.
"""

import asyncio
import json
import secrets
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import suppress
from typing import Any

from jgpt.loading.model import Model
from jgpt.serve.ask import Asked
from jgpt.serve.refusal import Refusal
from jgpt.serve.worker import Event, Job, Worker

PING_SECONDS = 10.0  # between two signs of life of a stream
LOOK_SECONDS = 0.5  # between two looks at whether a client is still there


class Reply:
    """The answer to a request whose texts are in the worker's queue."""

    def __init__(self, model: Model, worker: Worker, asked: Asked, is_chat: bool, served_name: str) -> None:
        """Put the texts into the queue. Raises Refusal where there is no room."""
        loop, self._events = asyncio.get_running_loop(), asyncio.Queue[Event]()

        def put(event: Event) -> None:
            with suppress(RuntimeError):  # the loop is closed: the server has ended
                loop.call_soon_threadsafe(self._events.put_nowait, event)

        self._worker, self._asked, self._is_chat = worker, asked, is_chat
        self._jobs: list[Job] = asked.jobs(model, put)
        self._head = {
            "id": f"{'chatcmpl' if is_chat else 'cmpl'}-{secrets.token_hex(12)}",
            "object": "chat.completion" if is_chat else "text_completion",
            "created": int(time.time()),
            "model": served_name,
        } | ({"jgpt": {"note": asked.note}} if asked.note else {})
        worker.submit(self._jobs)

    def cancel(self) -> None:
        """Stop writing, as nobody reads any more."""
        self._worker.cancel(self._jobs)

    async def whole(self, is_gone: Callable[[], Awaitable[bool]]) -> dict[str, Any]:
        """Wait for all texts, and return the answer. Raises Refusal where a text failed.

        Where `is_gone` finds that the client has left, the texts are cancelled and the answer is not complete.
        """
        texts, ends = [""] * len(self._jobs), [""] * len(self._jobs)
        try:
            looked = time.monotonic()
            while not all(ends):
                event = await self._next(LOOK_SECONDS)
                if event is None or time.monotonic() - looked > LOOK_SECONDS:
                    looked = time.monotonic()
                    if await is_gone():
                        break
                if event is None:
                    continue
                if event.end == "error":
                    raise Refusal(500, event.error, "failed")
                texts[event.number] += event.text
                ends[event.number] = event.end
        finally:
            self.cancel()
        choices = [self._choice(i, text, ends[i]) for i, text in enumerate(texts)]
        return {**self._head, "choices": choices, "usage": self._usage()}

    async def events(self) -> AsyncIterator[bytes]:
        """Return the pieces as server-sent events, while they are made; closing it cancels what is not made yet."""
        head = {**self._head, "object": "chat.completion.chunk" if self._is_chat else "text_completion"}
        ended = 0
        try:
            if self._is_chat:
                for i in range(len(self._jobs)):
                    yield _sse({**head, "choices": [_delta(i, {"role": "assistant", "content": ""}, "")]})
            while ended < len(self._jobs):
                event = await self._next(PING_SECONDS)
                if event is None:
                    yield b": waiting\n\n"
                    continue
                if event.end == "error":
                    yield _sse(Refusal(500, event.error, "failed").body())
                    return
                ended += bool(event.end)
                yield _sse({**head, "choices": [self._piece(event)]})
            if self._asked.include_usage:
                yield _sse({**head, "choices": [], "usage": self._usage()})
            yield b"data: [DONE]\n\n"
        finally:
            self.cancel()

    async def _next(self, seconds: float) -> Event | None:
        """Return the next event; None where there was none for so long."""
        try:
            return await asyncio.wait_for(self._events.get(), seconds)
        except TimeoutError:
            return None

    def _choice(self, i: int, text: str, end: str) -> dict[str, Any]:
        if not self._is_chat:
            return {"index": i, "text": text, "logprobs": None, "finish_reason": end}
        message = {"role": "assistant", "content": text}
        return {"index": i, "message": message, "logprobs": None, "finish_reason": end}

    def _piece(self, event: Event) -> dict[str, Any]:
        if self._is_chat:
            return _delta(event.number, {"content": event.text} if event.text else {}, event.end)
        return {"index": event.number, "text": event.text, "logprobs": None, "finish_reason": event.end or None}

    def _usage(self) -> dict[str, int]:
        prompt = sum(len(prompt.ids) for prompt in self._asked.prompts)
        completion = sum(job.n_tokens for job in self._jobs)
        return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}


def _delta(i: int, delta: dict[str, str], end: str) -> dict[str, Any]:
    return {"index": i, "delta": delta, "logprobs": None, "finish_reason": end or None}


def _sse(value: Any) -> bytes:
    return b"data: " + to_json(value) + b"\n\n"


def to_json(value: Any) -> bytes:
    """Return JSON as UTF-8; a lone half of a character, which UTF-8 has not, becomes a question mark."""
    return json.dumps(value, ensure_ascii=False, allow_nan=False).encode("utf-8", "replace")
