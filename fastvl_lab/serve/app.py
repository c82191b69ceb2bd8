"""The HTTP side: bodies read within limits, answers whole or as server-sent events, and an eye on who has left."""

from __future__ import annotations

import asyncio
import hmac
import json
from collections.abc import AsyncIterator
from concurrent.futures import Executor
from contextlib import asynccontextmanager
from functools import partial
from typing import Any

from fastvl_lab.errors import DeviceError, FastvlError, RequestCancelledError, require
from fastvl_lab.lab import Lab
from fastvl_lab.recipe import Recipe
from fastvl_lab.request import Chunk
from fastvl_lab.serve import chat as chats
from fastvl_lab.serve.chat import Chat, Reply, UnknownModelError, error_body
from fastvl_lab.serve.fetch import fetch
from fastvl_lab.serve.metrics import Metrics
from fastvl_lab.serve.request_queue import Finished, QueuedRequest, QueueFullError, RequestQueue, engine_thread
from fastvl_lab.serve.settings import Settings

CLIENT_LEFT = 499  # nginx's number for it; nobody reads it but the metrics


def create_app(lab: Lab, recipe: Recipe | str, settings: Settings | None = None, engine: Executor | None = None) -> Any:
    """The FastAPI application that serves a recipe of a lab; raises `RecipeError` for one that cannot run here.

    engine: the `engine_thread` that loaded the lab, where one did; it ends with the application.
    """
    fastapi = require("fastapi", "serve")
    settings = settings or Settings()
    bound = lab.engine(recipe)
    if not isinstance(bound, Recipe):
        raise FastvlError(f"recipe {bound!r} is a peer; a server runs a recipe")
    bound.check(lab.device, lab.dtype)
    metrics = Metrics()
    engine = engine or engine_thread()
    queue = RequestQueue(lab, bound, metrics, engine, max_queue=settings.max_queue, warm_up=settings.warm_up)

    @asynccontextmanager
    async def lifespan(_: Any) -> AsyncIterator[None]:
        queue.start()
        yield
        await asyncio.to_thread(queue.close)

    app = fastapi.FastAPI(title="fastvl_lab", lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None)
    app.state.queue = queue
    front = _Front(lab, queue, metrics, settings)
    app.add_route("/v1/chat/completions", front.complete, methods=["POST"])
    app.add_route("/v1/models", front.models, methods=["GET"])
    app.add_route("/health", front.health, methods=["GET"])
    app.add_route("/metrics", front.metrics_page, methods=["GET"])
    return app


class _Front:
    """The endpoints of one server."""

    def __init__(self, lab: Lab, queue: RequestQueue, metrics: Metrics, settings: Settings) -> None:
        self._model, self._ends = lab.checkpoint.name, tuple(lab.checkpoint.eos_token_ids)
        self._queue, self._metrics, self._settings = queue, metrics, settings
        self._fetch = partial(fetch, settings=settings)
        self._responses = require("starlette.responses", "serve")

    async def models(self, request: Any) -> Any:
        if (refused := self._without_key(request)) is not None:
            return refused
        model = {"id": self._model, "object": "model", "created": 0, "owned_by": "fastvl_lab"}
        return self._responses.JSONResponse({"object": "list", "data": [model]})

    async def health(self, _: Any) -> Any:
        if self._queue.failure is not None:
            return self._responses.JSONResponse(error_body(self._queue.failure, "server_error"), status_code=500)
        ready = self._queue.ready.is_set()
        return self._responses.JSONResponse({"status": "ok" if ready else "starting"}, status_code=200 if ready else 503)

    async def metrics_page(self, _: Any) -> Any:
        text, kind = self._metrics.text()
        return self._responses.Response(text, headers={"Content-Type": kind})

    async def complete(self, request: Any) -> Any:
        """One chat completion, from its body to the response that will be sent."""
        deadline = asyncio.get_running_loop().time() + self._settings.timeout
        if (refused := self._without_key(request)) is not None:
            return refused
        body = await self._body(request)
        if body is None:
            said = f"the body has more than {self._settings.max_body} bytes, the limit"
            return self._refused(413, said, "invalid_request_error", headers={"Connection": "close"})  # nobody reads the rest
        try:
            chat = await asyncio.to_thread(chats.read, body, self._model, self._settings, self._fetch)
            queued = QueuedRequest(chat.request)
            self._queue.put(queued)
        except UnknownModelError as error:
            return self._refused(404, error, "invalid_request_error", "model_not_found")
        except QueueFullError as error:
            return self._refused(429, error, "rate_limit_error", "queue_full", {"Retry-After": "1"})
        except FastvlError as error:
            return self._refused(400, error, "invalid_request_error")
        return _Answer(chat, queued, self._queue, self._metrics, deadline, self._ends)

    def _without_key(self, request: Any) -> Any:
        """The refusal of a request that does not show the key, where one is set; else None."""
        key, given = self._settings.api_key, request.headers.get("authorization", "")
        if key is None or hmac.compare_digest(given.encode(), f"Bearer {key}".encode()):
            return None
        return self._refused(401, "the API key is missing or wrong", "authentication_error")

    async def _body(self, request: Any) -> bytes | None:
        """The whole body, or None if it is too large.

        What is too large is read on for as much again, and thrown away: a client that is still sending hears no answer.
        """
        limit, body, n_read = self._settings.max_body, bytearray(), 0
        if int(request.headers.get("content-length", "0")) > 2 * limit:
            return None
        async for piece in request.stream():
            n_read += len(piece)
            if n_read > 2 * limit:
                return None
            if n_read <= limit:
                body += piece
        return bytes(body) if n_read <= limit else None

    def _refused(
        self, status: int, error: FastvlError | str, kind: str, code: str | None = None, headers: dict[str, str] | None = None
    ) -> Any:
        self._metrics.requests.labels(status).inc()
        return self._responses.JSONResponse(error_body(error, kind, code), status_code=status, headers=headers)


