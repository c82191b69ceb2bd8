"""Text embeddings with the visual tokens put in their places."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from fastvl_lab.request import Prompt, VisionTokens


def merge(prompt: Prompt, vision: VisionTokens | None, embed: torch.Tensor) -> torch.Tensor:
    """Decoder input [n_tokens, hidden]; embed is the token table [vocab, hidden].

    The places are known on the host since tokenization, so nothing is searched for and nothing waits for the device.
    """
    hidden = F.embedding(prompt.input_ids, embed)
    if vision is not None:
        hidden.index_copy_(0, prompt.visual_index, vision.embeds.to(hidden.dtype))
    return hidden
