"""How many tokens are behind each piece of an answer, from what an endpoint says of it."""

from __future__ import annotations

import pytest
from hypothesis import given, strategies as st

from fastvl_lab.peer.counts import Piece, tokens_of
from fastvl_lab.request import UNNAMED


def _pieces(*texts: str, size: int = 1) -> list[Piece]:
    """Pieces of whose texts this side's tokenizer makes a token of every so many characters."""
    return [Piece(text=text, guess=tuple(map(ord, text[::size]))) for text in texts]


def _counts(pieces: list[Piece], total: int | None) -> list[int]:
    return [len(tokens) for tokens in tokens_of(pieces, total)]


@pytest.mark.parametrize(
    ("texts", "total", "counts"),
    [
        (["a", "b", "c"], 3, [1, 1, 1]),
        (["abc", "de"], 2, [1, 1]),  # the endpoint's tokens are longer than this side's
        (["", "a", "", "", "b"], 4, [0, 1, 1, 1, 1]),  # the first piece only says that it begins
        (["", "a", "", "b", ""], 3, [0, 1, 1, 1, 0]),  # and the last why it ends
        (["", "a", "", "b", ""], 4, [0, 1, 1, 1, 1]),  # or it is the token that ends the answer
        (["", "", "a", "b", ""], 3, [0, 1, 1, 1, 0]),  # a token before the first text, such as <think>
        (["", "", ""], 2, [0, 1, 1]),
        (["", "", ""], 9, [3, 3, 3]),
        (["abcd", "abcd", "abcd", ""], 12, [4, 4, 4, 0]),  # several tokens a piece
        (["abcd", "ab"], 9, [6, 3]),  # in proportion
        (["a", "b", "c", "d"], 2, [1, 0, 1, 0]),  # characters that are sent one by one
        (["ab", "", "c"], None, [2, 0, 1]),  # nobody says
        (["ab", "c"], 0, [2, 1]),
    ],
)
def test_counts_add_up_to_what_the_endpoint_says(texts: list[str], total: int | None, counts: list[int]) -> None:
    assert _counts(_pieces(*texts), total) == counts


def test_tokens_are_named_only_where_they_are_known() -> None:
    assert tokens_of(_pieces("ab", "", "c"), 3) == [(UNNAMED,), (UNNAMED,), (ord("c"),)]
    assert tokens_of(_pieces("a", "b"), 2) == [(ord("a"),), (ord("b"),)]


def test_ids_stand_as_they_were_sent() -> None:
    named = [Piece(text="a", tokens=(7, 8)), Piece(text="b", tokens=(9,))]
    for total in (3, None, 2, 5):
        assert tokens_of(named, total) == [(7, 8), (9,)]
    assert tokens_of([*named, *_pieces("cd")], 4) == [(7, 8), (9,), (UNNAMED,)]
    assert tokens_of([*named, *_pieces("cd")], 3) == [(7, 8), (9,), ()]
    assert tokens_of([*named, *_pieces("cd")], 2) == [(7, 8), (9,), (ord("c"), ord("d"))]


def test_what_had_been_counted_by_each_piece_decides() -> None:
    def pieces(*counted: int | None) -> list[Piece]:
        return [Piece(text="ab", guess=(1, 2), counted=count) for count in counted]

    assert _counts(pieces(0, 3, 4, 9), 9) == [0, 3, 1, 5]
    assert _counts(pieces(1, None, 3), 3) == [1, 1, 1]  # it does not say it of all
    assert _counts(pieces(0, 0, 0), 3) == [1, 1, 1]  # these are no counts
    assert _counts(pieces(3, 2, 3), 3) == [1, 1, 1]


@given(st.lists(st.sampled_from(["", "a", "bcd", "efghijk"]), min_size=1, max_size=12), st.integers(1, 60))
def test_no_token_is_lost_or_invented(texts: list[str], total: int) -> None:
    counts = _counts(_pieces(*texts), total)
    assert sum(counts) == total
    assert min(counts) >= 0
