"""A step at a time: the host reads a token, sends it on, and only then launches the next step."""

from __future__ import annotations

from fastvl_lab.streaming.answer import Answer, Positions, Steps, no_wait


def one_by_one(steps: Steps, answer: Answer, *, positions: Positions) -> None:
    """Make the answer; it is complete on return."""
    span, position, token = steps.tracer.span, positions(steps, no_wait), steps.first
    while True:
        with span("sample"):
            token_id = int(token)  # the host waits for the device
        last = answer.take(token_id)
        answer.emit((token_id,), last=last)
        if last:
            return
        with span("decode"):
            step = steps.decode(token, position(len(answer.tokens) - 1))
        with span("sample"):
            token = steps.sample(step)
