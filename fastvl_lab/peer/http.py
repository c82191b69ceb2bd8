"""Any OpenAI-compatible endpoint, measured from outside by the same clock: vLLM, SGLang, LMDeploy, or this project's own server.

What can be seen from here is the request being encoded, the connection, the upload, the wait, and chunks as they arrive. TTFT ends
with the first text of any channel, be it thought or answer. What the endpoint says of itself is taken at its word: ids and numbers
of tokens (`counts`), and how many of the prompt it reused; that says nothing of images whose pixels or visual tokens it had kept.
Its own account of the request (`accounts`) splits the wait; it is read from the answer, and then from its metrics.
"""

from __future__ import annotations

import base64
import http.client
import io
import ipaddress
import json
import os
import re
import ssl
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import closing, contextmanager, suppress
from dataclasses import fields
from functools import partial
from itertools import chain
from typing import Any
from urllib.parse import SplitResult, urlsplit

import torch

from fastvl_lab.account import WAIT, Account
from fastvl_lab.engine import Engine, engine
from fastvl_lab.errors import EndpointError, RecipeError, RequestError
from fastvl_lab.peer.accounts import Counted
from fastvl_lab.peer.answers import MAX_EVENT, Event, Model, Usage, read_events, read_models, said
from fastvl_lab.peer.counts import Piece, tokens_of
from fastvl_lab.pipeline import Outcome
from fastvl_lab.preprocessor.decode_image import rgb_of
from fastvl_lab.request import ImageInput, Kind, Request
from fastvl_lab.sampling import JSON, Sampling
from fastvl_lab.streaming.text import Deliver
from fastvl_lab.trace import Tracer

KEY = "FASTVL_LAB_ENDPOINT_KEY"
TIMEOUT = 600.0  # seconds without a byte
PAGE_TIMEOUT = 5.0  # the same of what no request waits for

# How files begin, and what they are.
_MAGIC = ((b"\xff\xd8", "jpeg"), (b"\x89PNG", "png"), (b"GIF8", "gif"), (b"BM", "bmp"), (b"II*\0", "tiff"), (b"MM\0*", "tiff"))


@engine("http://", "https://", said="an http(s) address ending in /v1")
def endpoint(text: str) -> Engine:
    """Read an address, "http://127.0.0.1:8000/v1", and behind it ", model=…" where the server has several, or ", account=off".

    account=off: the engine is not asked for its own account, and its metrics are not read.
    """
    address, rest = (part.strip() for part in text.partition(",")[::2])  # a model's name may have commas
    _, at, host = address.partition("://")[2].partition("/")[0].rpartition("@")
    if at:  # not quoted, since it is no business of those who read the error
        why = f"which is sent to nobody and would stand in every record; give a key as {KEY}"
        raise RecipeError(f"endpoint at {host} has a name or password in its address, {why}")
    options = [part.strip() for part in re.split(r",(?=\s*(?:model|account)=)", rest)] if rest else []
    for option in options:
        if not re.fullmatch("model=.+|account=(on|off)", option):
            choices = "model=<name>, account=on and account=off"
            raise RecipeError(f"endpoint {text!r} has {option!r}; what may follow its address is {choices}")
    told = dict(option.split("=", 1) for option in options)
    if len(told) < len(options):
        raise RecipeError(f"endpoint {text!r} has an option twice")
    if not _is_address(address):
        raise RecipeError(f"endpoint {text!r} is no address; it reads http://host:port/v1, or https")
    address, name, account = address.rstrip("/"), told.get("model"), told.get("account") != "off"
    return Engine(
        name=", ".join([address, *options]),
        bind=lambda place: HttpPeer(address, name, place.checkpoint.tokenizer, account=account),
        remote=True,
        held_against="transformers",
    )


