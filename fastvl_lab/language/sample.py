"""The next token from its logits."""

from __future__ import annotations

import torch

from fastvl_lab.language.decoder import Decoder


def greedy(logits: torch.Tensor, decoder: Decoder) -> torch.Tensor:
    """The likeliest token of float32 [vocab]: int64 [1] on the device, where it stays until somebody reads it."""
    return decoder.operations.argmax(logits)