class _Answer:
    """An ASGI response that waits for its request's turn, sends what is made, and gives the request up when its client leaves."""

    def __init__(
        self, chat: Chat, queued: QueuedRequest, queue: RequestQueue, metrics: Metrics, deadline: float, ends: tuple[int, ...]
    ) -> None:
        self._chat, self._queued, self._queue, self._metrics, self._deadline = chat, queued, queue, metrics, deadline
        self._reply = Reply(chat, ends)
        self._begun = False

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        leaving = asyncio.create_task(_until_gone(receive))
        answering = asyncio.create_task(self._answer(send))
        try:
            await asyncio.wait((leaving, answering), return_when=asyncio.FIRST_COMPLETED)
            status = answering.result() if answering.done() else CLIENT_LEFT
        except (OSError, RuntimeError):  # the connection broke while something was sent
            status = CLIENT_LEFT
        finally:
            self._queue.give_up(self._queued)
            for task in (leaving, answering):
                task.cancel()
            await asyncio.gather(leaving, answering, return_exceptions=True)
        self._metrics.requests.labels(status).inc()

    async def _answer(self, send: Any) -> int:
        """Send the answer or the error; the status that the request had in the end."""
        try:
            async with asyncio.timeout_at(self._deadline):
                while isinstance(event := await self._queued.events.get(), Chunk):
                    if self._chat.stream:
                        await self._send_event(send, self._reply.piece(event))
                if isinstance(event, Finished):
                    await self._finish(send, event)
                    return 200
                return await self._fail(send, event)
        except TimeoutError:
            return await self._fail(send, TimeoutError())

    async def _finish(self, send: Any, finished: Finished) -> None:
        if not self._chat.stream:
            await self._send_json(send, 200, self._reply.whole(finished.run))
            return
        for last in self._reply.end(finished.run):
            await self._send_event(send, last)
        await send({"type": "http.response.body", "body": b"data: [DONE]\n\n"})

    async def _fail(self, send: Any, error: BaseException) -> int:
        """Say what went wrong, with a status, or in the stream if that has begun."""
        status, said = _status(error)
        if not self._begun:
            await self._send_json(send, status, said)
        else:
            await send({"type": "http.response.body", "body": _event(said)})
        return status

    async def _send_event(self, send: Any, data: dict[str, Any]) -> None:
        if not self._begun:
            self._begun = True
            headers = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-cache")]
            await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": _event(data), "more_body": True})

    async def _send_json(self, send: Any, status: int, data: dict[str, Any]) -> None:
        body = json.dumps(data).encode()
        headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": body})


def _event(data: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(data).encode() + b"\n\n"


def _status(error: BaseException) -> tuple[int, dict[str, Any]]:
    if isinstance(error, TimeoutError | RequestCancelledError):
        return 504, error_body("the request took longer than this server allows", "timeout_error")
    if isinstance(error, DeviceError):
        return 503, error_body(error, "server_error")
    if isinstance(error, FastvlError):
        return 400, error_body(error, "invalid_request_error")
    return 500, error_body(error, "server_error")


async def _until_gone(receive: Any) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
