"""What endpoints may send: a good stream is read in whatever form it comes, a bad one is refused in a sentence."""

from __future__ import annotations

import contextlib
import json
from typing import Any

import pytest
from hypothesis import given, settings, strategies as st

from fastvl_lab.errors import EndpointError
from fastvl_lab.peer.answers import Event, Model, Usage, read_events, read_models, said


def _read(body: bytes) -> list[Event]:
    return list(read_events(iter(body.splitlines(keepends=True))))


def _piece(delta: Any, **choice: Any) -> bytes:
    return json.dumps({"choices": [{"delta": delta, **choice}]}).encode()


A, B = _piece({"content": "a"}), _piece({"content": "b"})
CUT = A.index(b":") + 1
INDENTED = json.dumps(json.loads(B), indent=1).encode().replace(b"\n", b"\ndata: ")
NOTHINGS = b'\n\ndata\n\ndata:\n\ndata: null\n\ndata: 7\n\ndata: []\n\ndata: "ping"\n\nodd line\n\n'
FIELDS = b"\xef\xbb\xbf: hello\n\nretry: 10\nid: 1\nevent: message\n"


@pytest.mark.parametrize(
    "body",
    [
        pytest.param(b"data: " + A + b"\n\ndata: " + B + b"\n\ndata: [DONE]\n\n", id="plain"),
        pytest.param(b"data:" + A + b"\r\n\r\ndata:" + B + b"\r\n\r\ndata:[DONE]\r\n\r\n", id="CRLF and no space"),
        pytest.param(FIELDS + b"data: " + A + b"\n\n: still here\n\ndata: " + B + b"\n\n", id="BOM, comments and fields"),
        pytest.param(b"data: " + A + b"\ndata: " + B + b"\ndata: [DONE]\n", id="no empty lines"),
        pytest.param(b"data: " + A[:CUT] + b"\ndata: " + A[CUT:] + b"\n\ndata: " + INDENTED, id="several lines"),
        pytest.param(NOTHINGS + b"data: " + A + b"\n\n" + NOTHINGS + b"data: " + B + b"\n\n", id="nothings"),
        pytest.param(b"data: " + A + b"\n\ndata: " + B + b"\n\ndata: [DONE]\n\ndata: no JSON", id="after the end"),
    ],
)
def test_a_stream_is_read_in_any_of_its_forms(body: bytes) -> None:
    assert "".join(event.text for event in _read(body)) == "ab"


PARTS = [{"type": "text", "text": "x"}, None, "y", {"type": "thinking", "thinking": ["z"]}]
CALLS = [{"function": {"name": "f", "arguments": "{"}}, {"function": None}, None]


@pytest.mark.parametrize(
    ("delta", "text"),
    [
        (None, ""),
        ([], ""),
        ({}, ""),
        ({"content": None, "role": "assistant"}, ""),
        ({"content": PARTS}, "xyz"),
        ({"reasoning": "why", "reasoning_content": "why"}, "why"),
        ({"reasoning": None, "reasoning_content": "why", "content": ""}, "why"),
        ({"refusal": "no", "content": None}, "no"),
        ({"tool_calls": CALLS}, "f{"),
        ({"function_call": {"arguments": "}"}, "tool_calls": {"0": 1}}, "}"),
        ({"content": "\ud83d"}, "\ufffd"),
        ({"content": 5, "reasoning": {"text": "?"}}, ""),
    ],
)
def test_text_is_read_from_every_channel_and_from_nothing_else(delta: Any, text: str) -> None:
    (read,) = _read(b"data: " + _piece(delta, finish_reason=None) + b"\n\n")
    assert (read.text, read.is_piece) == (text, True)


@pytest.mark.parametrize(
    "event", [{"choices": None}, {"choices": {"0": 1}}, {"choices": [None, {}]}, {"error": None}, {"error": {}}]
)
def test_what_says_nothing_is_no_piece(event: Any) -> None:
    assert _read(b"data: " + json.dumps(event).encode() + b"\n\n") == [Event()]


NO_NUMBERS = {"prompt_tokens": -1, "completion_tokens": True, "prompt_tokens_details": {"cached_tokens": 2.5}}
NONE_CACHED = {"prompt_tokens": 5.0, "completion_tokens": 0, "prompt_tokens_details": {"cached_tokens": 0}}
NOT_FINITE = {"prompt_tokens": float("nan"), "completion_tokens": float("inf"), "prompt_tokens_details": {"cached_tokens": 3}}