class HttpPeer:
    """An endpoint at an address that ends in /v1; its key, if it wants one, is in the environment as FASTVL_LAB_ENDPOINT_KEY.

    model: its name there, by default the first that the endpoint lists. tokenizer: counts what the endpoint does not. account:
    whether the engine is asked for its own account of requests. Raises `EndpointError` for an endpoint that is not there, has no
    such model, or would be sent the key in the clear.
    """

    def __init__(self, address: str, model: str | None, tokenizer: Any, *, account: bool = True) -> None:
        self._address, self._tokenizer = urlsplit(address), tokenizer
        self._headers = {"Content-Type": "application/json", "Accept": "text/event-stream"}
        if key := os.environ.get(KEY, "").strip():
            self._headers["Authorization"] = f"Bearer {_checked(key, self._address)}"
        listed = self._models()
        names = [entry.name for entry in listed]
        if model is None and not names:
            raise EndpointError(f"endpoint {address!r} lists no model; name one behind the address: {address}, model=<name>")
        if model is not None and names and model not in names:
            raise EndpointError(f"endpoint {address!r} does not serve {model}; the choices are {', '.join(names)}")
        self._model = model or names[0]
        self._owner = next((entry.owner for entry in listed if entry.name == self._model), "")
        self._account = account
        self._counted = Counted(self._owner if account else "", self._page)

    def run(self, request: Request, tracer: Tracer, deliver: Deliver) -> Outcome:
        """Have one request served; raises `EndpointError` if the endpoint refuses it, fails, or falls silent."""
        if request.sampling.logprobs:
            raise RequestError("logprobs is true, and those of an endpoint name no token's id; ask a recipe for them")
        span, connection = tracer.span, self._connection()
        answer = _Answer(self._address.netloc, tracer, deliver, self._tokenizer)
        with self._counted.request(), closing(connection):
            with span("encode"):
                body = json.dumps(self._body(request)).encode()
            with self._heard():
                with span("connect"):
                    connection.connect()
                with span("upload"):
                    path = "completions" if request.raw else "chat/completions"
                    connection.request("POST", f"{self._address.path}/{path}", body, self._headers)
                tracer.begin(WAIT)
                response = connection.getresponse()
                if response.status != 200:
                    raise EndpointError(f"it answers {response.status}: {said(response.read(MAX_EVENT))}")
            for event in self._events(response):
                tracer.check()
                answer.take(event)
        return answer.outcome(self._model, partial(self._own_account, answer))

    def _own_account(self, answer: _Answer) -> Account | None:
        """What its answer has told, and what its metrics add: vLLM tells there alone what came before a request was queued."""
        told, counted = answer.account, self._counted.account()
        return counted if told is None else told.beside(counted)

    def logits_along(self, request: Request, tokens: torch.Tensor) -> torch.Tensor:
        """Endpoints show no logits: raises `EndpointError`."""
        raise EndpointError(f"{self._address.netloc} shows no logits; what it computes can be told by its tokens alone")

    def _page(self, path: str) -> bytes | None:
        """A page beside /v1; None where there is none."""
        connection = self._connection(PAGE_TIMEOUT)
        with closing(connection), suppress(OSError, http.client.HTTPException, UnicodeError):
            connection.request("GET", self._address.path.removesuffix("/v1") + path, headers=self._headers | {"Accept": "*/*"})
            response = connection.getresponse()
            body = response.read(MAX_EVENT)
            return body if response.status == 200 else None
        return None

    def _models(self) -> tuple[Model, ...]:
        connection = self._connection()
        try:
            with self._heard(" is no OpenAI-compatible endpoint"):
                connection.request("GET", f"{self._address.path}/models", headers=self._headers)
                response = connection.getresponse()
                body = response.read(MAX_EVENT)
                if response.status != 200:
                    hint = "" if self._address.path.endswith("/v1") else "; such an address ends in /v1 as a rule"
                    raise EndpointError(f"its list of models answers {response.status}: {said(body)}{hint}")
                return read_models(body)
        finally:
            connection.close()

    def _events(self, response: http.client.HTTPResponse) -> Iterator[Event]:
        """What arrives. Whom it is handed to may fail as well, which is no fault of the endpoint's."""
        events = read_events(iter(lambda: response.readline(MAX_EVENT), b""))
        while True:
            with self._heard():
                event = next(events, None)
            if event is None:
                return
            yield event

    @contextmanager
    def _heard(self, fault: str = "") -> Iterator[None]:
        """Turn what goes wrong while the endpoint is asked or heard into an error that names it."""
        try:
            yield
        except (OSError, http.client.HTTPException, UnicodeError, EndpointError) as error:
            raise EndpointError(f"{self._address.netloc}{fault}: {error or type(error).__name__}") from None

    def _connection(self, timeout: float = TIMEOUT) -> http.client.HTTPConnection:
        host, port = self._address.hostname or "", self._address.port
        if self._address.scheme == "https":
            return http.client.HTTPSConnection(host, port, timeout=timeout, context=ssl.create_default_context())
        return http.client.HTTPConnection(host, port, timeout=timeout)

    def _body(self, request: Request) -> dict[str, Any]:
        images = iter(request.image_inputs)
        messages = [self._message(message, images) for message in request.conversation]
        asked: dict[str, Any] = {"prompt": request.prompt} if request.raw else {"messages": messages}
        body: dict[str, Any] = {"model": self._model, **asked, "stream": True}
        body |= _choosing(request.sampling, whole=self._owner in ("fastvl_lab", "vllm", "sglang"))
        body |= _tools(request)
        body |= {"max_tokens": request.max_new_tokens, "stream_options": {"include_usage": True}}
        limits = {name: getattr(request, name) for name in ("min_pixels", "max_pixels") if getattr(request, name) is not None}
        if request.ignore_eos:
            body["ignore_eos"] = True  # vLLM, SGLang, LMDeploy
        if self._owner in ("fastvl_lab", "vllm"):
            body["return_token_ids"] = True
        if self._owner == "fastvl_lab":
            return body | limits | ({"return_trace": True} if self._account else {})
        return body | ({"mm_processor_kwargs": limits} if limits else {})  # vLLM

    def _message(self, message: Mapping[str, Any], images: Iterator[ImageInput]) -> dict[str, Any]:
        """A message of the conversation with its images in it."""
        content = message.get("content")
        if not isinstance(content, tuple):
            return dict(message)
        return {**message, "content": [self._image_part(next(images)) if part["type"] == "image" else part for part in content]}

    def _image_part(self, image: ImageInput) -> dict[str, Any]:
        """An image with its own limits and size, which this project's server alone knows."""
        limits = {name: getattr(image, name) for name in ("min_pixels", "max_pixels") if getattr(image, name) is not None}
        if image.asked is not None:
            limits |= dict(zip(("resized_width", "resized_height"), image.asked, strict=True))
        if limits and self._owner != "fastvl_lab":
            raise EndpointError(
                f"endpoint {self._address.geturl()!r} knows no {', '.join(limits)} of a single image; set limits of the request"
            )
        return {"type": "image_url", "image_url": {"url": _data_uri(image)}, **limits}


