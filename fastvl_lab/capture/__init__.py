"""Slot 5: how a stage is executed: launched from Python operation by operation, compiled, or replayed as a CUDA graph."""

from __future__ import annotations

import operator
from collections.abc import Callable
from functools import partial
from typing import cast

import torch

from fastvl_lab.capture.compiled import Compiled
from fastvl_lab.capture.execute import Capture, Eager, Execute, Program
from fastvl_lab.capture.graphs import Graphs, GraphStore
from fastvl_lab.capture.shapes import Size, keys_of_a_step, size_of, sizes_up_to
from fastvl_lab.capture.stages import (
    Encoder,
    Layers,
    Programs,
    SlotTable,
    blank_step,
    prompt_inputs,
    step_inputs,
    vit_inputs,
    with_rows,
)
from fastvl_lab.catalogue import Capture as Slot
from fastvl_lab.decoder.layers import Decoder, KvCache
from fastvl_lab.decoder.steps import Step, decode, prefill
from fastvl_lab.kernels.plain import power_of_two
from fastvl_lab.request import Pixels, Prompt, VisionTokens
from fastvl_lab.trace import Tracer

Encode = Callable[[Pixels, Tracer], VisionTokens]


class Stages:
    """The stages of one recipe, executed as the slot's toggles say.

    A stage that is eager, on shapes as they are, is the plain function over any tower and cache; else it is a program of
    `stages.py`, over the lean tower and a cache with slots, which the catalogue requires. layers, in_place: `Programs`. graphs:
    where CUDA graphs are kept, None without CUDA.
    """

    def __init__(
        self,
        slot: Slot,
        encode: Encode,
        decoder: Decoder,
        *,
        layers: Layers,
        in_place: bool,
        merge_size: int,
        graphs: GraphStore | None,
    ) -> None:
        self._encode, self._decoder, self._merge_size = encode, decoder, merge_size
        self._encoder = encoder = cast(Encoder, encode)
        self._size = size = size_of(slot.shapes)
        # Exact graphs of decode steps would be one a length: their keys are padded in any case.
        self._keys: Size | None = keys_of_a_step if size is None and slot.decode == "graph" else size
        padded = size is not None
        self._programs = programs = Programs(encoder=encoder, decoder=decoder, layers=layers, in_place=in_place)

        def execute(stage: str, option: str, program: Program, *, plain: bool, lent: int = 0) -> Execute | None:
            options: dict[str, Callable[[str, Program], Execute]] = {"eager": Eager, "compile": Compiled}
            if graphs is not None:
                implied = partial(operator.eq, "slot_of") if in_place else lambda name: False
                options["graph"] = partial(Graphs, store=graphs, constant=_is_of_a_plan, implied=implied, lent=lent)
            return None if plain and option == "eager" else options[option](stage, program)

        first_token = {"per_stage": "eager", "single_graph": "graph"}[slot.first_token]
        self._vit = execute("vit", slot.vit, programs.vit(), plain=not padded)
        self._prefill = execute("prefill", slot.prefill, programs.prefill(padded=padded), plain=not padded)
        padded_keys = self._keys is not None
        self._decode = execute("decode", slot.decode, programs.decode(padded=padded_keys), plain=not padded, lent=1)
        self._first_token = execute("first_token", first_token, programs.first_token(padded=padded), plain=True)
        self._executed = [x for x in (self._vit, self._prefill, self._decode, self._first_token) if x is not None]

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
        if self._vit is None:
            return self._encode(pixels, tracer)
        n_visual = len(pixels.patches) // self._merge_size**2
        inputs, rest = vit_inputs(self._encoder, pixels, self._merge_size, self._size, tracer)
        embeds, *deepstack = (part[:n_visual] for part in self._vit(inputs, rest, tracer))
        return VisionTokens(embeds=embeds, deepstack=tuple(deepstack))

    def prefill(
        self, hidden: torch.Tensor, prompt: Prompt, vision: VisionTokens | None, kv: KvCache, tracer: Tracer
    ) -> torch.Tensor:
        """The merged prompt to the logits of its last token, float32 [1, vocab]."""
        if self._prefill is None:
            return prefill(hidden, prompt, vision, self._decoder, kv, tracer.inner)
        n_visual = 0 if vision is None else self._padded(len(vision.embeds))
        inputs = prompt_inputs(prompt, {"hidden": hidden}, n_visual, cast(SlotTable, kv), self._size, tracer)
        for level, added in enumerate(() if vision is None else vision.deepstack):
            inputs[f"deepstack.{level}"] = with_rows(added, n_visual)
        return self._prefill(inputs, None, tracer)[0]

    def decode(self, token: torch.Tensor, position: torch.Tensor, kv: KvCache, tracer: Tracer) -> Step:
        """One more token, int64 [1] at position int64 [1]; a program chooses the next as well, a plain function does not."""
        if self._decode is None:
            return Step(decode(token, position, self._decoder, kv, tracer.inner))
        return Step(*self._decode(step_inputs(token, position, cast(SlotTable, kv), self._keys, tracer), None, tracer))

    def warm_up(self, session_len: int, tracer: Tracer, *, measures: bool) -> None:
        """A decode step at each number of keys that a request can come to, the most first, where no request is under way.

        So no answer stops in its middle to record a graph or, where `measures`, to measure a kernel's launch settings. Graphs of
        keys by the 64 can be more than the store may keep: then it is those of the fewest keys, for half of its places. Compiled
        code is for any number.
        """
        programs = self._programs
        if not programs.layers:  # keys and values are nowhere but with their request
            return

        def steps(execute: Execute, widths: list[int]) -> None:
            for width in reversed(widths):
                execute(blank_step(width, programs.layers, in_place=programs.in_place), None, tracer)

        n_slots = len(programs.layers[0][0])
        if measures:
            steps(Eager("decode", programs.decode(padded=True)), sizes_up_to(session_len, power_of_two, n_slots))
        if self._keys is not None and isinstance(self._decode, Graphs | Compiled):
            widths = sizes_up_to(session_len, self._keys, n_slots)
            steps(self._decode, widths[: self._decode.most // 2] if isinstance(self._decode, Graphs) else [widths[0], widths[-1]])

    def first_token(self, pixels: Pixels | None, prompt: Prompt, kv: KvCache, tracer: Tracer) -> tuple[torch.Tensor, torch.Tensor]:
        """Patches and prompt to the logits of its last token, float32 [1, vocab], and the likeliest next one, int64 [1]."""
        assert self._first_token is not None
        of_vit: dict[str, torch.Tensor] = {}
        rest, n_visual = None, 0
        if pixels is not None:
            of_vit, rest = vit_inputs(self._encoder, pixels, self._merge_size, self._size, tracer)
            n_visual = len(of_vit["patches"]) // self._merge_size**2
        inputs = prompt_inputs(prompt, {"input_ids": prompt.input_ids}, n_visual, cast(SlotTable, kv), self._size, tracer)
        inputs |= {f"vit.{name}": tensor for name, tensor in of_vit.items()}
        logits, token = self._first_token(inputs, rest, tracer)
        return logits, token

    def _padded(self, n: int) -> int:
        return n if self._size is None else self._size(n)


def _is_of_a_plan(name: str) -> bool:
    """Whether an input is of the vision tower's plan (`Encoder.inputs`), alone or as part of the first token's."""
    return name.startswith(("plan.", "vit.plan."))
