"""Ways to do the decoder's operations around attention: projections, norms, rotation, activation, argmax.

Each is plain PyTorch, or a Triton kernel that is imported where it is chosen.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from fastvl_lab.catalogue import Attention
from fastvl_lab.decoder.layers import KvCache, Operations
from fastvl_lab.decoder.weights import DecoderWeights, Layer, product
from fastvl_lab.kernels.choices import SiluMul, add_rms_norm, after_add, native_rms_norm, silu_mul
from fastvl_lab.kernels.plain import rms_norm, rms_norm_by_length, rotate_half

Norm = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
Qkv = Callable[[torch.Tensor, Layer], tuple[torch.Tensor, torch.Tensor, torch.Tensor]]
Rotate = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, Layer, Any, KvCache, int], torch.Tensor]


def bind_operations(slot: Attention, weights: DecoderWeights) -> Operations:
    """The operations by the values of the slot's toggles."""
    eps, device = weights.eps, weights.norm.device
    native, eps_there = partial(native_rms_norm, eps=eps), torch.full((1,), eps, dtype=torch.float32, device=device)
    norms: dict[str, Norm] = {
        "eager": partial(rms_norm, eps=eps),
        "native": native,
        "by_length": partial(rms_norm_by_length, eps=eps_there),
        "fused": native,  # of heads
    }
    norm = norms[slot.norms]
    add_norm = partial(add_rms_norm("fused"), eps=eps) if slot.norms == "fused" else after_add(norm)
    angles, rotate = {"eager": _eager_rope, "rolled": _rolled_rope, "fused": _fused_rope}[slot.rope](weights, norm)
    qkv = {"separate": _separate_qkv, "fused": _fused_qkv}[slot.projections](weights)
    mlp = {"separate": _separate_mlp, "fused": _fused_mlp}[slot.projections]
    return Operations(
        add_norm=add_norm,
        qkv=qkv,
        angles=angles,
        rotate=rotate,
        mlp=partial(mlp, silu_mul(slot.activation)),
        argmax={"eager": lambda: _argmax, "fused": _fused_argmax}[slot.argmax](),
        last_token_alone={"all_tokens": False, "last_token": True}[slot.last_layer],
    )


def _separate_qkv(weights: DecoderWeights) -> Qkv:
    """Three products."""

    def qkv(x: torch.Tensor, layer: Layer) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        q, k, v = (product(x, linear).view(len(x), -1, weights.head_dim) for linear in (layer.q, layer.k, layer.v))
        return q, k, v

    return qkv


def _fused_qkv(weights: DecoderWeights) -> Qkv:
    """One product; q, k and v are strided views of its result."""
    heads = (weights.n_heads, weights.n_kv_heads, weights.n_kv_heads)

    def qkv(x: torch.Tensor, layer: Layer) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        q, k, v = product(x, layer.qkv).view(len(x), -1, weights.head_dim).split(heads, dim=1)
        return q, k, v

    return qkv


def _separate_mlp(silu_mul: SiluMul, x: torch.Tensor, layer: Layer) -> torch.Tensor:
    return product(silu_mul(product(x, layer.gate), product(x, layer.up)), layer.down)


def _fused_mlp(silu_mul: SiluMul, x: torch.Tensor, layer: Layer) -> torch.Tensor:
    return product(silu_mul(*product(x, layer.gate_up).chunk(2, dim=-1)), layer.down)


def _normalised(q: torch.Tensor, k: torch.Tensor, layer: Layer, norm: Norm) -> tuple[torch.Tensor, torch.Tensor]:
    """With the norm of each head, where the family has one."""
    if layer.q_norm is None or layer.k_norm is None:
        return q, k
    return norm(q, layer.q_norm), norm(k, layer.k_norm)


def _eager_rope(weights: DecoderWeights, norm: Norm) -> tuple[Callable[[torch.Tensor], Any], Rotate]:
    """As published: angles of all three axes, then q and k one after the other, in the model's dtype."""

    def angles(positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        cos, sin = weights.rope.cos_sin(positions.expand(3, -1), weights.embed.dtype)
        return cos[:, None], sin[:, None]  # [n, 1, D]

    def rotate(
        q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, layer: Layer, angles: Any, cache: KvCache, index: int
    ) -> torch.Tensor:
        cos, sin = angles
        q, k = (x * cos + rotate_half(x) * sin for x in _normalised(q, k, layer, norm))
        cache.write(index, k, v)
        return q

    return angles, rotate


def _rolled_rope(weights: DecoderWeights, norm: Norm) -> tuple[Callable[[torch.Tensor], Any], Rotate]:
    """In float32; a head rolled by half its width meets sines of which the first half is negative."""
    half = weights.head_dim // 2

    def angles(positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        cos, sin = weights.rope.halves(positions)
        return torch.cat([cos, cos], dim=-1)[:, None], torch.cat([-sin, sin], dim=-1)[:, None]  # [n, 1, D]

    def rotated(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        wide = x.float()
        return torch.mul(wide, cos).addcmul_(wide.roll(half, -1), sin).to(x.dtype)

    def rotate(
        q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, layer: Layer, angles: Any, cache: KvCache, index: int
    ) -> torch.Tensor:
        q, k = _normalised(q, k, layer, norm)
        cache.write(index, rotated(k, *angles), v)
        return rotated(q, *angles)

    return angles, rotate


def _fused_rope(weights: DecoderWeights, norm: Norm) -> tuple[Callable[[torch.Tensor], Any], Rotate]:
    """Norm of heads, rotation and the write into the cache in one kernel."""
    from fastvl_lab.kernels.rotate_and_keep import rotate_and_keep

    def rotate(
        q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, layer: Layer, angles: Any, cache: KvCache, index: int
    ) -> torch.Tensor:
        keys, values, _, _, written = cache.slots(index)
        cos, sin = angles
        return rotate_and_keep(q, k, v, cos, sin, layer.q_norm, layer.k_norm, weights.eps, keys, values, written)

    return weights.rope.halves, rotate


def _argmax(logits: torch.Tensor) -> torch.Tensor:
    return logits.argmax(keepdim=True)


def _fused_argmax() -> Callable[[torch.Tensor], torch.Tensor]:
    from fastvl_lab.kernels.argmax import argmax

    return argmax
