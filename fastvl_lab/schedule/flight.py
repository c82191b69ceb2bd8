"""One request under way among others: its stages in the corridor's order, each taken when the schedule says so."""

from __future__ import annotations

from dataclasses import replace
from typing import Protocol

import torch

from fastvl_lab.cache import BoundCache, Place
from fastvl_lab.capture import Stages
from fastvl_lab.capture.execute import Capture
from fastvl_lab.checkpoint import Checkpoint
from fastvl_lab.decoder.layers import Decoder
from fastvl_lab.decoder.steps import merge, sample
from fastvl_lab.outcome import Outcome
from fastvl_lab.preprocessor import BoundPreprocessor, OpenedImages
from fastvl_lab.preprocessor.upload import upload_prompt
from fastvl_lab.request import Pixels, Prompt, VisionTokens
from fastvl_lab.schedule.inbox import Job
from fastvl_lab.streaming.answer import Answer, Forced
from fastvl_lab.streaming.text import Emitter, TokenBytes
from fastvl_lab.tokenizer import tokenize, tokens_to_make


class Bound(Protocol):
    """A recipe's parts over a checkpoint, as its pipeline holds them."""

    checkpoint: Checkpoint
    images: BoundPreprocessor
    cache: BoundCache
    stages: Stages
    decoder: Decoder
    token_bytes: TokenBytes


