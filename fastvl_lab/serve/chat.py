"""OpenAI's chat completions, read and written: a body to a `Request`, and runs and chunks to what clients expect."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeGuard

from fastvl_lab.channels import Call, Channels, Said, as_message, as_tool_calls, said_in
from fastvl_lab.errors import FastvlError, RequestCancelledError, RequestError, quoted, sentence, shortened
from fastvl_lab.request import MAX_IMAGES, Chunk, ImageInput, Request, TokenLogprob, check_whole_number
from fastvl_lab.run import Run
from fastvl_lab.sampling import Sampling
from fastvl_lab.serve import choosing
from fastvl_lab.serve.choosing import each_of, in_chat, in_text, read_n, read_sampling
from fastvl_lab.serve.settings import Settings

# What would change the answer in a way that is not made here, and the values under which it does not.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "typical_p": (1,),
    "use_beam_search": (False,),
    "best_of": (1,),
    "bad_words": ([],),
    "logits_processors": ([],),
    "stop_token_ids": ([],),
    "echo": (False,),
    "skip_special_tokens": (True,),
    "return_tokens_as_token_ids": (False,),
    "modalities": (["text"],),
    "verbosity": ("medium",),
    "reasoning_effort": ("none",),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "documents": ([],),
    "add_generation_prompt": (True,),
    "continue_final_message": (False,),
    "chat_template_kwargs": ({},),
    "media_io_kwargs": ({},),
    "priority": (0,),
    "return_hidden_states": (False,),
    "do_preprocess": (True,),
}
# What changes nothing here, whatever it is.
_IGNORED = (
    *("user", "store", "metadata", "service_tier", "safety_identifier", "prompt_cache_key", "prompt_cache_retention"),
    *("parallel_tool_calls", "prediction", "request_id", "rid", "session_id", "include_reasoning", "separate_reasoning"),
    *("stream_reasoning", "length_penalty", "spaces_between_special_tokens", "include_stop_str_in_output", "cache_salt"),
)
# Of a body, what passes beside that which is read: with these values alone, or, where there are none, whatever it is.
PASSING: dict[str, tuple[Any, ...]] = {**_NEUTRAL, **dict.fromkeys(_IGNORED, ())}
# What every completion has: OpenAI's fields, then vLLM's and this server's own.
READ = (
    *("model", "max_tokens", "max_completion_tokens", "stream", "stream_options"),
    *("ignore_eos", "return_token_ids", "return_trace", "timeout"),
    *choosing.FIELDS,
)
_LIMITS = ("min_pixels", "max_pixels")
OF_IMAGES = (*_LIMITS, "mm_processor_kwargs")
OF_TOOLS = ("tools", "tool_choice", "parallel_tool_calls")
OWN = ("messages", *OF_IMAGES, *OF_TOOLS, "top_logprobs")

# Of a request, messages and their parts together; more would take longer to look at than to refuse.
MAX_PARTS = 10_000

# What OpenAI makes of an image with detail "low": one of 512x512 pixels (its guide to images and vision).
LOW_DETAIL = 512 * 512

# Under which names Transformers and others keep an image in a part; those of files must not be read from the server's disk.
_SOURCES = ("type", "image", "image_url", "image_pil", "url", "path", "base64")


class UnknownModelError(RequestError):
    """A request for a model that is not served here."""


@dataclass(frozen=True, kw_only=True)
class Served:
    """What a server serves: the model's name there, the tokens that end its answers, and how many a session has.

    thinks: whether its prompts open a thought, which comes before the content of an answer.
    """

    model: str
    ends: tuple[int, ...]
    session_len: int
    thinks: bool = False


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What every completion may be asked besides its prompt.

    limits: how long it may be, what ends it and how its tokens are chosen, as `Request` has them. n: how many answers it gets.
    timeout: seconds that it may take from its arrival. include_usage, continuous_usage: whether a stream ends with the usage, and
    whether each of its chunks has it so far.
    """

    limits: Mapping[str, Any]
    n: int
    timeout: float
    stream: bool
    include_usage: bool
    continuous_usage: bool
    token_ids: bool
    trace: bool


