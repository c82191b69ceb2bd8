"""The whole prompt through the decoder, filling the KV cache."""

from __future__ import annotations

import torch

from fastvl_lab.language.decoder import Attend, DecoderWeights, Inner, KvCache, decode_layers, last_token_logits
from fastvl_lab.request import Prefilled, Prompt, VisionTokens


def prefill(
    hidden: torch.Tensor,
    prompt: Prompt,
    vision: VisionTokens | None,
    weights: DecoderWeights,
    attend: Attend,
    cache: KvCache,
    inner: Inner,
) -> Prefilled:
    """hidden [n_tokens, hidden], as `merge` made it, to the logits of the last prompt token."""
    deepstack = () if vision is None else vision.deepstack
    hidden = decode_layers(
        hidden,
        prompt.positions,
        weights,
        attend,
        cache,
        inner,
        deepstack=deepstack,
        visual_index=prompt.visual_index,
    )
    return Prefilled(logits=last_token_logits(hidden, weights), cache=cache)