class Flight:
    """A job from its bytes to its answer. Each method is a stage or some; they are called in the order in which they stand.

    forced: tokens that the answer is made to go on with.
    """

    def __init__(self, job: Job, bound: Bound, forced: Forced | None = None) -> None:
        self.job, self.tracer, self.forced = job, job.tracer, forced
        self._bound = bound
        self._place: Place | None = None
        self._captures: list[Capture] = []
        self._pixels: Pixels | None = None  # of all images, where they were made before it was admitted
        self._n_done = 0  # tokens of the rest of the prompt that were computed
        self.seen = 0  # what had been done for all requests when it had its last turn

    @property
    def n_prompt(self) -> int:
        return self._prompt.n_tokens

    @property
    def since(self) -> float:
        return self.job.since_ns / 1e9

    @property
    def n_left(self) -> int:
        """Tokens of the prompt that are still to be computed."""
        return self._rest.n_tokens - self._n_done

    @property
    def place(self) -> Place:
        assert self._place is not None, "it has not been admitted"
        return self._place

    @property
    def n_patches(self) -> int:
        """Of the images that its admission sent through the vision tower."""
        return 0 if self._opened is None else sum(self._opened.grids[n].n_patches for n in self.place.to_make)

    def open(self) -> None:
        """Headers and prompt; raises what the request cannot be served for."""
        request, span, checkpoint = self.job.request, self.tracer.span, self._bound.checkpoint
        self._opened: OpenedImages | None = None
        if request.image_inputs:
            with span("decode_image"):
                self._opened = self._bound.images.open(request)
        with span("tokenize"):
            self._prompt: Prompt = tokenize(request, self._opened.grids if self._opened else (), checkpoint)
            self.n_new = tokens_to_make(self._prompt.n_tokens, request, checkpoint)

    def unpack(self) -> None:
        """All of its images, before it is admitted."""
        if self._opened is not None:
            self._pixels = self._bound.images.make(self._opened, self.tracer.span)

    def has_room(self) -> bool:
        """Whether the caches could admit it now."""
        return self._bound.cache.has_room(self._prompt, self.n_new)

    def admit(self) -> None:
        """Its place in the caches, its images through the tower, and its prompt on the device."""
        bound, span, tracer = self._bound, self.tracer.span, self.tracer
        with span("admit"):
            self._place = place = bound.cache.admit(self._prompt, self.n_new, self._opened.contents if self._opened else tuple)
        rest, pixels, made = self._prompt.after(place.reused), None, None
        self._visual_rows = rest.visual_index.tolist()
        if self._opened is not None and place.to_make:
            all_of_them = len(place.to_make) == len(self._opened.images)
            pixels = self._pixels if all_of_them else None
            pixels = pixels or bound.images.make(self._opened.only(place.to_make), span)
        self._pixels = None
        with span("upload"):
            self._rest = rest = upload_prompt(rest, bound.images.copy)
        if pixels is not None:
            with span("vit"):
                made = bound.stages.encode(pixels, tracer)
        with span("merge"):
            self._vision = place.visual_tokens(made)
            self._hidden = merge(rest, self._vision, bound.decoder.weights.embed)
        self.note_captures()

    def prefill(self, n: int) -> None:
        """The next n tokens of the prompt; with the last of them comes the first of the answer."""
        bound, first, last = self._bound, self._n_done, self._n_done + n
        with self.tracer.span("prefill"):
            piece, vision = self._piece(first, last)
            self.place.extend(n)
            logits = bound.stages.prefill(self._hidden[first:last], piece, vision, self.place.kv, self.tracer)
        self._n_done = last
        self.note_captures()
        if self.n_left == 0:
            with self.tracer.span("sample"):
                self._logits, self.token = logits, sample(logits, bound.decoder)
            self._begin_answer()

    def _piece(self, first: int, last: int) -> tuple[Prompt, VisionTokens | None]:
        """Some of the prompt's rows, and the visual tokens that stand in them."""
        if (first, last) == (0, self._rest.n_tokens):
            return self._rest, self._vision
        rows = [number for number, row in enumerate(self._visual_rows) if first <= row < last]
        among = slice(rows[0], rows[-1] + 1) if rows else slice(0)
        piece = replace(
            self._rest,
            input_ids=self._rest.input_ids[first:last],
            positions=self._rest.positions[:, first:last],
            visual_index=self._rest.visual_index[among] - first,
        )
        if self._vision is None or not rows:
            return piece, None
        return piece, VisionTokens(
            embeds=self._vision.embeds[among], deepstack=tuple(level[among] for level in self._vision.deepstack)
        )

    def _begin_answer(self) -> None:
        request, checkpoint, first = self.job.request, self._bound.checkpoint, self._prompt.next_position
        emitter = Emitter(self._bound.token_bytes, self.job.deliver)
        ends = () if request.ignore_eos else checkpoint.eos_token_ids
        self._answer = Answer(most=self.n_new, ends=ends, emitter=emitter, tracer=self.tracer)
        self._positions = torch.arange(first, first + self.n_new, device=self.token.device)
        self._hidden, self._vision = torch.empty(0), None  # nobody needs them any more

    def take(self, token_id: int) -> bool:
        """Note the answer's next token and send it on its way; whether it was the last."""
        last = self._answer.take(token_id)
        self._answer.emit((token_id,), last=last)
        return last

    def next_input(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The token that its next decode step reads, and the position: int64 [1] each."""
        number = len(self._answer.tokens) - 1
        token = self.token
        if self.forced is not None and number < len(self.forced.tokens):
            token = self.forced.tokens[number : number + 1]
        return token, self._positions[number : number + 1]

    def stepped(self, logits: torch.Tensor, token: torch.Tensor) -> None:
        """What a decode step gave: float32 [vocab] and int64 [1]."""
        self.token = token
        if self.forced is not None:
            self.forced.logits.append(logits.to("cpu", copy=True))

    def note_captures(self) -> None:
        """What has been made since somebody asked last was made for this request."""
        self._captures += self._bound.stages.take_fresh()

    def outcome(self) -> Outcome:
        """The whole, once its last token was taken."""
        tokens = tuple(self._answer.tokens)
        self.place.keep(tokens[:-1])  # the last one has been through no layer
        for name, times in self.place.counts.items():
            self.tracer.count(name, times)
        return Outcome(
            tokens=tokens,
            n_prompt=self.n_prompt,
            shapes=self._opened.shapes if self._opened else (),
            logits=self._logits[0],
            reused=self.place.hit,
            captures=tuple(self._captures),
        )

    def close(self) -> None:
        """Give its place back, if it has one."""
        if self._place is not None:
            self._place.close()
