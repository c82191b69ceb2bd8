"""The gate of a SwiGLU MLP in one pass."""

from __future__ import annotations

import torch
import torch.nn.functional as F
import triton
import triton.language as tl

_BLOCK = 1024


def silu_mul_reference(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """What `silu_mul` computes, in plain PyTorch."""
    return F.silu(gate) * up


def silu_mul(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """silu(gate) * up; [n, width] each, rows contiguous, so that they may be halves of one tensor; float32 inside."""
    assert gate.shape == up.shape
    assert gate.stride(1) == up.stride(1) == 1
    n, width = gate.shape
    out = torch.empty((n, width), dtype=gate.dtype, device=gate.device)
    if n > 0:
        grid = (n, triton.cdiv(width, _BLOCK))
        _silu_mul_kernel[grid](gate, up, out, gate.stride(0), up.stride(0), width, block=_BLOCK)
    return out


@triton.jit
def _silu_mul_kernel(gate, up, out, gate_stride, up_stride, width, block: tl.constexpr):
    """One program a row and block of columns."""
    row, column = tl.program_id(0).to(tl.int64), tl.program_id(1) * block + tl.arange(0, block)
    inside = column < width
    g = tl.load(gate + row * gate_stride + column, mask=inside, other=0).to(tl.float32)
    u = tl.load(up + row * up_stride + column, mask=inside, other=0).to(tl.float32)
    tl.store(out + row * width + column, (g / (1 + tl.exp(-g)) * u).to(out.dtype.element_ty), mask=inside)
