"""The decoder's layers as one plain forward over packed tokens, for prefill and decode alike.

RMSNorm, grouped-query attention with M-RoPE, SwiGLU; whether q, k and v have biases, and heads norms, the weights say. What the
toggles of the attention slot choose comes in as `Operations`; what is kept between steps, as a `KvCache`. Shape letters: n new
tokens of all sequences, B sequences, H heads, D head_dim.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, TypeVar

import torch
from torch.nn.attention import SDPBackend

from fastvl_lab.decoder.segments import Segments
from fastvl_lab.decoder.weights import DecoderWeights, Layer, product
from fastvl_lab.kernels.backends import on_kernel
from fastvl_lab.trace import Inner


class Slots(NamedTuple):
    """A layer's keys and values where a kernel finds them.

    keys, values: [n_slots, n_kv_heads, D]. slot_of: int64 [B, longest], the slot of each token of each sequence. lengths: int32
    [B], tokens of each sequence, those of this forward included. written: int64 [n], the slots of this forward's tokens.
    """

    keys: torch.Tensor
    values: torch.Tensor
    slot_of: torch.Tensor
    lengths: torch.Tensor
    written: torch.Tensor


class KvCache(Protocol):
    """What a layer asks of the cache slot.

    segments: those of the forward that is under way. made: what attention has made of them for all layers, by the function that
    made it; empty when a forward begins. visible: bool [B, length], which of the keys that `read` gives are the sequence's, or None
    where all are.
    """

    @property
    def segments(self) -> Segments: ...

    @property
    def made(self) -> dict[Any, Any]: ...

    @property
    def visible(self) -> torch.Tensor | None: ...

    def write(self, layer: int, k: torch.Tensor, v: torch.Tensor) -> None:
        """Keep this forward's keys and values, [n, n_kv_heads, D] each."""

    def read(self, layer: int, sequence: int) -> tuple[torch.Tensor, torch.Tensor]:
        """All keys and values of a sequence so far, [length, n_kv_heads, D] each."""

    def slots(self, layer: int) -> Slots:
        """Where they lie, for kernels that write and read them in place; a cache without slots has no such thing."""

    def last(self, x: torch.Tensor) -> torch.Tensor:
        """The rows of x [n, ...] that are the sequences' last tokens, [B, ...]."""


T = TypeVar("T")


def once_a_forward(build: Callable[[Segments, torch.device], T]) -> Callable[[KvCache, torch.device], T]:
    """What `build` makes of a forward's segments, made in the first layer that asks and kept for the others."""

    def of(cache: KvCache, device: torch.device) -> T:
        if build not in cache.made:
            cache.made[build] = build(cache.segments, device)
        made: T = cache.made[build]
        return made

    return of


# (q [n, H, D], the cache, which layer) -> [n, H, D]. In prefill n rows are packed sequences; in decode each is a sequence of its
# own.
Attend = Callable[[torch.Tensor, KvCache, int], torch.Tensor]


@dataclass(frozen=True, kw_only=True, eq=False)
class Operations:
    """What the attention slot's toggles choose, but for attention itself.

    add_norm(hidden, added or None, weight) gives their sum, which may take the place of hidden, and its norm. qkv(x, layer) gives
    q, k, v, [n, heads, D] each. angles(positions [3, n] or [1, n]) gives what `rotate` needs of them. rotate(q, k, v, layer,
    angles, cache, index) normalises and rotates q and k, keeps k and v in the cache, and returns q. mlp(x, layer) gives what the
    layer adds. argmax(logits [vocab]) gives int64 [1]. last_token_alone: whether prefill's last layer computes the last token only.
    """

    add_norm: Callable[[torch.Tensor, torch.Tensor | None, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]
    qkv: Callable[[torch.Tensor, Layer], tuple[torch.Tensor, torch.Tensor, torch.Tensor]]
    angles: Callable[[torch.Tensor], Any]
    rotate: Callable[[torch.Tensor, torch.Tensor, torch.Tensor, Layer, Any, KvCache, int], torch.Tensor]
    mlp: Callable[[torch.Tensor, Layer], torch.Tensor]
    argmax: Callable[[torch.Tensor], torch.Tensor]
    last_token_alone: bool


@dataclass(frozen=True, kw_only=True, eq=False)
class Decoder:
    """A checkpoint's decoder, bound: its weights, the operations, and the attention of prefill and of decode.

    prefill_kernel, decode_kernel: on which of torch's kernels their scaled_dot_product_attention runs, where it has a choice.
    """

    weights: DecoderWeights
    operations: Operations
    attend_prefill: Attend
    attend_decode: Attend
    prefill_kernel: SDPBackend | None = None
    decode_kernel: SDPBackend | None = None


def run_layers(
    hidden: torch.Tensor,
    positions: torch.Tensor,
    decoder: Decoder,
    attend: Attend,
    cache: KvCache,
    inner: Inner,
    *,
    deepstack: Sequence[torch.Tensor] = (),
    visual_index: torch.Tensor | None = None,
) -> torch.Tensor:
    """All layers over new tokens: hidden [n, hidden] at positions [3, n]; returns the last token of each sequence, [B, hidden].

    deepstack: one [n_visual, hidden] per early layer, added after it at the rows of visual_index (arXiv 2406.04334). The result is
    before the final norm.
    """
    weights, operations, alone = decoder.weights, decoder.operations, False
    angles, added = operations.angles(positions), None
    for index, layer in enumerate(weights.layers):
        with inner(f"language.layer.{index}"):
            hidden, x = operations.add_norm(hidden, added, layer.norm1)
            q = operations.rotate(*operations.qkv(x, layer), layer, angles, cache, index)
            if operations.last_token_alone and index == len(weights.layers) - 1 and index >= len(deepstack):
                # Nothing reads the others' outputs any more; their keys and values are kept.
                q, hidden, alone = cache.last(q), cache.last(hidden), True
                with on_kernel(decoder.decode_kernel):
                    attended = decoder.attend_decode(q, cache, index)
            else:
                attended = attend(q, cache, index)
            # Of the two, the sum may take the place of what was made here: what the first layer is given is its caller's.
            hidden, x = operations.add_norm(product(attended.flatten(1), layer.o), hidden, layer.norm2)
            added = operations.mlp(x, layer)
        if index < len(deepstack):
            assert visual_index is not None
            hidden, added = hidden + added, None
            hidden.index_add_(0, visual_index, deepstack[index])
    hidden = hidden if added is None else hidden + added
    return hidden if alone else cache.last(hidden)


def logits_of(hidden: torch.Tensor, decoder: Decoder) -> torch.Tensor:
    """Final norm and LM head on [B, hidden], one row a sequence: float32 [B, vocab]."""
    _, x = decoder.operations.add_norm(hidden, None, decoder.weights.norm)
    return product(x, decoder.weights.lm_head).float()