class _Answer:
    """An answer as it arrives: its text is handed on, and what is said of it is kept.

    Pieces before the first with text are not handed on, since they end no TTFT; their tokens go with that one.
    """

    def __init__(self, whose: str, tracer: Tracer, deliver: Deliver, tokenizer: Any) -> None:
        self._whose, self._tracer, self._deliver, self._tokenizer = whose, tracer, deliver, tokenizer
        self._pieces: list[Piece] = []
        self._first: int | None = None  # number of the first piece with text
        self._has_ids = False
        self._usage = Usage()
        self._kind: Kind | None = None
        self.account: Account | None = None  # the engine's own

    def take(self, event: Event) -> None:
        self._usage, self._kind = event.usage.or_earlier(self._usage), event.kind or self._kind
        self.account = event.account or self.account
        self._has_ids = self._has_ids or bool(event.tokens)
        if not event.is_piece or (self._has_ids and not event.text and not event.tokens):
            return  # where ids are sent, no token is without
        guess = self._ids(event.text) if event.text and not event.tokens else ()
        self._pieces.append(Piece(text=event.text, tokens=event.tokens, guess=guess, counted=event.usage.completion))
        if self._first is not None:
            self._deliver(event.text, event.tokens or guess)
        elif event.text:
            self._first = len(self._pieces) - 1
            self._begin(event.text, _joined(piece.tokens or piece.guess for piece in self._pieces))

    def outcome(self, model: str, account: Callable[[], Account | None]) -> Outcome:
        """The whole, once it has ended; raises `EndpointError` for one without a token."""
        tokens, first = tokens_of(self._pieces, self._usage.completion), self._first
        chunks = [_joined(tokens)] if first is None else [_joined(tokens[: first + 1]), *tokens[first + 1 :]]
        if first is None:
            if not chunks[0]:
                raise EndpointError(f"{self._whose}: it ended its answer without a token")
            self._begin("", chunks[0])
        return Outcome(
            tokens=_joined(chunks),
            n_prompt=self._usage.prompt or 0,
            shapes=(),
            logits=torch.empty(0, dtype=torch.float32),
            model=model,
            kind=self._said_kind(),
            chunk_tokens=tuple(chunks),
            account=account,
        )

    def _said_kind(self) -> Kind | None:
        """What the endpoint's words make of the run; None where it reused nothing, and only the first of its shape can be cold."""
        if self._kind is not None or self._usage.cached == 0:
            return self._kind
        return "unknown" if self._usage.cached is None else "cache_hit"

    def _begin(self, text: str, tokens: tuple[int, ...]) -> None:
        self._tracer.end(WAIT)
        self._deliver(text, tokens)

    def _ids(self, text: str) -> tuple[int, ...]:
        return tuple(self._tokenizer(text, add_special_tokens=False).input_ids)


