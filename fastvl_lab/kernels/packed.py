"""Linear layers on a CPU by oneDNN, where it is the faster: over weights in its own blocked layout, and over those of one row.

Torch gives products of float32 to MKL, whose product of a matrix with a vector runs on one thread, and with few rows reads the
matrix once a row. oneDNN takes some 40 µs to be set up for a product, and as long again to wake threads between the small
operations of a decode step, so small weights stay torch's.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

# For how many rows oneDNN is to lay a weight out: it chooses the same for all that prefill and the tower have, from about 64 on.
_ROWS = 1024
# Weights so small that setting oneDNN up takes longer than it saves: with one row, and with few.
_SMALL_FOR_ONE, _SMALL_FOR_FEW, _FEW_ROWS = 2**20, 2**17, 256

_mkldnn: Any = torch.ops.mkldnn  # torch's operators; its inductor calls the same


def takes(dtype: torch.dtype) -> bool:
    """Whether torch is built with oneDNN, and packs weights of the dtype for this CPU."""
    if not torch.backends.mkldnn.is_available():
        return False
    asked = {torch.bfloat16: "_is_mkldnn_bf16_supported", torch.float16: "_is_mkldnn_fp16_supported"}
    return dtype == torch.float32 or (dtype in asked and bool(getattr(_mkldnn, asked[dtype])()))


def pack(weight: torch.Tensor) -> torch.Tensor:
    """A copy of a weight [out, in] that `packed_linear` reads, and nothing else can."""
    packed: torch.Tensor = _mkldnn._reorder_linear_weight(weight.detach(), _ROWS)
    return packed


def packed_bytes(packed: torch.Tensor) -> int:
    """What it takes, padding of its blocks included."""
    return int(_mkldnn._nbytes(packed))


def packed_linear(x: torch.Tensor, packed: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """x [n, in] times a weight that is there twice, or once where `packed` is the weight itself: [n, out].

    One row gains nothing by the layout, and reads the weight where it has no gaps: memory bounds it, which takes all threads
    to be read.
    """
    if len(x) < _FEW_ROWS and weight.numel() < (_SMALL_FOR_ONE if len(x) == 1 else _SMALL_FOR_FEW):
        return F.linear(x, weight, bias)
    read = weight if len(x) == 1 and weight.is_contiguous() else packed
    product: torch.Tensor = _mkldnn._linear_pointwise(x, read, bias, "none", [], "")
    return product
