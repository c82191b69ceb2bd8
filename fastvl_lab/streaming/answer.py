"""One request's answer from its first token on: what every way of streaming it has to work with."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass, field

import torch

from fastvl_lab.decoder.steps import Step
from fastvl_lab.streaming.text import Emitter
from fastvl_lab.trace import Tracer

# A token int64 [1] and its position int64 [1] to what a step gives.
Decode = Callable[[torch.Tensor, torch.Tensor], Step]

# From the number of one of the answer's tokens to its position: int64 [1] on the device.
Position = Callable[[int], torch.Tensor]

# The same for an answer, and what waits for all that is launched, where the copy itself would not.
Positions = Callable[["Answer", Callable[[], None]], Position]


@dataclass(frozen=True, kw_only=True, eq=False)
class Answer:
    """An answer in the making.

    first: its first token, int64 [1] on the device. next_position: of that token. decode: a token and its position to what a step
    gives; sample: what a step gave to the next token, int64 [1]; both launch work and wait for nothing. max_new_tokens, ends: how
    many tokens there may be, and the ids that end the answer before. tokens: the ids that the host has learnt so far.
    """

    first: torch.Tensor
    next_position: int
    decode: Decode
    sample: Callable[[Step], torch.Tensor]
    max_new_tokens: int
    ends: Collection[int]
    emitter: Emitter
    tracer: Tracer
    tokens: list[int] = field(default_factory=list)

    def take(self, token: int) -> bool:
        """Note the next token; whether it is the last."""
        self.tokens.append(token)
        return len(self.tokens) == self.max_new_tokens or token in self.ends


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


def on_device(answer: Answer, _wait: Callable[[], None]) -> Position:
    """All positions at once, made on the device before the first step: a step launches nothing for its own."""
    first = answer.next_position
    ahead = torch.arange(first, first + answer.max_new_tokens, device=answer.first.device)
    return lambda number: ahead[number : number + 1]


def host_sync(answer: Answer, wait: Callable[[], None]) -> Position:
    """Each from a Python list when its step is launched: a copy from pageable memory, for which the host waits for the device."""

    def position(number: int) -> torch.Tensor:
        wait()
        return torch.tensor([answer.next_position + number], device=answer.first.device)

    return position


def no_wait() -> None:
    """For a copy that waits by itself, or a device on which nothing is ever on its way."""
