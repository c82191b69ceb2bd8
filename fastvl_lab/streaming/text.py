"""The text that tokens carry, as a consumer receives it: whole characters, each as soon as it is complete."""

from __future__ import annotations

import codecs
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from transformers.convert_slow_tokenizer import bytes_to_unicode

from fastvl_lab.errors import CheckpointError

Deliver = Callable[[str, tuple[int, ...]], None]


@dataclass(frozen=True, kw_only=True, eq=False)
class TokenBytes:
    """The bytes of every token of a byte-level BPE vocabulary; special tokens have none."""

    table: dict[int, bytes]

    @classmethod
    def of(cls, tokenizer: Any) -> TokenBytes:
        """Read a fast tokenizer; raises `CheckpointError` if its vocabulary is not byte-level."""
        if type(tokenizer.backend_tokenizer.decoder).__name__ != "ByteLevel":
            raise CheckpointError("the checkpoint's tokenizer is not byte-level BPE, as both Qwen-VL families' are")
        byte_of = {character: byte for byte, character in bytes_to_unicode().items()}
        special, added = set(tokenizer.all_special_ids), tokenizer.added_tokens_decoder
        table = {}
        for text, token in tokenizer.get_vocab().items():
            if token in special or (token in added and added[token].special):
                table[token] = b""
            elif token in added:
                table[token] = text.encode()
            else:
                table[token] = bytes(byte_of[character] for character in text)
        return cls(table=table)


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


class Emitter:
    """Hands each new piece of text to the consumer as soon as it is complete, with the tokens it took.

    A step whose token completes no character sends nothing; its token goes with the next piece. The last step always sends, so that
    the consumer learns of the end.
    """

    def __init__(self, token_bytes: TokenBytes, deliver: Deliver) -> None:
        self._detokenizer = Detokenizer(token_bytes)
        self._deliver = deliver
        self._held: list[int] = []

    def emit(self, tokens: Sequence[int], *, last: bool) -> None:
        """Take new tokens of the answer, all at once; last: whether no more will come."""
        self._held += tokens
        text = "".join(map(self._detokenizer.push, tokens))
        if last:
            text += self._detokenizer.flush()
        if text or last:
            held, self._held = tuple(self._held), []
            self._deliver(text, held)
