"""Text that leaves token by token is the text of all tokens together."""

from __future__ import annotations

import random
from collections.abc import Sequence
from functools import partial
from typing import Any

import pytest
from hypothesis import given, settings, strategies as st

from fastvl_lab import CheckpointError, Lab
from fastvl_lab.streaming.text import AnswerText, Detokenizer, Emitter, TokenBytes


@pytest.fixture(scope="module")
def tokenizer(labs: dict[str, Lab]):  # type: ignore[no-untyped-def]
    return labs["tiny-qwen2.5-vl"].checkpoint.tokenizer


def _stream(tokenizer, tokens: list[int]) -> tuple[list[str], list[tuple[int, ...]]]:  # type: ignore[no-untyped-def]
    texts, held = [], []
    emitter = Emitter(AnswerText(TokenBytes.of(tokenizer)), lambda text, ids: (texts.append(text), held.append(ids))[0])
    for number, token in enumerate(tokens, start=1):
        emitter.emit((token,), last=number == len(tokens))
    return texts, held


@settings(max_examples=300, deadline=None)
@given(tokens=st.lists(st.integers(0, 263), min_size=1, max_size=60))
def test_pieces_add_up_to_what_the_tokenizer_decodes(tokenizer, tokens: list[int]) -> None:  # type: ignore[no-untyped-def]
    """Random bytes, whole and broken characters, special tokens between them."""
    texts, held = _stream(tokenizer, tokens)
    assert "".join(texts) == tokenizer.decode(tokens, skip_special_tokens=True)
    assert [token for ids in held for token in ids] == tokens


@pytest.mark.parametrize("text", ["naïve", "你好, 世界", "👩‍🚀 to 🌍", "e\u0301"])
def test_a_character_spread_over_tokens_comes_out_whole(tokenizer, text: str) -> None:  # type: ignore[no-untyped-def]
    tokens = tokenizer(text).input_ids
    texts, held = _stream(tokenizer, tokens)
    assert "\ufffd" not in "".join(texts)
    assert "".join(texts) == tokenizer.decode(tokens)
    assert all(len(piece) == 1 for piece in texts)  # the byte tokenizer completes one character a piece
    assert [len(ids) for ids in held] == [len(piece.encode()) for piece in texts]


def test_an_unfinished_character_is_held_until_the_end_and_then_shown_as_missing(tokenizer) -> None:  # type: ignore[no-untyped-def]
    tokens = tokenizer("a🌍").input_ids[:-1]
    texts, held = _stream(tokenizer, tokens)
    assert texts == ["a", "\ufffd"]
    assert held == [(tokens[0],), tuple(tokens[1:])]


def test_the_last_step_always_sends(tokenizer) -> None:  # type: ignore[no-untyped-def]
    texts, held = _stream(tokenizer, [tokenizer.eos_token_id])
    assert texts == [""]
    assert held == [(tokenizer.eos_token_id,)]


def test_ids_without_an_entry_have_no_text(tokenizer) -> None:  # type: ignore[no-untyped-def]
    assert Detokenizer(TokenBytes.of(tokenizer)).push(10**6) == ""


def test_a_vocabulary_that_is_not_byte_level_is_refused() -> None:
    class Metaspace:
        pass

    class Backend:
        decoder = Metaspace()

    class Other:
        backend_tokenizer = Backend()

    with pytest.raises(CheckpointError, match="not byte-level"):
        TokenBytes.of(Other())


def _until(text: str, stops: Sequence[str]) -> str:
    """The text before the stop that is complete first, the longest of those that end there."""
    for end in range(len(text) + 1):
        if ending := [stop for stop in stops if text[:end].endswith(stop)]:
            return text[: end - len(max(ending, key=len))]
    return text


def _kept(sent: list[Any], text: str, tokens: tuple[int, ...], logprobs: tuple[int, ...]) -> None:
    sent.append((text, tokens, logprobs))


def test_nothing_of_a_stop_is_sent_however_tokens_cut_it() -> None:
    """500 texts of few letters, cut at random bytes, with stops of the same letters: what has left is never to be taken back."""
    drawn, n_stopped = random.Random(0), 0
    for _ in range(500):
        text = "".join(drawn.choices("ab#é🌍", k=drawn.randint(1, 40)))
        stops = ["".join(drawn.choices("ab#é🌍", k=drawn.randint(1, 6))) for _ in range(drawn.randint(1, 4))]
        n_bytes = len(text.encode())
        cuts = sorted(drawn.sample(range(n_bytes + 1), drawn.randint(0, min(12, n_bytes))))
        pieces = [text.encode()[a:b] for a, b in zip([0, *cuts], [*cuts, None], strict=True)]
        table, expected = TokenBytes(table=dict(enumerate(pieces)), names={}), _until(text, stops)
        sent: list[tuple[str, tuple[int, ...], tuple[int, ...]]] = []
        emitter = Emitter(AnswerText(table, stops), partial(_kept, sent), lambda number: number)  # type: ignore[arg-type,return-value]
        told, held, token = AnswerText(table, stops), list[int](), -1
        while not (told.found or token == len(pieces) - 1):
            token += 1
            told.push(token)
            held.append(token)
            last = told.found or token == len(pieces) - 1
            if last or drawn.random() < 0.7:  # a gate lets several go at once
                emitter.emit(held, last=last)
                held = []
            assert expected.startswith("".join(one for one, _, _ in sent)), (text, stops, pieces)
        assert "".join(one for one, _, _ in sent) == expected
        assert told.found == (expected != text)
        n_stopped += told.found
        ids = [one for _, tokens, _ in sent for one in tokens]
        assert ids == list(range(token + 1)), "every token is told of, once"
        begins = [len(b"".join(pieces[:n]).decode(errors="ignore")) for n in ids]
        shown = [one for _, _, logprobs in sent for one in logprobs]
        assert shown == ([n for n in ids if begins[n] < len(expected)] if told.found else ids), "a stop's have no logprobs"
    assert 100 < n_stopped < 450


def test_text_that_begins_no_stop_leaves_at_once() -> None:
    table = TokenBytes(table=dict(enumerate([b"ab", b"\n", b"c", b"\n", b"\n", b"x"])), names={})
    answer = AnswerText(table, ["\n\n"])
    assert [answer.push(token) for token in range(6)] == ["ab", "", "\nc", "", "", ""]
    assert (answer.found, answer.flush()) == (True, "")
    free = AnswerText(table, ["\n\n"], min_tokens=5)
    assert "".join(map(free.push, range(6))) + free.flush() == "ab\nc\n\nx"
