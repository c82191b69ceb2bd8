"""Linear layers on a CPU by oneDNN, over weights that were brought into its own blocked layout before."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

# For how many rows oneDNN is to lay a weight out: it chooses the same for all that prefill and the tower have, from about 64 on.
_ROWS = 1024

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
    """x [n, in] times a weight that is there twice: [n, out].

    One row is a product of a matrix with a vector, which oneDNN does no faster, and has to be set up for: it stays torch's.
    """
    if len(x) == 1:
        return F.linear(x, weight, bias)
    product: torch.Tensor = _mkldnn._linear_pointwise(x, packed, bias, "none", [], "")
    return product
