"""What endpoints send, read in one place: whatever its form, it becomes one of these types or an `EndpointError`.

Servers agree on OpenAI's names and on little else: a field may be absent, null or of another type where it has nothing to say, and
text comes in more channels than one. What is not understood says nothing; what says that the endpoint failed is an error.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, get_args

from fastvl_lab.account import Account
from fastvl_lab.errors import EndpointError
from fastvl_lab.peer.accounts import in_answer
from fastvl_lab.request import Kind

MAX_EVENT = 16_000_000  # bytes
_MOST_TOKENS = 10_000_000  # that are counted; a number above it is none

# How an answer ends that is none.
_GIVEN_UP = ("abort", "error")


@dataclass(frozen=True, kw_only=True)
class Model:
    """A model that an endpoint lists: its name there, and whose it is."""

    name: str
    owner: str


@dataclass(frozen=True, kw_only=True)
class Usage:
    """What an endpoint has counted: tokens of the prompt, of them reused, and of the answer; None where it does not say."""

    prompt: int | None = None
    cached: int | None = None
    completion: int | None = None

    def or_earlier(self, earlier: Usage) -> Usage:
        """With what was said earlier where this says nothing."""
        return Usage(
            prompt=earlier.prompt if self.prompt is None else self.prompt,
            cached=earlier.cached if self.cached is None else self.cached,
            completion=earlier.completion if self.completion is None else self.completion,
        )


@dataclass(frozen=True, kw_only=True)
class Event:
    """One event of a stream.

    is_piece: whether it is of the answer, be it without text: a token may be behind it. text: of all channels. tokens: the ids
    behind it, where it has any. kind: of the whole run, which only the lab's own server says. account: the engine's
    own of the request.
    """

    is_piece: bool = False
    text: str = ""
    tokens: tuple[int, ...] = ()
    usage: Usage = Usage()
    kind: Kind | None = None
    account: Account | None = None


def read_models(body: bytes) -> tuple[Model, ...]:
    """The models of a list, in its order, but for entries without a name; raises `EndpointError` for what is no list."""
    try:
        data = json.loads(body)
    except (ValueError, RecursionError):
        raise EndpointError(f"its list of models is no JSON: {_shown(body)}") from None
    listed = data.get("data") if isinstance(data, Mapping) else data
    if not isinstance(listed, list):
        raise EndpointError(f"its list of models is none: {_shown(body)}")
    entries = [_object(entry) for entry in listed]
    return tuple(Model(name=e["id"], owner=_text(e.get("owned_by"))) for e in entries if e.get("id") and isinstance(e["id"], str))


def read_events(lines: Iterator[bytes]) -> Iterator[Event]:
    """A body of server-sent events, each as soon as it is whole, until the stream says that it is done or ends.

    lines: with their ends. Raises `EndpointError` for an event that is no JSON or says that the endpoint failed, and for a body
    that is no such stream. Events that follow one another without the empty line between them are told apart all the same.
    Format: https://html.spec.whatwg.org/multipage/server-sent-events.html
    """
    held, is_error, begun = b"", False, False
    for line in lines:
        if not begun:
            line = line.removeprefix(b"\xef\xbb\xbf")
            if line.lstrip()[:1] in (b"{", b"[", b"<"):
                raise EndpointError(_in_one_piece(line, lines))
            begun = bool(line.strip())
        field, _, value = line.rstrip(b"\r\n").partition(b":")
        if field == b"event":
            is_error = value.strip() == b"error"
        elif field == b"data":
            held += b"\n" + value
            if held.strip() == b"[DONE]":
                return
            try:
                data = json.loads(held)
            except (ValueError, RecursionError):
                if len(held) > MAX_EVENT:
                    break
                continue  # it may go on in the next line
            yield _event(data, is_error)
            held = b""
        elif not line.strip():
            if held.strip():
                break
            held, is_error = b"", False
    if held.strip():
        raise EndpointError(f"an event is no JSON: {_shown(held)}")


def said(body: bytes) -> str:
    """The sentence in an error's body, whatever its form."""
    try:
        return _sentence(json.loads(body))
    except (ValueError, RecursionError):
        return _shown(body)


