"""The stages as programs: inputs in, tensors out, over a checkpoint's weights.

A program may be run as it is, compiled, or recorded; padded rows in it are computed, seen by no token, and kept nowhere.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F

from fastvl_lab.capture.execute import Program
from fastvl_lab.decoder.fixed_kv import KvTable
from fastvl_lab.decoder.layers import Decoder, KvCache
from fastvl_lab.decoder.steps import decode, merge, prefill, sample
from fastvl_lab.inputs import tensors
from fastvl_lab.request import Pixels, VisionTokens
from fastvl_lab.trace import Inner, Tracer, no_inner


class Encoder(Protocol):
    """A vision tower, as `vit.bind` gives it."""

    def inputs(self, pixels: Pixels, tracer: Tracer, n_patches: int | None) -> Any:
        """What `forward` takes: the request's patches, padded to so many, and what follows from its grids."""

    def forward(self, inputs: Any, inner: Inner) -> VisionTokens: ...


class InParts(Protocol):
    """A forward of the tower that stops between blocks; n_left: blocks that are still to come, of n_blocks."""

    @property
    def n_blocks(self) -> int: ...

    @property
    def n_left(self) -> int: ...

    def go_on(self, n: int, inner: Inner) -> VisionTokens | None:
        """Through the next n blocks; with the last of them come the visual tokens."""


class EncoderInParts(Encoder, Protocol):
    """The lean tower, which alone can be stopped."""

    def in_parts(self, inputs: Any) -> InParts: ...


class Kv(Protocol):
    """Where a forward's keys and values are: a `KvTable`, or a cache itself."""

    def open(self, rows: int) -> KvCache: ...


class SlotTable(KvCache, Protocol):
    """A KV cache with slots, as the cache slot gives it."""

    def table(self, width: int, *, padded: bool, more: int = 0) -> KvTable: ...


@dataclass(frozen=True, kw_only=True, eq=False)
class PrefillInputs:
    """A merged prompt, with a row of hidden and deepstack's a token; its fields as those of `Prompt` and `VisionTokens`."""

    hidden: torch.Tensor = tensors(dim=0)
    positions: torch.Tensor = tensors(dim=1)
    kv: Kv = tensors()
    visual_index: torch.Tensor | None = tensors(dim=0)
    deepstack: tuple[torch.Tensor, ...] = tensors(dim=0)


@dataclass(frozen=True, kw_only=True, eq=False)
class StepInputs:
    """A token of each sequence, int64 [B], at its position, int64 [B]."""

    token: torch.Tensor = tensors()
    position: torch.Tensor = tensors()
    kv: Kv = tensors()


@dataclass(frozen=True, kw_only=True, eq=False)
class FirstTokenInputs:
    """A prompt as its ids, and what the vision tower takes."""

    input_ids: torch.Tensor = tensors(dim=0)
    positions: torch.Tensor = tensors(dim=1)
    kv: Kv = tensors()
    visual_index: torch.Tensor | None = tensors(dim=0)
    vit: Any = tensors()


def vit_program(encoder: Encoder) -> Program:
    """The tower's inputs -> visual tokens, then DeepStack features."""

    def vit(inputs: Any, inner: Inner = no_inner) -> tuple[torch.Tensor, ...]:
        return encoder.forward(inputs, inner).parts

    return vit


def prefill_program(decoder: Decoder) -> Program:
    """`PrefillInputs` -> logits of the last token of each prompt."""

    def prompt(inputs: PrefillInputs, inner: Inner = no_inner) -> tuple[torch.Tensor, ...]:
        hidden = inputs.hidden
        vision = VisionTokens(embeds=hidden, deepstack=inputs.deepstack) if inputs.deepstack else None
        return (prefill(hidden, inputs, vision, decoder, inputs.kv.open(len(hidden)), inner),)

    return prompt


def decode_program(decoder: Decoder, *, samples: bool) -> Program:
    """`StepInputs` -> logits of the next token of each sequence, and where it `samples` those tokens."""

    def step(inputs: StepInputs, inner: Inner = no_inner) -> tuple[torch.Tensor, ...]:
        logits = decode(inputs.token, inputs.position, decoder, inputs.kv.open(len(inputs.token)), inner)
        return (logits, sample(logits, decoder)) if samples else (logits,)

    return step


def first_token_program(encoder: Encoder, decoder: Decoder) -> Program:
    """`FirstTokenInputs` -> logits of the last token of the prompt, and the first of the answer."""

    def first_token(inputs: FirstTokenInputs, inner: Inner = no_inner) -> tuple[torch.Tensor, ...]:
        vision = None if inputs.vit is None else encoder.forward(inputs.vit, inner)
        hidden = merge(inputs, vision, decoder.weights.embed)
        logits = prefill(hidden, inputs, vision, decoder, inputs.kv.open(len(hidden)), inner)
        return logits, sample(logits, decoder)

    return first_token


def with_rows(tensor: torch.Tensor, rows: int) -> torch.Tensor:
    """Rows of zeros at the end of [n, width] or [n]; the tensor itself if it has that many."""
    return tensor if len(tensor) == rows else F.pad(tensor, [0, 0] * (tensor.dim() - 1) + [0, rows - len(tensor)])


def with_columns(tensor: torch.Tensor, n: int, value: int = 0) -> torch.Tensor:
    """More of a value at the end of the last dimension; the tensor itself if it is that long."""
    return tensor if tensor.shape[-1] == n else F.pad(tensor, (0, n - tensor.shape[-1]), value=value)
