"""Whether an engine computes what Transformers computes, where greedy tokens cannot tell: logits of a request and of forced steps.

In half precision with random weights two right engines may choose different tokens, after which nothing can be compared. So each
is given the same tokens to go on with, and its logits are held against those of Transformers in a wider dtype.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterable

import torch

from fastvl_lab import peers
from fastvl_lab.checkpoint import Checkpoint
from fastvl_lab.lab import EngineName, Lab, current_device
from fastvl_lab.language.decode import Step
from fastvl_lab.measure.decoding import text_prompt
from fastvl_lab.measure.slot_report import wider, worst_error
from fastvl_lab.pipeline import Pipeline
from fastvl_lab.recipe import Recipe
from fastvl_lab.request import Request
from fastvl_lab.streaming.answer import Answer
from fastvl_lab.trace import Tracer


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Truth:
    """What a peer makes of a request in a wider dtype, and the peer's own error in the lab's.

    forced: int64 [steps], the tokens that all go on with. logits: [1 + steps, vocab] on the host, of the last token of the prompt
    and of each forced one. own_error: as `Truth.error` gives it.
    """

    request: Request
    forced: torch.Tensor
    logits: torch.Tensor
    own_error: float

    def error(self, logits: torch.Tensor) -> float:
        """The worst step's relative error of logits [1 + steps, vocab]; NaN where there is one."""
        return worst_error([(logits.cpu(), self.logits)])


def in_wider_dtype(checkpoint: Checkpoint) -> Checkpoint:
    """The checkpoint with a copy of its model in the dtype of the truth."""
    dtype = wider(checkpoint.dtype)
    return dataclasses.replace(checkpoint, model=copy.deepcopy(checkpoint.model).to(dtype), dtype=dtype)


def truths(lab: Lab, wide: Checkpoint, request: Request, oracles: Iterable[str], steps: int) -> dict[str, Truth]:
    """The truth of each oracle (a peer's text: Transformers on the pixels that some recipe makes) for a request and `steps` tokens.

    wide: as `in_wider_dtype` makes it of the lab's checkpoint.
    """
    forced = text_prompt(lab, steps, 1).input_ids
    longer = dataclasses.replace(request, max_new_tokens=1 + steps, ignore_eos=True)
    found = {}
    for oracle in oracles:
        logits, own = (_by_peer(oracle, checkpoint, longer, forced).cpu() for checkpoint in (wide, lab.checkpoint))
        found[oracle] = Truth(request=longer, forced=forced, logits=logits, own_error=worst_error([(own, logits)]))
    return found


def forced_logits(lab: Lab, engine: EngineName, truth: Truth) -> torch.Tensor:
    """An engine's logits [1 + steps, vocab] on the truth's request, going on with the forced tokens."""
    if not isinstance(engine, Recipe):
        return _by_peer(engine, lab.checkpoint, truth.request, truth.forced)
    bound = lab._bind(engine)  # the very programs and graphs that the lab's runs use
    assert isinstance(bound, Pipeline)
    complete, kept = bound.complete, []

    def with_forced_tokens(answer: Answer) -> None:
        given = iter(truth.forced.split(1))

        def decode(token: torch.Tensor, position: torch.Tensor) -> Step:
            step = answer.decode(next(given, token), position)  # rounds may launch more steps than there are tokens to make
            kept.append(step.logits[0].cpu().clone())  # which the next step may overwrite
            return step

        complete(dataclasses.replace(answer, decode=decode))

    bound.complete = with_forced_tokens
    try:
        run = lab.run(truth.request, engine, trace="off")
    finally:
        bound.complete = complete
    return torch.stack([run.logits, *kept[: len(truth.forced)]])


@torch.inference_mode()
def _by_peer(peer: str, checkpoint: Checkpoint, request: Request, forced: torch.Tensor) -> torch.Tensor:
    """The same by a peer's own `generate`, whose LM head is made to prefer the forced token, once its logits have been taken."""
    kept: list[torch.Tensor] = []

    def prefer(_module: object, _inputs: object, logits: torch.Tensor) -> torch.Tensor:
        kept.append(logits[0, -1].clone())
        if len(kept) <= len(forced):
            logits = torch.full_like(logits, -torch.inf)
            logits[..., forced[len(kept) - 1]] = 0.0
        return logits

    handle = checkpoint.model.lm_head.register_forward_hook(prefer)
    try:
        with current_device(checkpoint.device):
            peers.bind(peer, checkpoint).run(request, Tracer(checkpoint.device, "off"), lambda text, tokens: None)
    finally:
        handle.remove()
    return torch.stack(kept)
