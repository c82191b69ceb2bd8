"""What several slots share, in plain PyTorch; it knows tensors and sizes, never models."""

from __future__ import annotations

import torch
import torch.nn.functional as F


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """Root-mean-square norm over the last dimension, computed in float32 and returned in x's dtype (arXiv 1910.07467)."""
    wide = x.float()
    wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return weight * wide.to(x.dtype)


def rms_norm_by_length(x: torch.Tensor, weight: torch.Tensor, eps: torch.Tensor) -> torch.Tensor:
    """`rms_norm` from each row's Euclidean length, which is one reduction; eps: float32 [1] on x's device."""
    length = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
    scale = torch.addcmul(eps, length, length, value=1 / x.shape[-1]).rsqrt_()
    return x.mul(scale).to(x.dtype).mul_(weight)


def rotate_half(x: torch.Tensor) -> torch.Tensor:
    """[a, b] -> [-b, a] over the halves of the last dimension, the rotation of RoPE in split-half layout."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat([-b, a], dim=-1)


def interpolate(table: torch.Tensor, indices: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """The sum over k of weights[:, k] * table[indices[:, k]]: [n, width] in the table's dtype, from indices and weights [n, k]."""
    rows = F.embedding(indices, table)  # [n, k, width]
    return (rows * weights[:, :, None]).sum(1).to(table.dtype)


def power_of_two(n: int) -> int:
    """The least that is not below n."""
    return 1 << (n - 1).bit_length()
