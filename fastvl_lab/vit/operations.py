"""Ways to do the tower's matrix products and the small operations between them: norms, rotation, activation, interpolation.

Each is plain PyTorch, or a Triton kernel that is imported where it is chosen. Shape letters: N patches, H heads, D head_dim.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from fastvl_lab.checkpoint.packed import PackedWeights
from fastvl_lab.families.vision import Function, Interpolate, TowerOperations, TowerRotate
from fastvl_lab.kernels import choices
from fastvl_lab.kernels.packed import packed_linear
from fastvl_lab.kernels.plain import interpolate, rotate_half
from fastvl_lab.vit.padding import itself


def bind_operations(
    packed: PackedWeights, *, weights: str, norms: str, rope: str, activation: str, interpolation: str
) -> TowerOperations:
    """The operations by the values of the slot's toggles; packed: where packed weights are kept."""
    linears: dict[str, Callable[[Any], Function]] = {"plain": itself, "packed": partial(_packed, packed)}
    add_rms_norm, add_layer_norm = choices.add_rms_norm(norms), choices.add_layer_norm(norms)
    return TowerOperations(
        linear=linears[weights],
        rms_norm=lambda weight, eps: lambda hidden, added: add_rms_norm(hidden, added, weight, eps),
        layer_norm=lambda weight, bias, eps: lambda hidden, added: add_layer_norm(hidden, added, weight, bias, eps),
        rotate={"eager": lambda: _rotate, "halves": lambda: _rotate_halves, "fused": _fused_rotate}[rope](),
        silu_mul=choices.silu_mul(activation),
        interpolate={"eager": lambda: interpolate, "fused": _fused_interpolate}[interpolation](),
    )


def _packed(kept: PackedWeights, module: Any) -> Function:
    return partial(packed_linear, packed=kept.of(module.weight), weight=module.weight, bias=module.bias)


def _rotate(
    qkv: torch.Tensor, n_heads: int, cos: torch.Tensor, sin: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """As published: q and k one after the other, each with its rotated half put together again, in float32."""
    q, k, v = qkv.view(qkv.shape[0], 3, n_heads, -1).unbind(1)  # [N, H, D]
    cos, sin = (torch.cat([x, x], dim=-1)[:, None] for x in (cos, sin))  # [N, 1, D]
    q, k = ((x.float() * cos + rotate_half(x.float()) * sin).to(v.dtype) for x in (q, k))
    return q.transpose(0, 1), k.transpose(0, 1), v.transpose(0, 1)


def _rotate_halves(
    qkv: torch.Tensor, n_heads: int, cos: torch.Tensor, sin: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """q and k together, a half at a time, in float32; each head is then contiguous, which SDPA's kernel on a CPU reads faster."""
    n, half = cos.shape
    packed = qkv.view(n, 3, n_heads, 2, half).permute(1, 2, 3, 0, 4)  # [3, H, 2, N, D / 2]
    a, b = (packed[:2, :, i].float() for i in (0, 1))  # [2, H, N, D / 2]
    if torch.compiler.is_compiling():  # which fuses this, and takes no strided `out`
        rotated = torch.stack([a * cos - b * sin, b * cos + a * sin], dim=3)
    else:
        rotated = torch.empty((2, n_heads, n, 2, half), dtype=torch.float32, device=qkv.device)
        torch.mul(a, cos, out=rotated[..., 0, :]).addcmul_(b, sin, value=-1)
        torch.mul(b, cos, out=rotated[..., 1, :]).addcmul_(a, sin)
    q, k = rotated.flatten(3).to(qkv.dtype).unbind(0)
    return q, k, qkv.view(n, 3, n_heads, 2 * half)[:, 2].transpose(0, 1).contiguous()


def _fused_rotate() -> TowerRotate:
    from fastvl_lab.kernels.rotate_packed import rotate_packed

    def rotate(
        qkv: torch.Tensor, n_heads: int, cos: torch.Tensor, sin: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        q, k, v = rotate_packed(qkv.view(qkv.shape[0], 3, n_heads, -1), cos, sin).permute(1, 2, 0, 3)  # [3, H, N, D]
        return q, k, v

    return rotate


def _fused_interpolate() -> Interpolate:
    from fastvl_lab.kernels import interpolate as kernel

    return kernel.interpolate
