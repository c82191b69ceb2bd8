"""Text that leaves token by token is the text of all tokens together."""

from __future__ import annotations

import pytest
from hypothesis import given, settings, strategies as st

from fastvl_lab import CheckpointError, Lab
from fastvl_lab.streaming.text import Detokenizer, Emitter, TokenBytes


@pytest.fixture(scope="module")
def tokenizer(labs: dict[str, Lab]):  # type: ignore[no-untyped-def]
    return labs["tiny-qwen2.5-vl"].checkpoint.tokenizer


def _stream(tokenizer, tokens: list[int]) -> tuple[list[str], list[tuple[int, ...]]]:  # type: ignore[no-untyped-def]
    texts, held = [], []
    emitter = Emitter(TokenBytes.of(tokenizer), lambda text, ids: (texts.append(text), held.append(ids))[0])
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
