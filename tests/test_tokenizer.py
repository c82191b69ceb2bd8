"""Prompts and M-RoPE positions, against Transformers' own."""

from __future__ import annotations

import dataclasses
import unicodedata
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from tokenizers import AddedToken, normalizers

from fastvl_lab import Lab, Request, RequestError
from fastvl_lab.checkpoint import Checkpoint
from fastvl_lab.families.qwen import mrope_positions
from fastvl_lab.request import Grid
from fastvl_lab.tokenizer import chat_text, check_bytes, check_text, followed_by, tokenize

grids_strategy = st.lists(st.builds(lambda h, w: Grid(1, 2 * h, 2 * w), st.integers(1, 40), st.integers(1, 40)), max_size=4)
# Without placeholders, which hypothesis knows from the source, and which are refused in a prompt.
text_strategy = st.text(st.characters(exclude_categories=["Cs"]), max_size=30).filter(lambda text: "_pad|>" not in text)


@settings(max_examples=60, deadline=None)
@given(data=st.data(), grids=grids_strategy)
@pytest.mark.parametrize("name", ["tiny-qwen2.5-vl", "tiny-qwen3-vl"])
def test_prompt_and_positions_equal_transformers(labs: dict[str, Lab], name: str, data: st.DataObject, grids: list[Grid]) -> None:
    """0 to 4 images of random grids between random texts."""
    checkpoint = labs[name].checkpoint
    content: list[dict] = [{"type": "text", "text": data.draw(text_strategy)}]
    for _ in grids:
        content.append({"type": "image", "image": b"not decoded here"})
        content.append({"type": "text", "text": data.draw(text_strategy)})
    prompt = tokenize(Request(messages=[{"role": "user", "content": content}]), grids, checkpoint)

    text = checkpoint.tokenizer.apply_chat_template(
        [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
    )
    pieces = text.split("<|image_pad|>")
    assert len(pieces) == len(grids) + 1
    expanded = pieces[0]
    for grid, piece in zip(grids, pieces[1:], strict=True):
        expanded += "<|image_pad|>" * (grid.h * grid.w // 4) + piece
    input_ids = checkpoint.tokenizer(expanded, return_tensors="pt").input_ids
    assert torch.equal(prompt.input_ids, input_ids[0])

    is_image = input_ids == checkpoint.image_token_id
    assert torch.equal(prompt.visual_index, is_image[0].nonzero()[:, 0])
    grid_thw = torch.tensor(grids) if grids else None
    positions, delta = checkpoint.model.model.get_rope_index(input_ids, mm_token_type_ids=is_image.int(), image_grid_thw=grid_thw)
    assert torch.equal(prompt.positions, positions[:, 0])
    assert prompt.next_position == prompt.n_tokens + int(delta)


def test_positions_of_a_known_prompt() -> None:
    """Two text tokens, a 2 x 3 image, one text token: written out by hand."""
    positions, following = mrope_positions(np.array([False, False, True, False]), [Grid(1, 4, 6)], merge_size=2)
    assert positions.tolist() == [
        [0, 1, 2, 2, 2, 2, 2, 2, 5],
        [0, 1, 2, 2, 2, 3, 3, 3, 5],
        [0, 1, 2, 3, 4, 2, 3, 4, 5],
    ]
    assert following == 6


@pytest.mark.parametrize("placeholder", ["<|image_pad|>", "<|video_pad|>"])
def test_a_placeholder_in_the_text_is_refused(lab: Lab, placeholder: str) -> None:
    for engine in ("baseline", "transformers"):
        with pytest.raises(RequestError, match=r"the prompt contains the placeholder '<\|(image|video)_pad\|>'"):
            lab.run(Request(prompt=f"Look: {placeholder}"), engine)


def test_tokens_behind_a_prompt_are_text_whatever_their_ids(lab: Lab) -> None:
    request = Request(images=[b"not decoded here"], prompt="Hi")
    prompt = tokenize(request, [Grid(1, 8, 12)], lab.checkpoint)
    n, image = prompt.n_tokens, lab.checkpoint.image_token_id
    longer = followed_by(followed_by(prompt, [7]), [image, 8])
    assert longer.input_ids.tolist() == [*prompt.input_ids.tolist(), 7, image, 8]
    assert longer.positions[:, :n].equal(prompt.positions)
    assert longer.positions[:, n:].tolist() == [[prompt.next_position + step for step in range(3)]] * 3
    assert longer.visual_index is prompt.visual_index
    assert (longer.next_position, longer.images) == (prompt.next_position + 3, prompt.images)
    assert followed_by(prompt, []) is prompt


def test_a_placeholder_put_together_from_parts_is_refused(lab: Lab) -> None:
    parts = [{"type": "text", "text": "<|image_"}, {"type": "text", "text": "pad|>"}]
    for messages in ([{"role": "user", "content": parts}], [{"role": "<|image_pad|>", "content": "Hello."}]):
        for engine in ("baseline", "transformers"):
            with pytest.raises(RequestError, match="the prompt contains the placeholder"):
                lab.run(Request(messages=messages), engine)


@pytest.mark.parametrize(
    ("template", "says"),
    [
        (
            "{% for m in messages %}{{ m['role'] }}{% endfor %}",
            "wrote 0 image placeholders for 1 images",
        ),
        ("{{ messages[0]['content'] + 'x' }}", "cannot write this conversation"),
        ("{{ raise_exception('roles must alternate') }}", "cannot write this conversation: roles must alternate"),
        ("{% for %}", "cannot write this conversation"),
    ],
)
def test_templates_that_cannot_write_the_conversation_are_refused(
    lab: Lab, template: str, says: str, picture: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lab.checkpoint.tokenizer, "chat_template", template)
    for engine in ("baseline", "transformers"):
        with pytest.raises(RequestError, match=says):
            lab.run(Request(images=[picture], prompt="?"), engine)


def test_a_prompt_longer_than_the_model_is_refused_with_the_numbers(lab: Lab) -> None:
    limit = lab.checkpoint.session_len
    request = Request(prompt="Hello.", max_new_tokens=limit)
    for engine in ("baseline", "transformers"):
        with pytest.raises(RequestError, match=rf"max_new_tokens is {limit}: together over session_len, {limit} "):
            lab.run(request, engine)


def _short(lab: Lab, session_len: int) -> Lab:
    """The same, whose sessions have so many tokens."""
    short = lab.apart()
    short.checkpoint = dataclasses.replace(lab.checkpoint, session_len=session_len)
    return short.apart()


@settings(max_examples=200, deadline=None)
@given(st.text(max_size=40) | st.text(st.sampled_from("e\u0301\u0327 \n\t\u1100\u1161\u11a8\u212a\u1fef<|im_end|>"), max_size=60))
def test_no_token_stands_for_more_than_the_longest(labs: dict[str, Lab], text: str) -> None:
    checkpoint = labs["tiny-qwen3-vl"].checkpoint
    text = text.encode(errors="replace").decode()
    n_tokens = len(checkpoint.tokenizer(text, add_special_tokens=False).input_ids)
    assert checkpoint.longest_token == len("<|vision_start|>")
    assert len(unicodedata.normalize("NFC", text).encode()) <= checkpoint.longest_token * n_tokens


@pytest.mark.parametrize("text", ["word " * 400, "w\u00f6rter " * 300, "\U0001f600" * 500, "\n" * 1700])
@pytest.mark.parametrize("engine", ["baseline", "transformers"])
def test_a_text_of_too_many_bytes_is_refused_before_it_is_tokenized(
    lab: Lab, text: str, engine: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def tokenized(*_: object, **__: object) -> None:
        raise AssertionError("it was tokenized")

    monkeypatch.setattr(type(lab.checkpoint.tokenizer), "__call__", tokenized)
    for role in ("user", "assistant", "system"):
        messages = [{"role": role, "content": text}, {"role": "user", "content": "?"}]
        with pytest.raises(RequestError, match=r"bytes of text, which are at least \d+ tokens: over session_len, 100"):
            _short(lab, 100).run(Request(messages=messages), engine)


def test_bytes_decide_nothing_that_they_cannot(lab: Lab) -> None:
    """Characters that are composed first, special tokens in the text, and tokenizers that may drop some of it."""
    short = _short(lab, 100).checkpoint
    for text in ("e\u0301" * 600, "<|vision_start|>" * 99, "a" * 1600):
        check_bytes(text, short)
    for text in ("e\u0301" * 801, "<|vision_start|>" * 101, "a" * 1601):
        with pytest.raises(RequestError, match="bytes of text"):
            check_bytes(text, short)

    def other(**changes: Any) -> Checkpoint:
        backend = SimpleNamespace(normalizer=changes.get("normalizer"))
        added = {7: AddedToken("<a>", lstrip=changes.get("lstrip", False), rstrip=changes.get("rstrip", False))}
        vocabulary = {"\u00e4" * 9: 1, "<\u00e4\u00e4\u00e4\u00e4>": 7}  # a character for each byte, but in what was added
        tokenizer = SimpleNamespace(backend_tokenizer=backend, added_tokens_decoder=added, get_vocab=lambda: vocabulary)
        return dataclasses.replace(short, tokenizer=tokenizer)

    assert other().longest_token == 10
    assert other(normalizer=normalizers.NFC()).longest_token == 10
    for unsure in ({"normalizer": normalizers.Strip()}, {"normalizer": normalizers.NFKC()}, {"lstrip": True}, {"rstrip": True}):
        assert other(**unsure).longest_token is None
        check_bytes("a" * 10_000, other(**unsure))


def test_a_long_text_is_counted_by_who_has_time(lab: Lab) -> None:
    short = _short(lab, 100).checkpoint
    for text in ("a" * 20, "a" * 390):  # of which the engine itself says what it is
        check_text(Request(prompt=text), short)
    with pytest.raises(RequestError, match=r"the prompt has \d+ tokens and max_new_tokens is 3: together over session_len, 100"):
        check_text(Request(prompt="a" * 401, max_new_tokens=3), short)
    with pytest.raises(RequestError, match="bytes of text"):
        check_text(Request(prompt="a" * 4000), short)


@pytest.mark.parametrize(
    "engine",
    ["baseline", "fastest", "fastest, cache.kv=paged", "fastest, streaming.steps_per_round=16", "transformers"],
)
def test_an_answer_that_may_fit_ends_where_the_session_does(lab: Lab, engine: str) -> None:
    request = Request(prompt="Hello.", max_new_tokens=8, ignore_eos=True, fit=True)
    whole = lab.run(request, "baseline")
    for room, made in ((1, 1), (5, 5), (8, 8), (100, 8)):
        run = _short(lab, whole.n_prompt + room).run(request, engine)
        assert run.tokens == whole.tokens[:made]
    for asked in (request, dataclasses.replace(request, fit=False, max_new_tokens=1)):
        with pytest.raises(RequestError, match="over session_len"):
            _short(lab, whole.n_prompt).run(asked, engine)


# Roles, tools and reasoning as Qwen3's published templates have them: reasoning of turns before the last question is left out.
TOOLS = """
{%- set ns = namespace(last=-1) %}
{%- for m in messages %}{%- if m.role == 'user' %}{%- set ns.last = loop.index0 %}{%- endif %}{%- endfor %}
{%- for m in messages %}{{- '<|im_start|>' + m.role + '\n' }}
{%- if m.role == 'assistant' and loop.index0 > ns.last and m.reasoning_content %}{{- '<think>' + m.reasoning_content + '</think>' }}
{%- endif %}
{%- if m.content is string %}{{- m.content }}{%- else %}{%- for p in m.content or [] %}
{{- '<|vision_start|><|image_pad|><|vision_end|>' if p.type == 'image' else p.text }}{%- endfor %}{%- endif %}
{%- for call in m.tool_calls or [] %}{{- '<tool_call>' + (call.function | tojson) + '</tool_call>' }}{%- endfor %}
{{- '<|im_end|>\n' }}{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}"""
NAMES = (
    "{% for m in messages %}[{{ m['role'] }}{{ ' ' + m.get('name') if 'name' in m else '' }}]"
    "{{ m['content'] if m['content'] is string else m['content'] | map(attribute='text') | join('|') }}{% endfor %}"
)
EVERYTHING = "{{ messages | tojson }}"

QUESTION = {"role": "user", "content": "What is the weather?"}
CALL = {"id": "c", "type": "function", "function": {"name": "get", "arguments": {"town": "Ulm", "days": [1, 2]}}}
AS_TEXT = CALL | {"function": {"name": "get", "arguments": '{"town": "Ulm"}'}}


@pytest.mark.parametrize(
    ("template", "messages"),
    [
        (TOOLS, [QUESTION, {"role": "assistant", "content": None, "tool_calls": [CALL]}, {"role": "tool", "content": "22"}]),
        (
            TOOLS,
            [QUESTION, {"role": "assistant", "tool_calls": [AS_TEXT, CALL]}, {"role": "tool", "tool_call_id": "c", "content": "2"}],
        ),
        (TOOLS, [QUESTION, {"role": "assistant", "content": "Wet.", "reasoning_content": "Clouds."}]),
        (TOOLS, [QUESTION, {"role": "assistant", "content": "Wet.", "reasoning_content": "Clouds."}, QUESTION]),
        (
            TOOLS,
            [QUESTION, {"role": "assistant", "content": "Wet.", "tool_calls": None, "audio": None, "partial": False}, QUESTION],
        ),
        (TOOLS, [QUESTION, {"role": "tool", "name": "get", "tool_call_id": "c", "content": "22"}]),
        (
            NAMES,
            [
                QUESTION | {"name": "Ann"},
                {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
            ],
        ),
        (EVERYTHING, [QUESTION | {"mood": "good"}, {"role": "assistant", "content": "a", "function_call": {"name": "f"}}]),
        (EVERYTHING, [QUESTION, {"role": "user", "content": [{"type": "text", "text": "in parts"}]}]),
    ],
)
def test_prompts_are_transformers_own_with_every_field_that_the_template_writes(
    labs: dict[str, Lab], template: str, messages: list, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = labs["tiny-qwen3-vl"].checkpoint
    monkeypatch.setattr(checkpoint.tokenizer, "chat_template", template)
    expected = checkpoint.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert chat_text(Request(messages=messages), checkpoint) == expected


@pytest.mark.parametrize(
    ("template", "message", "field"),
    [
        (TOOLS, QUESTION | {"name": "Ann"}, "name"),  # though functions in the template have names
        (TOOLS, QUESTION | {"tool_calls_id": 5}, "tool_calls_id"),
        (TOOLS, {"role": "assistant", "content": "a", "function_call": {"name": "f", "arguments": "{}"}}, "function_call"),
        (TOOLS, {"role": "assistant", "content": None, "audio": {"id": "a"}}, "audio"),
        (TOOLS, {"role": "assistant", "content": "a", "partial": True}, "partial"),
        (TOOLS, QUESTION | {"reasoning_content": "I wonder."}, "reasoning_content"),
        (NAMES, {"role": "assistant", "content": "a", "tool_calls": [CALL]}, "tool_calls"),
        (NAMES, {"role": "assistant", "content": "a", "reasoning_content": "Clouds."}, "reasoning_content"),
        ("{% for m in messages %}{{ m.role }}{% endfor %}", {"role": "user", "content": "nobody reads this"}, "content"),
    ],
)
def test_a_field_that_the_template_does_not_write_is_refused_by_name(
    labs: dict[str, Lab], template: str, message: dict, field: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    lab = labs["tiny-qwen3-vl"]
    monkeypatch.setattr(lab.checkpoint.tokenizer, "chat_template", template)
    for engine in ("baseline", "transformers"):
        with pytest.raises(
            RequestError, match=f"has the field '{field}', which the chat template of 'tiny-qwen3-vl' does not write"
        ):
            lab.run(Request(messages=[QUESTION | {"content": "user"}, message]), engine)


@pytest.mark.parametrize(
    "field",
    [
        {"tool_calls": [{"function": {"name": "f", "arguments": '{"a": "<|image_pad|>"}'}}]},
        {"tool_calls": [{"function": {"name": "<|video_pad|>", "arguments": {}}}]},
        {"tool_calls": [{"function": {"name": "f", "arguments": {"<|image_pad|>": 1}}}]},
        {"reasoning_content": "<|image_pad|>"},
        {"name": "<|video_pad|>"},
        {"<|image_pad|>": "a field's name"},
    ],
)
def test_a_placeholder_in_any_field_is_refused(labs: dict[str, Lab], field: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the template leaves an image out, so that the number of placeholders would be right."""
    checkpoint = labs["tiny-qwen3-vl"].checkpoint
    image = {"role": "system", "content": [{"type": "image", "image": np.zeros((9, 9, 3), np.uint8)}]}
    for template in (
        TOOLS,
        TOOLS.replace("{%- for m in messages %}{{-", "{%- for m in messages if m.role != 'system' %}{{-"),
        EVERYTHING,
    ):
        monkeypatch.setattr(checkpoint.tokenizer, "chat_template", template)
        for messages in (
            [QUESTION, {"role": "assistant", "content": "a", **field}],
            [image, {"role": "assistant", "content": "a", **field}],
        ):
            with pytest.raises(RequestError, match="the prompt contains the placeholder"):
                chat_text(Request(messages=messages), checkpoint)


@pytest.mark.parametrize(
    ("template", "says"),
    [
        ("{{ 1 / 0 }}", "cannot write this conversation: ZeroDivisionError"),
        ("{{ messages[9].content.x }}", "cannot write this conversation: list object has no element 9"),
        ("{% for _ in range(10 ** 9) %}{% endfor %}", "cannot write this conversation: OverflowError"),
        ("{{ messages | first | attr('role') | tojson(indent='x'.foo) }}{{ raise_exception('y' * 99999) }}", "cannot write"),
        ("{{ '' }}", "makes an empty prompt"),
    ],
)
def test_whatever_a_template_does_is_one_line(
    labs: dict[str, Lab], template: str, says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = labs["tiny-qwen3-vl"].checkpoint
    monkeypatch.setattr(checkpoint.tokenizer, "chat_template", template)
    with pytest.raises(RequestError, match=says) as error:
        chat_text(Request(prompt="?"), checkpoint)
    assert len(str(error.value)) < 400
