"""The HTTP side: bodies read within limits, answers whole or as server-sent events, and an eye on who has left."""

from __future__ import annotations

import asyncio
import copy
import dataclasses
import hmac
import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, asynccontextmanager
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar

from fastvl_lab.capture.warm_up import requests_of
from fastvl_lab.checkpoint import Checkpoint
from fastvl_lab.errors import DeviceError, FastvlError, RequestCancelledError, require
from fastvl_lab.grammars import Grammars
from fastvl_lab.lab import Lab
from fastvl_lab.recipe import Recipe
from fastvl_lab.request import Chunk, Request
from fastvl_lab.run import Run
from fastvl_lab.serve import chat as chats, completions, openapi
from fastvl_lab.serve.chat import Chat, Draft, Reply, Served, UnknownModelError, error_body, json_object
from fastvl_lab.serve.completions import prompt_of
from fastvl_lab.serve.fetch import fetch_all
from fastvl_lab.serve.metrics import Metrics
from fastvl_lab.serve.openapi import of_body, of_look
from fastvl_lab.serve.page import page
from fastvl_lab.serve.request_queue import Events, Finished, HeldBytes, QueuedRequest, QueueFullError, RequestQueue, Share
from fastvl_lab.serve.settings import Settings
from fastvl_lab.tokenizer import check_text

T = TypeVar("T")

CLIENT_LEFT = 499  # nginx's number for it; nobody reads it but the metrics

_READERS, _FETCHERS = 4, 16  # threads: who reads bodies is not held up by who waits for addresses

# Pages of this machine, whose scripts may ask.
_LOCAL_PAGES = r"https?://(localhost|127\.0\.0\.1|\[::1\])(:\d+)?"


def create_app(lab: Lab, recipe: Recipe | str, settings: Settings | None = None) -> Any:
    """The FastAPI application that serves a recipe of a lab.

    Raises `RecipeError` for a recipe that cannot run here, and `RequestError` for a size to warm up that cannot be.
    """
    fastapi = require("fastapi", "serve")
    settings = settings or Settings()
    bound = lab.recipe(recipe)
    bound.check(lab.checkpoint.target)
    lab = _under_its_served_name(lab, settings)
    warm_up = tuple(_checked(request, lab.checkpoint) for request in requests_of(settings.warm_up, 32))
    metrics = Metrics(lab.memory if bound.cache.kv == "paged" else None)
    queue = RequestQueue(lab, bound, metrics, max_queue=settings.max_queue, warm_up=warm_up)
    front = _Front(lab.checkpoint, lab.grammars, queue, metrics, settings)

    @asynccontextmanager
    async def lifespan(_: Any) -> AsyncIterator[None]:
        queue.start()
        yield
        front.close()
        await asyncio.to_thread(queue.close)

    http_error = require("starlette.exceptions", "serve").HTTPException
    app = fastapi.FastAPI(
        title="fastvl_lab",
        version=version("fastvl-lab"),
        lifespan=lifespan,
        docs_url=None,  # FastAPI's own pages fetch their scripts from a CDN
        redoc_url=None,
        exception_handlers={http_error: front.no_such_place, Exception: front.failed},
    )
    app.state.queue = queue
    for path, method, endpoint, told in front.places():
        app.add_api_route(path, _of_request(endpoint, fastapi.Request), methods=[method], response_model=None, **told)
        if method == "GET":
            app.add_route(path, endpoint, methods=["HEAD"], include_in_schema=False)

    async def described(_: Any) -> Any:
        return fastapi.responses.HTMLResponse(page(app.openapi()))

    app.add_route("/docs", described, include_in_schema=False)
    app.add_middleware(
        require("starlette.middleware.cors", "serve").CORSMiddleware,
        allow_origins=settings.origins,
        allow_origin_regex=_LOCAL_PAGES,
        allow_methods=["GET", "POST"],
        allow_headers=["*"],
    )
    return app


