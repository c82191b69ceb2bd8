"""The next token from its logits."""

from __future__ import annotations

import torch


def greedy(logits: torch.Tensor) -> tuple[torch.Tensor, int]:
    """The likeliest token of float32 [vocab]: int64 [1] on the device, and its id on the host, for which the host waits."""
    token = logits.argmax(keepdim=True)
    return token, int(token)