def _choosing(sampling: Sampling, *, whole: bool) -> dict[str, Any]:
    """The same in OpenAI's words, and vLLM's where it has none; of what is as by default, the temperature alone.

    whole: whether the endpoint knows all words of a draw, and would take those that are not said from a generation_config.json.
    """
    body: dict[str, Any] = {"temperature": sampling.temperature}
    if whole and sampling.draws:
        body |= {"top_p": 1.0, "top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0}
    for named in fields(sampling):
        if named.name not in ("logit_bias", "format") and (value := getattr(sampling, named.name)) != named.default:
            body[named.name] = value
    if sampling.logit_bias:
        body["logit_bias"] = {str(token): by for token, by in sampling.logit_bias.items()}
    if (schema := sampling.schema) is not None:
        whole_schema = {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema}}
        body["response_format"] = {"type": "json_object"} if sampling.format == JSON else whole_schema
    return body


def _tools(request: Request) -> dict[str, Any]:
    """What it offers to be called, in OpenAI's words; of what is as by default, nothing."""
    if not request.tools:
        return {}
    parallel = {} if request.parallel_tool_calls else {"parallel_tool_calls": False}
    return {"tools": list(request.tools), "tool_choice": request.tool_choice, **parallel}


def _joined(tokens: Iterable[tuple[int, ...]]) -> tuple[int, ...]:
    return tuple(chain.from_iterable(tokens))


def _is_address(text: str) -> bool:
    """Whether a URL has a host, a port that there can be, if any, and nothing behind its path, which would not be sent."""
    try:
        parts = urlsplit(text)
        return bool(parts.hostname) and (parts.port is None or parts.port > 0) and not (parts.query or parts.fragment)
    except ValueError:
        return False


def _checked(key: str, address: SplitResult) -> str:
    """The key, where it can be sent there; raises `EndpointError`."""
    if not (key.isascii() and key.isprintable()):
        raise EndpointError(f"{KEY} has characters that no header can carry")
    if address.scheme == "http" and not _is_here(address.hostname or ""):
        raise EndpointError(f"{KEY} is set and would go to {address.hostname} unencrypted; give an https address, or unset it")
    return key


def _is_here(host: str) -> bool:
    """Whether a host's name or address is this machine's own."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost" or host.endswith(".localhost")


def _data_uri(image: ImageInput) -> str:
    """An encoded image as it is; pixels as the lab itself would see them, as PNG."""
    data = image.data
    if not isinstance(data, bytes):
        buffer = io.BytesIO()
        rgb_of(image).save(buffer, "PNG", compress_level=1)  # its time is in TTFT
        data = buffer.getvalue()
    kind = next((kind for magic, kind in _MAGIC if data.startswith(magic)), "webp")
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"
