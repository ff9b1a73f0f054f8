"""The routes: the page, and OpenAI's endpoints; who may call them, and how much they may send.

In the data path: requests in, the events of `answer.py` out. Nothing here knows the model.
"""

import asyncio
import hmac
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import FileResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from jgpt.inference.chat_prompt import ChatPrompts, chat_sampling
from jgpt.inference.sampling import Sampling
from jgpt.loading.model import Model
from jgpt.serve.answer import Reply, to_json
from jgpt.serve.ask import Limits, read_chat, read_completion
from jgpt.serve.refusal import Refusal
from jgpt.serve.worker import Worker

PAGE = Path(__file__).parent / "page"
MOST_BYTES = 1 << 20  # of a request's body
DRAINED_BYTES = 64 << 20  # of a larger body that are read, so that a client that still sends sees the answer
BODY_SECONDS = 30.0  # that a body may take
LOOPBACK = {"127.0.0.1", "localhost", "::1"}
HEADERS = [
    (b"content-security-policy", b"default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
     b"img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"),
    (b"x-content-type-options", b"nosniff"), (b"referrer-policy", b"no-referrer"), (b"cache-control", b"no-store"),
]  # fmt: skip


class Endpoints:
    """What the routes do."""

    def __init__(self, model: Model, worker: Worker, limits: Limits, name: str, prompts: ChatPrompts | None) -> None:
        """`name` is what clients call the model; `prompts` is None where it has no chat template."""
        self.model, self.worker, self.limits, self.name, self.prompts = model, worker, limits, name, prompts

    def described(self) -> dict[str, Any]:
        """Return the model as /v1/models lists it, with what the page needs."""
        rules = chat_sampling(self.model.loaded.sampling, {}) if self.prompts else Sampling()
        about = {
            "chat": self.prompts is not None, "context_length": self.limits.context_length,
            "max_new_tokens": self.limits.new_tokens, "sampling": vars(rules), "step": self.model.step,
        }  # fmt: skip
        return {"id": self.name, "object": "model", "created": 0, "owned_by": "jgpt", "jgpt": about}

    async def models(self, request: Request) -> Response:
        """List the model."""
        return _json({"object": "list", "data": [self.described()]})

    async def one_model(self, request: Request) -> Response:
        """Describe the model by its name."""
        self._check_name(request.path_params["name"])
        return _json(self.described())

    async def health(self, request: Request) -> Response:
        """Say that the server runs, and what it does."""
        return _json({"status": "ok", **self.worker.counts()})

    async def completions(self, request: Request) -> Response:
        """Continue texts."""
        return await self._answer(request, is_chat=False)

    async def chat(self, request: Request) -> Response:
        """Answer a conversation."""
        return await self._answer(request, is_chat=True)

    async def _answer(self, request: Request, is_chat: bool) -> Response:
        body = await _read(request)
        self._check_name(body.get("model", self.name))
        # In another thread: a template takes a process of its own, and a long text time.
        if is_chat:
            asked = await run_in_threadpool(read_chat, body, self.model, self.prompts, self.limits)
        else:
            asked = await run_in_threadpool(read_completion, body, self.model, self.limits)
        reply = Reply(self.model, self.worker, asked, is_chat, self.name)
        if asked.stream:
            return StreamingResponse(
                reply.events(), media_type="text/event-stream", headers={"X-Accel-Buffering": "no"}
            )
        return _json(await reply.whole(request.is_disconnected))

    def _check_name(self, name: Any) -> None:
        if name != self.name:
            raise Refusal(
                404,
                f"the model {str(name)[:100]!r} does not exist. Allowed: {self.name!r}, the one that is served.",
                "model_not_found",
                "model",
            )


class Guard:
    """Lets in only who may: with a token whoever has it, without one only pages and programs of this machine."""

    def __init__(self, app: ASGIApp, token: str, hosts: frozenset[str]) -> None:
        """`hosts` are the names that this server may be called by where there is no token.

        A web page of somebody else could reach this address under a name of its own (DNS rebinding).
        """
        self._app, self._token, self._hosts = app, token, hosts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message.get("headers", []), *HEADERS]
            await send(message)

        try:
            self._check(Request(scope))
        except Refusal as refusal:
            return await _refused(refusal)(scope, receive, send_with_headers)
        await self._app(scope, receive, send_with_headers)

    def _check(self, request: Request) -> None:
        host = request.headers.get("host", "")
        name = _host_name(f"//{host}")
        if not self._token and name not in self._hosts:
            raise Refusal(403, f"the host {host[:60]!r}. Allowed: {', '.join(sorted(self._hosts))}.", "host")
        origin = request.headers.get("origin")
        if origin is not None and (not host or _place(origin) != host):
            raise Refusal(403, f"the origin {origin[:60]!r}. Allowed: the page of this server.", "origin")
        if self._token and request.url.path.startswith("/v1/"):
            given = request.headers.get("authorization", "").removeprefix("Bearer ").encode("utf-8", "replace")
            if not hmac.compare_digest(given, self._token.encode()):
                raise Refusal(
                    401, "no or a wrong token. Needed: the header Authorization: Bearer TOKEN.", "invalid_api_key"
                )


