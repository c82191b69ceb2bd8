"""What an engine reports of a request that it has served."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from fastvl_lab.account import Account
from fastvl_lab.capture.execute import Capture
from fastvl_lab.request import FinishReason, ImageShape, Kind


@dataclass(frozen=True, kw_only=True, eq=False)
class Outcome:
    """What an engine reports when a request is done; `logits` are those of the last prompt token, float32 [vocab].

    finish_reason: why the answer ended; None of an endpoint. reused: whether anything of an earlier request was used. captures:
    what was compiled or captured on the way. Of an endpoint alone, model: what it calls the model that it serves; kind: what its
    words make of the run, where they decide it; chunk_tokens: the tokens of each chunk, which may be known only at the end;
    account: asked once the request has ended, its engine's own.
    """

    tokens: tuple[int, ...]
    n_prompt: int
    shapes: tuple[ImageShape, ...]
    logits: torch.Tensor
    finish_reason: FinishReason | None = None
    reused: bool = False
    captures: tuple[Capture, ...] = ()
    model: str | None = None
    kind: Kind | None = None
    chunk_tokens: tuple[tuple[int, ...], ...] | None = None
    account: Callable[[], Account | None] | None = None