def _of_request(endpoint: Callable[[Any], Awaitable[Any]], kind: type) -> Callable[[Any], Awaitable[Any]]:
    """The endpoint as FastAPI wants it: what it takes for the request itself is told by type."""

    async def given(request: Any) -> Any:
        return await endpoint(request)

    given.__annotations__["request"] = kind
    given.__name__ = endpoint.__name__
    return given


def _under_its_served_name(lab: Lab, settings: Settings) -> Lab:
    """The same lab with a checkpoint of that name, so that no answer, trace or error shows a path of this disk."""
    name = settings.served_name or _last_part(lab.checkpoint.name)
    if name == lab.checkpoint.name:
        return lab
    lab = copy.copy(lab)
    lab.checkpoint = dataclasses.replace(lab.checkpoint, name=name)
    return lab


def _last_part(name: str) -> str:
    """The name of a checkpoint that is a folder, without the way there."""
    path = Path(name).expanduser() if name.startswith("~") else Path(name)
    return path.resolve().name if path.exists() else name


def _checked(request: Request, checkpoint: Checkpoint) -> Request:
    """A request, where one such can be served; raises `RequestError`."""
    prompt_of(request, checkpoint)
    return request


@dataclass(frozen=True, kw_only=True, eq=False)
class _Body:
    """A body that was read.

    arrived: when its request did, in seconds of the event loop. read_ns: when all of it was there (`time.perf_counter_ns`), before
    it was looked at. until: the end of its time. put: gives its request a place.
    share: of the bytes that the server holds; leaving: gives it back, unless an answer takes that over.
    """

    data: dict[str, Any]
    arrived: float
    read_ns: int
    until: asyncio.Timeout
    put: Callable[[QueuedRequest], None]
    share: Share
    leaving: ExitStack


