"""OpenAI's chat completions, read and written: a body to a `Request`, and runs and chunks to what clients expect."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from fastvl_lab.errors import FastvlError, RequestError, sentence
from fastvl_lab.request import Chunk, Request, check_whole_number
from fastvl_lab.run import Run
from fastvl_lab.serve.settings import Settings

# What would change the answer, and the only values under which it does not: decoding is greedy, the answer one text.
_FIXED: dict[str, tuple[Any, ...]] = {
    "temperature": (0,),
    "top_p": (1,),
    "n": (1,),
    "stop": ([],),
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "logit_bias": ({},),
    "logprobs": (False,),
    "top_logprobs": (0,),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "tools": ([],),
    "tool_choice": ("none",),
}
# What changes nothing here.
_IGNORED = ("user", "seed", "store", "metadata", "service_tier", "parallel_tool_calls", "safety_identifier", "prompt_cache_key")
_READ = ("model", "messages", "max_tokens", "max_completion_tokens", "stream", "stream_options")
_EXTENSIONS = ("ignore_eos", "min_pixels", "max_pixels", "return_token_ids", "return_trace")


class UnknownModelError(RequestError):
    """A request for a model that is not served here."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Chat:
    """A chat completion that a client has asked for.

    token_ids: whether chunks carry them. trace: whether the end of the answer carries the request's own trace.
    """

    request: Request
    model: str
    stream: bool
    include_usage: bool
    token_ids: bool
    trace: bool


def read(body: bytes, model: str, settings: Settings, fetch: Callable[[str], bytes]) -> Chat:
    """A body as a chat completion of the model served; raises `RequestError`s. fetch: the bytes at an http(s) address."""
    try:
        data = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise RequestError(f"the body is no JSON: {error}") from None
    if not isinstance(data, dict):
        raise RequestError(f"the body is a JSON {type(data).__name__}; it must be an object")
    _check_fields(data)
    if data.get("model", model) != model:
        raise UnknownModelError(f"model {str(data['model'])[:80]!r} is not served here; the choice is {model!r}")
    options = data.get("stream_options") or {}
    if not isinstance(options, Mapping):
        raise RequestError("stream_options must be an object")
    given = [name for name in ("max_completion_tokens", "max_tokens") if data.get(name) is not None]
    for name in given:
        check_whole_number(name, data[name])
    if len({data[name] for name in given}) > 1:
        raise RequestError(f"max_completion_tokens is {data[given[0]]} and max_tokens {data[given[1]]}; give one of them")
    request = Request(
        messages=[_message(number, message, fetch) for number, message in enumerate(_list(data.get("messages"), "messages"))],
        max_new_tokens=data[given[0]] if given else settings.max_tokens,
        ignore_eos=_flag(data, "ignore_eos"),
        min_pixels=data.get("min_pixels"),
        max_pixels=data.get("max_pixels"),
    )
    return Chat(
        request=request,
        model=model,
        stream=_flag(data, "stream"),
        include_usage=bool(options.get("include_usage")),
        token_ids=_flag(data, "return_token_ids"),
        trace=_flag(data, "return_trace"),
    )


def _check_fields(data: Mapping[str, Any]) -> None:
    for name, value in data.items():
        if name in _FIXED:
            if value is not None and value not in _FIXED[name]:
                allowed = " or ".join(json.dumps(v) for v in _FIXED[name])
                why = "the answer is one text, made greedily and to its end"
                raise RequestError(f"{name} is {json.dumps(value)[:80]}; {why}, so it must be {allowed} or left out")
        elif name not in (*_READ, *_IGNORED, *_EXTENSIONS):
            known = ", ".join((*_READ, *_EXTENSIONS))
            raise RequestError(f"the field {name[:80]!r} is unknown; the choices are {known}")


def _flag(data: Mapping[str, Any], name: str) -> bool:
    value = data.get(name) or False
    if not isinstance(value, bool):
        raise RequestError(f"{name} is {json.dumps(value)[:80]}; it must be true or false")
    return value


