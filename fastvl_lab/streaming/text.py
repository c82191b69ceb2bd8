"""The text that tokens carry, as a consumer receives it: whole characters, each as soon as it is complete."""

from __future__ import annotations

import codecs
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from transformers.convert_slow_tokenizer import bytes_to_unicode

from fastvl_lab.errors import CheckpointError
from fastvl_lab.request import TokenLogprob


class Deliver(Protocol):
    """Given new text, the tokens behind it, and their logprobs where the request asked for them."""

    def __call__(self, text: str, tokens: tuple[int, ...], logprobs: tuple[TokenLogprob, ...] = (), /) -> object: ...


@dataclass(frozen=True, kw_only=True, eq=False)
class TokenBytes:
    """The bytes of every token of a byte-level BPE vocabulary; special tokens have none, but names."""

    table: dict[int, bytes]
    names: dict[int, bytes]

    @classmethod
    def of(cls, tokenizer: Any) -> TokenBytes:
        """Read a fast tokenizer; raises `CheckpointError` if its vocabulary is not byte-level."""
        if type(tokenizer.backend_tokenizer.decoder).__name__ != "ByteLevel":
            raise CheckpointError("the checkpoint's tokenizer is not byte-level BPE, as both Qwen-VL families' are")
        byte_of = {character: byte for byte, character in bytes_to_unicode().items()}
        special, added = set(tokenizer.all_special_ids), tokenizer.added_tokens_decoder
        table, names = {}, {}
        for text, token in tokenizer.get_vocab().items():
            if token in special or (token in added and added[token].special):
                table[token], names[token] = b"", text.encode()
            elif token in added:
                table[token] = text.encode()
            else:
                table[token] = bytes(byte_of[character] for character in text)
        return cls(table=table, names=names)

    def spelt(self, token: int) -> bytes:
        """Its bytes, or a special token's name; none of an id without an entry."""
        return self.names.get(token) or self.table.get(token, b"")


class Detokenizer:
    """Tokens to text, one at a time: a character whose bytes are spread over tokens comes out whole, once it is complete."""

    def __init__(self, token_bytes: TokenBytes) -> None:
        self._table = token_bytes.table
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token: int) -> str:
        """The text that this token completes; "" while a character is unfinished. An id without an entry has no text."""
        return self._decoder.decode(self._table.get(token, b""))

    def flush(self) -> str:
        """What remains when no more tokens come: U+FFFD if a character stayed unfinished."""
        return self._decoder.decode(b"", final=True)


class AnswerText:
    """The text of an answer, a token at a time, up to the first of some stops; what may yet begin one is held back.

    The stop that is complete first ends the answer, the longest of those that end together: it does not matter how tokens cut the
    text. One that is complete within the first `min_tokens` ends nothing. found: whether one has.
    """

    def __init__(self, token_bytes: TokenBytes, stop: Sequence[str] = (), min_tokens: int = 0) -> None:
        self._detokenizer = Detokenizer(token_bytes)
        self.stops, self._left = stop, min_tokens
        self._held = ""
        self.found = False
        self.n_made = self.n_given = 0  # characters

    def push(self, token: int) -> str:
        """What can be sent now that the token is known."""
        piece = self._detokenizer.push(token)
        if not self.stops:
            return piece
        self._left -= 1
        self.n_made += len(piece)
        if self.found:
            return ""
        self._held += piece
        end = self._end_of_stop(len(piece)) if self._left < 0 else None
        self.found = end is not None
        return self._given(end if end is not None else len(self._held) - self._may_begin_stop())

    def flush(self) -> str:
        """What remains when no more tokens come."""
        if self.found:
            return ""
        self._held += self._detokenizer.flush()
        return self._given(len(self._held))

    def _given(self, n: int) -> str:
        given, self._held = self._held[:n], self._held[n:]
        self.n_given += n
        return given

    def _end_of_stop(self, n_new: int) -> int | None:
        """Where the text ends before a stop that the last n_new characters complete."""
        before = len(self._held) - n_new
        found = [(at + len(stop), at) for stop in self.stops if (at := self._held.find(stop, max(before - len(stop) + 1, 0))) >= 0]
        return min(found)[1] if found else None

    def _may_begin_stop(self) -> int:
        """How many of the last characters begin a stop, at most."""
        lengths = (n for stop in self.stops for n in range(1, len(stop)) if self._held.endswith(stop[:n]))
        return max(lengths, default=0)


class Emitter:
    """Hands each new piece of text to the consumer as soon as it is complete, with the tokens it took.

    A step whose token completes no character sends nothing; its token goes with the next piece, as does that of a text which may
    begin a stop. The last step always sends, so that the consumer learns of the end. text: new, and this one's own. logprob: of the
    answer's token of that number, where they are asked for; those of a stop are not sent.
    """

    def __init__(self, text: AnswerText, deliver: Deliver, logprob: Callable[[int], TokenLogprob] | None = None) -> None:
        self._text, self._deliver, self._logprob = text, deliver, logprob
        self._held: list[int] = []
        self._begins: list[int] = []  # of each of them, characters before it
        self._n_sent = 0  # tokens

    def emit(self, tokens: Sequence[int], *, last: bool) -> None:
        """Take new tokens of the answer, all at once; last: whether no more will come."""
        pieces = []
        for token in tokens:
            self._held.append(token)
            self._begins.append(self._text.n_made)
            pieces.append(self._text.push(token))
        if last:
            pieces.append(self._text.flush())
        if (text := "".join(pieces)) or last:
            self._send(text, last)

    def _send(self, text: str, last: bool) -> None:
        n = n_shown = len(self._held)
        if self._text.found or (self._text.stops and not last):
            n_shown = sum(begin < self._text.n_given for begin in self._begins)
            n = n if last else n_shown
        held, first = tuple(self._held[:n]), self._n_sent
        del self._held[:n], self._begins[:n]
        self._n_sent += n
        if self._logprob is None:
            self._deliver(text, held)
        else:
            self._deliver(text, held, tuple(map(self._logprob, range(first, first + n_shown))))
