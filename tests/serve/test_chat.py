"""What clients ask, read: what says nothing or changes nothing passes, what would change the answer is refused by its name."""

from __future__ import annotations

import json
from typing import Any

import pytest

from fastvl_lab import RequestError
from fastvl_lab.request import Request
from fastvl_lab.serve import chat
from fastvl_lab.serve.chat import Draft, Served
from fastvl_lab.serve.settings import Settings

SERVED = Served(model="m", ends=(7, 9), session_len=4096)
HI = [{"role": "user", "content": "hi"}]
PIXEL = "data:image/gif;base64,R0lGODlhAQABAIAAAP///wAAACH5BAAAAAAALAAAAAABAAEAAAICRAEAOw=="


def _read(**change: Any) -> Request:
    """The request of a body, whose addresses are not fetched."""
    body = {"model": "m", "messages": HI, "max_tokens": 2} | change
    return _draft(body).chat({}).request


def _draft(body: dict[str, Any], **settings: Any) -> Draft:
    return chat.read(chat.json_object(json.dumps(body).encode()), SERVED, Settings(**settings))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"stop_token_ids": [7, 8]}, "stop_token_ids is [7, 8]"),
        ({"min_tokens": 3, "ignore_eos": True}, "min_tokens is 3, over max_new_tokens, 2"),
        ({"response_format": {"type": "regex"}}, "response_format is"),
        ({"skip_special_tokens": False}, "skip_special_tokens is false"),
        ({"add_generation_prompt": False}, "add_generation_prompt is false"),
        ({"chat_template_kwargs": {"enable_thinking": False}}, "chat_template_kwargs is"),
        ({"mm_processor_kwargs": {"fps": 2}}, "mm_processor_kwargs has 'fps'; the choices are min_pixels, max_pixels"),
        ({"mm_processor_kwargs": {"max_pixels": 3136}, "max_pixels": 6272}, "max_pixels is 6272 and in mm_processor_kwargs"),
        ({"guided_json": {}}, "the field 'guided_json' is unknown"),
        ({"tool_choice": "required"}, "tool_choice is"),
        ({"messages": [{"role": "user", "content": None}]}, "content"),
        ({"messages": [{"role": "user", "content": ""}] * 10_001}, "over 10000 messages and parts of messages"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"temperature": 0.7, "typical_p": 0.9}, "typical_p is 0.9"),
        ({"n": 1, "best_of": 2}, "best_of is 2"),
        ({"temperature": -1}, "temperature is -1"),
        ({"stop_token_ids": [7], "ignore_eos": True}, "stop_token_ids is [7]"),  # which would end it all the same
        ({"mm_processor_kwargs": [1]}, "mm_processor_kwargs must be an object"),
        ({"stream_options": True}, "stream_options must be an object"),
        ({"timeout": 0}, "timeout is 0; it must be a number of seconds above 0 and at most 300"),
        ({"timeout": 301}, "timeout is 301"),
        ({"timeout": float("nan")}, "timeout is NaN"),
        ({"timeout": True}, "timeout is true"),
    ],
)
def test_what_would_change_the_answer_is_refused_by_name(change: dict[str, Any], says: str) -> None:
    with pytest.raises(RequestError) as raised:
        _read(**change)
    assert says in str(raised.value)


def _said(role: str, content: Any = None, **more: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **more}


ANSWERED = {"refusal": None, "annotations": [], "audio": None, "function_call": None, "tool_calls": None, "name": None}


