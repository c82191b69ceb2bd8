"""Slot 5: how a stage is executed: launched from Python operation by operation, compiled, or replayed as a CUDA graph."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import product
from math import prod
from typing import Any, Protocol, cast

import torch

from fastvl_lab.capture.compiled import Compiled
from fastvl_lab.capture.execute import Capture, Eager, Execute, Program
from fastvl_lab.capture.graphs import Graphs, GraphStore
from fastvl_lab.capture.shapes import Size, keys_of_a_step, rows_of_a_step, size_of, sizes_up_to
from fastvl_lab.capture.stages import (
    Encoder,
    EncoderInParts,
    FirstTokenInputs,
    InParts,
    Kv,
    PrefillInputs,
    SlotTable,
    StepInputs,
    decode_program,
    first_token_program,
    prefill_program,
    vit_program,
    with_columns,
    with_rows,
)
from fastvl_lab.catalogue import Capture as Slot
from fastvl_lab.decoder.fixed_kv import KvTable
from fastvl_lab.decoder.layers import Decoder, KvCache
from fastvl_lab.decoder.steps import Step
from fastvl_lab.kernels.plain import power_of_two
from fastvl_lab.request import Pixels, Prompt, VisionTokens
from fastvl_lab.trace import COMPUTED, OF_PADDING, Tracer


class Slotted(Protocol):
    """The store that every request's keys and values are in."""

    @property
    def n_slots(self) -> int: ...

    def blank(self, width: int, rows: int = 1) -> KvTable:
        """For a step of so many keys and sequences that are no request's: it is kept where no token of a request is."""


