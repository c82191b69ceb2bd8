"""The prompt through the decoder, filling the KV cache."""

from __future__ import annotations

import torch

from fastvl_lab.kernels.backends import on_kernel
from fastvl_lab.language.decoder import Decoder, KvCache, logits_of, run_layers
from fastvl_lab.request import Prompt, VisionTokens
from fastvl_lab.trace import Inner


def prefill(
    hidden: torch.Tensor, prompt: Prompt, vision: VisionTokens | None, decoder: Decoder, cache: KvCache, inner: Inner
) -> torch.Tensor:
    """hidden [n_tokens, hidden], as `merge` made it, to the logits of each sequence's last token, float32 [B, vocab].

    The cache has been told of the new tokens (`extend`); what it holds of each sequence already is attended to.
    """
    with on_kernel(decoder.prefill_kernel):
        hidden = run_layers(
            hidden,
            prompt.positions,
            decoder,
            decoder.attend_prefill,
            cache,
            inner,
            deepstack=() if vision is None else vision.deepstack,
            visual_index=prompt.visual_index,
        )
    return logits_of(hidden, decoder)