@dataclass(frozen=True, kw_only=True, eq=False)
class Chat:
    """A completion that a client has asked for: of a conversation, or, where the request is raw, of a text or of several.

    token_ids: whether chunks carry them. trace: whether the end of the answer carries the request's own trace. echo: whether a
    raw prompt comes before its answer. n_prompt: tokens of all prompts, where every chunk is to carry the usage so far. others: the
    requests of its other prompts, and `with_others` the same requests with other draws; the client wants one answer of each.
    """

    request: Request
    served: Served
    asked: Asked
    echo: bool = False
    n_prompt: int | None = None
    others: tuple[Request, ...] = ()

    def with_others(self) -> Chat:
        """With as many answers to each prompt as it has been asked for, prompt by prompt: OpenAI's order of choices."""
        prompts = (self.request, *self.others)
        first, *others = (replace(one, sampling=s) for one in prompts for s in each_of(one.sampling, self.asked.n))
        return replace(self, request=first, others=tuple(others))

    @property
    def first_of_each(self) -> tuple[Request, ...]:
        """Of each prompt the first request, once all are there."""
        return (self.request, *self.others)[:: self.asked.n]


@dataclass(frozen=True, kw_only=True, eq=False)
class Draft:
    """A completion whose images may still be at their addresses; chat: the whole, from the bytes at each."""

    asked: Asked
    addresses: tuple[str, ...]
    chat: Callable[[Mapping[str, bytes]], Chat]


def read(data: Mapping[str, Any], served: Served, settings: Settings) -> Draft:
    """A body as a chat completion of the model served; raises `RequestError`s, here or in `Draft.chat`."""
    asked = read_asked(data, served, settings, own=OWN)
    messages, limits = _list(data.get("messages"), "messages"), _limits(data)
    tools = {name: data[name] for name in OF_TOOLS if name in data}
    _check_number(messages)

    def chat(fetched: Mapping[str, bytes]) -> Chat:
        read_messages = [_message(number, message, fetched) for number, message in enumerate(messages)]
        return Chat(request=Request(messages=read_messages, **asked.limits, **limits, **tools), served=served, asked=asked)

    urls = (_url(number, part) for number, message in enumerate(messages) for part in _parts(message) if _is_image(part))
    return Draft(asked=asked, addresses=tuple(dict.fromkeys(url for url in urls if not _is_data(url))), chat=chat)


def json_object(body: bytes) -> dict[str, Any]:
    """The object that a body is, without its nulls, which say nothing, and a 16.0 as 16: JSON has one kind of number.

    Raises `RequestError`.
    """
    try:
        data = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise RequestError(f"the body is no JSON: {shortened(str(error))}") from None
    if not isinstance(data, dict):
        raise RequestError(f"the body is a JSON {type(data).__name__}; it must be an object")
    return {name: _whole(value) for name, value in data.items() if value is not None}