def _list(value: Any, name: str) -> list[Any]:
    if not isinstance(value, list):
        raise RequestError(f"{name} must be a list")
    return value


def _message(number: int, message: Any, fetch: Callable[[str], bytes]) -> Any:
    """A message whose images are bytes or data URIs: what a client names must not be read from the server's disk."""
    if not isinstance(message, dict) or not isinstance(message.get("content"), list):
        return message  # a text, or what `Request` refuses
    return message | {"content": [_part(number, part, fetch) for part in message["content"]]}


def _part(number: int, part: Any, fetch: Callable[[str], bytes]) -> Any:
    if not isinstance(part, dict) or part.get("type") not in ("text", "image_url"):
        kind = part.get("type") if isinstance(part, dict) else part
        raise RequestError(f"message {number} has a part of type {str(kind)[:80]!r}; the choices are 'text' and 'image_url'")
    if part["type"] == "text":
        return part
    url = part.get("image_url")
    url = url.get("url") if isinstance(url, dict) else url
    if not isinstance(url, str):
        raise RequestError(f"message {number} has an image_url without a url")
    return {"type": "image", "image": url if url[:5].lower() == "data:" else fetch(url)}


class Reply:
    """What is sent back for one chat: the same id and time in all of it."""

    def __init__(self, chat: Chat, ends: tuple[int, ...]) -> None:
        self._chat, self._ends = chat, ends
        self._head = {"id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": chat.model}
        self._begun = False

    def piece(self, chunk: Chunk) -> dict[str, Any]:
        """A piece of the answer."""
        delta: dict[str, Any] = {"content": chunk.text} if self._begun else {"role": "assistant", "content": chunk.text}
        self._begun = True
        return self._choice(delta, None, chunk.tokens)

    def end(self, run: Run) -> list[dict[str, Any]]:
        """Why the answer ended; then, if asked for, usage and trace."""
        last = [self._choice({}, self._reason(run), ())]
        if self._chat.include_usage or self._chat.trace:
            last.append({**self._head, "object": "chat.completion.chunk", "choices": [], **self._measured(run)})
        return last

    def whole(self, run: Run) -> dict[str, Any]:
        """The answer of a client that does not stream."""
        message = {"role": "assistant", "content": run.text}
        choice: dict[str, Any] = {"index": 0, "message": message, "finish_reason": self._reason(run)}
        if self._chat.token_ids:
            choice["token_ids"] = list(run.tokens)
        return {**self._head, "object": "chat.completion", "choices": [choice], **self._measured(run)}

    def _choice(self, delta: dict[str, Any], reason: str | None, tokens: tuple[int, ...]) -> dict[str, Any]:
        choice: dict[str, Any] = {"index": 0, "delta": delta, "finish_reason": reason}
        if self._chat.token_ids and tokens:
            choice["token_ids"] = list(tokens)
        return {**self._head, "object": "chat.completion.chunk", "choices": [choice]}

    def _reason(self, run: Run) -> str:
        ended = not self._chat.request.ignore_eos and run.tokens[-1] in self._ends
        return "stop" if ended else "length"

    def _measured(self, run: Run) -> dict[str, Any]:
        """Usage, and on demand the run's own record, from when it was queued."""
        n, made = run.n_prompt, len(run.tokens)
        measured: dict[str, Any] = {"usage": {"prompt_tokens": n, "completion_tokens": made, "total_tokens": n + made}}
        if self._chat.trace:
            measured["fastvl_lab"] = {"run": run.to_record()}
        return measured


def error_body(error: BaseException | str, kind: str, code: str | None = None) -> dict[str, Any]:
    """An error as OpenAI's clients read it. What was not foreseen is named by its type alone: its text may hold a path."""
    if isinstance(error, str | FastvlError):
        message = error if isinstance(error, str) else sentence(error)
    else:
        message = f"the server failed with a {type(error).__name__}"
    return {"error": {"message": message, "type": kind, "param": None, "code": code}}
