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
    """silu(gate) * up; contiguous and of one shape, float32 inside."""
    assert gate.shape == up.shape
    assert gate.is_contiguous()
    assert up.is_contiguous()
    out = torch.empty_like(gate)
    n = gate.numel()
    if n > 0:
        _silu_mul_kernel[(triton.cdiv(n, _BLOCK),)](gate, up, out, n, block=_BLOCK)
    return out


@triton.jit
def _silu_mul_kernel(gate, up, out, n, block: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * block + tl.arange(0, block)
    inside = at < n
    g = tl.load(gate + at, mask=inside, other=0).to(tl.float32)
    u = tl.load(up + at, mask=inside, other=0).to(tl.float32)
    tl.store(out + at, (g / (1 + tl.exp(-g)) * u).to(out.dtype.element_ty), mask=inside)