def _whole(value: Any) -> Any:
    """A float that is a whole number as an int, and anything else as it is."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def check_model(data: Mapping[str, Any], served: Served) -> None:
    """Raise `UnknownModelError` for another model than the one that is served."""
    if data.get("model", served.model) != served.model:
        raise UnknownModelError(f"model {quoted(data['model'])} is not served here; the choice is {served.model!r}")


def read_asked(data: Mapping[str, Any], served: Served, settings: Settings, *, own: tuple[str, ...], raw: bool = False) -> Asked:
    """What a body asks of any completion; own: the fields that only its kind has; raw: it is of a text. Raises `RequestError`."""
    check_model(data, served)
    given = [name for name in ("max_completion_tokens", "max_tokens") if name in data]
    for name in given:
        check_whole_number(name, data[name])
    if len({data[name] for name in given}) > 1:
        raise RequestError(f"max_completion_tokens is {data[given[0]]} and max_tokens {data[given[1]]}; give one of them")
    most: int = data[given[0]] if given else settings.max_tokens or served.session_len
    ignore_eos = flag(data, "ignore_eos")
    sampling, n = read_sampling(data, raw=raw), read_n(data, settings)
    _check_fields(data, served, sampling, own, ignore_eos=ignore_eos)
    if n > 1 and flag(data, "return_trace"):
        raise RequestError(f"return_trace is true and n is {n}; a trace is of one answer, so ask for one")
    options = data.get("stream_options", {})
    if not isinstance(options, Mapping):
        raise RequestError("stream_options must be an object")
    include = flag(options, "include_usage")
    return Asked(
        limits={"max_new_tokens": most, "fit": not given, "ignore_eos": ignore_eos, "sampling": sampling},
        n=n,
        timeout=_timeout(data, settings),
        stream=flag(data, "stream"),
        include_usage=include,
        continuous_usage=flag(options, "continuous_usage_stats") and include,
        token_ids=flag(data, "return_token_ids"),
        trace=flag(data, "return_trace"),
    )


def _check_fields(data: Mapping[str, Any], served: Served, sampling: Sampling, own: tuple[str, ...], *, ignore_eos: bool) -> None:
    """Raise `RequestError` for a field that is unknown, or under whose value the answer would be another."""
    for name, value in data.items():
        if name in own:
            continue
        if name in _NEUTRAL:
            if value not in _NEUTRAL[name] and not _changes_nothing(name, data, served, sampling, ignore_eos=ignore_eos):
                allowed = " or ".join(json.dumps(v) for v in _NEUTRAL[name])
                raise RequestError(f"{name} is {json.dumps(value)[:80]}; no other answer is made here than with {allowed}")
        elif name not in (*READ, *_IGNORED):
            known = ", ".join((*own, *READ))
            raise RequestError(f"the field {name[:80]!r} is unknown; the choices are {known}")


def _changes_nothing(name: str, data: Mapping[str, Any], served: Served, sampling: Sampling, *, ignore_eos: bool) -> bool:
    """Whether a value does not change the answer for what else is asked."""
    value = data[name]
    if name == "typical_p":
        return not sampling.draws and _number(value)
    if name == "best_of":
        return bool(value == data.get("n", 1))
    if name == "stop_token_ids":
        return not ignore_eos and isinstance(value, list) and all(token in served.ends for token in value)
    return False


def _number(value: Any) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _timeout(data: Mapping[str, Any], settings: Settings) -> float:
    """Seconds that the client gives its request, or else the server."""
    given = data.get("timeout", settings.timeout)
    if not _number(given) or not 0 < given <= settings.timeout:
        most = f"at most {settings.timeout:g}, which this server gives every request"
        raise RequestError(f"timeout is {json.dumps(given)[:80]}; it must be a number of seconds above 0 and {most}")
    return given


def _limits(data: Mapping[str, Any]) -> dict[str, Any]:
    """The limits of all images, as this server's own fields or as vLLM's."""
    options = data.get("mm_processor_kwargs", {})
    if not isinstance(options, Mapping):
        raise RequestError("mm_processor_kwargs must be an object")
    options = {name: value for name, value in options.items() if value is not None}
    for name, value in options.items():
        if name not in _LIMITS:
            raise RequestError(f"mm_processor_kwargs has {name[:80]!r}; the choices are {', '.join(_LIMITS)}")
        if data.get(name, value) != value:
            raise RequestError(f"{name} is {data[name]} and in mm_processor_kwargs {value}; give one of them")
    return {name: options.get(name, data.get(name)) for name in _LIMITS}


def flag(data: Mapping[str, Any], name: str) -> bool:
    """A field that is true or false, and false where it is not there; raises `RequestError`."""
    value = False if data.get(name) is None else data[name]
    if not isinstance(value, bool):
        raise RequestError(f"{name} is {json.dumps(value)[:80]}; it must be true or false")
    return value


def _list(value: Any, name: str) -> list[Any]:
    if not isinstance(value, list):
        raise RequestError(f"{name} must be a list")
    return value


def _check_number(messages: list[Any]) -> None:
    """Raise `RequestError` for more messages, parts or images than there may be, before any is looked at."""
    parts = [part for message in messages[:MAX_PARTS] for part in _parts(message)]
    if len(messages) + len(parts) > MAX_PARTS:
        raise RequestError(f"the request has over {MAX_PARTS} messages and parts of messages, the limit")
    if (n_images := sum(map(_is_image, parts))) > MAX_IMAGES:
        raise RequestError(f"the request has {n_images} images; the limit is {MAX_IMAGES}")


def _parts(message: Any) -> list[Any]:
    content = message.get("content") if isinstance(message, dict) else None
    return content if isinstance(content, list) else []


def _is_image(part: Any) -> bool:
    return isinstance(part, dict) and part.get("type") == "image_url"


def _message(number: int, message: Any, fetched: Mapping[str, bytes]) -> Any:
    """A message as `Request` takes it, with its images in it, and without what says nothing: null, or an empty list."""
    if not isinstance(message, dict):
        return message  # which `Request` refuses
    said = {name: value for name, value in message.items() if name in ("role", "content") or value not in (None, [])}
    if said.get("role") == "developer":
        said["role"] = "system"  # OpenAI's later name for it, which no template of these families knows
    if said.get("content") is None and said.get("role") == "assistant" and "tool_calls" not in said:
        said["content"] = ""  # as clients send back an answer of which nothing was text
    if isinstance(said.get("content"), list):
        said["content"] = [_part(number, part, fetched) for part in said["content"]]
    if isinstance(said.get("tool_calls"), list):
        said["tool_calls"] = [_with_object(call) for call in said["tool_calls"]]
    return said


def _with_object(call: Any) -> Any:
    """A call whose arguments are an object, as templates are written for, where they are the JSON of one, as OpenAI has them."""
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(arguments := function.get("arguments"), str):
        return call
    try:
        read = json.loads(arguments)
    except (ValueError, RecursionError):
        return call
    return call | {"function": function | {"arguments": read}} if isinstance(read, dict) else call


def _part(number: int, part: Any, fetched: Mapping[str, bytes]) -> Any:
    """A part of a message, with its image read: all answers to it share those bytes.

    It comes from a data URI or from an address, since what a client names must not be read from the server's disk.
    """
    kind = part.get("type") if isinstance(part, dict) else part
    if kind == "text":
        return part
    if kind == "refusal":
        return {"type": "text", "text": part.get("refusal")}
    if kind != "image_url":
        raise RequestError(f"message {number} has a part of type {str(kind)[:80]!r}; the choices are 'text' and 'image_url'")
    url, beside = _url(number, part), {name: value for name, value in part.items() if name not in _SOURCES and value is not None}
    said = dict(part["image_url"]) if isinstance(part["image_url"], dict) else {}
    for where in (said, beside):
        if where.get("detail") == "low":
            where["detail"] = "auto"
            if said.get("max_pixels") is None and beside.get("max_pixels") is None:
                said["max_pixels"] = LOW_DETAIL
    return {"type": "image", "image": {**said, "url": ImageInput.of(url if _is_data(url) else fetched[url])}, **beside}


def _url(number: int, part: Mapping[str, Any]) -> str:
    url = part.get("image_url")
    url = url.get("url") if isinstance(url, dict) else url
    if not isinstance(url, str):
        raise RequestError(f"message {number} has an image_url without a url")
    return url


def _is_data(url: str) -> bool:
    return url[:5].lower() == "data:"


class Reply:
    """What is sent back for one completion: the same id and time in all of it.

    A choice has a text where the request was raw (/v1/completions), else a message, or a delta of one. Of an answer that may hold
    more than content, a chunk is split by channel, and may have nothing to send yet.
    """

    def __init__(self, chat: Chat) -> None:
        self._chat, self._raw = chat, chat.request.raw
        self._head = {
            "id": f"{'cmpl' if self._raw else 'chatcmpl'}-{uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": chat.served.model,
        }
        self._thinks, self._calls = chat.served.thinks and not self._raw, bool(chat.request.offered)
        self._channels: dict[int, Channels] = {}  # of each answer that has begun, where there may be several
        self._n_made = 0  # tokens, of all answers
        self._n_sent: dict[int, int] = {}  # characters of each answer that has begun, by its number
        self._begun: set[int] = set()  # of which a first delta was sent

    def piece(self, chunk: Chunk, number: int = 0) -> list[dict[str, Any]]:
        """A piece of an answer: an event, or none where all of it is held back and nothing else is told of it."""
        first, before = number not in self._n_sent, self._n_sent.get(number, 0)
        self._n_made += len(chunk.tokens)
        text = (self._echoed(number) if first else "") + chunk.text
        self._n_sent[number] = before + len(text)
        if self._raw:
            said: dict[str, Any] = {"text": text}
        elif self._thinks or self._calls:
            if first:
                self._channels[number] = Channels(thinks=self._thinks, calls=self._calls)
            made = self._channels[number].push(text)
            if not (made or chunk.logprobs or self._chat.asked.token_ids or self._chat.n_prompt is not None):
                return []
            said = self._adds(number, _delta(made))
        else:
            said = self._adds(number, {"content": text})
        return [self._choice(number, {**said, "logprobs": self._logprobs(chunk.logprobs, before)}, None, chunk.tokens)]

    def end(self, run: Run, number: int = 0) -> list[dict[str, Any]]:
        """What was held back of an answer, and why it ended."""
        rest = Said()
        if (channels := self._channels.get(number)) is not None:
            rest = channels.end(cut=run.finish_reason == "length")
        events = [self._choice(number, {**self._adds(number, _delta(rest)), "logprobs": None}, None, ())] if rest else []
        said: dict[str, Any] = {"text": ""} if self._raw else self._adds(number, {})
        called = channels is not None and channels.n_calls > 0
        return [*events, self._choice(number, {**said, "logprobs": None}, _reason(run, called=called), ())]

    def _adds(self, number: int, delta: dict[str, Any]) -> dict[str, Any]:
        """What is added to the message of an answer; the first of it says who speaks."""
        if number in self._begun:
            return {"delta": delta}
        self._begun.add(number)
        return {"delta": {"role": "assistant", "content": "", **delta}}

    def measured(self, runs: Sequence[Run]) -> list[dict[str, Any]]:
        """After the ends of all answers, if asked for: usage and trace."""
        if not (self._chat.asked.include_usage or self._chat.asked.trace):
            return []
        return [{**self._head, "object": self._kind(streamed=True), "choices": [], **self._measured(runs)}]

    def whole(self, runs: Sequence[Run]) -> dict[str, Any]:
        """The answers of a client that does not stream."""
        choices = [self._whole_choice(number, run) for number, run in enumerate(runs)]
        return {**self._head, "object": self._kind(streamed=False), "choices": choices, **self._measured(runs)}

    def _whole_choice(self, number: int, run: Run) -> dict[str, Any]:
        said: dict[str, Any] = {"text": self._echoed(number) + run.text}
        called = False
        if not self._raw:
            parts = Said(content=run.text)
            if self._thinks or self._calls:
                parts = said_in(run.text, thinks=self._thinks, calls=self._calls, cut=run.finish_reason == "length")
            said, called = {"message": as_message(parts)}, bool(parts.calls)
        told = self._logprobs([one for chunk in run.chunks for one in chunk.logprobs], 0)
        choice: dict[str, Any] = {"index": number, **said, "logprobs": told, "finish_reason": _reason(run, called=called)}
        if self._chat.asked.token_ids:
            choice["token_ids"] = list(run.tokens)
        return choice

    def _kind(self, *, streamed: bool) -> str:
        """OpenAI's name for what is sent."""
        if self._raw:
            return "text_completion"
        return "chat.completion.chunk" if streamed else "chat.completion"

    def _echoed(self, number: int) -> str:
        """What comes before an answer: its prompt, where that is wanted."""
        return self._chat.first_of_each[number // self._chat.asked.n].prompt or "" if self._chat.echo else ""

    def _logprobs(self, told: Sequence[TokenLogprob], n_before: int) -> dict[str, Any] | None:
        """Of tokens behind so many characters of their choice; None where nobody asked."""
        if not self._chat.request.sampling.logprobs:
            return None
        return in_text(told, n_before) if self._raw else in_chat(told)

    def _choice(self, number: int, said: dict[str, Any], reason: str | None, tokens: tuple[int, ...]) -> dict[str, Any]:
        choice: dict[str, Any] = {"index": number, **said, "finish_reason": reason}
        if self._chat.asked.token_ids and tokens:
            choice["token_ids"] = list(tokens)
        usage = {} if self._chat.n_prompt is None else {"usage": _usage(self._chat.n_prompt, self._n_made)}
        return {**self._head, "object": self._kind(streamed=True), "choices": [choice], **usage}

    def _measured(self, runs: Sequence[Run]) -> dict[str, Any]:
        """Usage of all answers, each prompt once; of the first, what kind of run it was, and on demand its own record."""
        first, prompts = runs[0], runs[:: self._chat.asked.n]
        usage: dict[str, Any] = _usage(sum(run.n_prompt for run in prompts), sum(len(run.tokens) for run in runs))
        cached = sum(run.trace.counts.get("cache: prefix tokens found", 0) for run in prompts)
        usage["prompt_tokens_details"] = {"cached_tokens": cached}
        ours: dict[str, Any] = {"kind": first.kind}
        if self._chat.asked.trace:
            ours["run"] = first.to_record()
        return {"usage": usage, "fastvl_lab": ours}


def _reason(run: Run, *, called: bool) -> str | None:
    """Why an answer ended, in OpenAI's words: one that was not cut may have ended with calls."""
    return "tool_calls" if called and run.finish_reason == "stop" else run.finish_reason


def _delta(said: Said) -> dict[str, Any]:
    """What a piece of an answer adds to its message."""
    texts = {"reasoning_content": said.reasoning, "content": said.content}
    delta: dict[str, Any] = {name: text for name, text in texts.items() if text}
    if said.calls:
        delta["tool_calls"] = [_call(call) for call in said.calls]
    return delta


def _call(call: Call) -> dict[str, Any]:
    """What it adds to a call, by the call's place; what the call is comes once, where it begins."""
    if call.name is None:
        return {"index": call.number, "function": {"arguments": call.arguments}}
    (whole,) = as_tool_calls([call])
    return {"index": call.number, **whole}


def _usage(n_prompt: int, n_made: int) -> dict[str, int]:
    return {"prompt_tokens": n_prompt, "completion_tokens": n_made, "total_tokens": n_prompt + n_made}


def error_body(error: BaseException | str, kind: str, code: str | None = None) -> dict[str, Any]:
    """An error as OpenAI's clients read it. What was not foreseen is named by its type alone: its text may hold a path."""
    if isinstance(error, str):
        message = error
    elif isinstance(error, TimeoutError | RequestCancelledError):
        message = "the request took longer than this server, or its own timeout, allows"
    elif isinstance(error, FastvlError):
        message = sentence(error)
    else:
        message = f"the server failed with a {type(error).__name__}"
    return {"error": {"message": message, "type": kind, "param": None, "code": code}}
