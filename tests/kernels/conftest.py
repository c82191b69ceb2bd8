"""What tests of kernels share."""

from __future__ import annotations

import pytest
import torch

from fastvl_lab.kernels import tuned
from fastvl_lab.kernels.decode_attention import decode_share_kernel
from fastvl_lab.kernels.prefill_attention import prefill_attention_kernel
from fastvl_lab.kernels.segment_attention import segment_attention_kernel

LAUNCHES = (*tuned.launches_of(torch.float32), *tuned.launches_of(torch.bfloat16))


@pytest.fixture(params=sorted({launch.block_k for launch in LAUNCHES}))
def block_k(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """How many keys one step of an attention kernel reads: each number that tuning may choose in turn, for all of them."""
    launch = next(launch for launch in LAUNCHES if launch.block_k == request.param)
    monkeypatch.setattr(tuned, "launches_of", lambda dtype: (launch,))
    for kernel in (segment_attention_kernel, prefill_attention_kernel, decode_share_kernel):
        monkeypatch.setattr(kernel, "_chosen", {})
    return launch.block_k