def _host_name(url: str) -> str:
    try:
        return urlsplit(url).hostname or ""
    except ValueError:
        return ""


def _place(url: str) -> str:
    """Return host and port of an address; "" where it is none."""
    try:
        return urlsplit(url).netloc
    except ValueError:
        return ""


def make_app(endpoints: Endpoints, token: str, host: str) -> ASGIApp:
    """Return the application; its worker runs from its start to its end."""

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        endpoints.worker.start()
        yield
        await run_in_threadpool(endpoints.worker.close)

    files = {
        "/": "chat.html",
        "/chat.css": "chat.css",
        "/words.js": "words.js",
        "/server.js": "server.js",
        "/chat.js": "chat.js",
    }
    app = Starlette(
        routes=[
            *(Route(path, _file(name)) for path, name in files.items()),
            Route("/health", endpoints.health),
            Route("/v1/models", endpoints.models),
            Route("/v1/models/{name:path}", endpoints.one_model),
            Route("/v1/completions", endpoints.completions, methods=["POST"]),
            Route("/v1/chat/completions", endpoints.chat, methods=["POST"]),
        ],
        exception_handlers={Refusal: _on_refusal, HTTPException: _on_http_error, Exception: _on_bug},
        lifespan=lifespan,
    )
    return Guard(app, token, frozenset(LOOPBACK | {host}))


def _file(name: str) -> Any:
    async def send(request: Request) -> Response:
        return FileResponse(PAGE / name)

    return send


async def _read(request: Request) -> dict[str, Any]:
    """Return the JSON object that a request holds."""
    kind = request.headers.get("content-type", "").split(";")[0].strip().lower()
    if kind != "application/json":  # what a page of somebody else could not send without asking
        raise Refusal(415, f"the content type {kind[:60]!r}. Allowed: application/json.", "content_type")
    raw, n_bytes = bytearray(), 0
    try:
        async with asyncio.timeout(BODY_SECONDS):
            async for chunk in request.stream():
                n_bytes += len(chunk)
                if n_bytes <= MOST_BYTES:
                    raw += chunk
                elif n_bytes > DRAINED_BYTES:
                    break
    except TimeoutError:
        raise Refusal(408, f"the body did not come within {BODY_SECONDS:.0f} s. Send it again.", "timeout") from None
    except ClientDisconnect:  # nobody reads this
        raise Refusal(400, "the client went away before it had sent all of the body.", "disconnected") from None
    if n_bytes > MOST_BYTES:
        raise Refusal(413, f"the body is too large. Allowed: {MOST_BYTES:,} bytes. Send less.", "body_too_large")
    try:
        body = json.loads(raw, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise Refusal(
            400, f"the body is not JSON ({str(error)[:100]}). Needed: a JSON object.", "invalid_json"
        ) from None
    if not isinstance(body, dict):
        raise Refusal(400, "the body is no JSON object. Needed: one, as OpenAI's API has it.", "invalid_json")
    return body


def _refuse_constant(name: str) -> float:
    raise ValueError(f"{name} is not JSON")


def _json(value: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    return Response(to_json(value), status, headers, "application/json")


def _refused(refusal: Refusal) -> Response:
    return _json(refusal.body(), refusal.status, refusal.headers)


async def _on_refusal(request: Request, error: Exception) -> Response:
    assert isinstance(error, Refusal)
    return _refused(error)


async def _on_http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    message = f"{request.method} {request.url.path[:100]}: {error.detail}. The API is below /v1, the page is at /."
    return _refused(Refusal(error.status_code, message, headers=dict(error.headers or {})))


async def _on_bug(request: Request, error: Exception) -> Response:
    return _refused(Refusal(500, "the server failed, see its log. Try again.", "failed"))
