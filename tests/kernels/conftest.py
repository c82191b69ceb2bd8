"""What tests of kernels share."""

from __future__ import annotations

import pytest

from fastvl_lab.kernels.decode_attention import decode_share_kernel
from fastvl_lab.kernels.prefill_attention import prefill_attention_kernel
from fastvl_lab.kernels.segment_attention import segment_attention_kernel
from fastvl_lab.kernels.tuned import attention_launches


@pytest.fixture(params=sorted({launch.kwargs["block_k"] for launch in attention_launches()}))
def block_k(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """How many keys one step of an attention kernel reads: each number that tuning may choose in turn, for all of them."""
    launch = next(launch for launch in attention_launches() if launch.kwargs["block_k"] == request.param)
    for kernel in (segment_attention_kernel, prefill_attention_kernel, decode_share_kernel):
        monkeypatch.setattr(kernel, "configs", [launch])
        monkeypatch.setattr(kernel, "chosen", {})
    chosen: int = request.param
    return chosen
