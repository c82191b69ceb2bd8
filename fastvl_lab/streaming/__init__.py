"""Slot 6: how decode steps are launched, and when their tokens leave."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch

from fastvl_lab.catalogue import Streaming
from fastvl_lab.streaming.answer import Answer, Steps, host_sync, on_device
from fastvl_lab.streaming.one_by_one import one_by_one
from fastvl_lab.streaming.rounds import CountingGate, CudaStream, PlayedStream, in_rounds

# Makes an answer whole by its steps, and sends it on its way.
Loop = Callable[[Steps, Answer], None]


def bind(slot: Streaming, device: torch.device) -> Loop:
    """How answers are made on a device, as the slot's toggles say."""
    assert isinstance(slot.steps_per_round, int)
    positions = {"on_device": on_device, "host_sync": host_sync}[slot.positions]
    new_gate = {"open": None, "round": CountingGate}[slot.gate]
    if slot.steps_per_round == 1 and new_gate is None:
        return partial(one_by_one, positions=positions)
    return partial(
        in_rounds,
        new_stream=CudaStream if device.type == "cuda" else PlayedStream,
        positions=positions,
        steps_per_round=slot.steps_per_round,
        new_gate=new_gate,
    )
