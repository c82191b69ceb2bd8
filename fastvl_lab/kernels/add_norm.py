"""Residual add and norm in one pass: the sum is written where the residual was, and its norm beside it."""

from __future__ import annotations

import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from fastvl_lab.kernels.plain import rms_norm


def add_rms_norm_reference(
    hidden: torch.Tensor, added: torch.Tensor | None, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """What `add_rms_norm` computes, in plain PyTorch; hidden is left as it was."""
    hidden = hidden if added is None else hidden + added
    return hidden, rms_norm(hidden, weight, eps)


def add_layer_norm_reference(
    hidden: torch.Tensor, added: torch.Tensor | None, weight: torch.Tensor, bias: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """What `add_layer_norm` computes, in plain PyTorch; hidden is left as it was."""
    hidden = hidden if added is None else hidden + added
    return hidden, F.layer_norm(hidden, weight.shape, weight, bias, eps)


def add_rms_norm(
    hidden: torch.Tensor, added: torch.Tensor | None, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """hidden + added, written over hidden, and its RMSNorm; [n, width] each, rows contiguous, float32 inside."""
    return _add_norm(hidden, added, weight, None, eps)


def add_layer_norm(
    hidden: torch.Tensor, added: torch.Tensor | None, weight: torch.Tensor, bias: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """hidden + added, written over hidden, and its LayerNorm; [n, width] each, rows contiguous, float32 inside."""
    return _add_norm(hidden, added, weight, bias, eps)


def _add_norm(
    hidden: torch.Tensor, added: torch.Tensor | None, weight: torch.Tensor, bias: torch.Tensor | None, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    n, width = hidden.shape
    assert hidden.stride(1) == 1
    assert added is None or (added.shape == hidden.shape and added.stride(1) == 1)
    normed = torch.empty((n, width), dtype=hidden.dtype, device=hidden.device)
    if n > 0:
        _add_norm_kernel[(n,)](
            hidden,
            hidden if added is None else added,
            weight,
            weight if bias is None else bias,
            normed,
            hidden.stride(0),
            0 if added is None else added.stride(0),
            eps,
            width,
            has_added=added is not None,
            is_layer_norm=bias is not None,
            block=triton.next_power_of_2(width),
        )
    return hidden, normed


@triton.jit
def _add_norm_kernel(
    hidden,
    added,
    weight,
    bias,
    normed,
    hidden_stride,
    added_stride,
    eps,
    width,
    has_added: tl.constexpr,
    is_layer_norm: tl.constexpr,
    block: tl.constexpr,
):
    """One program a row."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, block)
    inside = column < width
    x = tl.load(hidden + row * hidden_stride + column, mask=inside, other=0).to(tl.float32)
    if has_added:
        x += tl.load(added + row * added_stride + column, mask=inside, other=0).to(tl.float32)
        rounded = x.to(hidden.dtype.element_ty)  # the residual stream is kept in the model's dtype, and normalised as kept
        tl.store(hidden + row * hidden_stride + column, rounded, mask=inside)
        x = rounded.to(tl.float32)
    scale = tl.load(weight + column, mask=inside, other=0).to(tl.float32)
    if is_layer_norm:
        x = tl.where(inside, x - tl.sum(x) / width, 0.0)
    y = x / tl.sqrt(tl.sum(x * x) / width + eps) * scale
    if is_layer_norm:
        y += tl.load(bias + column, mask=inside, other=0).to(tl.float32)
    tl.store(normed + row * width + column, y.to(normed.dtype.element_ty), mask=inside)
