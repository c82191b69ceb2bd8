"""What every way of streaming has to work with: decode steps on the device, and the answer as the host learns it."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field

import torch

from fastvl_lab.decoder.steps import Step
from fastvl_lab.request import FinishReason
from fastvl_lab.streaming.text import AnswerText, Emitter
from fastvl_lab.trace import Tracer

# Tokens int64 [B] and their positions int64 [B] to what a step gives.
Decode = Callable[[torch.Tensor, torch.Tensor], Step]

# From the number of the answers' tokens to their positions: int64 [B] on the device.
Position = Callable[[int], torch.Tensor]

# The same for steps, and what waits for all that is launched, where the copy itself would not.
Positions = Callable[["Steps", Callable[[], None]], Position]


@dataclass(frozen=True, kw_only=True, eq=False)
class Steps:
    """Decode steps, a row an answer.

    first: the answers' first tokens, int64 [B] on the device. next_positions: of those tokens. most: how many tokens an answer may
    have. decode: tokens and their positions to what a step gives; sample: what a step gave to the next tokens, int64 [B]; both
    launch work and wait for nothing.
    """

    first: torch.Tensor
    next_positions: tuple[int, ...]
    most: int
    decode: Decode
    sample: Callable[[Step], torch.Tensor]
    tracer: Tracer


@dataclass(frozen=True, kw_only=True, eq=False)
class Answer:
    """One request's answer in the making.

    most, ends: how many tokens there may be, and the ids that end the answer before. text: whose stops end it before, None where
    there are none. tokens: the ids that the host has learnt.
    """

    most: int
    ends: Collection[int]
    emitter: Emitter
    tracer: Tracer
    text: AnswerText | None = None
    tokens: list[int] = field(default_factory=list)

    def take(self, token: int) -> bool:
        """Note the next token; whether it is the last."""
        self.tokens.append(token)
        if self.text is not None:
            self.text.push(token)
        return len(self.tokens) == self.most or self.finish_reason == "stop"

    @property
    def finish_reason(self) -> FinishReason:
        """Why the token noted last is the last, if it is."""
        stopped = self.tokens[-1] in self.ends or (self.text is not None and self.text.found)
        return "stop" if stopped else "length"

    def emit(self, tokens: Sequence[int], *, last: bool) -> None:
        """Send tokens that were taken on their way, all at once."""
        with self.tracer.span("emit"):
            self.emitter.emit(tokens, last=last)


@dataclass(frozen=True, kw_only=True, eq=False)
class Forced:
    """Tokens that an answer goes on with, whatever it would have chosen, and the logits that it had after each.

    tokens: int64 [n] on the device. logits: float32 [vocab] on the host, one a step; rounds may launch more steps than n.
    """

    tokens: torch.Tensor
    logits: list[torch.Tensor] = field(default_factory=list)

    def steps(self, decode: Decode) -> Decode:
        """The decode step `decode`, given these tokens."""

        def step(token: torch.Tensor, position: torch.Tensor) -> Step:
            number = len(self.logits)
            made = decode(self.tokens[number : number + 1] if number < len(self.tokens) else token, position)
            self.logits.append(made.logits[0].to("cpu", copy=True))  # which the next step may overwrite
            return made

        return step


def on_device(steps: Steps, _wait: Callable[[], None]) -> Position:
    """All positions at once, made on the device before the first step: a step launches nothing for its own."""
    device = steps.first.device
    ahead = torch.stack([torch.arange(first, first + steps.most, device=device) for first in steps.next_positions], dim=1)
    return lambda number: ahead[number]


def host_sync(steps: Steps, wait: Callable[[], None]) -> Position:
    """Each from a Python list when its step is launched: a copy from pageable memory, for which the host waits for the device."""

    def position(number: int) -> torch.Tensor:
        wait()
        return torch.tensor([first + number for first in steps.next_positions], device=steps.first.device)

    return position


def no_wait() -> None:
    """For a copy that waits by itself, or a device on which nothing is ever on its way."""
