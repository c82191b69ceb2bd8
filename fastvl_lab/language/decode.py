"""One new token of each sequence through the decoder."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F

from fastvl_lab.kernels.backends import on_kernel
from fastvl_lab.language.decoder import Decoder, KvCache, logits_of, run_layers
from fastvl_lab.trace import Inner


class Step(NamedTuple):
    """What a decode step gives.

    logits: of the next token, float32 [1, vocab]; they may be overwritten by the next step, so that who keeps them copies them.
    token: int64 [1], where the step itself has chosen it, or None.
    """

    logits: torch.Tensor
    token: torch.Tensor | None = None


def decode(tokens: torch.Tensor, positions: torch.Tensor, decoder: Decoder, cache: KvCache, inner: Inner) -> torch.Tensor:
    """tokens int64 [B] at positions int64 [B], both on the device, to the logits of the next ones, float32 [B, vocab].

    The cache has been told of the new tokens (`extend`). Generated tokens are text: one position stands for all three axes.
    """
    hidden = F.embedding(tokens, decoder.weights.embed)  # [B, hidden]
    with on_kernel(decoder.decode_kernel):
        hidden = run_layers(hidden, positions[None], decoder, decoder.attend_decode, cache, inner)
    return logits_of(hidden, decoder)