def _event(data: Any, is_error: bool) -> Event:
    event = _object(data)
    nothing_else = "choices" not in event and "usage" not in event and any(_text(event.get(n)) for n in ("message", "detail"))
    if is_error or event.get("error") or event.get("object") == "error" or nothing_else:
        raise EndpointError(f"the endpoint gave up: {_sentence(data)}")
    text, tokens = "", []
    choices = [_object(choice) for choice in _list(event.get("choices")) if choice]
    for choice in choices:
        if choice.get("finish_reason") in _GIVEN_UP:
            raise EndpointError(f"the endpoint gave up: finish_reason is {choice['finish_reason']!r}")
        text += _all_channels(_object(choice.get("delta"))) + _text(choice.get("text"))  # of /chat/completions, of /completions
        ids = _list(choice.get("token_ids"))
        tokens += ids if all(isinstance(token, int) and not isinstance(token, bool) and token >= 0 for token in ids) else []
    ours = _object(event.get("fastvl_lab"))
    return Event(
        is_piece=bool(choices),
        text=text,
        tokens=tuple(tokens),
        usage=_usage(_object(event.get("usage"))),
        kind=next((kind for kind in (ours.get("kind"), _object(ours.get("run")).get("kind")) if kind in get_args(Kind)), None),
        account=in_answer(event),
    )


def _all_channels(delta: Mapping[str, Any]) -> str:
    """What a reader sees, in whichever channel; the two names for thoughts may both be given, and are one."""
    calls = [_object(_object(call).get("function")) for call in _list(delta.get("tool_calls"))]
    calls.append(_object(delta.get("function_call")))
    texts = [_text(delta.get("reasoning")) or _text(delta.get("reasoning_content"))]
    texts += [_text(delta.get("content")), _text(delta.get("refusal"))]
    texts += [_text(call.get(name)) for call in calls for name in ("name", "arguments")]
    # Half of a character that JSON writes in two escapes is none.
    return "".join(texts).encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _usage(usage: Mapping[str, Any]) -> Usage:
    return Usage(
        prompt=_count(usage.get("prompt_tokens")),
        cached=_count(_object(usage.get("prompt_tokens_details")).get("cached_tokens")),
        completion=_count(usage.get("completion_tokens")),
    )


def _sentence(data: Any) -> str:
    """What an error's JSON says: its message, wherever that stands, else all of it."""
    while isinstance(data, Mapping):
        inner = next((data[name] for name in ("error", "message", "detail", "msg") if data.get(name)), None)
        if inner is None:
            break
        data = inner
    return _shown((data if isinstance(data, str) else json.dumps(data)).encode(errors="replace"))


def _in_one_piece(body: bytes, lines: Iterator[bytes]) -> str:
    """Why a body that is no stream is not read as one; its first line and the rest."""
    while len(body) <= MAX_EVENT and (line := next(lines, b"")):
        body += line
    try:
        data = json.loads(body)
    except (ValueError, RecursionError):
        return f"it answers with no stream of events: {_shown(body)}"
    if isinstance(data, Mapping) and not data.get("error") and "choices" in data:
        return "it answers in one piece though a stream was asked for, so its first token cannot be timed"
    return f"the endpoint gave up: {_sentence(data)}"


def _shown(body: bytes) -> str:
    """The beginning, in one line."""
    return " ".join(body[:400].decode(errors="replace").split()) or "nothing"


def _object(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _text(value: Any) -> str:
    """A text, or the texts of a list of parts."""
    if isinstance(value, list):
        return "".join(_text(part) if isinstance(part, str) else _text_of_part(_object(part)) for part in value)
    return value if isinstance(value, str) else ""


def _text_of_part(part: Mapping[str, Any]) -> str:
    return "".join(_text(part.get(name)) for name in ("text", "thinking", "refusal"))


def _count(value: Any) -> int | None:
    """A whole number of tokens that there can be, also where it is written as a float."""
    good = isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= _MOST_TOKENS and value == value // 1
    return int(value) if good else None
