"""The stages as programs: tensors by name in, tensors out, over a checkpoint's weights and one store of keys and values.

A program may be run as it is, compiled, or recorded; padded rows in it are computed, seen by no token, and kept nowhere.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F

from fastvl_lab.capture.execute import Program, Tensors
from fastvl_lab.capture.shapes import Size
from fastvl_lab.decoder.fixed_kv import FixedKv
from fastvl_lab.decoder.layers import Decoder, KvCache
from fastvl_lab.decoder.steps import decode, merge, prefill, sample
from fastvl_lab.request import Pixels, Prompt, VisionTokens
from fastvl_lab.trace import COMPUTED, OF_PADDING, Inner, Tracer, no_inner

Layers = Sequence[tuple[torch.Tensor, torch.Tensor]]

Inputs = dict[str, torch.Tensor]


class Encoder(Protocol):
    """The lean vision tower, as `vit.bind` gives it."""

    def inputs(self, pixels: Pixels, tracer: Tracer, n_patches: int | None) -> tuple[Inputs, Hashable]:
        """The request's "patches" and its "plan.…", which never changes once it is made; and what else decides the program."""

    def forward(self, tensors: Tensors, rest: Any, inner: Inner) -> VisionTokens: ...


class SlotTable(KvCache, Protocol):
    """A KV cache with slots, as the cache slot gives it."""

    @property
    def layers(self) -> Layers: ...

    def table(self, width: int) -> tuple[torch.Tensor, torch.Tensor]: ...


@dataclass(frozen=True, kw_only=True, eq=False)
class Programs:
    """The programs of a recipe's stages.

    layers: the store of keys and values, [n_slots, n_kv_heads, D] each, a pair a layer. in_place: whether token i of a sequence is
    kept in slot i of it.
    """

    encoder: Encoder
    decoder: Decoder
    layers: Layers
    in_place: bool

    def vit(self) -> Program:
        """Patches and plan -> visual tokens, then DeepStack features."""
        encoder = self.encoder

        def vit(tensors: Tensors, rest: Any) -> tuple[torch.Tensor, ...]:
            return encoder.forward(tensors, rest, no_inner).parts

        return vit

    def prefill(self, *, padded: bool) -> Program:
        """Hidden states of a prompt -> logits of its last token."""
        decoder = self.decoder

        def prompt(tensors: Tensors, rest: Any) -> tuple[torch.Tensor, ...]:
            hidden = tensors["hidden"]
            deepstack = tuple(tensor for name, tensor in tensors.items() if name.startswith("deepstack."))
            vision = VisionTokens(embeds=hidden, deepstack=deepstack) if deepstack else None
            return (prefill(hidden, _prompt(tensors), vision, decoder, self._kv(tensors, len(hidden), padded), no_inner),)

        return prompt

    def decode(self, *, padded: bool) -> Program:
        """One token -> logits of the next, and the next."""
        decoder = self.decoder

        def step(tensors: Tensors, rest: Any) -> tuple[torch.Tensor, ...]:
            logits = decode(
                tensors["token"], tensors["position"], decoder, self._kv(tensors, len(tensors["token"]), padded), no_inner
            )
            return logits, sample(logits, decoder)

        return step

    def first_token(self, *, padded: bool) -> Program:
        """Patches, plan and prompt -> logits of the last token of the prompt, and the first of the answer."""
        encoder, decoder = self.encoder, self.decoder

        def first_token(tensors: Tensors, rest: Any) -> tuple[torch.Tensor, ...]:
            of_vit = {name.removeprefix("vit."): tensor for name, tensor in tensors.items() if name.startswith("vit.")}
            vision = encoder.forward(of_vit, rest, no_inner) if of_vit else None
            prompt = _prompt(tensors)
            hidden = merge(prompt, vision, decoder.weights.embed)
            logits = prefill(hidden, prompt, vision, decoder, self._kv(tensors, len(hidden), padded), no_inner)
            return logits, sample(logits, decoder)

        return first_token

    def _kv(self, tensors: Tensors, rows: int, padded: bool) -> FixedKv:
        return FixedKv(
            layers=self.layers,
            slot_of=tensors["slot_of"],
            lengths=tensors["lengths"],
            rows=rows,
            padded=padded,
            in_place=self.in_place,
        )


