"""An answer's reasoning, content and calls are told apart wherever tokens cut its text, and nothing of a mark is in any."""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import pytest

from fastvl_lab.channels import Call, Channels, Said, as_message, said_in

hypothesis = pytest.importorskip("hypothesis", reason="property tests need hypothesis (extra dev)")
st = pytest.importorskip("hypothesis.strategies")


def _call(name: str, arguments: str) -> str:
    return f'<tool_call>\n{{"name": "{name}", "arguments": {arguments}}}\n</tool_call>'


def _joined(pieces: Sequence[str], *, thinks: bool = False, calls: bool = True, cut: bool = False) -> tuple[Any, ...]:
    """What the channels have once all pieces came, and calls as (name, arguments)."""
    channels = Channels(thinks=thinks, calls=calls)
    told = [channels.push(piece) for piece in pieces] + [channels.end(cut=cut)]
    made: list[list[str]] = []
    for said in told:
        for call in said.calls:
            if call.name is not None:
                assert call.number == len(made)
                assert call.id is not None
                made.append([call.name, ""])
            made[call.number][1] += call.arguments
    assert channels.n_calls == len(made)
    return "".join(s.reasoning for s in told), "".join(s.content for s in told), [tuple(call) for call in made]


ANSWERS: dict[str, tuple[str, dict[str, bool], tuple[Any, ...]]] = {
    "a text": ("A <b>text</b> with </tool_call> and \n", {}, ("", "A <b>text</b> with </tool_call> and \n", [])),
    "calls that nobody offered": (_call("f", "{}"), {"calls": False}, ("", _call("f", "{}"), [])),
    "a call": (_call("f", '{"a": "}</tool_call>\\"{"}'), {}, ("", "", [("f", '{"a": "}</tool_call>\\"{"}')])),
    "a text before": ("Let me see.\n" + _call("f", '{"a": [1, {}]}'), {}, ("", "Let me see.", [("f", '{"a": [1, {}]}')])),
    "two": (_call("f", "{}") + "\n" + _call("g", '{"x": "é<"}') + "\n", {}, ("", "", [("f", "{}"), ("g", '{"x": "é<"}')])),
    "a text behind": (_call("f", "{}") + "\n\nDone. ", {}, ("", "Done. ", [("f", "{}")])),
    "in another order": ('<tool_call>{"arguments": {"a": 1}, "name": "f"}</tool_call>', {}, ("", "", [("f", '{"a": 1}')])),
    "not closed": ('<tool_call>\n{"name": "f", "arguments": {"a": 1}}', {}, ("", "", [("f", '{"a": 1}')])),
    "a brace too few": ('<tool_call>\n{"name": "f", "arguments": {"a": 1\n</tool_call>x', {}, ("", "x", [("f", '{"a": 1\n')])),
    "no call": ("<tool_call>hm</tool_call> yes", {}, ("", "<tool_call>hm</tool_call>yes", [])),
    "a thought": ("\nWhy?\n</think>\n\nSo.", {"thinks": True}, ("Why?", "So.", [])),
    "a thought alone": ("Why? </thin", {"thinks": True}, ("Why? </thin", "", [])),
    "a thought and a call": (
        "\n<tool_call>?</think>\n\n" + _call("f", "{}"),
        {"thinks": True},
        ("<tool_call>?", "", [("f", "{}")]),
    ),
    "no tools": ("a</think>\n<tool_call>", {"thinks": True, "calls": False}, ("a", "<tool_call>", [])),
    "cut before its name": ('So\n<tool_call>\n{"na', {"cut": True}, ("", "So", [])),
    "cut in its arguments": ('<tool_call>\n{"name": "f", "arguments": {"a": "x', {"cut": True}, ("", "", [("f", '{"a": "x')])),
    "cut in a mark": ("So <tool_", {"cut": True}, ("", "So <tool_", [])),
}


@pytest.mark.parametrize("name", ANSWERS)
def test_an_answer_is_told_apart_however_it_is_cut(name: str) -> None:
    """Whole, character by character, and in pieces of any lengths."""
    text, how, expected = ANSWERS[name]
    assert _joined([text], **how) == expected
    assert _joined(list(text), **how) == expected

    @hypothesis.settings(max_examples=60, deadline=None, database=None, derandomize=True)
    @hypothesis.given(st.sets(st.integers(0, len(text))))
    def check(cuts: set[int]) -> None:
        places = [0, *sorted(cuts), len(text)]
        assert _joined([text[a:b] for a, b in pairwise(places)], **how) == expected

    check()


@hypothesis.settings(max_examples=200, deadline=None, database=None, derandomize=True)
@hypothesis.given(
    st.text("ab<>/ \n", max_size=12).filter(lambda text: "</think>" not in text),
    st.text("ab<>/ \ntool_call", max_size=12).filter(lambda text: "<tool_call>" not in text),
    st.lists(
        st.dictionaries(st.text(max_size=4), st.recursive(st.text(max_size=6), st.lists, max_leaves=3), max_size=2), max_size=2
    ),
    st.randoms(use_true_random=False),
)
def test_no_split_leaks_a_mark_or_loses_a_word(thought: str, content: str, arguments: list[Any], chance: Any) -> None:
    written = [json.dumps(one, ensure_ascii=chance.random() < 0.5) for one in arguments]
    text = thought + "</think>\n\n" + content + "".join("\n" + _call("f", one) for one in written)
    pieces = []
    while text:
        n = chance.randint(1, 9)
        pieces.append(text[:n])
        text = text[n:]
    reasoning, said, calls = _joined(pieces, thinks=True)
    assert reasoning == thought.strip()
    assert said == (content.strip() if written else content.lstrip())
    assert calls == [("f", one) for one in written]


def test_what_can_be_said_is_not_held_back() -> None:
    """Each piece of content and of arguments leaves with the text that completes it."""
    channels = Channels(thinks=False, calls=True)
    assert channels.push("Hello, <b").content == "Hello, <b"
    assert channels.push(" and <tool_").content == " and"
    assert channels.push("x").content == " <tool_x"
    assert not channels.push('<tool_call>\n{"name": "f", ')
    begun = channels.push('"arguments": {"a": ').calls
    assert [(call.number, call.name, call.arguments) for call in begun] == [(0, "f", '{"a": ')]
    assert channels.push('"b').calls == [Call(number=0, arguments='"b')]
    assert channels.push('"}}\n</tool').calls == [Call(number=0, arguments='"}')]
    assert not channels.push("_call>")


def test_a_message_is_what_openai_makes_of_an_answer() -> None:
    said = said_in("why</think>\n\n" + _call("f", '{"a": 1}'), thinks=True, calls=True, cut=False)
    message = as_message(said)
    (call,) = message.pop("tool_calls")
    assert message == {"role": "assistant", "content": None, "reasoning_content": "why"}
    assert call.pop("id").startswith("call_")
    assert call == {"type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}
    assert as_message(Said()) == {"role": "assistant", "content": ""}
