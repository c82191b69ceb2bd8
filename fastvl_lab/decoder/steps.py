"""What the decoder does for a request: `merge` and `prefill` for the prompt, then `decode` and `sample` for each token."""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F

from fastvl_lab.decoder.layers import Decoder, KvCache, logits_of, run_layers
from fastvl_lab.kernels.backends import on_kernel
from fastvl_lab.request import VisionTokens
from fastvl_lab.trace import Inner


class Placed(Protocol):
    """Of a `Prompt`, what says where its rows stand."""

    @property
    def positions(self) -> torch.Tensor: ...

    @property
    def visual_index(self) -> torch.Tensor | None: ...


class Ids(Placed, Protocol):
    @property
    def input_ids(self) -> torch.Tensor: ...


class Step(NamedTuple):
    """What a decode step gives.

    logits: of the next tokens, float32 [B, vocab]; the next step may overwrite them, so who keeps them copies them.
    token: int64 [B], where the step itself has chosen it, or None.
    """

    logits: torch.Tensor
    token: torch.Tensor | None = None


def merge(prompt: Ids, vision: VisionTokens | None, embed: torch.Tensor) -> torch.Tensor:
    """Text embeddings with the visual tokens in their places, [n_tokens, hidden]; embed is the token table [vocab, hidden].

    Tokenization has told the host the places, so nothing is searched for and nothing waits for the device.
    """
    hidden = F.embedding(prompt.input_ids, embed)
    if vision is not None:
        assert prompt.visual_index is not None
        hidden.index_copy_(0, prompt.visual_index, vision.embeds.to(hidden.dtype))
    return hidden


def prefill(
    hidden: torch.Tensor, prompt: Placed, vision: VisionTokens | None, decoder: Decoder, cache: KvCache, inner: Inner
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


def decode(tokens: torch.Tensor, positions: torch.Tensor, decoder: Decoder, cache: KvCache, inner: Inner) -> torch.Tensor:
    """tokens int64 [B] at positions int64 [B], both on the device, to the logits of the next ones, float32 [B, vocab].

    The cache has been told of the new tokens (`extend`). Generated tokens are text: one position stands for all three axes.
    """
    hidden = F.embedding(tokens, decoder.weights.embed)  # [B, hidden]
    with on_kernel(decoder.decode_kernel):
        hidden = run_layers(hidden, positions[None], decoder, decoder.attend_decode, cache, inner)
    return logits_of(hidden, decoder)


def sample(logits: torch.Tensor, decoder: Decoder) -> torch.Tensor:
    """The likeliest tokens of float32 [B, vocab]: int64 [B] on the device, where they stay until somebody reads them."""
    argmax = decoder.operations.argmax
    return argmax(logits[0]) if len(logits) == 1 else torch.cat([argmax(row) for row in logits])


def likeliest(step: Step, decoder: Decoder) -> torch.Tensor:
    """The likeliest tokens of a step, int64 [B] on the device, whether it has chosen them or not."""
    return sample(step.logits, decoder) if step.token is None else step.token
