"""Ways to do the small operations between the tower's matrix products: norms, rotation, activation, interpolation.

Each is plain PyTorch, or a Triton kernel that is imported where it is chosen. Shape letters: N patches, H heads, D head_dim.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F

from fastvl_lab.families.vision import AddNorm, Interpolate, Operations, Rotate
from fastvl_lab.kernels.plain import interpolate, rms_norm, rotate_half


def bind_operations(*, norms: str, rope: str, activation: str, interpolation: str) -> Operations:
    """The operations by the values of the slot's toggles."""
    rms_norm, layer_norm = {
        "eager": (_eager_rms_norm, _native_layer_norm),
        "native": (_native_rms_norm, _native_layer_norm),
        "fused": (_fused_rms_norm, _fused_layer_norm),
    }[norms]
    return Operations(
        rms_norm=rms_norm,
        layer_norm=layer_norm,
        rotate={"eager": lambda: _rotate, "halves": lambda: _rotate_halves, "fused": _fused_rotate}[rope](),
        silu_mul={"eager": lambda: _silu_mul, "fused": _fused_silu_mul}[activation](),
        interpolate={"eager": lambda: interpolate, "fused": _fused_interpolate}[interpolation](),
    )


def _after_add(norm: Callable[[torch.Tensor], torch.Tensor]) -> AddNorm:
    def add_norm(hidden: torch.Tensor, added: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        hidden = hidden if added is None else hidden.add_(added)
        return hidden, norm(hidden)

    return add_norm


def _eager_rms_norm(weight: torch.Tensor, eps: float) -> AddNorm:
    return _after_add(lambda x: rms_norm(x, weight, eps))


def _native_rms_norm(weight: torch.Tensor, eps: float) -> AddNorm:
    return _after_add(lambda x: F.rms_norm(x, weight.shape, weight, eps))


def _native_layer_norm(weight: torch.Tensor, bias: torch.Tensor, eps: float) -> AddNorm:
    return _after_add(lambda x: F.layer_norm(x, weight.shape, weight, bias, eps))


def _fused_rms_norm(weight: torch.Tensor, eps: float) -> AddNorm:
    from fastvl_lab.kernels.add_norm import add_rms_norm

    return lambda hidden, added: add_rms_norm(hidden, added, weight, eps)


def _fused_layer_norm(weight: torch.Tensor, bias: torch.Tensor, eps: float) -> AddNorm:
    from fastvl_lab.kernels.add_norm import add_layer_norm

    return lambda hidden, added: add_layer_norm(hidden, added, weight, bias, eps)


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


def _fused_rotate() -> Rotate:
    from fastvl_lab.kernels.rotate_packed import rotate_packed

    def rotate(
        qkv: torch.Tensor, n_heads: int, cos: torch.Tensor, sin: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        q, k, v = rotate_packed(qkv.view(qkv.shape[0], 3, n_heads, -1), cos, sin).permute(1, 2, 0, 3)  # [3, H, N, D]
        return q, k, v

    return rotate


def _silu_mul(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    return F.silu(gate, inplace=True).mul_(up)


def _fused_silu_mul() -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    from fastvl_lab.kernels.silu_mul import silu_mul

    return silu_mul


def _fused_interpolate() -> Interpolate:
    from fastvl_lab.kernels import interpolate as kernel

    return kernel.interpolate