@pytest.mark.parametrize(
    ("usage", "read"),
    [
        (None, Usage()),
        ([], Usage()),
        ({"prompt_tokens": None, "completion_tokens": "7", "prompt_tokens_details": None}, Usage()),
        (NO_NUMBERS, Usage()),
        (NONE_CACHED, Usage(prompt=5, completion=0, cached=0)),
        (NOT_FINITE, Usage(cached=3)),
        ({"prompt_tokens": 10**300, "completion_tokens": 1e15}, Usage()),  # each would be a token of the answer
    ],
)
def test_what_is_no_number_of_tokens_is_none(usage: Any, read: Usage) -> None:
    (event,) = _read(b"data: " + json.dumps({"choices": [], "usage": usage}).encode() + b"\n\n")
    assert event.usage == read


@pytest.mark.parametrize(
    ("ids", "read"), [([3, 5], (3, 5)), (None, ()), ([], ()), ("35", ()), ([3, None], ()), ([-1], ()), ([True], ())]
)
def test_ids_are_read_where_they_are_ids(ids: Any, read: tuple[int, ...]) -> None:
    (event,) = _read(b"data: " + _piece({"content": "a"}, token_ids=ids) + b"\n\n")
    assert event.tokens == read


@pytest.mark.parametrize(
    ("body", "says"),
    [
        (b"data: {'a': 1}\n\n", "an event is no JSON: {'a': 1}"),
        (b"data: " + A + b'\n\ndata: {"choices": [{"del', "an event is no JSON"),
        (b"data: " + b"[" * 100_000 + b"\n\n", "an event is no JSON"),
        (b'data: {"error": {"message": "too long", "code": 400}}\n\n', "gave up: too long"),
        (b'data: {"error": "too\\n  long"}\n\n', "gave up: too long"),
        (b'data: {"error": {"error": {"detail": {"msg": "too long"}}}}\n\n', "gave up: too long"),
        (b'data: {"error": {"code": 7}}\n\n', 'gave up: {"code": 7}'),
        (b'data: {"object": "error", "message": "too long"}\n\n', "gave up: too long"),
        (b'data: {"message": "too long", "code": 400}\n\n', "gave up: too long"),
        (b'event: error\ndata: {"message": "too long"}\n\n', "gave up: too long"),
        (b'event: error\ndata: "too long"\n\n', "gave up: too long"),
        (b"data: " + _piece({}, finish_reason="abort") + b"\n\n", "finish_reason is 'abort'"),
        (b'{"choices": [{"message": {"content": "a"}}]}', "in one piece though a stream was asked for"),
        (b'{\n "error": {\n  "message": "too long"\n }\n}\n', "gave up: too long"),
        (b'{"detail": [{"loc": 1}]}', 'gave up: [{"loc": 1}]'),
        (b"<html>\n<body>Sign in</body></html>", "no stream of events: <html> <body>Sign in</body></html>"),
        (b'{"half": ', "no stream of events"),
    ],
)
def test_a_stream_that_says_that_it_failed_is_an_error_of_one_line(body: bytes, says: str) -> None:
    with pytest.raises(EndpointError) as raised:
        _read(body)
    assert says in str(raised.value)
    assert "\n" not in str(raised.value)
    assert len(str(raised.value)) < 500


_NAMES = (
    *("choices", "delta", "content", "reasoning", "refusal", "tool_calls", "function", "arguments", "usage", "token_ids", "text"),
    *("prompt_tokens_details", "cached_tokens", "completion_tokens", "finish_reason", "fastvl_lab", "run", "kind"),
    *("id", "data", "owned_by", "error", "message"),
)
_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(_NAMES), inner, max_size=4),
    max_leaves=12,
)


@settings(max_examples=300, deadline=None)
@given(_JSON)
def test_no_json_is_unforeseen(value: Any) -> None:
    body = json.dumps(value).encode()
    with contextlib.suppress(EndpointError):
        assert all(isinstance(event.text, str) for event in _read(b"data: " + body + b"\n\n"))
    with contextlib.suppress(EndpointError):
        _read(body)
    with contextlib.suppress(EndpointError):
        assert all(isinstance(model, Model) for model in read_models(body))
    assert said(body)


def test_models_are_read_from_lists_with_odd_entries() -> None:
    m = Model(name="m", owner="")
    assert read_models(
        b'{"object": "list", "data": [null, {"name": "n"}, {"id": 3}, {"id": ""}, {"id": "m", "owned_by": null}]}'
    ) == (m,)
    assert read_models(b'[{"id": "m"}]') == (m,)
    assert read_models(b'{"data": [{"id": "m", "owned_by": "vllm"}]}') == (Model(name="m", owner="vllm"),)
    for body in (b"", b"{}", b'{"data": null}', b'{"data": {"id": "m"}}', b"<html>", b"\xff", b"[" * 100_000):
        with pytest.raises(EndpointError, match="its list of models"):
            read_models(body)
