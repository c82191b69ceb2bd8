"""A recipe bound to a checkpoint: it serves one request alone, through the corridor of `schedule.in_flight`, or many in a loop."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

from fastvl_lab import preprocessor, streaming, vit
from fastvl_lab.cache import BoundCache
from fastvl_lab.cache.memory import Memory
from fastvl_lab.capture import Stages
from fastvl_lab.capture.execute import Capture
from fastvl_lab.capture.graphs import GraphStore
from fastvl_lab.checkpoint import Checkpoint
from fastvl_lab.decoder import bind_decoder
from fastvl_lab.decoder.weights import decoder_weights
from fastvl_lab.grammars import Grammars
from fastvl_lab.outcome import Outcome as Outcome
from fastvl_lab.recipe import Recipe
from fastvl_lab.request import Request
from fastvl_lab.sampling import Sampling
from fastvl_lab.schedule import overlap
from fastvl_lab.schedule.in_flight import InFlight
from fastvl_lab.schedule.inbox import Inbox, Job
from fastvl_lab.schedule.loop import Loop, OnStep, one_at_a_time, unpackers
from fastvl_lab.schedule.policy import Policy
from fastvl_lab.streaming.answer import Forced
from fastvl_lab.streaming.text import Deliver, TokenBytes
from fastvl_lab.trace import Tracer


class Pipeline:
    """A recipe bound to a checkpoint: its functions are chosen here, once, and run over the checkpoint's own weights.

    grammars: those that are shared with other recipes; by default its own.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        recipe: Recipe,
        memory: Memory,
        graphs: GraphStore | None = None,
        grammars: Grammars | None = None,
    ) -> None:
        recipe.check(checkpoint.target)
        self.checkpoint, self.recipe = checkpoint, recipe
        self.images = images = preprocessor.bind(recipe.preprocessor, checkpoint)
        compiled = recipe.capture.vit == "compile"
        encode = vit.bind(recipe.vit, checkpoint, images.patch_format, compiled=compiled)
        self.decoder = bind_decoder(recipe.attention, decoder_weights(checkpoint))
        images_by = f"{checkpoint.name} {recipe.preprocessor} {recipe.vit} {recipe.capture.vit} {recipe.capture.shapes}"
        self.cache = BoundCache(
            recipe.cache, memory, images_by=images_by, family=f"{images_by} {recipe.attention} {recipe.capture} {recipe.schedule}"
        )
        self.stages = Stages(
            recipe.capture,
            encode,
            self.decoder,
            self.cache.store,
            merge_size=checkpoint.merge_size,
            graphs=graphs,
        )
        self.complete = streaming.bind(recipe.streaming, checkpoint.device)
        self.token_bytes = TokenBytes.of(checkpoint.tokenizer)
        self.grammars = grammars or Grammars(checkpoint)
        slot = recipe.schedule
        self._policy = {"one_at_a_time": None, "continuous": Policy.of(slot)}[slot.batching]
        self._unpacking = unpackers(checkpoint.device) if {"inline": False, "ahead": True, "batched": True}[slot.vision] else None
        self._beside = overlap.worker(checkpoint.device) if {"off": False, "on": True}[slot.overlap] else None

    @torch.inference_mode()
    def warm_up(self, tracer: Tracer) -> tuple[Capture, ...]:
        """What decode steps need at any length is made, and told of; no request may be under way."""
        self.stages.warm_up(self.checkpoint.session_len, tracer, measures=self.recipe.attention.decode == "triton")
        return self.stages.take_fresh()

    def run(self, request: Request, tracer: Tracer, deliver: Deliver) -> Outcome:
        """Serve one request; raises `RequestError` for one that cannot be served, before any pixel of it is read."""
        return self._run(request, tracer, deliver, None)

    def serve(self, inbox: Inbox, on_step: OnStep, *, lingers: bool) -> None:
        """Serve what comes until the inbox is closed, or empty where nothing `lingers`."""
        if self._policy is None:
            device = self.checkpoint.device
            one_at_a_time(lambda job: self.run(job.request, job.tracer, job.deliver), device, inbox, on_step, lingers=lingers)
        else:
            self._serve_together(inbox, None, on_step, lingers=lingers)

    def logits_along(self, request: Request, tokens: torch.Tensor) -> torch.Tensor:
        """Logits of the prompt's last token, and after each of `tokens` (int64 [n]); float32 [1 + n, vocab], on the host."""
        forced = Forced(tokens=tokens.to(self.checkpoint.device))
        choice = "none" if request.tool_choice == "none" else "auto"  # the tools that are shown are in the prompt
        free: dict[str, Any] = {"ignore_eos": True, "sampling": Sampling(), "tool_choice": choice}
        longer = dataclasses.replace(request, max_new_tokens=1 + len(tokens), **free)
        outcome = self._run(longer, Tracer(self.checkpoint.device, "off"), lambda *_: None, forced)
        return torch.stack([outcome.logits.cpu(), *forced.logits[: len(tokens)]])

    def _run(self, request: Request, tracer: Tracer, deliver: Deliver, forced: Forced | None) -> Outcome:
        ended: list[Outcome | Exception] = []
        job = Job(number=0, request=request, tracer=tracer, deliver=deliver, end=ended.append, since_ns=tracer.started_ns)
        if self._policy is None:
            return self._serve_alone(job, forced)
        inbox = Inbox()
        inbox.put(job)
        self._serve_together(inbox, forced, None, lingers=False)
        if isinstance(ended[0], Exception):
            raise ended[0]
        return ended[0]

    @torch.inference_mode()
    def _serve_together(self, inbox: Inbox, forced: Forced | None, on_step: OnStep | None, *, lingers: bool) -> None:
        assert self._policy is not None
        self.stages.take_fresh()  # what a request that failed has made is no part of these
        Loop(self, self._policy, self._unpacking, forced, on_step).serve(inbox, lingers=lingers)

    @torch.inference_mode()
    def _serve_alone(self, job: Job, forced: Forced | None) -> Outcome:
        self.stages.take_fresh()  # what a request that failed has made is no part of this one
        request = InFlight(job, self)
        try:
            request.open()
            if self._beside is not None:
                overlap.first_token(request, self._beside)
            else:
                request.admit()
                if self.stages.first_token_alone:
                    request.first_token()
                else:
                    request.encode()
                    request.prefill(request.n_left)
            self.complete(request.steps(forced), request.answer)
            return request.outcome()
        finally:
            request.close()
