"""One new token through the decoder."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from fastvl_lab.language.decoder import Attend, DecoderWeights, Inner, KvCache, decode_layers, last_token_logits


def decode(
    token: torch.Tensor, position: torch.Tensor, weights: DecoderWeights, attend: Attend, cache: KvCache, inner: Inner
) -> torch.Tensor:
    """token int64 [1] at position int64 [1], both on the device, to the logits of the next one, float32 [vocab]."""
    hidden = F.embedding(token, weights.embed)  # [1, hidden]
    hidden = decode_layers(hidden, position.expand(3, 1), weights, attend, cache, inner)
    return last_token_logits(hidden, weights)