class Stages:
    """The stages of one recipe, executed as the slot's toggles say.

    Stages that are padded, compiled or recorded need the lean tower and a cache with slots, which the catalogue requires. store:
    None where each request has tensors of its own. graphs: where CUDA graphs are kept, None without CUDA.
    """

    def __init__(
        self, slot: Slot, encoder: Encoder, decoder: Decoder, store: Slotted | None, *, merge_size: int, graphs: GraphStore | None
    ) -> None:
        self._encoder, self._decoder, self._store = encoder, decoder, store
        self._patches_of_one, self._n_slots = merge_size**2, store.n_slots if store is not None else 0
        self._size = size = size_of(slot.shapes)
        # Exact graphs of decode steps would be one a length: their keys are padded in any case.
        self._keys: Size | None = keys_of_a_step if size is None and slot.decode == "graph" else size
        # A stage that is eager, on shapes as they are, is over any cache; others find keys and values by tables.
        self._prefill_by_table = slot.prefill != "eager" or size is not None
        self._decode_by_table = slot.decode != "eager" or size is not None

        def execute(stage: str, option: str, program: Program, lent: int = 0) -> Execute:
            options: dict[str, Callable[[str, Program], Execute]] = {"eager": Eager, "compile": Compiled}
            if graphs is not None:
                options["graph"] = partial(Graphs, store=graphs, lent=lent)
            return options[option](stage, program)

        self._vit = execute("vit", slot.vit, vit_program(encoder))
        self._prefill = execute("prefill", slot.prefill, prefill_program(decoder))
        self._decode = execute("decode", slot.decode, decode_program(decoder, samples=self._decode_by_table), lent=1)
        self._executed = [self._vit, self._prefill, self._decode]
        self._first_token: Execute | None = None
        if {"per_stage": False, "single_graph": True}[slot.first_token]:
            self._first_token = execute("first_token", "graph", first_token_program(encoder, decoder))
            self._executed.append(self._first_token)

    @property
    def captures(self) -> tuple[Capture, ...]:
        """The programs that were made and are kept, and what each has cost."""
        return tuple(capture for execute in self._executed for capture in execute.captures)

    def take_fresh(self) -> tuple[Capture, ...]:
        """Those that were made since this was asked last."""
        fresh = tuple(capture for execute in self._executed for capture in execute.fresh)
        for execute in self._executed:
            execute.fresh.clear()
        return fresh

    @property
    def first_token_alone(self) -> bool:
        """Whether all from patches to the first token is one program, `first_token`."""
        return self._first_token is not None

    def encode(self, pixels: Pixels, tracer: Tracer) -> VisionTokens:
        """Patches to visual tokens."""
        inputs, _ = self._vit_inputs(pixels, tracer)
        n_visual = len(pixels.patches) // self._patches_of_one
        embeds, *deepstack = (part[:n_visual] for part in self._vit(inputs, tracer))
        return VisionTokens(embeds=embeds, deepstack=tuple(deepstack))

    def encode_in_parts(self, pixels: Pixels, tracer: Tracer) -> InParts:
        """Patches to visual tokens, some blocks at a time; of an eager tower on shapes as they are."""
        assert self._size is None
        assert isinstance(self._vit, Eager)
        return cast(EncoderInParts, self._encoder).in_parts(self._encoder.inputs(pixels, tracer, None))

    def prefill(
        self, hidden: torch.Tensor, prompt: Prompt, vision: VisionTokens | None, kv: KvCache, tracer: Tracer
    ) -> torch.Tensor:
        """The merged prompt to the logits of its last token, float32 [1, vocab]; an eager one may be several, packed."""
        n_visual = 0 if vision is None else self._padded(len(vision.embeds))
        rows, table = prompt.n_tokens, cast(Kv, kv)
        if self._prefill_by_table:
            rows, table = self._table_of_prompt(prompt, kv, tracer)
        inputs = PrefillInputs(
            hidden=with_rows(hidden, rows),
            positions=with_columns(prompt.positions, rows),
            kv=table,
            visual_index=_visual_index(prompt, n_visual, rows),
            deepstack=() if vision is None else tuple(with_rows(added, n_visual) for added in vision.deepstack),
        )
        return self._prefill(inputs, tracer)[0]

    def decode(self, tokens: torch.Tensor, positions: torch.Tensor, kv: KvCache, tracer: Tracer) -> Step:
        """One more token of each sequence, int64 [B] at positions int64 [B]."""
        if not self._decode_by_table:
            return Step(*self._decode(StepInputs(token=tokens, position=positions, kv=cast(Kv, kv)), tracer))
        n = len(tokens)
        rows = rows_of_a_step(n) if isinstance(self._decode, Graphs) else n
        table = self._table_of_step(kv, rows, tracer)
        inputs = StepInputs(token=with_rows(tokens, rows), position=with_rows(positions, rows), kv=table)
        return Step(*(output[:n] for output in self._decode(inputs, tracer)))

    def first_token(self, pixels: Pixels | None, prompt: Prompt, kv: KvCache, tracer: Tracer) -> tuple[torch.Tensor, torch.Tensor]:
        """Patches and prompt to the logits of its last token, float32 [1, vocab], and the likeliest next one, int64 [1]."""
        assert self._first_token is not None
        vit, n_visual = (None, 0) if pixels is None else self._vit_inputs(pixels, tracer)
        rows, table = self._table_of_prompt(prompt, kv, tracer)
        inputs = FirstTokenInputs(
            input_ids=with_rows(prompt.input_ids, rows),
            positions=with_columns(prompt.positions, rows),
            kv=table,
            visual_index=_visual_index(prompt, n_visual, rows),
            vit=vit,
        )
        logits, token = self._first_token(inputs, tracer)
        return logits, token

    def warm_up(self, session_len: int, at_once: int, tracer: Tracer, *, measures: bool) -> None:
        """A decode step at each number of keys that a request can come to, the most first, where no request is under way.

        at_once: how many requests may share a step; one is recorded for each number of them, too. So no answer stops in its middle
        to record a graph or, where `measures`, to measure a kernel's launch settings. Graphs can be more than the store may keep:
        then it is those of the fewest keys, of all sequences together, for half of its places. Compiled code is for any number.
        """
        store = self._store
        if store is None:  # keys and values are nowhere but with their request
            return

        def steps(execute: Execute, sizes: list[tuple[int, int]]) -> None:
            for rows, width in reversed(sizes):
                table = store.blank(width, rows)
                token, position = (torch.full((rows,), x, device=table.slot_of.device) for x in (0, width - 1))
                execute(StepInputs(token=token, position=position, kv=table), tracer)

        if measures:
            eager = Eager("decode", decode_program(self._decoder, samples=True))
            steps(eager, [(1, width) for width in sizes_up_to(session_len, power_of_two, self._n_slots)])
        if self._keys is None:
            return
        widths = sizes_up_to(session_len, self._keys, self._n_slots)
        if isinstance(self._decode, Graphs):
            all_rows = sizes_up_to(at_once, rows_of_a_step, rows_of_a_step(at_once))
            sizes = sorted(product(all_rows, widths), key=prod)
            steps(self._decode, sizes[: self._decode.most // 2])
        elif isinstance(self._decode, Compiled):
            steps(self._decode, [(1, widths[0]), (1, widths[-1])])

    def _vit_inputs(self, pixels: Pixels, tracer: Tracer) -> tuple[Any, int]:
        """What the tower takes, padded to a size of visual tokens, and how many these are."""
        n = len(pixels.patches)
        n_visual = self._padded(n // self._patches_of_one)
        n_patches = n_visual * self._patches_of_one if self._size is not None else None
        if n_patches is not None:
            _count_padding(tracer, "vit: patches", n_patches, n_patches - n)
        return self._encoder.inputs(pixels, tracer, n_patches), n_visual

    def _table_of_prompt(self, prompt: Prompt, kv: KvCache, tracer: Tracer) -> tuple[int, KvTable]:
        """How many rows a program computes for a prompt, and where it keeps them.

        A padded prompt has at least one row of padding, the last, which is where visual tokens of padding go.
        """
        n, (before,), size = prompt.n_tokens, kv.segments.before, self._size
        rows = n if size is None else min(size(n + 1), self._n_slots - before)
        if size is not None:
            _count_padding(tracer, "prefill: tokens", rows, rows - n)
        return rows, cast(SlotTable, kv).table(before + rows, padded=size is not None)

    def _table_of_step(self, kv: KvCache, rows: int, tracer: Tracer) -> KvTable:
        """Where a step's keys are: of as many rows, as many of each sequence as the longest has, or a size more."""
        lengths, size = kv.segments.lengths, self._keys
        n, longest = len(lengths), max(lengths)
        width = longest if size is None else min(size(longest), self._n_slots)
        if size is not None:
            _count_padding(tracer, "decode: keys", rows * width, rows * width - sum(lengths))
        return cast(SlotTable, kv).table(width, padded=size is not None or n > 1, more=rows - n)

    def _padded(self, n: int) -> int:
        return n if self._size is None else self._size(n)


def _visual_index(prompt: Prompt, n_visual: int, rows: int) -> torch.Tensor | None:
    return with_columns(prompt.visual_index, n_visual, value=rows - 1) if n_visual > 0 else None


def _count_padding(tracer: Tracer, what: str, computed: int, padding: int) -> None:
    tracer.count(f"{what}{COMPUTED}", computed)
    tracer.count(f"{what}{OF_PADDING}", padding)