@pytest.mark.parametrize(
    "change",
    [
        {
            "user": "me",
            "seed": 3,
            "temperature": 0,
            "n": 1,
            "stop": None,
            "store": False,
            "service_tier": "auto",
            "metadata": {"a": "b"},
        },
        dict.fromkeys(
            ["max_tokens", "stream", "stream_options", "tools", "logprobs", "structured_outputs", "chat_template", "audio"]
        ),
        dict.fromkeys(["ignore_eos", "min_pixels", "mm_processor_kwargs", "return_trace", "a_field_to_come", "messages_"]),
        {"temperature": 0.0, "top_p": 0.8, "top_k": 20, "min_p": 0.05},
        {"temperature": 0.7, "top_k": 1},
        {"temperature": 1e-6, "top_p": 0.1},
        {"temperature": 0.7, "top_p": 0.9, "do_sample": False},
        {"stop_token_ids": [7, 9]},
        {"model": None, "prediction": {"type": "content", "content": "x"}},
        {"top_k": 0, "typical_p": 1.0, "length_penalty": 1.2, "best_of": 1, "use_beam_search": False, "do_sample": False},
        {"frequency_penalty": 0.0, "presence_penalty": 0, "repetition_penalty": 1, "logit_bias": {"5": 0}, "bad_words": []},
        {"stop": [""], "stop_token_ids": [], "include_stop_str_in_output": False, "min_tokens": 0},
        {"min_tokens": 1, "ignore_eos": True, "max_tokens": 1},
        {
            "response_format": {"type": "text", "strict": None},
            "modalities": ["text"],
            "verbosity": "medium",
            "parallel_tool_calls": True,
        },
        {"tools": [], "tool_choice": "auto", "functions": [], "function_call": "none", "documents": []},
        {
            "logprobs": False,
            "top_logprobs": 0,
            "echo": False,
            "spaces_between_special_tokens": True,
            "priority": 0,
            "request_id": "r",
        },
        {"chat_template_kwargs": {}, "media_io_kwargs": {}, "mm_processor_kwargs": {}, "continue_final_message": False},
        {"stream_options": {"include_usage": True, "continuous_usage_stats": True, "include_obfuscation": False}},
        {"messages": [_said("user", "hi"), _said("assistant", "ho", **ANSWERED), _said("user", "hi")]},
        {"messages": [_said("user", "hi"), _said("assistant", [{"type": "refusal", "refusal": "no"}]), _said("user", "hi")]},
        {"messages": [_said("user", "hi"), _said("assistant", [], tool_calls=[]), _said("user", "hi")]},
    ],
)
def test_a_field_that_changes_nothing_passes(change: dict[str, Any]) -> None:
    """Nulls of all fields, the neutral values that clients send unasked, and what has no meaning where decoding is greedy."""
    assert _read(**change).max_new_tokens == (change.get("max_tokens", 2) or SERVED.session_len)


def test_a_length_is_the_clients_wish_or_what_fits() -> None:
    assert [(r.max_new_tokens, r.fit) for r in (_read(), _read(max_tokens=None, max_completion_tokens=3))] == [
        (2, False),
        (3, False),
    ]
    default = _read(max_tokens=None)
    assert (default.max_new_tokens, default.fit) == (SERVED.session_len, True)


def test_a_timeout_is_the_clients_or_the_servers() -> None:
    body = {"messages": HI, "timeout": 2.5}
    assert _draft(body).asked.timeout == 2.5
    assert _draft({"messages": HI}, timeout=7).asked.timeout == 7


def test_what_parts_and_messages_carry_reaches_the_request() -> None:
    """All but what names an image elsewhere: the server's own disk is not read."""
    image = {"type": "image_url", "image_url": {"url": PIXEL, "detail": "low"}, "max_pixels": 3136, "path": "/etc/hostname"}
    call = {"role": "assistant", "content": None, "tool_calls": [{"id": "1"}], "reasoning_content": "why", "refusal": None}
    seen: dict[str, Any] = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chat, "Request", lambda **given: seen.update(given) or Request(prompt="?"))
        _read(messages=[{"role": "user", "content": [image], "name": "me"}, call])
    read = seen["messages"][0]["content"][0]["image"].pop("url")
    assert read.data.startswith(b"GIF89a")
    part = {"type": "image", "image": {"detail": "auto"}, "max_pixels": 3136}
    assert seen["messages"] == [
        {"role": "user", "content": [part], "name": "me"},
        {"role": "assistant", "content": None, "tool_calls": [{"id": "1"}], "reasoning_content": "why"},
    ]


def test_low_detail_is_the_size_that_openai_gives_it() -> None:
    """Unless the part itself says how large; both places where clients write it are read."""
    for part, most in (
        ({"image_url": {"url": PIXEL, "detail": "low"}}, 512 * 512),
        ({"image_url": PIXEL, "detail": "low"}, 512 * 512),
        ({"image_url": {"url": PIXEL, "detail": "low", "max_pixels": 3136}}, 3136),
        ({"image_url": {"url": PIXEL, "detail": "low"}, "max_pixels": 3136, "uuid": "a"}, 3136),
        ({"image_url": {"url": PIXEL, "detail": "high"}}, None),
    ):
        (image,) = _read(messages=[_said("user", [{"type": "image_url", **part}])]).image_inputs
        assert image.max_pixels == most, part


def test_an_image_is_there_once_however_many_answers_it_has() -> None:
    """A body of megabytes that asks for 64 answers must not take 64 times as much memory as the server counts for it."""
    body = {"messages": [_said("user", [{"type": "image_url", "image_url": {"url": PIXEL}}])], "n": 3, "max_tokens": 2}
    asked = _draft(body).chat({}).with_others()
    data = {id(request.image_inputs[0].data) for request in (asked.request, *asked.others)}
    assert (len(asked.others), len(data)) == (2, 1)


def test_a_developer_is_who_was_the_system_before() -> None:
    (first, _) = _read(messages=[_said("developer", "Be brief."), *HI]).conversation
    assert first == {"role": "system", "content": "Be brief."}
