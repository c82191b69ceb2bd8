"""One new token of each sequence through the decoder."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from fastvl_lab.kernels.backends import on_kernel
from fastvl_lab.language.decoder import Decoder, KvCache, logits_of, run_layers
from fastvl_lab.trace import Inner


def decode(tokens: torch.Tensor, positions: torch.Tensor, decoder: Decoder, cache: KvCache, inner: Inner) -> torch.Tensor:
    """tokens int64 [B] at positions int64 [B], both on the device, to the logits of the next ones, float32 [B, vocab].

    The cache has been told of the new tokens (`extend`). Generated tokens are text: one position stands for all three axes.
    """
    hidden = F.embedding(tokens, decoder.weights.embed)  # [B, hidden]
    with on_kernel(decoder.decode_kernel):
        hidden = run_layers(hidden, positions[None], decoder, decoder.attend_decode, cache, inner)
    return logits_of(hidden, decoder)
