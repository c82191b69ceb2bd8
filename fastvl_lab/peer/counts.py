"""How many tokens are behind each piece of a streamed answer, of which an endpoint says the whole number, and sometimes more."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

from fastvl_lab.request import UNNAMED


@dataclass(frozen=True, kw_only=True)
class Piece:
    """A piece as it came: its text, the ids behind it where they were sent, and what the endpoint had counted by then, if it said.

    guess: the ids that this side's tokenizer makes of the text.
    """

    text: str
    tokens: tuple[int, ...] = ()
    guess: tuple[int, ...] = ()
    counted: int | None = None


def tokens_of(pieces: Sequence[Piece], total: int | None) -> list[tuple[int, ...]]:
    """The tokens of each piece, which are `total` together where that is known; `UNNAMED` where their ids are not.

    Ids that were sent stand as they are. For the others: what the endpoint had counted by each piece; else one token a piece, if
    there are enough of both; else in proportion to what this side's tokenizer makes of the texts. Without a total it is that.
    """
    others = [piece for piece in pieces if not piece.tokens]
    rest = None if total is None else total - sum(len(piece.tokens) for piece in pieces)
    if not total or rest is None or rest < 0 or not others:
        counts = [len(piece.guess) for piece in others]
    elif len(others) == len(pieces) and (steps := _steps(pieces, total)) is not None:
        counts = steps
    else:
        counts = _shared(others, rest)
    left = iter(counts)
    return [piece.tokens or _named(piece, next(left)) for piece in pieces]


def _named(piece: Piece, count: int) -> tuple[int, ...]:
    """The tokenizer's own ids where there are as many."""
    return piece.guess if len(piece.guess) == count else (UNNAMED,) * count


def _steps(pieces: Sequence[Piece], total: int) -> list[int] | None:
    """Counts from what the endpoint had counted by each piece; None where it did not say, or does not reach the total."""
    counted = [piece.counted for piece in pieces]
    reached = [count for count in counted if count is not None]
    if len(reached) < len(counted) or reached[-1] != total or reached != sorted(reached):
        return None
    return [later - earlier for earlier, later in pairwise((0, *reached))]


def _shared(pieces: Sequence[Piece], total: int) -> list[int]:
    """Counts of pieces whose ids nobody sent."""
    numbers = range(len(pieces))
    with_text = [n for n in numbers if pieces[n].text]
    spare = total - len(with_text)
    if 0 <= spare <= len(pieces) - len(with_text):
        ones = {*with_text, *_likely_blanks(pieces, with_text)[:spare]}
        return [int(n in ones) for n in numbers]
    weights = [max(len(piece.guess), 1) if piece.text or not with_text else 0 for piece in pieces]
    reached = [-(-total * weight // sum(weights)) for weight in accumulate(weights)]  # rounded up: the first text has a token
    return [later - earlier for earlier, later in pairwise((0, *reached))]


def _likely_blanks(pieces: Sequence[Piece], with_text: Sequence[int]) -> list[int]:
    """Pieces without text, those first that a token is most likely behind.

    Between two texts there is no other reason for one. The last may only say why the answer ended, and the first that it begins.
    """
    if not with_text:
        return [*range(1, len(pieces)), 0]
    first, last = with_text[0], with_text[-1]
    between = [n for n in range(first, last) if not pieces[n].text]
    return [*between, *range(1, first), *range(last + 1, len(pieces)), *range(min(first, 1))]
