"""The next token from its logits."""

from __future__ import annotations

import torch

from fastvl_lab.language.decoder import Decoder


def greedy(logits: torch.Tensor, decoder: Decoder) -> tuple[torch.Tensor, int]:
    """The likeliest token of float32 [vocab]: int64 [1] on the device, and its id on the host, for which the host waits."""
    token = decoder.operations.argmax(logits)
    return token, int(token)
