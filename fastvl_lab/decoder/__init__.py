"""Slot 3: the decoder's attention, for prefill and for one decode step, and the operations around it."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from fastvl_lab.catalogue import Attention
from fastvl_lab.decoder import eager, sdpa
from fastvl_lab.decoder.layers import Attend, Decoder
from fastvl_lab.decoder.operations import bind_operations
from fastvl_lab.decoder.weights import DecoderWeights, with_packed


def bind_decoder(slot: Attention, weights: DecoderWeights) -> Decoder:
    """The decoder as the slot's toggles say."""
    if {"plain": False, "packed": True}[slot.weights]:
        read = {"separate": ("q", "k", "v", "gate", "up"), "fused": ("qkv", "gate_up")}[slot.projections]
        weights = with_packed(weights, *read, "o", "down")
    prefill: dict[str, Callable[[], Attend]] = {option: partial(sdpa.bind_prefill, option) for option in sdpa.BACKENDS}
    prefill |= {
        "eager": lambda: eager.prefill,
        "varlen": _varlen,
        "triton": partial(_triton_prefill, weights),
    }
    decode: dict[str, Callable[[], Attend]] = {option: lambda: sdpa.decode for option in sdpa.BACKENDS}
    decode |= {
        "eager": lambda: eager.decode,
        "triton": _triton_decode,
    }
    return Decoder(
        weights=weights,
        operations=bind_operations(slot, weights),
        attend_prefill=prefill[slot.prefill](),
        attend_decode=decode[slot.decode](),
        prefill_kernel=sdpa.BACKENDS.get(slot.prefill),
        decode_kernel=sdpa.BACKENDS.get(slot.decode),
    )


def _varlen() -> Attend:
    from fastvl_lab.decoder.varlen import bind_prefill  # absent from torch on some platforms

    return bind_prefill()


def _triton_prefill(weights: DecoderWeights) -> Attend:
    from fastvl_lab.decoder.slotted import bind_prefill  # triton is loaded where it is asked for

    return bind_prefill(weights.embed.dtype, weights.n_heads // weights.n_kv_heads)


def _triton_decode() -> Attend:
    from fastvl_lab.decoder import slotted

    return slotted.decode
