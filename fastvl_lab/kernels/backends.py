"""Which of torch's kernels its scaled_dot_product_attention runs on, named by who calls it."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

from torch.nn.attention import SDPBackend, sdpa_kernel


def on_kernel(kernel: SDPBackend | None) -> AbstractContextManager[None]:
    """Have scaled_dot_product_attention run on that kernel, or fail; None leaves the choice to torch, as on a CPU.

    Entered once a forward and not once a call, since entering takes microseconds.
    """
    return nullcontext() if kernel is None else sdpa_kernel(kernel)
