"""A byte-level tokenizer with Qwen's special tokens, for checkpoints without a vocabulary of their own.

Its first 256 tokens are the 256 bytes, in the order in which byte-level BPE vocabularies such as Qwen's list them, so that their
ids are the real ones; it has no merges, so that every byte of text is one token.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import Qwen2Tokenizer
from transformers.convert_slow_tokenizer import bytes_to_unicode


def byte_vocabulary() -> dict[str, int]:
    """The 256 byte tokens and their ids, as byte-level BPE writes them."""
    return {character: token_id for token_id, character in enumerate(bytes_to_unicode().values())}


def printable_ids() -> tuple[int, ...]:
    """Ids of the byte tokens that are printable ASCII: each is a complete character."""
    characters = bytes_to_unicode()
    vocabulary = byte_vocabulary()
    return tuple(vocabulary[characters[byte]] for byte in range(0x20, 0x7F))


def write_byte_tokenizer(folder: Path, *, chat_template: str, special_tokens: Mapping[str, int], vocab_size: int) -> None:
    """Write tokenizer files and chat template into `folder`.

    special_tokens: token -> id, all at 256 or above. Ids up to `vocab_size` that no token owns decode to their number in brackets,
    so that a model with a large random vocabulary streams text for every token; encoding never yields them.
    """
    vocabulary = byte_vocabulary() | dict(special_tokens)
    taken = set(vocabulary.values())
    vocabulary |= {f"[{token_id}]": token_id for token_id in range(vocab_size) if token_id not in taken}
    settings: dict[str, Any] = {
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "extra_special_tokens": [token for token in special_tokens if token not in ("<|im_end|>", "<|endoftext|>")],
    }
    tokenizer = Qwen2Tokenizer(vocab=vocabulary, merges=[], **settings)
    tokenizer.chat_template = chat_template
    tokenizer.save_pretrained(folder)