def _prompt(tensors: Tensors) -> Prompt:
    """A prompt of what a program has been given of it; it reads nothing else."""
    absent = tensors["positions"]
    return Prompt(
        input_ids=tensors.get("input_ids", absent),
        positions=tensors["positions"],
        visual_index=tensors.get("visual_index", absent),
        next_position=0,
        images=(),
    )


def vit_inputs(encoder: Encoder, pixels: Pixels, merge_size: int, size: Size | None, tracer: Tracer) -> tuple[Inputs, Hashable]:
    """What `Programs.vit` takes; where there is a size, patches are padded to that many visual tokens."""
    n, of_one = len(pixels.patches), merge_size**2
    n_patches = None if size is None else size(n // of_one) * of_one
    if n_patches is not None:
        _count_padding(tracer, "vit: patches", n_patches, n_patches - n)
    return encoder.inputs(pixels, tracer, n_patches)


def prompt_inputs(prompt: Prompt, rows_of: Tensors, n_visual: int, kv: SlotTable, size: Size | None, tracer: Tracer) -> Inputs:
    """What a program takes that brings a prompt into the cache.

    rows_of: tensors with a row a token, by name. n_visual: visual tokens, those of padding included. A padded prompt has at least
    one row of padding, the last, which is where visual tokens of padding go.
    """
    n, (before,) = prompt.n_tokens, kv.segments.before
    rows = n if size is None else min(size(n + 1), kv.layers[0][0].shape[0] - before)
    if size is not None:
        _count_padding(tracer, "prefill: tokens", rows, rows - n)
    slot_of, lengths = kv.table(before + rows)
    tensors = {name: with_rows(tensor, rows) for name, tensor in rows_of.items()}
    tensors |= {"positions": _padded(prompt.positions, rows), "slot_of": slot_of, "lengths": lengths}
    if n_visual > 0:
        tensors["visual_index"] = _padded(prompt.visual_index, n_visual, value=rows - 1)
    return tensors


def step_inputs(tokens: torch.Tensor, positions: torch.Tensor, kv: SlotTable, size: Size | None, tracer: Tracer) -> Inputs:
    """What `Programs.decode` takes; where there is a size, it reads that many keys, and sees those of each sequence."""
    lengths = kv.segments.lengths
    longest, n = max(lengths), len(lengths)
    width = longest if size is None else min(size(longest), kv.layers[0][0].shape[0])
    if size is not None:
        _count_padding(tracer, "decode: keys", n * width, n * width - sum(lengths))
    slot_of, device_lengths = kv.table(width)
    return {"token": tokens, "position": positions, "slot_of": slot_of, "lengths": device_lengths}


def blank_step(width: int, layers: Layers, *, in_place: bool) -> Inputs:
    """What `step_inputs` gives for so many keys, of no request: what it keeps, it keeps where no token of another is.

    Where slots are not the tokens' own places, all are the last, which is no sequence's.
    """
    keys, _ = layers[0]
    device, n_slots = keys.device, len(keys)
    slots = torch.arange(n_slots, device=device) if in_place else torch.full((n_slots,), n_slots - 1, device=device)
    token, position = torch.zeros(1, dtype=torch.int64, device=device), torch.full((1,), width - 1, device=device)
    lengths = torch.full((1,), width, dtype=torch.int32, device=device)
    return {"token": token, "position": position, "slot_of": slots[None, :width], "lengths": lengths}  # a view, as of a sequence


def _count_padding(tracer: Tracer, what: str, computed: int, padding: int) -> None:
    tracer.count(f"{what}{COMPUTED}", computed)
    tracer.count(f"{what}{OF_PADDING}", padding)


def with_rows(tensor: torch.Tensor, rows: int) -> torch.Tensor:
    """Rows of zeros at the end of [n, width] or [n]; the tensor itself if it has that many."""
    return tensor if len(tensor) == rows else F.pad(tensor, [0, 0] * (tensor.dim() - 1) + [0, rows - len(tensor)])


def _padded(tensor: torch.Tensor, n: int, value: int = 0) -> torch.Tensor:
    """More of a value at the end of the last dimension; the tensor itself if it is that long."""
    return tensor if tensor.shape[-1] == n else F.pad(tensor, (0, n - tensor.shape[-1]), value=value)