class _Front:
    """The endpoints of one server."""

    def __init__(
        self, checkpoint: Checkpoint, grammars: Grammars, queue: RequestQueue, metrics: Metrics, settings: Settings
    ) -> None:
        self._checkpoint, self._grammars = checkpoint, grammars
        self._served = Served(
            model=checkpoint.name,
            ends=tuple(checkpoint.eos_token_ids),
            session_len=checkpoint.session_len,
            thinks=grammars.thinks,
        )
        self._queue, self._metrics, self._settings = queue, metrics, settings
        self._held = HeldBytes(settings.max_held)
        self._readers = ThreadPoolExecutor(_READERS, thread_name_prefix="fastvl-reader")
        self._fetchers = ThreadPoolExecutor(_FETCHERS, thread_name_prefix="fastvl-fetcher")
        self._responses = require("starlette.responses", "serve")
        self._gone = require("starlette.requests", "serve").ClientDisconnect
        self._answer = type("Answer", (_Answer, self._responses.Response), {"background": None})  # FastAPI asks for its type

    def close(self) -> None:
        for pool in (self._readers, self._fetchers):
            pool.shutdown(wait=False, cancel_futures=True)

    def places(self) -> Iterator[tuple[str, str, Callable[[Any], Awaitable[Any]], dict[str, Any]]]:
        """Paths, their methods, what is served there, and what FastAPI is told of it."""
        model = self._served.model
        yield "/v1/chat/completions", "POST", self.complete_chat, of_body(openapi.CHAT, openapi.CHAT_ANSWER, model, streams=True)
        yield "/v1/completions", "POST", self.complete_text, of_body(openapi.COMPLETION, openapi.TEXT_ANSWER, model, streams=True)
        yield "/tokenize", "POST", self.tokenize, of_body(openapi.TOKENIZE, openapi.TOKENS, model)
        yield "/detokenize", "POST", self.detokenize, of_body(openapi.DETOKENIZE, openapi.TEXT, model)
        yield "/v1/models", "GET", self.models, of_look(openapi.MODELS, keyed=True)
        yield "/v1/models/{name:path}", "GET", self.model, of_look(openapi.MODEL, keyed=True) | openapi.NAME
        health = of_look(openapi.HEALTH, fails={500: "no later request can be served"})
        health["responses"][503] = health["responses"][200] | {"description": "it is still starting"}
        for path in ("/health", "/ping"):  # the second is SageMaker's
            yield path, "GET", self.health, health
        yield "/version", "GET", self.version, of_look(openapi.VERSION)
        yield "/metrics", "GET", self.metrics_page, openapi.PAGE

    async def models(self, request: Any) -> Any:
        if (refused := self._without_key(request)) is not None:
            return refused
        return self._told({"object": "list", "data": [self._model()]})

    async def model(self, request: Any) -> Any:
        if (refused := self._without_key(request)) is not None:
            return refused
        if (name := request.path_params["name"]) != self._served.model:
            said = f"model {name[:80]!r} is not served here; the choice is {self._served.model!r}"
            return self._refused(404, said, "invalid_request_error", "model_not_found")
        return self._told(self._model())

    def _model(self) -> dict[str, Any]:
        said = {"id": self._served.model, "object": "model", "created": 0, "owned_by": "fastvl_lab"}
        return said | {"max_model_len": self._served.session_len}  # vLLM's

    async def health(self, _: Any) -> Any:
        if self._queue.failure is not None:
            return self._responses.JSONResponse(error_body(self._queue.failure, "server_error"), status_code=500)
        ready = self._queue.ready.is_set()
        return self._responses.JSONResponse({"status": "ok" if ready else "starting"}, status_code=200 if ready else 503)

    async def version(self, _: Any) -> Any:
        return self._responses.JSONResponse({"version": version("fastvl-lab")})

    async def metrics_page(self, _: Any) -> Any:
        text, kind = self._metrics.text()
        return self._responses.Response(text, headers={"Content-Type": kind})

    async def no_such_place(self, request: Any, error: Any) -> Any:
        """What is not served here: a path, or a method of one."""
        said = f"{request.method} {request.url.path[:80]} is not served here: {error.detail}"
        return self._refused(error.status_code, said, "invalid_request_error", headers=error.headers)

    async def failed(self, _: Any, error: Exception) -> Any:
        """What was not foreseen, which goes to the log as well."""
        return self._refused(500, error, "server_error")

    async def complete_chat(self, request: Any) -> Any:
        """One chat completion, from its body to the response that will be sent."""
        return await self._answered(request, partial(self._completion, chats.read))

    async def complete_text(self, request: Any) -> Any:
        return await self._answered(request, partial(self._completion, completions.read))

    async def tokenize(self, request: Any) -> Any:
        return await self._answered(request, self._tokens)

    async def detokenize(self, request: Any) -> Any:
        return await self._answered(request, self._text)

    async def _answered(self, request: Any, answer: Callable[[_Body], Awaitable[Any]]) -> Any:
        """What is made of a body that is read within its limits, or why it is refused."""
        arrived = asyncio.get_running_loop().time()
        if (refused := self._without_key(request)) is not None:
            return refused
        if int(request.headers.get("content-length", "0")) > 2 * self._settings.max_body:
            return self._too_large()
        try:
            with self._queue.place() as put, ExitStack() as leaving:
                leaving.callback((share := self._held.share()).give_back)
                async with asyncio.timeout_at(arrived + self._settings.timeout) as until:
                    body = await self._body(request, share)
                    if body is None:
                        return self._too_large()
                    read_ns = time.perf_counter_ns()
                    data = await self._on_reader(json_object, body)
                    given = _Body(data=data, arrived=arrived, read_ns=read_ns, until=until, put=put, share=share, leaving=leaving)
                    return await answer(given)
        except self._gone:
            return self._refused(CLIENT_LEFT, "the client left", "invalid_request_error")
        except UnknownModelError as error:
            return self._refused(404, error, "invalid_request_error", "model_not_found")
        except QueueFullError as error:
            return self._refused(429, error, "rate_limit_error", "queue_full", {"Retry-After": "1"})
        except (FastvlError, TimeoutError) as error:
            status, kind = _status(error)
            return self._refused(status, error, kind)

    async def _completion(self, read: Callable[..., Draft], body: _Body) -> Any:
        draft = await self._on_reader(read, body.data, self._served, self._settings)
        deadline = body.arrived + draft.asked.timeout
        body.until.reschedule(deadline)
        chat = await self._chat(draft, deadline, body.share)
        with ExitStack() as places:  # one for each answer, or none for any
            put = [body.put, *(places.enter_context(self._queue.place()) for _ in chat.others)]
            events: Events = asyncio.Queue()
            requests = enumerate((chat.request, *chat.others))
            queued = [QueuedRequest(request, n, events, body.read_ns) for n, request in requests]
            for place, one in zip(put, queued, strict=True):
                place(one)
        return self._answer(chat, queued, self._queue, self._metrics, deadline, body.leaving.pop_all())

    async def _tokens(self, body: _Body) -> Any:
        draft = await self._on_reader(completions.read_prompt, body.data, self._served, self._settings)
        chat = await self._chat(draft, body.arrived + draft.asked.timeout, body.share)
        with_texts = bool(body.data.get("return_token_strs"))
        tokens = await self._on_reader(partial(completions.tokens_of, chat, self._checkpoint, with_texts=with_texts))
        return self._told(tokens)

    async def _text(self, body: _Body) -> Any:
        return self._told(await self._on_reader(completions.text_of, body.data, self._served, self._checkpoint))

    async def _on_reader(self, work: Callable[..., T], *given: Any) -> T:
        """Done on other threads than the engine's, and than the one that hears all clients."""
        return await asyncio.get_running_loop().run_in_executor(self._readers, partial(work, *given))

    async def _chat(self, draft: Draft, deadline: float, share: Share) -> Chat:
        """The same with the images at its addresses."""
        loop = asyncio.get_running_loop()
        fetched: dict[str, bytes] = {}
        if draft.addresses:
            left = deadline - loop.time()
            fetched = await loop.run_in_executor(self._fetchers, fetch_all, draft.addresses, self._settings, left)
            share.take(sum(map(len, fetched.values())))

        def whole() -> Chat:
            chat = draft.chat(fetched).with_others()
            for request in chat.first_of_each:
                check_text(request, self._checkpoint)
                self._grammars.of(request)  # made here, and refused here, where no device waits for it
            if not draft.asked.continuous_usage:
                return chat
            n_prompt = sum(prompt_of(request, self._checkpoint).n_tokens for request in chat.first_of_each)
            return dataclasses.replace(chat, n_prompt=n_prompt)

        return await self._on_reader(whole)

    def _without_key(self, request: Any) -> Any:
        """The refusal of a request that does not show the key, where one is set; else None."""
        key, (scheme, _, given) = self._settings.api_key, request.headers.get("authorization", "").partition(" ")
        shown = given.strip().encode("latin-1") if scheme.lower() == "bearer" else b""  # as it came; schemes have no case
        if key is None or hmac.compare_digest(shown, key.encode()):
            return None
        return self._refused(401, "the API key is missing or wrong", "authentication_error")

    async def _body(self, request: Any, share: Share) -> bytes | None:
        """The whole body, or None if it is too large; raises `QueueFullError` where it finds no room beside others.

        What is too large is read on for as much again, and thrown away: a client that is still sending hears no answer.
        """
        limit, body, n_read = self._settings.max_body, bytearray(), 0
        async for piece in request.stream():
            n_read += len(piece)
            if n_read > 2 * limit:
                return None
            if n_read <= limit:
                share.take(len(piece))
                body += piece
        return bytes(body) if n_read <= limit else None

    def _too_large(self) -> Any:
        said, unread = f"the body has more than {self._settings.max_body} bytes, the limit", {"Connection": "close"}
        return self._refused(413, said, "invalid_request_error", headers=unread)

    def _told(self, data: Mapping[str, Any]) -> Any:
        """What needs no engine, told at once."""
        self._metrics.requests.labels(200).inc()
        return self._responses.JSONResponse(data)

    def _refused(
        self,
        status: int,
        error: BaseException | str,
        kind: str,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> Any:
        self._metrics.requests.labels(status).inc()
        return self._responses.JSONResponse(error_body(error, kind, code), status_code=status, headers=headers)


class _Answer:
    """An ASGI response that waits for its requests' turns, sends what is made, and gives them up when its client leaves.

    queued: a request for each answer that the client wants. leaving: what is given back when they have ended.
    """

    def __init__(
        self,
        chat: Chat,
        queued: Sequence[QueuedRequest],
        queue: RequestQueue,
        metrics: Metrics,
        deadline: float,
        leaving: ExitStack,
    ) -> None:
        self._chat, self._queued, self._queue, self._metrics, self._deadline = chat, queued, queue, metrics, deadline
        self._leaving = leaving
        self._reply = Reply(chat)
        self._begun = False

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        with self._leaving:
            await self._until_it_ends(receive, send)

    async def _until_it_ends(self, receive: Any, send: Any) -> None:
        leaving = asyncio.create_task(_until_gone(receive))
        answering = asyncio.create_task(self._answer(send))
        try:
            await asyncio.wait((leaving, answering), return_when=asyncio.FIRST_COMPLETED)
            status = answering.result() if answering.done() else CLIENT_LEFT
        except OSError:  # the connection broke while something was sent
            status = CLIENT_LEFT
        finally:
            for queued in self._queued:
                self._queue.give_up(queued)
            for task in (leaving, answering):
                task.cancel()
            await asyncio.gather(leaving, answering, return_exceptions=True)
        self._metrics.requests.labels(status).inc()

    async def _answer(self, send: Any) -> int:
        """Send the answer or the error; the status that the request had in the end."""
        try:
            async with asyncio.timeout_at(self._deadline):
                runs: dict[int, Run] = {}
                while len(runs) < len(self._queued):
                    number, event = await self._queued[0].events.get()
                    if isinstance(event, Chunk):
                        if self._chat.asked.stream:
                            await self._send_events(send, self._reply.piece(event, number))
                    elif isinstance(event, Finished):
                        runs[number] = event.run
                        if self._chat.asked.stream:
                            await self._send_events(send, self._reply.end(event.run, number))
                    else:
                        return await self._fail(send, event)
                await self._finish(send, [runs[number] for number in sorted(runs)])
                return 200
        except TimeoutError:
            return await self._fail(send, TimeoutError())

    async def _finish(self, send: Any, runs: Sequence[Run]) -> None:
        if not self._chat.asked.stream:
            await self._send_json(send, 200, self._reply.whole(runs))
            return
        await self._send_events(send, self._reply.measured(runs))
        await send({"type": "http.response.body", "body": b"data: [DONE]\n\n"})

    async def _fail(self, send: Any, error: BaseException) -> int:
        """Say what went wrong, with a status, or in the stream if that has begun."""
        status, kind = _status(error)
        said = error_body(error, kind)
        if not self._begun:
            await self._send_json(send, status, said)
        else:
            await send({"type": "http.response.body", "body": _event(said)})
        return status

    async def _send_events(self, send: Any, events: Sequence[dict[str, Any]]) -> None:
        for data in events:
            await self._send_event(send, data)

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


def _status(error: BaseException) -> tuple[int, str]:
    """An error's HTTP status, and OpenAI's type for it."""
    if isinstance(error, TimeoutError | RequestCancelledError):
        return 504, "timeout_error"
    if isinstance(error, DeviceError):
        return 503, "server_error"
    return (400, "invalid_request_error") if isinstance(error, FastvlError) else (500, "server_error")


async def _until_gone(receive: Any) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
