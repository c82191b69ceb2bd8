"""Any OpenAI-compatible endpoint, measured from outside by the same clock: vLLM, SGLang, LMDeploy, or this project's own server.

What can be seen from here is the request being encoded, the connection, the upload, the wait, and chunks as they arrive. An
endpoint that sends no token ids is counted by the checkpoint's own tokenizer on the text of each chunk, which may differ by a few
from its own.
"""

from __future__ import annotations

import base64
import http.client
import io
import json
import os
import ssl
from collections.abc import Iterator
from typing import Any
from urllib.parse import urlsplit

import torch

from fastvl_lab.errors import EndpointError
from fastvl_lab.pipeline import Outcome
from fastvl_lab.preprocessor.decode_image import rgb_of
from fastvl_lab.request import ImageInput, Request
from fastvl_lab.streaming.text import Deliver
from fastvl_lab.trace import Tracer

KEY = "FASTVL_LAB_API_KEY"
TIMEOUT = 600.0  # seconds without a byte
_MAX_LINE = 16_000_000

# How files begin, and what they are.
_MAGIC = ((b"\xff\xd8", "jpeg"), (b"\x89PNG", "png"), (b"GIF8", "gif"), (b"BM", "bmp"), (b"II*\0", "tiff"), (b"MM\0*", "tiff"))


class HttpPeer:
    """An endpoint at an address that ends in /v1; its key, if it wants one, is in the environment as FASTVL_LAB_API_KEY.

    model: its name there, by default the only or first that the endpoint lists. tokenizer: counts what has no ids.
    """

    def __init__(self, address: str, model: str | None, tokenizer: Any) -> None:
        self._address, self._tokenizer = urlsplit(address), tokenizer
        self._headers = {"Content-Type": "application/json", "Accept": "text/event-stream"}
        if key := os.environ.get(KEY):
            self._headers["Authorization"] = f"Bearer {key}"
        listed = self._models()
        names = [entry["id"] for entry in listed]
        if not names or (model is not None and model not in names):
            raise EndpointError(f"endpoint {address!r} does not serve {model or 'any model'}; the choices are {', '.join(names)}")
        self._model = model or names[0]
        self._is_ours = any(entry["id"] == self._model and entry.get("owned_by") == "fastvl_lab" for entry in listed)

    def run(self, request: Request, tracer: Tracer, deliver: Deliver) -> Outcome:
        """Have one request served; raises `EndpointError` if the endpoint refuses it, fails, or falls silent."""
        span, connection = tracer.span, self._connection()
        tokens: list[int] = []
        usage: dict[str, Any] = {}
        try:
            with span("encode"):
                body = json.dumps(self._body(request)).encode()
            with span("connect"):
                connection.connect()
            with span("upload"):
                connection.request("POST", f"{self._address.path}/chat/completions", body, self._headers)
            tracer.begin("wait")
            response = connection.getresponse()
            if response.status != 200:
                raise EndpointError(f"{self._address.netloc} answers {response.status}: {_said(response.read(_MAX_LINE))}")
            for event in _events(response):
                tracer.check()
                usage = event.get("usage") or usage
                for choice in event.get("choices", ()):
                    text = choice.get("delta", {}).get("content") or ""
                    made = choice.get("token_ids") or (self._count(text) if text else [])
                    if text or made:
                        if not tokens:
                            tracer.end("wait")
                        tokens += made
                        deliver(text, tuple(made))
        except (OSError, http.client.HTTPException) as error:
            raise EndpointError(f"{self._address.netloc}: {error or type(error).__name__}") from None
        finally:
            connection.close()
        if not tokens:
            raise EndpointError(f"{self._address.netloc} ended its answer without a token")
        return Outcome(
            tokens=tuple(tokens),
            n_prompt=int(usage.get("prompt_tokens", 0)),
            shapes=(),
            logits=torch.empty(0, dtype=torch.float32),
            model=self._model,
        )

    def _models(self) -> list[dict[str, Any]]:
        connection = self._connection()
        try:
            connection.request("GET", f"{self._address.path}/models", headers=self._headers)
            response = connection.getresponse()
            body = response.read(_MAX_LINE)
            if response.status != 200:
                raise EndpointError(f"{self._address.geturl()}/models answers {response.status}: {_said(body)}")
            listed: list[dict[str, Any]] = json.loads(body)["data"]
            return listed
        except (OSError, http.client.HTTPException, ValueError, KeyError, TypeError) as error:
            if isinstance(error, EndpointError):
                raise
            raise EndpointError(
                f"{self._address.geturl()} is no OpenAI-compatible endpoint: {error or type(error).__name__}"
            ) from None
        finally:
            connection.close()

    def _connection(self) -> http.client.HTTPConnection:
        host, port = self._address.hostname or "", self._address.port
        if self._address.scheme == "https":
            return http.client.HTTPSConnection(host, port, timeout=TIMEOUT, context=ssl.create_default_context())
        return http.client.HTTPConnection(host, port, timeout=TIMEOUT)

    def _body(self, request: Request) -> dict[str, Any]:
        images = iter(request.image_inputs)
        messages = [
            message
            if not isinstance(message.get("content"), tuple)
            else message
            | {"content": [part if part["type"] == "text" else _image_part(next(images)) for part in message["content"]]}
            for message in request.conversation
        ]
        body: dict[str, Any] = {"model": self._model, "messages": messages, "temperature": 0, "stream": True}
        body |= {"max_tokens": request.max_new_tokens, "stream_options": {"include_usage": True}}
        limits = {name: getattr(request, name) for name in ("min_pixels", "max_pixels") if getattr(request, name) is not None}
        if request.ignore_eos:
            body["ignore_eos"] = True  # vLLM, SGLang, LMDeploy
        if self._is_ours:
            return body | limits | {"return_token_ids": True}
        return body | ({"mm_processor_kwargs": limits} if limits else {})  # vLLM

    def _count(self, text: str) -> list[int]:
        ids: list[int] = self._tokenizer(text, add_special_tokens=False).input_ids
        return ids


def _image_part(image: ImageInput) -> dict[str, Any]:
    """An encoded image as it is; pixels as PNG."""
    data = image.data
    if not isinstance(data, bytes):
        buffer = io.BytesIO()
        rgb_of(image).save(buffer, "PNG")
        data = buffer.getvalue()
    kind = next((kind for magic, kind in _MAGIC if data.startswith(magic)), "webp")
    return {"type": "image_url", "image_url": {"url": f"data:image/{kind};base64,{base64.b64encode(data).decode()}"}}


def _events(response: http.client.HTTPResponse) -> Iterator[dict[str, Any]]:
    """The data of server-sent events, until the stream says that it is done or ends."""
    while line := response.readline(_MAX_LINE):
        if not line.startswith(b"data:"):
            continue
        data = line[len(b"data:") :].strip()
        if data == b"[DONE]":
            return
        try:
            event: dict[str, Any] = json.loads(data)
        except ValueError:
            raise EndpointError(f"an event is no JSON: {data[:80]!r}") from None
        if "error" in event:
            raise EndpointError(f"the endpoint gave up: {_said(data)}")
        yield event


def _said(body: bytes) -> str:
    """The sentence in an error's body, whatever its form."""
    try:
        error = json.loads(body)
        error = error.get("error", error)
        return str(error["message"] if isinstance(error, dict) and "message" in error else error)[:400]
    except (ValueError, AttributeError):
        return body[:400].decode(errors="replace")
